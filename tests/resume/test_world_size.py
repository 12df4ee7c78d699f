"""A run of two ranks goes on with one or four: the same images, the same views, the same losses."""

import hashlib
import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
from figures import figure

GLOBAL = 16
SAVED, LAST = 4, 24  # twenty steps are compared
# a backbone without batch norm, of the size that an image of 8 allows
KEYS: dict[str, Any] = {"MODEL__BACKBONE__NAME": "deit_tiny", "MODEL__BACKBONE__PATCH_SIZE": 4}


def note_batches(rank: int, *, path: Path) -> None:
    """Write a line for each step: the sample and the digest of its views, in the order of this rank."""
    from data.loader import GlobalLoader

    from_step = GlobalLoader.from_step

    def wrapper(self: Any, step: int, total_steps: int) -> Any:
        with path.with_suffix(f".{rank}").open("w", buffering=1) as file:
            for index, batches in from_step(self, step, total_steps):
                samples = []
                for batch in batches:
                    for row, sample in enumerate(batch.indices.tolist()):
                        views = b"".join(
                            view[row].contiguous().numpy().tobytes() for view in batch.views
                        )
                        samples.append((sample, hashlib.sha256(views).hexdigest()))
                file.write(json.dumps([index, samples]) + "\n")
                yield index, batches

    GlobalLoader.from_step = wrapper  # type: ignore[method-assign]


def kill_and_note(rank: int, *, path: Path, step: int) -> None:
    note_batches(rank, path=path)
    runs.kill_at(rank, step=step)


def noted(path: Path, world: int) -> dict[int, list[Any]]:
    """Return each step's global batch, put together from the ranks: position p lies on rank p % world."""
    ranks = [
        map(json.loads, path.with_suffix(f".{r}").read_text().splitlines()) for r in range(world)
    ]
    steps = {}
    for lines in zip(*ranks, strict=True):
        assert len({index for index, _ in lines}) == 1
        steps[lines[0][0]] = [
            sample for row in zip(*(s for _, s in lines), strict=True) for sample in row
        ]
    return steps


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def arguments(method: str, root: Path, tag: str, data: Path, world: int, **more: Any) -> list[str]:
    keys = {
        **KEYS,
        "DATA__DATASET": "imagefolder",
        "DATA__PATH": str(data),
        "AUG__RECIPE": "moco_v2",
    }
    keys |= {"TRAIN__BATCH_SIZE": GLOBAL // world, "TRAIN__EPOCHS": 6, "LOG__PRINT_FREQ": 1}
    keys |= {"CHECKPOINT__EVERY_STEPS": SAVED, "CHECKPOINT__KEEP_LAST": 9}
    return runs.arguments(method, root, tag, **{**keys, **more})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moco_v2", "moby"])
def test_the_run_goes_on_with_another_number_of_processes(method: str, tmp_path: Path) -> None:
    data = runs.image_folder(tmp_path / "images", train=64, val=2)
    place = tmp_path / method

    argv = arguments(method, tmp_path, "whole", data, 2)
    note = partial(note_batches, path=tmp_path / "whole")
    assert forked.run("main_pretrain", argv, tmp_path / "log", ranks=2, prepare=note) == [0, 0]
    whole, truth = noted(tmp_path / "whole", 2), losses(place / "whole")
    assert max(truth) == LAST

    argv = arguments(method, tmp_path, "saved", data, 2)
    fault = partial(kill_and_note, path=tmp_path / "saved", step=SAVED)
    assert (
        forked.run("main_pretrain", argv, tmp_path / "log", ranks=2, prepare=fault)
        == [-signal.SIGKILL] * 2
    )
    for world, workers in ((2, 0), (1, 2), (4, 0)):
        tag = f"world{world}"
        shutil.copytree(place / "saved", place / tag)
        argv = arguments(method, tmp_path, tag, data, world, DATA__NUM_WORKERS=workers)
        note = partial(note_batches, path=tmp_path / tag)
        jobs = forked.start("main_pretrain", argv, tmp_path / "log", ranks=world, prepare=note)
        assert [job.wait() for job in jobs] == [0] * world, jobs[0].text()
        assert runs.resumed_at(jobs[0].text()) == SAVED

        seen, found = noted(tmp_path / tag, world), losses(place / tag)
        same = sum(seen[step] == whole[step] for step in range(SAVED, LAST))
        gap = max(abs(found[step] / truth[step] - 1) for step in range(SAVED + 1, LAST + 1))
        figure(
            f"{method}, 2 -> {world} processes: global batches and views identical",
            f"{same}/{LAST - SAVED}",
        )
        figure(
            f"{method}, 2 -> {world}: largest relative difference of the loss in 20 steps",
            f"{gap:.1e}",
        )
        assert same == LAST - SAVED
        assert gap <= (0 if world == 2 else 1e-5)


@pytest.mark.slow
def test_a_global_batch_that_does_not_divide_is_refused_with_sizes_that_do(tmp_path: Path) -> None:
    data = runs.image_folder(tmp_path / "images", train=64, val=2)
    argv = arguments("moco_v2", tmp_path, "t", data, 2)
    fault = partial(runs.kill_at, step=SAVED)
    forked.run("main_pretrain", argv, tmp_path / "log", ranks=2, prepare=fault)
    argv = arguments("moco_v2", tmp_path, "t", data, 2, TRAIN__BATCH_SIZE=5)
    for ranks in (2, 3):
        jobs = forked.start("main_pretrain", argv, tmp_path / "log", ranks=ranks)
        assert [job.wait() for job in jobs] == [2] * ranks
        assert "global batch of 16" in jobs[0].text()
        assert str(5 * ranks) in jobs[0].text()
