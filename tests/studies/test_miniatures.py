"""Each study of benchmarks/studies from end to end, an epoch of 4,000 digits in place of its time."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tools.parts.study.runs import Runs, this_machine
from tools.parts.study.study import UNTRAINED, Entry, read_study
from tools.parts.study.tables import markdown
from tools.parts.study.trainer import Trainer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))


def different_entries() -> list[tuple[str, str]]:
    """Return study and name of each entry, of those that differ only in their length one."""
    found = {}
    for path in STUDIES:
        for entry in read_study(path).entries:
            found[entry.cfg, entry.peer, entry.opts] = path.stem, entry.name
    return sorted(found.values())


def miniature(entry: Entry) -> Entry:
    """Return the entry with the length of a test and, for a GPU's, a network for a CPU."""
    if entry.peer in UNTRAINED:
        return entry
    opts = entry.opts
    if "resnet18" in entry.cfg:
        opts += ("MODEL.BACKBONE.NAME=resnet8", "MODEL.BACKBONE.STEM=cifar_stride2")
    epochs = 0.1 if entry.peer else 1.0
    return replace(entry, opts=opts, minutes=0, epochs=epochs, epochs_of="")


@pytest.mark.parametrize(("name", "title"), different_entries())
def test_a_row_of_each_entry_is_made_by_its_command(name: str, title: str, tmp_path: Path) -> None:
    study = replace(read_study(ROOT / "benchmarks" / "studies" / f"{name}.yaml"), dataset="mnist5k")
    entry = miniature(study.entry(title))
    library = entry.peer.rpartition("_")[0]
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    study = replace(study, entries=(entry,), differences=(), claims=())
    row = Trainer(Runs(study, tmp_path, "", "cpu", this_machine("cpu"))).measure(entry, 0, [])
    row = json.loads(json.dumps(row))  # a row is a line of JSON
    for measure in ("knn20", "knn200", "linear", "linear_1pct", "linear_10pct"):
        assert 10 < row[measure] < 100  # chance is 10
    assert row["cpu_seconds"] > 0
    assert str(tmp_path) not in row["command"] + row["probe"]
    assert f"| {title} | 1 |" in markdown(study, {title: {0: row}}, "cpu", "p")
