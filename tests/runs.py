"""Real runs of the mains on small data, faults on demand, and what a run left behind."""

import hashlib
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from utils.checkpoints import file as checkpoint
from utils.config.methods import method_options
from utils.config.sections import method_section

STEPS = 11  # of an epoch of digits at a global batch of 128
# of each method that has such an option: small enough for a run of seconds
SMALL = {
    "queue_size": 512,
    "out_dim": 32,
    "hidden_dim": 64,
    "num_hard": 32,
    "num_synthetic": [8] * 6,
    "warmup_epochs": 0,
}


def small_options(method: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a method that `sizes` has; a new method needs no entry."""
    known = method_options()[method_section(method).lower()]
    options = {name: size for name, size in sizes.items() if name in known}
    if method == "sit":
        options["base_momentum"] = 0.9  # the published rate moves nothing in so few steps
    return options


def small_keys(method: str) -> dict[str, Any]:
    """Return the keys that make a method small."""
    section = method_section(method)
    options = small_options(method, SMALL)
    return {f"MODEL.{section}.{name.upper()}": value for name, value in options.items()}


def arguments(
    method: str, output: Path, tag: str, *flags: str, world: int = 1, **keys: Any
) -> list[str]:
    """Return the command line of a run on digits; ``keys`` (DOTTED__KEY=value) come last, so they win."""
    settings: dict[str, Any] = {
        "DATA.DATASET": "digits",
        "DATA.IMG_SIZE": 8,
        "DATA.NUM_WORKERS": 0,
        "AUG.RECIPE": "digits",
        "MODEL.NAME": method,
        "MODEL.BACKBONE.NAME": "resnet8",
        "TRAIN.BATCH_SIZE": 128 // world,
        "TRAIN.EPOCHS": 1,
        "TRAIN.PRECISION": "fp32",
        # gloo now and then misses the death of a process: end before `forked.LIMIT` then
        "TRAIN.RANK_TIMEOUT": 100.0,
        "CHECKPOINT.EVERY_STEPS": 3,
        "LOG.PRINT_FREQ": 2,
        "LOG.TENSORBOARD": False,
        "KNN.EVERY_EPOCHS": 0,
        # SiT restores pixels, so an image of 8 must not be smaller than a cell of the last map
        **({"MODEL.BACKBONE.STEM": "cifar_stride2"} if method == "sit" else {}),
        **small_keys(method),
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    opts = [
        str(part)
        for key, value in settings.items()
        for part in (key, json.dumps(value, ensure_ascii=False))
    ]
    opts = [part.strip('"') for part in opts]
    return ["--device", "cpu", "--output", str(output), "--tag", tag, *flags, "--opts", *opts]


def image_folder(root: Path, train: int = 48, val: int = 12, size: int = 24) -> Path:
    """Draw a folder with splits and two classes, told apart by their colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            name = ("blue", "red")[number % 2]
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., 2 if name == "blue" else 0] += 120
            path = root / split / name / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


# ---- what a run left -----------------------------------------------------------------------------


# what two runs of the same course may differ in
CLOCK = {"images_per_second", "data_wait_percent", "time"}


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def outcome(folder: Path) -> tuple[str, int, str]:
    found = status(folder)
    return found["state"], found["step"], found["reason"]


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in folder.glob("ckpt_*.json"))


def final_state(folder: Path) -> dict[str, Any]:
    """Load the newest checkpoint, which has to verify."""
    found = checkpoint.newest_valid(folder)
    assert found is not None
    return checkpoint.load(found.path)


def digest(folder: Path, step: int | None = None) -> str:
    """Return the sha256 of all state in the newest checkpoint, or of a step, but for the configuration."""
    state = final_state(folder) if step is None else checkpoint.load(folder / f"ckpt_{step:08d}.pt")
    sha = hashlib.sha256()
    _update(sha, {key: state[key] for key in ("framework", "optimizer", "scaler", "step", "best")})
    return sha.hexdigest()


def _update(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            sha.update(f"{key}=".encode())
            _update(sha, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _update(sha, item)
    else:
        sha.update(repr(value).encode())


def resumed_at(text: str) -> int:
    """Return the step from which a run said it went on, 0 if it started afresh."""
    found = re.search(r"resumed from \S+ at step (\d+)", text)
    return int(found[1]) if found else 0


# ---- faults, set up in the run's own process before its main starts ------------------------------


def at_step(step: int, action: Callable[[], object]) -> None:
    """Call ``action`` when optimiser step ``step`` begins."""
    from engine import loop as engine

    seed_step = engine.seed_step

    def wrapper(seed: int, index: int) -> None:
        if index == step:
            action()
        seed_step(seed, index)

    engine.seed_step = wrapper


def send_self(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def kill_soon(delay: float) -> None:
    """SIGKILL this process ``delay`` seconds from now, wherever it is then."""
    if delay > 0:
        threading.Timer(delay, send_self, [signal.SIGKILL]).start()
    else:
        send_self(signal.SIGKILL)


def kill_at(rank: int, *, step: int, delay: float = 0.0, ranks: tuple[int, ...] = (0, 1)) -> None:
    """Arrange for a SIGKILL."""
    if rank in ranks:
        at_step(step, lambda: kill_soon(delay))


def note_steps(path: Path) -> None:
    """Keep the number of the step that has begun in a file, which outlives a SIGKILL."""
    from engine import loop as engine

    seed_step = engine.seed_step

    def wrapper(seed: int, index: int) -> None:
        path.write_text(str(index))
        seed_step(seed, index)

    engine.seed_step = wrapper


def killed_somewhere(
    rank: int, *, step: int | None, delay: float, ranks: tuple[int, ...], note: Path
) -> None:
    """Arrange for a SIGKILL ``delay`` seconds after ``step`` begins, or after the process does."""
    if rank == 0:
        note_steps(note)
    if rank in ranks and step is None:
        kill_soon(delay)
    elif rank in ranks:
        at_step(step, lambda: kill_soon(delay))


def signal_at(
    rank: int,
    *,
    step: int,
    number: signal.Signals,
    ranks: tuple[int, ...] = (0, 1),
    times: int = 1,
    pause: float = 0.0,
    echo: float | None = None,
) -> None:
    """Arrange for ``times`` signals, ``pause`` seconds apart; within ``echo`` seconds they count as one."""
    if echo is not None:
        from engine import guards

        guards._ECHO_SECONDS = echo

    def send() -> None:
        for _ in range(times):
            send_self(number)
            time.sleep(pause)

    if rank in ranks:
        at_step(step, send)


def signal_during(rank: int, *, where: str) -> None:
    """Arrange for a SIGTERM in the middle of a save or of an evaluation, on rank 0."""
    from engine import loop as engine
    from engine import meter

    owner, name = {
        "save": (checkpoint, "save"),
        "evaluation": (meter.Meter, "record"),
        "update": (engine, "update"),
    }[where]
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if rank == 0:
            setattr(owner, name, original)
            send_self(signal.SIGTERM)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def random_kills(seed: str, count: int) -> list[tuple[int, float]]:
    """Draw ``count`` rising steps after the first checkpoint, and delays of a step or so."""
    rng = random.Random(seed)
    return [
        (step, rng.choice([0.0, rng.uniform(0, 0.1)]))
        for step in sorted(rng.sample(range(4, 11), count))
    ]
