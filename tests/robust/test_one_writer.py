"""Only the first of several processes changes anything below the output folder."""

import os
import sys
from functools import partial
from pathlib import Path

import forked
import runs
from figures import figure

CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
)


def note_changes(rank: int, *, output: Path, notes: Path) -> None:
    """Note every file below ``output`` that this process opens for writing, renames, removes or makes."""
    note = os.open(notes.with_suffix(f".{rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, changes = arguments[0] if arguments else "", event in CHANGES
        if (
            changes
            and isinstance(path, str | bytes | os.PathLike)
            and str(output) in os.fsdecode(path)
        ):
            os.write(note, f"{event} {os.fsdecode(path)}\n".encode())

    sys.addaudithook(hook)


def test_only_rank_0_writes(tmp_path: Path) -> None:
    output = tmp_path / "output"
    keys = {
        "KNN__EVERY_EPOCHS": 1,
        "KNN__K": [5],
        "LINEAR__BATCH_SIZE": 512,
        "LOG__TENSORBOARD": True,
    }
    argv = runs.arguments("moco_v2", output, "t", world=2, **keys)
    prepare = partial(note_changes, output=output, notes=tmp_path / "notes")
    for _ in range(2):  # a fresh run, and one that resumes at its end
        jobs = forked.start("main_pretrain", argv, tmp_path / "log", ranks=2, prepare=prepare)
        assert [job.wait() for job in jobs] == [0, 0], jobs[0].text()
    first, second = ((tmp_path / f"notes.{rank}").read_text().splitlines() for rank in (0, 1))
    figure("files written, renamed or removed below the output by rank 0", len(first))
    figure("by rank 1", len(second))
    assert len(first) > 10
    assert second == []
