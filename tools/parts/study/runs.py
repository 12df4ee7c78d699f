"""Train one entry of a study for its time, judge it, and say what it cost."""

import contextlib
import functools
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.parts.run_files import read_json
from tools.parts.study.costs import POLL, Cost, run, start, tree_cpu_seconds
from tools.parts.study.study import EVALUATION, UNTRAINED, Entry, Row, Study, number
from utils.checkpoints.atomic import write_text
from utils.checkpoints.locks import try_lock
from utils.cli.version import commit
from utils.config.datasets import DATASETS
from utils.config.load import written_values

ROOT = Path(__file__).resolve().parents[3]
_SPEED_SHARE = 0.05  # of the budget is trained to measure the speed, outside the budget
_SPEED_LEAST = 10.0  # seconds of that: the first steps compile and are slow
_MANY_EPOCHS = 100_000  # of the run that is stopped when its speed is known


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
class Trainer:
    """Trains and judges entries below the folder `work`."""

    study: Study
    work: Path
    data_path: str
    tier: str
    # an entry trains as many epochs as this one's time holds; another one's are read from its rows
    machine: str

    @property
    def _is_here(self) -> bool:
        return self.machine == this_machine(self.tier)

    @contextlib.contextmanager
    def only_here(self, entry: Entry, seed: int) -> Iterator[bool]:
        """Yield whether no other driver has this entry and seed in hand."""
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / f"{self._tag(entry)}-{seed}.lock").open("a+") as file:
            yield try_lock(file, self.work)

    def recipe(self, entry: Entry) -> str:
        """Return the digest of an entry's recipe on this tier."""
        return self.study.recipe(entry, self.tier)

    def rows(self, entry: Entry, rows: Sequence[Row]) -> dict[int, Row]:
        """Return the rows of an entry by seed."""
        return self.study.rows(entry, rows, self.tier, self.machine)

    def _tag(self, entry: Entry) -> str:
        """Return a name that studies with this recipe share, and that a changed recipe loses."""
        return f"{entry.peer or Path(entry.cfg).stem}-{self.recipe(entry)}"

    def measure(self, entry: Entry, seed: int, rows: Sequence[Row]) -> Row:
        """Train and judge an entry; return its row."""
        length = self._length(entry, seed, rows)
        # the epochs too: a run of another length must not be taken for this one
        tag = f"{self._tag(entry)}-{seed}-{length.epochs:g}ep"
        self._say(tag, f"{length.epochs:g} epochs" if length.epochs else "nothing to train")
        command = self._training(entry, tag, seed, length)
        costs = self.work / f"{tag}.cost.json"
        if costs.exists() and self._weights(tag):
            cost = Cost(**json.loads(costs.read_bytes()))  # only its probe is missing
        else:
            if entry.peer:  # begins anew after a stop
                costs.unlink(missing_ok=True)
                shutil.rmtree(self._folder(tag), ignore_errors=True)
            write_text(self.work / f"{tag}.where.json", json.dumps(_here(entry, self.tier)))
            cost = run(command, self.work / f"{tag}.log", costs)
        row: Row = {
            "study": self.study.name,
            "entry": entry.name,
            "recipe": self.recipe(entry),
            "evaluation": EVALUATION,
            "seed": seed,
            "epochs": length.epochs,
            **({"steps": length.steps} if length.steps else {}),
            **vars(cost),
            **self._training_figures(tag),
            **self._judge(entry, tag, seed),
            **read_json(self.work / f"{tag}.where.json"),  # of the training
            **({} if self._is_here or not length.epochs else {"length_of": self.machine}),
            "judged": commit(),
            "command": self._shown(command),
            "probe": self._shown(self._probe(entry, tag, seed, self.study.dataset)),
        }
        self._say(tag, f"k-NN 20 {row['knn20']:.1f}, linear {row['linear']:.1f}")
        return row

    # ---- the length of the run -------------------------------------------------------------------

    def knows_length(self, entry: Entry, rows: Sequence[Row]) -> bool:
        """Return whether an entry's epochs are known, or can be found out here."""
        timed = not (entry.peer in UNTRAINED or entry.epochs or entry.epochs_of)
        return self._is_here or not timed or bool(self.rows(entry, rows))

    def _length(self, entry: Entry, seed: int, rows: Sequence[Row]) -> Length:
        if entry.peer in UNTRAINED:
            return Length(0)
        if entry.epochs:
            return Length(entry.epochs)
        if entry.epochs_of:
            found = self.rows(self.study.entry(entry.epochs_of), rows)
            if seed not in found:
                raise ValueError(
                    f"entry {entry.name}: epochs_of needs a row of {entry.epochs_of} with seed "
                    f"{seed}; run it first"
                )
            return Length.of(found[seed])
        if not self._is_here:
            known = sorted(self.rows(entry, rows).values(), key=lambda row: number(row, "epochs"))
            return Length.of(known[len(known) // 2])
        budget = 60.0 * (entry.minutes or self.study.minutes)
        speed = self._speed(entry, seed, budget)
        # whole epochs would lose much of the budget where it holds few of them
        epochs = (budget - speed["start"]) / speed["epoch"]
        if entry.peer:
            length = Length(math.floor(epochs * 100) / 100)
        else:
            steps = math.floor(epochs * speed["epoch_steps"])
            length = Length(round(steps / speed["epoch_steps"], 2), steps)
        if length.epochs <= 0:
            raise ValueError(
                f"entry {entry.name}: an epoch takes {speed['epoch']:.0f} seconds, the start "
                f"{speed['start']:.0f}; give more minutes than {budget / 60:g}"
            )
        return length

    def _speed(self, entry: Entry, seed: int, budget: float) -> dict[str, float]:
        """Return the seconds of the start and of an epoch and its steps, measured once for a seed.

        Not once for all: on a shared machine a measurement is off by some percent, and the interval
        over the seeds has to contain that.
        """
        file = self.work / f"{self._tag(entry)}-{seed}.speed.json"
        if not file.exists():
            write_text(file, json.dumps(self._measured_speed(entry, seed, budget)))
        return json.loads(file.read_bytes())

    def _measured_speed(self, entry: Entry, seed: int, budget: float) -> dict[str, float]:
        tag = f"{self._tag(entry)}-{seed}-speed"
        # what an earlier driver left would resume, and its start would cost less
        shutil.rmtree(self._folder(tag), ignore_errors=True)
        self._say(tag, "measuring the speed")
        command = self._training(entry, tag, seed, Length(_MANY_EPOCHS))
        command += _without_warmup(entry)
        with (self.work / f"{tag}.log").open("wb") as log:
            child = start(command, log)
        try:
            points = list(self._watched(child, tag, max(_SPEED_LEAST, budget * _SPEED_SHARE)))
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait()
        epoch_steps = self._steps(tag)
        shutil.rmtree(self._folder(tag), ignore_errors=True)
        # the median: a burst of other work on the machine must not count
        pairs = itertools.pairwise(points)
        step = statistics.median((end - begin) / (b - a) for (a, begin), (b, end) in pairs)
        first, begin = points[0]
        return {
            "start": max(0.0, begin - first * step),
            "epoch": step * epoch_steps,
            "epoch_steps": epoch_steps,
        }

    def _watched(
        self, child: subprocess.Popen[bytes], tag: str, seconds: float
    ) -> Iterator[tuple[int, float]]:
        """Yield (step, seconds) at each change of the status, until enough are used.

        Seconds are those of CPUs, on a GPU those since the start: its time is nobody's CPU time.
        """
        last, begin, used, started = 0, 0.0, -1.0, time.monotonic()
        while used < seconds:
            if child.poll() is not None:
                raise ValueError(f"{tag} ended early; see {self.work / tag}.log")
            time.sleep(POLL)
            step = int(str(self._status(tag).get("step", 0)))
            now = time.monotonic() - started
            if self.tier == "cpu":
                now = tree_cpu_seconds(child.pid)
            if step > last:
                begin = now if not last else begin
                last, used = step, now - begin
                yield step, now

    def _steps(self, tag: str) -> float:
        status = self._status(tag)
        return number(status, "total") / number(status, "epochs")

    # ---- training and judging --------------------------------------------------------------------

    def _training(self, entry: Entry, tag: str, seed: int, length: Length) -> list[str]:
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
        if not self._is_here:
            # here bfloat16 may be slow, and its speed is in the number of epochs already
            opts.append("TRAIN.PRECISION=auto")
        opts += entry.opts
        return [sys.executable, str(ROOT / "main_pretrain.py"), *flags, "--opts", *opts]

    def _shown(self, command: Sequence[str]) -> str:
        """Return a command as it can be given elsewhere: places by their letters."""
        places = {self.data_path: "D", str(self.work): "O", sys.executable: "python"}
        words = [places.get(word, word) for word in command]
        words = [word.replace(f"{self.work}/", "O/").removeprefix(f"{ROOT}/") for word in words]
        return "OMP_NUM_THREADS=1 " + shlex.join(words)

    def _folder(self, tag: str) -> Path:
        return next(self.work.glob(f"*/{tag}"), self.work / tag)

    def _status(self, tag: str) -> Row:
        return read_json(self._folder(tag) / "status.json")

    def _training_figures(self, tag: str) -> Row:
        """Return medians of what the run itself wrote down."""
        metrics = self._folder(tag) / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else ()
        rows = [json.loads(line) for line in lines]
        found: Row = {}
        for name in ("images_per_second", "data_wait_percent", "gpu_memory_gib"):
            values = [row[name] for row in rows if name in row]
            if values:
                found[name] = statistics.median(values)
        return found

    def _weights(self, tag: str) -> Path | None:
        """Return the file of weights of a run that is done."""
        folder = self._folder(tag)
        if self._status(tag).get("state") == "done" or (folder / "backbone.pt").exists():
            return max([*folder.glob("ckpt_*.pt"), *folder.glob("backbone.pt")], default=None)
        return None

    def _judge(self, entry: Entry, tag: str, seed: int) -> Row:
        """Return the accuracies; a probe's rate is the best one on held-out training images."""
        dataset = self.study.dataset
        tests = self._probes(entry, tag, seed, dataset)
        choices = tests
        if f"{dataset}_held_out" in DATASETS:
            choices = self._probes(entry, tag, seed, f"{dataset}_held_out")
        found, rates = Row(), {}
        for labels, result in tests.items():
            accuracies, offered = result["final_by_lr"], choices[labels]["final_by_lr"]
            # in their order: of two equal rates always the first
            shared = [rate for rate in accuracies if rate in offered]
            rate = max(shared, key=lambda rate: offered[rate][0])
            found["linear" if labels == "100pct" else f"linear_{labels}"] = accuracies[rate][0]
            rates[labels] = float(rate)
        for k in (20, 200):
            # those of few labels have a bank of few images
            found[f"knn{k}"] = tests["100pct"][f"knn{k}_top1"]
        return found | {"probe_rates": rates}

    def _probes(self, entry: Entry, tag: str, seed: int, dataset: str) -> dict[str, Any]:
        """Train the linear probes on a data set; return the results by the share of labels."""
        probe = f"{tag}-probe{EVALUATION}-{dataset}"
        run(self._probe(entry, tag, seed, dataset), self.work / f"{probe}.log", None)
        results = [read_json(file) for file in self._folder(probe).glob("linear/*/result.json")]
        return {str(result["labels"]): result for result in results}

    def _probe(self, entry: Entry, tag: str, seed: int, dataset: str) -> list[str]:
        """Return the command that trains the linear probes."""
        program = [str(ROOT / "main_linear.py")]
        if entry.peer == "pixels":
            program = ["-m", "benchmarks.studies.raw_pixels"]
        command = [sys.executable, *program, "--cfg", entry.cfg]
        command += ["--data-path", self.data_path, "--dataset", dataset]
        command += ["--output", str(self.work), "--tag", f"{tag}-probe{EVALUATION}-{dataset}"]
        command += ["--seed", str(seed), "--pretrained", str(self._weights(tag))]
        command += ["--cached-features", "--labels", "1", "10", "100"]
        # last: the same numbers for all, whatever they were trained in
        return [*command, "--opts", *entry.opts, "KNN.K=[20,200]", "TRAIN.PRECISION=fp32"]

    def _say(self, tag: str, text: str) -> None:
        clock = datetime.now().strftime("%H:%M:%S")
        print(f"{clock} {self.study.name} {tag}: {text}", file=sys.stderr, flush=True)


def _without_warmup(entry: Entry) -> list[str]:
    """Return options that make a method's first steps cost as much as the later ones.

    SynCo makes no synthetic negatives while it warms up; the speed of those steps would buy it more
    epochs than its time holds.
    """
    keys = () if entry.peer else written_values(ROOT / entry.cfg)
    return [
        f"{key}=0" for key in keys if key.startswith("MODEL.") and key.endswith(".WARMUP_EPOCHS")
    ]


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


def _here(entry: Entry, tier: str) -> Row:
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
