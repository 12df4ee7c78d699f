"""Two thousand flipped bits and five hundred truncations of a run's newest checkpoint: none is silent."""

import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch
from figures import figure

from utils.checkpoints import file as checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the two checkpoints of a finished run, steps 9 and 11, large tensors cut short to be quick."""
    output = tmp_path_factory.mktemp("trained")
    keys = {"MODEL__MOCO_V2__OUT_DIM": 8, "MODEL__MOCO_V2__QUEUE_SIZE": 128}
    argv = runs.arguments("moco_v2", output, "t", **keys)
    assert forked.run("main_pretrain", argv, output / "log") == [0]
    folder, small = output / "moco_v2" / "t", output / "small"
    for step in (9, runs.STEPS):
        state = checkpoint.load(folder / f"ckpt_{step:08d}.pt")
        checkpoint.save(small, step, shortened(state), meta={"best": {"knn5_top1": 12.5}})
    return small


def shortened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.flatten()[:64].clone()
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    return [shortened(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """Give a copy; the reasons of a thousand rejections are not shown."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    logging.getLogger("synco").setLevel(logging.ERROR)
    yield copy
    logging.getLogger("synco").setLevel(logging.NOTSET)


def equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return (
            isinstance(right, dict)
            and list(left) == list(right)
            and all(equal(left[k], right[k]) for k in left)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))  # type: ignore[arg-type]
    return left == right


def outcome(newest: Path, older: Path, whole: dict, meta: dict) -> str:
    """Say what a damaged newest checkpoint leads to: the older one, no harm, or a wrong state."""
    found = checkpoint.newest_valid(newest.parent)
    if found is None:
        return "wrong"
    if found.path != newest:
        try:
            checkpoint.load(newest)
        except checkpoint.CheckpointError:
            return "previous taken" if found.path == older else "wrong"
        return "wrong"  # one reader refuses what another one takes
    return "harmless" if equal(checkpoint.load(newest), whole) and found.meta == meta else "wrong"


def damage(folder: Path, flips: int, truncations: int) -> dict[str, dict[str, int]]:
    newest = folder / f"ckpt_{runs.STEPS:08d}.pt"
    older, whole = folder / "ckpt_00000009.pt", checkpoint.load(newest)
    found = checkpoint.newest_valid(folder)
    assert found is not None
    assert found.path == newest
    assert outcome(newest, older, whole, found.meta) == "harmless"
    draw, meta = random.Random(0), found.meta
    counts: dict[str, dict[str, int]] = {}
    for kind, times in (("flips", flips), ("truncations", truncations)):
        counts[kind] = {"previous taken": 0, "harmless": 0, "wrong": 0}
        for number in range(times):
            victim = newest if number % 4 else newest.with_suffix(".json")
            data = bytearray(content := victim.read_bytes())
            if kind == "flips":
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            else:
                del data[draw.choice([0, len(data) - 1, draw.randrange(len(data))]) :]
            victim.write_bytes(data)
            counts[kind][outcome(newest, older, whole, meta)] += 1
            victim.write_bytes(content)
    return counts


def check(counts: dict[str, dict[str, int]]) -> None:
    for kind, found in counts.items():
        figure(f"{sum(found.values()):,} {kind}: silently wrong", found["wrong"])
        figure(
            f"{sum(found.values()):,} {kind}: previous checkpoint taken", found["previous taken"]
        )
        assert found["wrong"] == 0
        assert found["previous taken"] > 0.9 * sum(found.values())
    assert counts["truncations"]["harmless"] == 0


def test_damage_to_the_newest_checkpoint_of_a_run(folder: Path) -> None:
    check(damage(folder, flips=100, truncations=30))


@pytest.mark.slow
def test_much_damage_to_the_newest_checkpoint_of_a_run(folder: Path) -> None:
    check(damage(folder, flips=2000, truncations=500))
