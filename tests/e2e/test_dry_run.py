"""--dry-run says what a run would do and need, and leaves no trace of a run."""

from pathlib import Path

import forked
import runs
from PIL import Image


def test_a_dry_run_answers_on_one_screen_and_leaves_no_run(tmp_path: Path) -> None:
    keys = {"DATA__DATASET": "imagefolder", "DATA__IMG_SIZE": 16, "TRAIN__BATCH_SIZE": 8}
    data = runs.image_folder(tmp_path / "images", train=32, val=8, size=20)
    flags = ("--data-path", str(data), "--dry-run")
    argv = runs.arguments("byol", tmp_path / "out", "t", *flags, **keys, AUG__RECIPE="byol")
    (job,) = forked.start("main_pretrain", argv, tmp_path / "log", ranks=1)
    assert job.wait() == 0, job.text()
    text = job.text()
    for part in (
        "DATA.IMG_SIZE 16 (--opts)",
        "1 epochs x 4 steps",
        "trained parameters",
        "GFLOP",
        "images/s",
        "the device needs",
        "MiB/s in 32 images; the device needs",
        "more processes with 8 images each a step",
        "MB that each sends",
        "with which the network takes 10% of a step",
    ):
        assert part in text, text
    assert len(text.splitlines()) < 50
    folder = tmp_path / "out" / "dry_run" / "byol"
    assert sorted(path.name for path in folder.iterdir()) == ["schedule.png", "views.png"]
    assert Image.open(folder / "schedule.png").height == 3 * 160  # rate, decay, momentum
    # nothing of the run's own folder, nor a checkpoint
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dry_run"]


def test_a_run_that_ends_before_its_synthetics_says_so(tmp_path: Path) -> None:
    keys = {"MODEL__SYNCO__WARMUP_EPOCHS": 2, "TRAIN__EPOCHS": 2}
    argv = runs.arguments("synco", tmp_path / "out", "t", "--dry-run", **keys)
    (job,) = forked.start("main_pretrain", argv, tmp_path / "log", ranks=1)
    assert job.wait() == 0, job.text()
    assert "MODEL.SYNCO.WARMUP_EPOCHS 2: the run ends before" in job.text()
