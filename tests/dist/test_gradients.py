"""The engine's gradients on several processes: the plain mean over ranks, in places that never change."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from forked import Pool, pool
from torch import Tensor, nn

from engine import loop as engine
from engine.run import Run
from models import framework_options
from utils import distributed
from utils.config.schema import declare
from utils.schedules import Progress


class Net(nn.Module):
    """Layers of several types, memory formats and sizes, registered in another order than they run in.

    One is frozen; `spare` may be left out.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.spare = nn.Linear(4, 4).double()
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
        self.wide = nn.Linear(6, 4).double()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor, spare: bool = True) -> dict[str, Tensor]:
        self.seen += distributed.rank() + 1
        rows = self.wide(self.frozen(self.norm(self.conv(images).mean((2, 3)))).double())
        loss = (self.spare(rows) if spare else rows).square().sum()
        return {"loss": loss, "rows": rows.detach()}


def images(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 3, 8, 8, generator=generator)


def prepare() -> engine.TrainState:
    """Return a state whose model is wrapped as a run wraps it."""
    run = Run(declare(framework_options()).defaults(), Path("unused"), torch.device("cpu"))
    net = run.prepare(Net())
    trained = [p for p in net.parameters() if p.requires_grad]
    return engine.TrainState(net, torch.optim.SGD(trained, 0.1), run.wrap(net))


def backward(state: engine.TrainState, steps: list[int], spare: Sequence[int] = (0, 1, 2)) -> None:
    """Accumulate over micro-batches as the engine does; only the ranks of `spare` use that layer."""
    batches = [images(step, distributed.rank()) for step in steps]
    state.optimizer.zero_grad()
    used = distributed.rank() in spare
    engine.forward_and_backward(
        state, batches, lambda batch, _: state.model(batch, used), Progress(0, 2, 4)
    )


def plain_mean(steps: list[int], spare: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
    """Return the gradients of all ranks' images, worked out one after another on this process alone."""
    net, world = Net(), distributed.world_size()
    for rank in range(world):
        for step in steps:
            (net(images(step, rank), rank in spare)["loss"] / len(steps) / world).backward()
    return gradients(net)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Pool]:
    """Give three processes joined by gloo: a sum of three depends on its order, one of two does not."""
    with pool(3) as made:
        yield made


# ---- the mean ------------------------------------------------------------------------------------


def compare_with_plain_mean(steps: list[int]) -> bool:
    """Check three steps; tell whether each gradient has its parameter's strides."""
    state = prepare()
    for first in range(0, 30, 10):
        backward(state, [first + step for step in steps])
        expected = plain_mean([first + step for step in steps])
        found = gradients(state.module)
        assert len(found) == 8
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grads = [(p, p.grad) for p in state.module.parameters() if p.requires_grad]
    return all(grad is not None and grad.stride() == p.stride() for p, grad in grads)


@pytest.mark.parametrize("steps", [[0], [0, 1], [0, 1, 2]], ids=["one", "two", "three"])
def test_gradients_are_the_plain_mean_laid_out_as_the_parameters(
    ranks: Pool, three_ranks: Pool, steps: list[int]
) -> None:
    """Also over several micro-batches; multi-tensor optimisers want the strides equal."""
    assert ranks.run(compare_with_plain_mean, steps) == [True] * 2
    assert three_ranks.run(compare_with_plain_mean, steps) == [True] * 3


def one_rank_leaves_a_layer_out() -> bool:
    state = prepare()
    for step in (0, 1):
        backward(state, [step], spare=[0])
        expected = plain_mean([step], spare=[0])
        torch.testing.assert_close(gradients(state.module), expected, rtol=1e-5, atol=1e-6)
    return True


def test_a_layer_that_one_rank_leaves_out_counts_as_zero_there(ranks: Pool) -> None:
    """No process waits for it, and the mean is still the mean."""
    assert ranks.run(one_rank_leaves_a_layer_out) == [True] * 2


def left_out() -> str:
    state = prepare()
    with pytest.raises(RuntimeError) as error:
        backward(state, [0, 1], spare=[])
    return str(error.value)


def test_a_parameter_that_no_gradient_reaches_is_named_after_the_first_backward(
    ranks: Pool,
) -> None:
    for message in ranks.run(left_out):
        assert "no gradient reached 2 trained parameters, e.g. spare.weight" in message


# ---- what resume needs ---------------------------------------------------------------------------


def fresh_and_used(wrap: Callable[[nn.Module], nn.Module] | None = None) -> bool:
    """Tell whether a model that has trained on and one that has just begun give the same bits."""
    states = [prepare(), prepare()]
    if wrap:
        for state in states:
            state.model = wrap(state.module)
    for step in (0, 1, 2):
        backward(states[0], [step])
    backward(states[1], [2])
    used, fresh = (gradients(state.module) for state in states)
    return all(torch.equal(used[name], fresh[name]) for name in fresh)


def test_a_step_gives_the_same_bits_at_the_start_of_a_process_as_later(three_ranks: Pool) -> None:
    assert three_ranks.run(fresh_and_used) == [True] * 3
    # the control: as DDP does it by itself, the places change after the first step
    assert three_ranks.run(fresh_and_used, nn.parallel.DistributedDataParallel) == [False] * 3


def names_and_buffers() -> tuple[list[str], float]:
    state = prepare()
    for step in (0, 1):
        backward(state, [step])
    return list(state.state_dict()["framework"]), float(state.module.seen)


def test_names_have_no_prefix_and_buffers_stay_those_of_each_rank(ranks: Pool) -> None:
    (names, first), (_, second) = ranks.run(names_and_buffers)
    assert names == list(Net().state_dict())
    assert (first, second) == (2.0, 4.0)
