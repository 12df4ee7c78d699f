"""A disk that is full for a while costs the files of that while, not the run and not an old checkpoint."""

import contextlib
import errno
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import forked
import pytest
import runs
from figures import figure

SIZE = "24m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of a few megabytes, or skip where that needs a right that we lack."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if mount.returncode:
        pytest.skip(
            f"cannot mount a small disk ({mount.stderr.strip()}); file-size limits are tested instead"
        )
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def pad(place: Path) -> None:
    """End the logs at a page's end with empty lines: the rest of a page would take a few lines more."""
    for name in ("metrics.jsonl", "log.txt"):
        (path,) = place.rglob(name)
        with path.open("ab", buffering=0) as file:
            file.write(b"\n" * (-file.tell() % os.sysconf("SC_PAGE_SIZE")))


def fill(place: Path) -> None:
    """Leave no byte."""
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with (place / "filler").open("ab", buffering=0) as file:
        while True:
            try:
                file.write(b"\0")
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    return
                raise


def full_between(rank: int, *, place: Path, first: int, last: int) -> None:
    """Fill the disk when step ``first`` begins and free it when step ``last`` does."""
    if rank == 0:
        runs.at_step(first, lambda: (pad(place), fill(place)))
        runs.at_step(last, partial(os.remove, place / "filler"))


def test_a_full_disk_at_a_checkpoint_and_at_the_logs(small_disk: Path, tmp_path: Path) -> None:
    """Step 3 is saved, then the disk is full for the checkpoint of step 6 and all lines of the logs."""
    pytest.importorskip("tensorboard")
    keys = {"LOG__TENSORBOARD": True, "LOG__PRINT_FREQ": 1, "CHECKPOINT__KEEP_LAST": 9}
    argv = runs.arguments("moby", tmp_path, "whole", world=2, **keys)
    assert forked.run("main_pretrain", argv, tmp_path / "log", ranks=2) == [0, 0]
    argv = runs.arguments("moby", small_disk, "t", world=2, **keys)
    fault = partial(full_between, place=small_disk, first=4, last=8)
    jobs = forked.start("main_pretrain", argv, tmp_path / "log", ranks=2, prepare=fault)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text()
    text, folder = jobs[0].text(), small_disk / "moby" / "t"
    assert text.count("checkpoint of step 6 failed") == 1
    assert "No space left" in text
    assert "Free space" in text
    for name in ("metrics.jsonl", "log.txt"):
        assert text.count(f"{name} (") == 1, name  # once, and the run goes on
    assert runs.steps_saved(folder) == [3, 9, 11]
    assert runs.digest(folder, 3) == runs.digest(tmp_path / "moby" / "whole", 3)
    assert not list(folder.glob("*.tmp"))
    same = runs.digest(folder) == runs.digest(tmp_path / "moby" / "whole")
    figure("disk full at a checkpoint: older checkpoint intact", "yes")
    figure("disk full at metrics.jsonl and log.txt: training went on", "yes")
    figure("final state identical to a run with room", "yes" if same else "no")
    assert same


def no_file_may_grow(rank: int, *, first: int, last: int) -> None:
    """Refuse every written byte from step ``first`` to step ``last``."""
    runs.at_step(first, partial(limit_files, 1))
    runs.at_step(last, partial(limit_files, resource.RLIM_INFINITY))


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_logs_that_take_no_byte_are_reported_once_each(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    keys = {"LOG__TENSORBOARD": True, "LOG__PRINT_FREQ": 1, "CHECKPOINT__EVERY_STEPS": 9}
    argv = runs.arguments("moby", tmp_path, "t", **keys)
    fault = partial(no_file_may_grow, first=3, last=8)
    (job,) = forked.start("main_pretrain", argv, tmp_path / "log", prepare=fault)
    assert job.wait() == 0, job.text()
    # the limit holds for the captured terminal too, so that the warnings are read where there was
    # room
    text = (tmp_path / "moby" / "t" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines() if line]
    assert {line["step"] for line in lines if "loss" in line} == {1, 2, 3, 9, 10, 11}
    assert runs.steps_saved(tmp_path / "moby" / "t") == [9, 11]
    figure("logs that take no byte for five steps: exit code of the run", 0)
