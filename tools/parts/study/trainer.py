"""Train one entry of a study for its time, judge it, and say what it cost."""

import contextlib
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.parts.run_files import read_json
from tools.parts.study.costs import Cost, run
from tools.parts.study.lengths import Lengths
from tools.parts.study.runs import Runs, made_here
from tools.parts.study.study import EVALUATION, ROOT, Entry, Row
from utils.checkpoints.atomic import write_text
from utils.checkpoints.locks import try_lock
from utils.cli.version import commit
from utils.config.datasets import DATASETS


@dataclass(frozen=True)
class Trainer:
    """Trains and judges the entries of a study."""

    runs: Runs

    @contextlib.contextmanager
    def only_here(self, entry: Entry, seed: int) -> Iterator[bool]:
        """Yield whether no other driver has this entry and seed in hand."""
        self.runs.work.mkdir(parents=True, exist_ok=True)
        with (self.runs.work / f"{self.runs.tag(entry)}-{seed}.lock").open("a+") as file:
            yield try_lock(file, self.runs.work)

    def measure(self, entry: Entry, seed: int, rows: Sequence[Row]) -> Row:
        """Train and judge an entry; return its row."""
        lengths = Lengths(self.runs)
        length = lengths.of(entry, seed, rows)
        # the epochs too: a run of another length must not be taken for this one
        tag = f"{self.runs.tag(entry)}-{seed}-{length.epochs:g}ep"
        self.runs.say(tag, f"{length.epochs:g} epochs" if length.epochs else "nothing to train")
        command = self.runs.training(entry, tag, seed, length)
        costs = self.runs.work / f"{tag}.cost.json"
        if costs.exists() and self._weights(tag):
            cost = Cost(**json.loads(costs.read_bytes()))  # only its probe is missing
        else:
            if entry.peer:  # begins anew after a stop
                costs.unlink(missing_ok=True)
                shutil.rmtree(self.runs.folder(tag), ignore_errors=True)
            write_text(
                self.runs.work / f"{tag}.where.json",
                json.dumps(made_here(entry, self.runs.tier)),
            )
            cost = run(command, self.runs.work / f"{tag}.log", costs)
        row: Row = {
            "study": self.runs.study.name,
            "entry": entry.name,
            "recipe": self.runs.recipe(entry),
            "evaluation": EVALUATION,
            "seed": seed,
            "epochs": length.epochs,
            **({"steps": length.steps} if length.steps else {}),
            **vars(cost),
            **self._training_figures(tag),
            **self._judge(entry, tag, seed),
            **read_json(self.runs.work / f"{tag}.where.json"),  # of the training
            **lengths.whose(entry, length, rows),
            "judged": commit(),
            "command": self.runs.shown(command),
            "probe": self.runs.shown(self._probe(entry, tag, seed, self.runs.study.dataset)),
        }
        self.runs.say(tag, f"k-NN 20 {row['knn20']:.1f}, linear {row['linear']:.1f}")
        return row

    def _training_figures(self, tag: str) -> Row:
        """Return medians of what the run itself wrote down."""
        metrics = self.runs.folder(tag) / "metrics.jsonl"
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
        folder = self.runs.folder(tag)
        if self.runs.status(tag).get("state") == "done" or (folder / "backbone.pt").exists():
            return max([*folder.glob("ckpt_*.pt"), *folder.glob("backbone.pt")], default=None)
        return None

    def _judge(self, entry: Entry, tag: str, seed: int) -> Row:
        """Return the accuracies; a probe's rate is the best one on held-out training images."""
        dataset = self.runs.study.dataset
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
        run(self._probe(entry, tag, seed, dataset), self.runs.work / f"{probe}.log", None)
        results = [read_json(file) for file in self.runs.folder(probe).glob("linear/*/result.json")]
        return {str(result["labels"]): result for result in results}

    def _probe(self, entry: Entry, tag: str, seed: int, dataset: str) -> list[str]:
        """Return the command that trains the linear probes."""
        program = [str(ROOT / "main_linear.py")]
        if entry.peer == "pixels":
            program = ["-m", "benchmarks.studies.raw_pixels"]
        command = [sys.executable, *program, "--cfg", entry.cfg]
        command += ["--data-path", self.runs.data_path, "--dataset", dataset]
        command += [
            "--output",
            str(self.runs.work),
            "--tag",
            f"{tag}-probe{EVALUATION}-{dataset}",
        ]
        command += ["--seed", str(seed), "--pretrained", str(self._weights(tag))]
        command += ["--cached-features", "--labels", "1", "10", "100"]
        # last: the same numbers for all, whatever they were trained in
        return [*command, "--opts", *entry.opts, "KNN.K=[20,200]", "TRAIN.PRECISION=fp32"]
