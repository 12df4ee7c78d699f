"""The runs of a study: their names, commands and folders, and the machine that they run on."""

import contextlib
import functools
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from tools.parts.run_files import read_json
from tools.parts.study.study import ROOT, Entry, Row, Study, number
from utils.cli.version import commit


@dataclass(frozen=True)
class Length:
    """How long an entry trains: epochs, and for ours the steps that end within one (0: whole)."""

    epochs: float
    steps: int = 0

    @classmethod
    def of(cls, row: Row) -> "Length":
        """Return the length of a row."""
        return cls(number(row, "epochs"), int(str(row.get("steps", 0))))


@dataclass(frozen=True)
class Runs:
    """The runs of a study below the folder `work`."""

    study: Study
    work: Path
    data_path: str
    tier: str
    # an entry trains as many epochs as this one's time holds; another one's are read from its rows
    machine: str

    @property
    def is_here(self) -> bool:
        """Whether it is the time of this machine that counts."""
        return self.machine == this_machine(self.tier)

    def recipe(self, entry: Entry) -> str:
        """Return the digest of an entry's recipe on this tier."""
        return self.study.recipe(entry, self.tier)

    def rows(self, entry: Entry, rows: Sequence[Row]) -> dict[int, Row]:
        """Return the rows of an entry by seed."""
        return self.study.rows(entry, rows, self.tier, self.machine)

    def tag(self, entry: Entry) -> str:
        """Return a name that studies with this recipe share, and that a changed recipe loses."""
        return f"{entry.peer or Path(entry.cfg).stem}-{self.recipe(entry)}"

    def training(self, entry: Entry, tag: str, seed: int, length: Length) -> list[str]:
        """Return the command that trains an entry."""
        flags = ["--cfg", entry.cfg, "--data-path", self.data_path, "--dataset", self.study.dataset]
        flags += ["--output", str(self.work), "--tag", tag, "--seed", str(seed)]
        flags += [] if length.steps else ["--epochs", f"{length.epochs:g}"]
        flags += ["--device", "cuda" if self.tier == "gpu" else "cpu"]
        if entry.peer:
            opts = ["--opts", *entry.opts] if entry.opts else []
            return [sys.executable, "-m", "benchmarks.studies.peer_runs", entry.peer, *flags, *opts]
        # A look at the k-NN is an evaluation: it would be paid from the budget of training.
        opts = ["KNN.EVERY_EPOCHS=0", "LOG.TENSORBOARD=False"]
        opts += [f"TRAIN.STEPS={length.steps}"] if length.steps else []
        if not self.is_here:
            # here bfloat16 may be slow, and its speed is in the number of epochs already
            opts.append("TRAIN.PRECISION=auto")
        opts += entry.opts
        return [sys.executable, str(ROOT / "main_pretrain.py"), *flags, "--opts", *opts]

    def shown(self, command: Sequence[str]) -> str:
        """Return a command as it can be given elsewhere: places by their letters."""
        places = {self.data_path: "D", str(self.work): "O", sys.executable: "python"}
        words = [places.get(word, word) for word in command]
        words = [word.replace(f"{self.work}/", "O/").removeprefix(f"{ROOT}/") for word in words]
        return "OMP_NUM_THREADS=1 " + shlex.join(words)

    def folder(self, tag: str) -> Path:
        """Return the folder of a run, whether or not it exists."""
        return next(self.work.glob(f"*/{tag}"), self.work / tag)

    def status(self, tag: str) -> Row:
        """Return what a run says of its state; empty before it says anything."""
        return read_json(self.folder(tag) / "status.json")

    def say(self, tag: str, text: str) -> None:
        """Print a line about a run, with the time of day."""
        clock = datetime.now().strftime("%H:%M:%S")
        print(f"{clock} {self.study.name} {tag}: {text}", file=sys.stderr, flush=True)


@functools.cache
def this_machine(tier: str) -> str:
    """Return the name that rows give to this machine."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    if tier == "gpu":
        import torch  # only here: the driver itself needs no torch

        name = torch.cuda.get_device_name()
    return f"{name}, {os.cpu_count()} cores"


def made_here(entry: Entry, tier: str) -> Row:
    """Say where a row was measured: the machine, and what its figures depend on."""
    library = entry.peer.rpartition("_")[0].replace("_", "-")
    return {
        **({"library": f"{library} {version(library)}"} if library else {}),
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": this_machine(tier),
        "python": platform.python_version(),
        "torch": version("torch"),
        "timm": version("timm"),
    }
