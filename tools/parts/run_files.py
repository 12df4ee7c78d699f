"""Read what the folder of a run holds: configuration, status, metrics, results. Needs no torch."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

Row = dict[str, float]
SILENT_AFTER = 600.0  # seconds without a sign of life


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run say. What is absent or torn is empty."""

    folder: Path
    config: dict[str, object]  # dotted key -> value
    status: dict[str, object]
    starts: list[dict[str, object]]
    rows: list[Row]

    @property
    def name(self) -> str:
        """Return NAME/TAG, the last two parts of the folder."""
        return "/".join(self.folder.absolute().parts[-2:])

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return (epoch, value) of each finite value of the metric `name`."""
        points = ((row.get("epoch"), row.get(name)) for row in self.rows)
        return [(float(x), y) for x, y in points if x is not None and isinstance(y, int | float)]

    def events(self) -> list[tuple[float, str]]:
        """Return the epochs at which something happens to the curves, with its name."""
        config = self.config
        method = str(config.get("MODEL.NAME", "")).upper()
        events = []
        for key, name in (
            ("SCHEDULE.WARMUP_EPOCHS", "warm-up of the rate ends"),
            (f"MODEL.{method}.WARMUP_EPOCHS", "synthetic negatives join"),
            (f"MODEL.{method}.COOLDOWN_EPOCHS", "synthetic negatives leave"),
        ):
            epoch = config.get(key)
            if isinstance(epoch, int | float) and epoch > 0:
                events.append((float(epoch), name))
        return events + [(epoch, "restart") for epoch in self._restarts()]

    def _restarts(self) -> list[float]:
        # run.json has the steps of the starts, the curves have epochs.
        steps = [start.get("step") for start in self.starts[1:]]
        places = {int(step): epoch for epoch, step in self.curve("step")}
        later = ([p for s, p in places.items() if s >= step] for step in steps if type(step) is int)
        return [min(found) for found in later if found]

    def knn_names(self) -> list[str]:
        """Return the names of the k-NN accuracies that were measured, those of k = 20 first."""
        names = {key for row in self.rows for key in row if key[:3] == "knn" and "_top1" in key}
        return sorted(names, key=lambda name: (name != "knn20_top1", name))

    def best_knn(self) -> float | None:
        """Return the best k-NN accuracy, in percent."""
        names = self.knn_names()
        return max((y for _, y in self.curve(names[0])), default=None) if names else None

    def best_linear(self) -> float | None:
        """Return the best linear probe of this run's checkpoints on all labels, in percent."""
        results = [read_json(path) for path in sorted(self.folder.glob("linear/*/result.json"))]
        found = [
            result.get("best_top1")
            for result in results
            # neither the random baseline nor a file that is not named as a checkpoint
            if str(result.get("weights", "ckpt_")).startswith("ckpt_")
            and result.get("labels", "100pct") == "100pct"
        ]
        return max((value for value in found if isinstance(value, float)), default=None)

    def speed(self) -> float | None:
        """Return the median images/s of the lines of training."""
        # The median, since the first steps of a start are slow.
        rates = sorted(y for _, y in self.curve("images_per_second"))
        return rates[len(rates) // 2] if rates else None

    def step(self) -> int:
        """Return the last step that status.json or metrics.jsonl mentions."""
        status = self.status.get("step")
        last = max((int(row["step"]) for row in self.rows if "step" in row), default=0)
        return max(last, status if isinstance(status, int) else 0)

    def total(self) -> int | None:
        """Return the steps of the whole run: as the status says, else by the share of epochs."""
        if isinstance(total := self.status.get("total"), int):
            return total
        epochs, points = self.config.get("TRAIN.EPOCHS"), self.curve("step")
        if not isinstance(epochs, int) or not points or not points[-1][0]:
            return None
        return round(points[-1][1] / points[-1][0] * epochs)

    def silence(self) -> float:
        """Return the seconds since the run last wrote anything about itself."""
        files = [self.folder / name for name in ("status.json", "metrics.jsonl", "log.txt")]
        times = [path.stat().st_mtime for path in files if path.exists()]
        return max(0.0, time.time() - max(times, default=0.0))

    def state(self, silent_after: float = SILENT_AFTER) -> str:
        """Return the state; a run that says `running` but writes nothing is said to be silent."""
        state = str(self.status.get("state", "unknown"))
        alive = state in ("running", "starting")
        return f"{state}, silent" if alive and self.silence() > silent_after else state


def open_run_files(folder: Path) -> RunFiles:
    """Read the folder of a run; `ValueError` if it is none."""
    if not (folder / "config.yaml").is_file() and not (folder / "status.json").is_file():
        raise ValueError(f"{folder} is no folder of a run: it has no config.yaml or status.json")
    starts = read_json(folder / "run.json").get("starts")
    return RunFiles(
        folder,
        _read_config(folder / "config.yaml"),
        read_json(folder / "status.json"),
        [entry for entry in starts if isinstance(entry, dict)] if isinstance(starts, list) else [],
        _read_rows(folder / "metrics.jsonl"),
    )


def find_runs(root: Path) -> list[RunFiles]:
    """Return the pretraining runs below `root`, by path; `ValueError` if there is none."""
    found = [open_run_files(folder) for folder in _folders(root)]
    if not found:
        raise ValueError(f"{root} holds no run; name the folder that --output named")
    return found


def _folders(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        below.sort()
        if "status.json" in files:
            below.clear()  # probes live inside the folder of their run
            yield Path(folder)


def read_json(path: Path) -> dict[str, object]:
    """Return the object of a JSON file; empty if there is none or it is torn."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_rows(path: Path) -> list[Row]:
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_config(path: Path) -> dict[str, object]:
    return dict(flat(parsed_config(path.read_bytes()))) if path.is_file() else {}


def parsed_config(text: str | bytes) -> object:
    """Return what a yaml configuration holds; None if it is torn."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def value_at(tree: object, key: str) -> str:
    """Return the value of a dotted key of nested dictionaries, "?" if there is none."""
    for part in key.split("."):
        tree = tree.get(part, "?") if isinstance(tree, dict) else "?"
    return str(tree)


def flat(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of each leaf of nested dictionaries."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(runs: list[dict[str, object]]) -> list[tuple[str, list[object]]]:
    """Return the keys on which configurations differ, with the value of each."""
    keys = dict.fromkeys(key for run in runs for key in run)
    rows = [(key, [run.get(key, "-") for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if any(v != values[0] for v in values)]


def seconds_as_text(seconds: float) -> str:
    """Return a duration for people: 40 s, 12 min, 3.5 h, 2.1 d."""
    for limit, unit, size in ((100, "s", 1), (6000, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86_400:.1f} d"
