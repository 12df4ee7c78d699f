"""The committed pages of the studies, and README's figures, are what the committed rows give."""

import statistics
from pathlib import Path

import pytest

from tools.parts.study.pictures import picture
from tools.parts.study.study import Results, machines_of, number, read_rows, read_study, results_of
from tools.parts.study.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "results"
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))
RUN_ON_CPU = [path for path in STUDIES if (PAGES / f"{path.stem}.md").exists()]


def results_from_rows(name: str) -> Results:
    study = read_study(ROOT / "benchmarks" / "studies" / f"{name}.yaml")
    rows = read_rows(PAGES / "studies.jsonl")
    return results_of(study, rows, "cpu", next(iter(machines_of(study, rows, "cpu"))))


@pytest.mark.parametrize("path", RUN_ON_CPU, ids=lambda path: path.stem)
def test_a_page_and_its_picture_are_those_of_the_rows(path: Path) -> None:
    study, results = read_study(path), results_from_rows(path.stem)
    said = f"python tools/reproduce.py {path.stem} --render"
    assert (PAGES / f"{path.stem}.md").read_text() == markdown(
        study, results, "cpu", f"{path.stem}.svg"
    ), said
    assert (PAGES / f"{path.stem}.svg").read_text() == picture(study, results, "cpu"), said


def mean(results: Results, entry: str) -> str:
    return f"{statistics.mean(number(row, 'knn20') for row in results[entry].values()):.1f}"


def test_the_figures_of_readme_are_those_of_the_rows() -> None:
    readme = (ROOT / "README.md").read_text()
    methods = results_from_rows("methods_resnet8")
    table = [line for line in readme.splitlines() if "](docs/methods/" in line and "arxiv" in line]
    table += [line for line in readme.splitlines() if line.startswith("| [SynCo-v2](docs/methods")]
    assert len(table) == 8
    for line in table:
        entry = line.split("docs/methods/")[1].split(".md")[0]
        assert line.endswith(f" {mean(methods, entry)} |"), line
    bullet = readme.split("**Twenty CPU minutes")[1].split("\n* ")[0]
    best, peers = results_from_rows("best_recipe"), results_from_rows("peers")
    for entry in ("best, 20 min", "best, 60 min"):
        assert mean(best, entry) in bullet, entry
    for entry in ("ours, MoCo v2", "lightly, MoCo", "stable-pretraining, SimCLR", "raw pixels"):
        assert mean(peers, entry) in bullet, entry
    below = readme.split("CIFAR-10: k-NN accuracy")[1].split("\n\n")[0]
    for entry in ("random", "raw pixels"):
        assert mean(methods, entry) in below, entry
