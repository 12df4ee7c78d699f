"""A global batch that another number of processes cannot give: which sizes would."""

import pytest

from engine import checkpointing as resume
from engine.plan import Plan
from utils import distributed


@pytest.mark.parametrize(
    ("saved", "world", "batch_size", "accumulation", "expected"),
    [
        (256, 2, 64, 1, "on 2 process(es) use --batch-size 128"),
        (256, 1, 64, 1, "on 1 process(es) use --batch-size 256"),
        (256, 4, 64, 2, "on 4 process(es) use --batch-size 32 --accumulation-steps 2"),
        (90, 2, 9, 4, "on 2 process(es) use --batch-size 45 --accumulation-steps 1"),
        (
            *(256, 3, 64, 1),
            "256 cannot be divided over 3 processes; use 1 with --batch-size 256, 2 with --batch-size 128, "
            "4 with --batch-size 64",
        ),
        (
            *(256, 3, 64, 2),
            "256 cannot be divided over 3 processes; use 1 with --batch-size 128, 2 with --batch-size 64, "
            "4 with --batch-size 32 (each with --accumulation-steps 2)",
        ),
    ],
)
def test_sizes_that_work(
    saved: int,
    world: int,
    batch_size: int,
    accumulation: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resume, "world_size", lambda: world)
    plan = Plan(1, 1, batch_size * world * accumulation, accumulation, 0.0, ())
    assert resume.sizes_that_work(saved, plan) == expected
    assert distributed.world_size() == 1
