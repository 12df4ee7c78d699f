"""A run does not mind where it is: umask, locale, time zone, blanks, umlauts, links, read-only images."""

import json
import locale
import os
import sys
import time
from pathlib import Path

import forked
import runs
from figures import figure


def odd_surroundings(rank: int) -> None:
    os.umask(0o077)
    os.environ.update(TZ="Asia/Kathmandu", LC_ALL="C", LANG="C")
    time.tzset()
    locale.setlocale(locale.LC_ALL, "C")


def test_a_run_in_an_odd_place(tmp_path: Path) -> None:
    data = runs.image_folder(tmp_path / "Bilder für eine Prüfung")
    for path in (*data.rglob("*.png"), *data.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    real = tmp_path / "the real output"
    real.mkdir()
    (tmp_path / "österreich out").symlink_to(real)
    keys = {"DATA__DATASET": "imagefolder", "DATA__PATH": str(data), "AUG__RECIPE": "moco_v2"}
    keys |= {"TRAIN__BATCH_SIZE": 8, "DATA__NUM_WORKERS": 1}
    digests = []
    for output, prepare in (
        (tmp_path / "österreich out", odd_surroundings),
        (tmp_path / "plain", None),
    ):
        argv = runs.arguments("moco_v2", output, "t", **keys)
        for _ in range(2):  # and resumes there
            (job,) = forked.start("main_pretrain", argv, tmp_path / "log", prepare=prepare)
            assert job.wait() == 0, job.text()
        digests.append(runs.digest(output / "moco_v2" / "t"))
    figure("run and resume in an odd place", "identical to a plain one")
    assert digests[0] == digests[1]
    assert (real / "moco_v2" / "t" / "status.json").stat().st_mode & 0o077 == 0


def no_streams(rank: int) -> None:
    """Leave what Python finds after 1>&- 2>&-."""
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = None  # type: ignore[assignment]


def test_a_run_without_standard_output_and_error(tmp_path: Path) -> None:
    argv = runs.arguments("byol", tmp_path / "out", "t", DATA__NUM_WORKERS=1)
    (job,) = forked.start("main_pretrain", argv, tmp_path / "log", prepare=no_streams)
    assert job.wait() == 0
    folder = tmp_path / "out" / "byol" / "t"
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert "checkpoint" in (folder / "log.txt").read_text()
