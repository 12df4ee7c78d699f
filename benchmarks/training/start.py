"""From the command to the first step: ours, and other libraries by short scripts of their own.

Every side is a process that starts from nothing, reads the same folder of small JPEGs, and is ended
after the first step of a ResNet-18. CPU seconds are those of the whole process, so a busy
neighbour changes them little. Peers: lightly and stable-pretraining, each if it is installed.
"""

import argparse
import importlib.util
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.common import ratio
from benchmarks.training.first_steps.arguments import DONE

_ROOT = Path(__file__).resolve().parents[2]
_SCRIPTS = {"lightly": "lightly_moco", "stable_pretraining": "stable_pretraining_simclr"}
_PATIENCE = 3600  # seconds for one start, on a loaded machine
DIFFERENCES = """what differs:
- ours checks configuration and data, looks for a checkpoint and opens the run's folder and its log;
  a peer's script does less
- ours makes the views with kernels that numba has compiled and kept on disk before
- stable-pretraining trains SimCLR, since its README does"""


class Start(NamedTuple):
    """A command, and the text in whose line the first step is over."""

    command: list[str]
    end: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes and what is started."""
    parser.add_argument("--images", type=int, default=512, help="JPEGs in the folder")
    parser.add_argument("--size", type=int, default=32, help="of a view, in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--cfg", default="configs/cifar10/moco_v2_resnet18.yaml", help="what ours trains"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="further KEY VALUE pairs for ours"
    )


def run(args: argparse.Namespace) -> dict[str, float]:
    """Start all sides in turn; one round is not counted."""
    with tempfile.TemporaryDirectory(prefix="synco-start-") as made:
        folder = Path(made)
        make_images(folder / "images", args.images)
        sides = _sides(args, folder)
        clock: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name, side in sides.items():
                seconds = time_start(side, args.threads, folder)
                if number:  # the first start fills the memory of the file system
                    clock[name].append(seconds[0])
                    cpu[name].append(seconds[1])
    result: dict[str, float] = {}
    for name in sides:
        by_clock, by_cpu = statistics.median(clock[name]), statistics.median(cpu[name])
        print(f"{name:20s} {by_clock:7.2f} s by the clock {by_cpu:7.2f} s of CPU")
        result |= {f"{name}_start_s": by_clock, f"{name}_start_cpu_s": by_cpu}
    for name in sides:
        if name != "ours":
            result[f"start_{name}_over_ours"] = ratio(clock, name, "ours")
            result[f"start_{name}_over_ours_cpu"] = ratio(cpu, name, "ours")
    print(DIFFERENCES)
    return result


def _sides(args: argparse.Namespace, folder: Path) -> dict[str, Start]:
    """Return a bare import of torch, ours, and the peers that are installed."""
    python, images = sys.executable, folder / "images"
    ours = [python, "main_pretrain.py", "--cfg", args.cfg, "--dataset", "imagefolder"]
    ours += ["--data-path", str(images), "--output", str(folder / "runs"), "--tag", "start"]
    ours += ["--device", args.device, "--batch-size", str(args.batch)]
    ours += ["--opts", "DATA.NUM_WORKERS", "0", "DATA.IMG_SIZE", str(args.size)]
    ours += ["LOG.PRINT_FREQ", "1", *args.opts]
    bare = [python, "-c", "import torch; print('imported')"]
    sides = {"import_torch": Start(bare, "imported"), "ours": Start(ours, "  step 1/")}
    for library, script in _SCRIPTS.items():
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: left out")
            continue
        command = [python, "-m", f"benchmarks.training.first_steps.{script}"]
        command += [str(images / "train"), "--size", str(args.size), "--batch", str(args.batch)]
        sides[library] = Start(command, DONE)
    return sides


def make_images(folder: Path, count: int) -> None:
    """Write JPEGs of 64 pixels, in four classes, for training, and a few for testing."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 16)):
        for index in range(number):
            file = folder / split / f"class{index % 4}" / f"{index}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((64, 64)).save(file)


def time_start(side: Start, threads: int, folder: Path) -> tuple[float, float]:
    """Return the seconds by the clock and of CPU until the line that ends the first step.

    Raises `RuntimeError` with the command's last lines if that line never comes.
    """
    # what a run left would be resumed
    shutil.rmtree(folder / "runs", ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    process = subprocess.Popen(
        side.command,
        cwd=_ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    alarm = threading.Timer(_PATIENCE, process.kill)
    alarm.start()
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line)
        if side.end in line:
            break
    elapsed = time.perf_counter() - begin
    alarm.cancel()
    process.kill()
    process.wait()
    process.stdout.close()
    if not seen or side.end not in seen[-1]:
        tail = "".join(seen[-20:])
        raise RuntimeError(f"{' '.join(side.command)}: made no step; its last lines:\n{tail}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return elapsed, used
