"""What a replay says of a step, on networks small enough to spoil by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import replay
from engine.replay import Finding, verdict

NAN = float("nan")


class Tiny(nn.Module):
    """Two layers and a loss; under accumulation it is called once a micro-batch."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.first.weight)
        nn.init.eye_(self.second.weight)
        self.second.weight.data *= scale

    def forward(self, views: list[Tensor], progress: Any) -> dict[str, Tensor]:
        return {"loss": self.second(self.first(views[0])).float().mean()}


def play(
    module: nn.Module, precision: str, views: list[Tensor], scale: float = 1.0, **more: Any
) -> Finding:
    kept = {"seed": 0, "step": 3, "progress": [3, 5, 10], "scale": scale, **more}
    indices = torch.arange(100, 100 + sum(map(len, views))).split(len(views[0]))
    part = {"rank": 0, "views": [[view] for view in views], "indices": list(indices)}
    run: Any = SimpleNamespace(device=torch.device("cpu"), views=lambda view: view)
    return replay._play(run, module, kept, part, precision)


def test_a_range_that_fp16_does_not_have() -> None:
    views = [torch.ones(3, 4), torch.stack([torch.ones(4), torch.full((4,), 100.0), torch.ones(4)])]
    low, high = (play(Tiny(scale=2000.0), precision, views) for precision in ("fp16", "fp32"))
    assert low.module.startswith("second (Linear): 4 of 12 values")
    assert "input" not in low.module
    assert low.samples == "104"  # of the second micro-batch
    assert high.finite
    assert "leave the range of fp16, not that of fp32: --precision fp32 or bf16" in verdict(
        [low, high], "", False, 1
    )


def test_a_gradient_that_overflows_behind_finite_outputs() -> None:
    found = play(Tiny(), "fp16", [torch.ones(2, 4)], scale=1e6)
    assert not found.module
    assert found.parameter == "second.weight"  # the last layer's comes first
    assert (
        "all outputs are finite; the first gradient that is not is that of second.weight"
        in found.describe()
    )
    assert play(Tiny(), "fp32", [torch.ones(2, 4)], scale=1e6).finite


def test_the_hooks_leave_nothing_behind() -> None:
    module = Tiny()
    play(module, "fp32", [torch.ones(2, 4)])
    assert not module.first._forward_hooks
    assert not module.first.weight._post_accumulate_grad_hooks


BAD, GOOD = Finding("bf16", NAN, module="a"), Finding("fp32", 1.0)


@pytest.mark.parametrize(
    ("found", "inputs", "weights", "world", "expected"),
    [
        ([BAD, GOOD], "", True, 1, "the weights are not finite, before any forward"),
        ([BAD, GOOD], "7", False, 1, "the images are to blame, not the network: look at samples 7"),
        ([BAD, GOOD], "", False, 1, "leave the range of bf16, not that of fp32: --precision fp32"),
        ([BAD, Finding("fp32", NAN)], "", False, 1, "fp32 does not help"),
        (
            [GOOD],
            "",
            False,
            1,
            "not reproduced: this batch is finite on one process; if it comes again",
        ),
        ([GOOD], "", False, 2, "other processes took part"),
    ],
)
def test_verdicts(
    found: list[Finding], inputs: str, weights: bool, world: int, expected: str
) -> None:
    assert expected in verdict(found, inputs, weights, world)


def test_a_state_read_a_step_late(tmp_path: Path) -> None:
    """On a GPU the next step has begun: the queue holds spoilt keys, and LARS has spoilt the weights."""
    keys = torch.ones(4, 2)
    keys[1] = NAN
    kept = {
        "late": True,
        "framework": {"weight": torch.ones(2), "queue1.keys": keys},
        "checkpoint": "c.pt",
    }
    weights = replay._weights(kept, tmp_path / "nonfinite_00000004.pt")
    assert weights["queue1.keys"].tolist() == [[1, 1], [0, 0], [1, 1], [1, 1]]
    assert replay._spoilt(weights) == []

    kept["framework"] = {"weight": torch.full((2,), NAN), "queue1.keys": keys}
    assert replay._spoilt(replay._weights(kept, tmp_path / "f.pt")) == ["weight", "queue1.keys"]
    torch.save({"framework": {"weight": torch.zeros(2)}}, tmp_path / "c.pt")
    assert replay._weights(kept, tmp_path / "f.pt")["weight"].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_update_that_is_not_finite_is_skipped_by_the_optimiser_itself(name: str) -> None:
    """What the engine asks of a GPU, where the host reads the norm later; fused CPU kernels can do it too."""
    from engine.loop import skip_if_not_finite

    weight = nn.Parameter(torch.ones(3))
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    optimizer = make([weight], lr=0.1, weight_decay=0.1, fused=True)
    for norm, moves in ((1.0, True), (NAN, False), (float("inf"), False), (2.0, True)):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), norm)
        skip_if_not_finite(optimizer, torch.tensor(norm))
        optimizer.step()
        assert torch.equal(before, weight.detach()) != moves
        assert torch.isfinite(weight).all()
