"""SiT from the command line: unlabelled images, losses on a held-out split, pictures of what it restores."""

import json
from pathlib import Path

import forked
import numpy as np
import pytest
import runs
from PIL import Image

SIT = {"MODEL__BACKBONE__STEM": "cifar_stride2", "AUG__RECIPE": "sit_fork", "DATA__IMG_SIZE": 16}
NAMES = ("loss", "loss_rotation", "loss_contrast", "loss_reconstruction", "rotation_acc")


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a flat folder of 80 images without classes: 72 to train on, 8 held out."""
    folder, rng = tmp_path_factory.mktemp("herd"), np.random.default_rng(0)
    for number in range(80):
        pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"cow_{number * 7919 % 80:02d}.png")
    return folder


def start(herd: Path, output: Path, *flags: str, ranks: int = 1, **keys: object) -> forked.Job:
    flags = ("--dataset", "folder_split", "--data-path", str(herd), *flags)
    keys = {**SIT, "TRAIN__BATCH_SIZE": 24 // ranks, "TRAIN__EPOCHS": 2, **keys}
    jobs = forked.start(
        "main_pretrain",
        runs.arguments("sit", output, "t", *flags, **keys),
        output / "log",
        ranks=ranks,
    )
    assert [job.wait() for job in jobs] == [0] * ranks, jobs[0].text()
    return jobs[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_loss_is_told_apart_on_held_out_images(herd: Path, tmp_path: Path, ranks: int) -> None:
    argv_keys = {"DATA__DATASET": "folder_split"}
    start(herd, tmp_path, "--held-out", ranks=ranks, **argv_keys)
    folder = tmp_path / "sit" / "t"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "held_out_loss" in row]
    assert [row["epoch"] for row in evaluated] == [1.0, 2.0]
    assert {f"held_out_{name}" for name in NAMES} <= evaluated[-1].keys()
    assert "held out: 8 of 8 images" in (folder / "log.txt").read_text()
    # a later look at a checkpoint sees the same corruption, rotation and views, and leaves the
    # folder alone
    before = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    older = str(folder / "ckpt_00000003.pt")
    first = start(
        herd, tmp_path, "--held-out", "--eval", "--resume", older, ranks=ranks, **argv_keys
    ).text()
    assert f"held_out_loss {evaluated[0]['held_out_loss']:.2f}" in first
    assert {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()
    } == before
    text = start(herd, tmp_path, "--held-out", "--eval", ranks=ranks, **argv_keys).text()
    assert f"held_out_loss {evaluated[-1]['held_out_loss']:.2f}" in text
    assert f"held_out_loss_rotation {evaluated[-1]['held_out_loss_rotation']:.2f}" in text
    for step in (0, 6):
        with Image.open(folder / f"reconstruction_{step:07d}.png") as picture:
            assert (
                picture.width == 3 * 18 * 6
            )  # clean, corrupted, reconstruction; 16 pixels and a frame, zoomed


def test_the_published_mode_flag_leads_to_the_other_main(herd: Path, tmp_path: Path) -> None:
    argv = runs.arguments("sit", tmp_path, "t", "--training-mode", "finetune")
    (job,) = forked.start("main_pretrain", argv, tmp_path / "log")
    assert job.wait() == 2
    assert "use main_semisup.py" in job.text()
