"""The on-line probe: its features, its start, and its gradient on one process and on two."""

from typing import Any

import pytest
import torch
import training
from forked import Pool
from torch import Tensor

from evaluation.online_probe import OnlineProbe
from utils import distributed
from utils.schedules import Progress

PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5)


def made() -> OnlineProbe:
    return OnlineProbe(6, 3, lr=0.1, seed=4, device=torch.device("cpu"))


def learned(micro: int) -> list[Tensor]:
    """Take two steps of 8 images, shared by the processes and cut into `micro` micro-batches."""
    probe, images = made(), torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % 3
    for step in (0, 8):
        share = 8 // distributed.world_size()
        first = step + distributed.rank() * share
        for rows in torch.arange(first, first + share).chunk(micro):
            probe.learn(images[rows], labels[rows])
        probe.update()
    return [probe.weight.detach(), probe.bias.detach()]


def test_two_processes_learn_what_one_learns(ranks: Pool) -> None:
    alone, first = learned(1), ranks.run(learned, 2)
    for mine, of_rank0, of_rank1 in zip(alone, *first, strict=True):
        torch.testing.assert_close(of_rank0, mine, rtol=1e-4, atol=1e-5)
        assert torch.equal(of_rank0, of_rank1)


def test_another_rate_holds_from_the_resume_on() -> None:
    before = made()
    before.learn(torch.ones(2, 6), torch.tensor([0, 1]))
    before.update()
    after = OnlineProbe(6, 3, lr=0.01, seed=4, device=torch.device("cpu"))
    after.load_state_dict(before.state_dict())
    assert [group["lr"] for group in after.optimizer.param_groups] == [0.01]
    assert after.optimizer.state


@pytest.mark.parametrize("method", training.SMALL)
@pytest.mark.parametrize("options", [{}, {"stacked": True}])
def test_it_sees_the_first_view_through_the_online_backbone(
    method: str, options: dict[str, Any]
) -> None:
    framework = training.build(method, {}, batch_norm=False)
    if options and not framework.can_stack_views:
        pytest.skip("the method takes its views one by one")
    if options:
        framework.stack_views()
    framework.online.keeps_features = True
    views = training.joint_views(0)
    for _ in range(2):  # taken once, then those of the next step
        framework(views, PROGRESS)
        seen = framework.online.take_features()[: training.BATCH]
        assert not seen.requires_grad
        torch.testing.assert_close(seen, framework.online.backbone(views[0]))
    framework.eval()(views, PROGRESS)
    with pytest.raises(AssertionError):
        framework.online.take_features()


def test_its_start_takes_no_draw_of_the_run() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, other = made(), made()
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.weight, other.weight)
    assert float(one.weight.detach().std()) > 0


def test_a_batch_that_overflowed_teaches_nothing() -> None:
    probe, bad = made(), torch.full((4, 6), float("inf"))
    start = probe.weight.detach().clone()
    probe.learn(bad, torch.arange(4) % 3)
    probe.update()
    assert torch.equal(probe.weight.detach(), start)
