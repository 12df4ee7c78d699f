"""README's section "Your own images", run as it stands on made-up images: bash and Python blocks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SMALL = ["--epochs", "1", "--batch-size", "16"]
# The smallest forms of what the README runs for hours.
EXTRA = {
    "main_pretrain.py": [
        *SMALL,
        "--img-size",
        "32",
        "--workers",
        "0",
        "--opts",
        "MODEL.MOCO_V2.QUEUE_SIZE",
        "16",
    ],
    "main_linear.py": [
        *SMALL,
        "--img-size",
        "32",
        "--workers",
        "0",
        "--opts",
        "MODEL.MOCO_V2.QUEUE_SIZE",
        "16",
    ],
    "tools/convert.py": [],
}


def make_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (count, 40, 40, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")


@pytest.mark.slow
def test_the_section_on_own_images_runs(tmp_path: Path) -> None:
    make_images(tmp_path / "photos" / "any", 32, seed=0)
    for number, split in enumerate(("train", "val")):
        for kind in ("cat", "dog"):
            make_images(tmp_path / "labelled" / split / kind, 16, seed=1 + number)
    text = (ROOT / "README.md").read_text()
    section = text.split("## Your own images")[1].split("\n## ")[0]
    commands = re.findall(r"^python (\S+) (.*)$", section, re.MULTILINE)
    assert [program for program, _ in commands] == list(EXTRA)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for program, words in commands:
        words = words.replace("configs/", f"{ROOT}/configs/").split()
        command = [sys.executable, str(ROOT / program), *words, *EXTRA[program]]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    code = f"{snippet}\nassert features.shape == (1, 512)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "output/own_images/first/views.png").is_file()
