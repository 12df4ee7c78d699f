"""k-NN that nobody asked for: after the last epoch where there are labels, no trouble elsewhere."""

import json
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
from PIL import Image


def pretrain(root: Path, **keys: Any) -> tuple[str, list[dict[str, Any]]]:
    """Pretrain an epoch with KNN.EVERY_EPOCHS as it is by default; return log and evaluations."""
    argv = runs.arguments("byol", root, "t", KNN__EVERY_EPOCHS=-1, KNN__K=[5], **keys)
    (job,) = forked.start("main_pretrain", argv, root / "log")
    assert job.wait() == 0, job.text()
    lines = (root / "byol" / "t" / "metrics.jsonl").read_text().splitlines()
    return job.text(), [row for row in map(json.loads, lines) if "lr" not in row]


def test_a_labelled_set_is_judged_after_the_last_epoch(tmp_path: Path) -> None:
    text, found = pretrain(tmp_path, LOG__TENSORBOARD=True)
    assert [row["step"] for row in found] == [runs.STEPS]
    assert found[0]["knn5_top1"] > 20
    assert "best     knn5_top1" in text
    (table,) = (tmp_path / "byol" / "t").glob("*/knn/metadata.tsv")
    assert 100 < len(table.read_text().split()) <= 500


@pytest.mark.parametrize("kind", ["imagefolder", "folder"])
def test_a_set_without_labels_or_test_images_trains_all_the_same(kind: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    runs.image_folder(data, train=16, val=0)
    keys = {"DATA__DATASET": kind, "DATA__PATH": str(data), "TRAIN__BATCH_SIZE": 8}
    text, found = pretrain(tmp_path, **keys, DATA__IMG_SIZE=16)
    assert found == []
    assert "no k-NN while this run trains: " in text


def test_a_damaged_test_image_is_left_out(tmp_path: Path) -> None:
    data = tmp_path / "data"
    runs.image_folder(data, train=16, val=8)
    next((data / "val").rglob("*.png")).write_bytes(b"no picture")
    keys = {"DATA__DATASET": "imagefolder", "DATA__PATH": str(data), "TRAIN__BATCH_SIZE": 8}
    assert len(pretrain(tmp_path, **keys, DATA__IMG_SIZE=16)[1]) == 1


def test_other_test_images_are_named_when_a_run_resumes(tmp_path: Path) -> None:
    """Its best accuracy would be of both; it goes on, since the weights are not."""
    data = tmp_path / "data"
    runs.image_folder(data, train=16, val=8)
    keys = {"DATA__DATASET": "imagefolder", "DATA__PATH": str(data), "TRAIN__BATCH_SIZE": 8}
    for step in range(3):
        if step == 2:
            Image.new("RGB", (24, 24)).save(next((data / "val").rglob("*.png")))
        text = pretrain(tmp_path, **keys, DATA__IMG_SIZE=16)[0]
        assert ("resumed from" in text) == (step > 0)
        assert ("the val images of the k-NN are other ones now" in text) == (step == 2)
    assert "the train images of the k-NN" not in text
