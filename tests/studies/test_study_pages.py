"""What the page and the picture of a study say of its rows."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_studies import CLAIM, HEAD, row, study_of

from tools.parts.study.pictures import picture
from tools.parts.study.study import (
    append_row,
    rows_of,
)
from tools.parts.study.tables import gains, interval, markdown

ROOT = Path(__file__).resolve().parents[2]


def test_the_interval_is_students() -> None:
    # mean 0 and standard deviation 1 of three values: 4.303 / sqrt(3)
    assert interval([-1.0, 0.0, 1.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-6)
    assert math.isnan(interval([1.0]))


def test_differences_are_of_equal_seeds_on_one_machine() -> None:
    rows = [row("a", 0, 50.0), row("a", 1, 60.0), row("b", 1, 58.0), row("b", 2, 10.0)]
    results = {name: rows_of(rows, name) for name in ("a", "b")}
    assert gains(results, "a", "b", "knn20") == [2.0]
    results["b"][1]["machine"] = "another"  # its precision may be another too
    assert gains(results, "a", "b", "knn20") == []
    results["b"][1]["epochs"] = 0  # not trained: the same everywhere
    assert gains(results, "a", "b", "knn20") == [2.0]
    results["b"][1]["epochs"] = 3
    results["a"][1]["machine"] = "another"
    assert gains(results, "a", "b", "knn20") == [2.0]


def test_a_difference_says_whether_both_had_the_same_time(tmp_path: Path) -> None:
    rows = [row("a", seed, 50.0) for seed in (0, 1)] + [row("b", seed, 48.0) for seed in (0, 1)]
    rows[0]["cpu_seconds"], rows[1]["cpu_seconds"] = 48.0, 54.0  # b: 60
    study = study_of(tmp_path, HEAD + "differences: [[a, b]]\nentries: {a: {cfg: c}, b: {cfg: c}}")
    results = {name: rows_of(rows, name) for name in ("a", "b")}
    assert "| a - b | 2 | 0.85 (0.80 to 0.90) | **+2.00 ± 0.00**" in markdown(
        study, results, "cpu", "p"
    )
    results["b"][1]["epochs"] = 0
    assert "| a - b | 2 |  | **+2.00 ± 0.00**" in markdown(study, results, "cpu", "p")


def test_a_difference_names_the_seeds_that_are_no_pairs(tmp_path: Path) -> None:
    rows = [row("a", seed, 50.0) for seed in (0, 1)] + [row("b", seed, 48.0) for seed in (0, 1, 2)]
    study = study_of(tmp_path, HEAD + "differences: [[a, b]]\nentries: {a: {cfg: c}, b: {cfg: c}}")
    results = {name: rows_of(rows, name) for name in ("a", "b")}
    assert "no pair" not in markdown(study, results, "cpu", "p")
    results["b"][1]["machine"] = "another"
    page = markdown(study, results, "cpu", "p")
    assert "| a - b | 1 |" in page
    assert "\n* a - b: no pair, trained on two machines: seed 1.\n" in page


def test_the_page_names_what_is_worse_than_pixels(tmp_path: Path) -> None:
    text = HEAD + "entries: {a: {cfg: c}, b: {cfg: c}, none: {cfg: c}, p: {cfg: c, peer: pixels}}"
    study = study_of(tmp_path, text)
    rows = [row("a", 0, 50.0), row("b", 0, 48.0), row("p", 0, 49.0)]
    results = {name: rows_of(rows, name) for name in ("a", "b", "none", "p")}
    assert "\nBelow p in k-NN 20: b.\n" in markdown(study, results, "cpu", "p")
    results["b"][0]["knn20"] = 49.5
    assert "Below" not in markdown(study, results, "cpu", "p")
    results["p"][0]["knn20"] = 60.0
    assert "\nBelow p in k-NN 20: all that was trained.\n" in markdown(study, results, "cpu", "p")


@pytest.mark.parametrize(
    ("gain", "found", "said"),
    [
        (0.4, [0.4, 0.5, 0.3, 0.4], "open: too few seeds"),
        (0.4, [0.4, 0.5, 0.3, 0.4, 0.4], "confirmed here |"),
        (0.4, [1.4, 1.5, 1.3, 1.4, 1.4], "confirmed here in its direction; +0.4 lies outside"),
        (0.4, [-1.4, -1.5, -1.3, -1.4, -1.4], "refuted here: the difference is the other way"),
        (-0.4, [0.4, 0.5, 0.3, 0.4, 0.4], "refuted here: the difference is the other way"),
        (0.4, [0.1, 0.9, -0.5, 0.6, -0.4], "open: the interval holds 0 and +0.4"),
        (0.4, [0.1, -0.1, 0.1, -0.1, 0.0], "refuted here: the interval holds 0, not +0.4"),
    ],
)
def test_a_claim_is_judged_by_the_interval_of_five_seeds(
    gain: float, found: list[float], said: str, tmp_path: Path
) -> None:
    study = study_of(tmp_path, CLAIM.replace("0.4", str(gain)))
    rows = [row("b", seed, 50.0) for seed in range(len(found))]
    rows += [row("a", seed, 50.0 + gained) for seed, gained in enumerate(found)]
    results = {name: rows_of(rows, name) for name in ("a", "b")}
    page = markdown(study, results, "cpu", "p")
    assert f"| a - b, linear: a paper | {gain:+.1f} | " in page
    assert f" | {len(found)} | {said}" in page


def test_a_difference_is_bold_where_its_interval_leaves_out_zero(tmp_path: Path) -> None:
    study = study_of(tmp_path, HEAD + "differences: [[a, b]]\nentries: {a: {cfg: c}, b: {cfg: c}}")
    rows = [row("a", seed, 60.0 + seed) for seed in range(3)]
    rows += [row("b", seed, 58.0 + 1.1 * seed) for seed in range(3)]
    results = {name: rows_of(rows, name) for name in ("a", "b")}
    page = markdown(study, results, "cpu", "p")
    assert "| a - b | 3 | 1.00 | **+1.90 ± 0.25** | +1.90 ± 0.25 |" in page
    # only what was chosen beforehand: of many measures one is beyond chance by chance
    page = markdown(replace(study, measure="knn200"), results, "cpu", "p")
    assert "| a - b | 3 | 1.00 | +1.90 ± 0.25 | **+1.90 ± 0.25** |" in page
    assert ">61.0<" in picture(study, results, "cpu")
    assert ">60.0<" in picture(replace(study, measure="knn200"), results, "cpu")


def test_the_page_has_what_was_run_and_nothing_else(tmp_path: Path) -> None:
    text = (
        HEAD
        + "notes: [differs in rate]\ndifferences: [[a, b]]\nentries: {a: {cfg: c}, b: {cfg: c}, never: {cfg: c}}"
    )
    study = study_of(tmp_path, text)
    rows = [row("a", 0, 50.0), row("a", 1, 52.0), row("b", 0, 49.0), row("b", 1, 50.0)]
    results = {name: rows_of(rows, name) for name in ("a", "b", "never")}
    page = markdown(study, results, "cpu", "small.svg")
    assert (
        "| a | 2 | 3 | 1.0 | 1.5 | 20 | 0.5 GiB | 51.0 ± 1.4 | 50.0 ± 1.4 | 52.0 ± 1.4 |  |  |"
        in page
    )
    assert "| never |  |  |  |  |  |  |  |  |  |  |  |" in page
    assert "| a - b | 2 | 1.00 | +1.50 ± 6.35 |" in page
    assert "* M, torch ?, ?, commits abc\n" in page
    assert "* differs in rate" in page
    assert "of the recipe on the test images" in page  # its data set has no held-out images
    assert "on a tenth of the training images" in markdown(
        replace(study, dataset="cifar10"), results, "cpu", "p"
    )
    assert "`python tools/reproduce.py small --data-path D`" in page
    assert "1 CPU minutes of training, unless a line says otherwise, on one thread" in page
    for found in results.values():
        found.update({seed: line | {"gpu_memory_gib": 5.25} for seed, line in found.items()})
    page = markdown(replace(study, minutes=0), results, "gpu", "small.svg")
    assert "| a | 2 | 3 | 1.0 | 1.5 | 30.0 | 5.2 GiB |" in page  # seconds of the clock
    assert "`python tools/reproduce.py small --data-path D --tier gpu`" in page
    assert "training on one GPU" in page
    drawn = picture(study, results, "cpu")
    assert "never" not in drawn
    assert drawn.index(">a<") < drawn.index(">b<")  # the best on top


def test_accuracy_over_time_is_drawn_by_lines(tmp_path: Path) -> None:
    text = (
        "entries: {a5: {cfg: c, line: us, minutes: 5}, b: {cfg: c, line: them}, "
        "a20: {cfg: c, line: us, minutes: 20}, later: {cfg: c, line: us, minutes: 97}, "
        "chance: {cfg: c, line: chance, peer: random}}"
    )
    study = study_of(tmp_path, HEAD + text)
    rows = [row("a5", 0, 50.0), row("a20", 0, 60.0), row("a20", 1, 62.0), row("b", 0, 40.0)]
    rows += [row("chance", 0, 30.0)]
    # a point lies where its run ended, not where it should have
    rows = [
        line | {"cpu_seconds": 60.0 * {"a5": 5, "b": 17}.get(str(line["recipe"]), 20)}
        for line in rows
    ]
    results = {entry.name: rows_of(rows, entry.name) for entry in study.entries}
    drawn = picture(study, results, "cpu")
    assert ">us 61.0<" in drawn  # the mean, at the end of the line
    assert ">them 40.0<" in drawn
    ours, theirs = re.findall(r'points="([^"]*)"', drawn)
    assert ours.count(",") == 2
    assert float(theirs.split(",")[0]) < float(ours.split()[1].split(",")[0])
    assert drawn.count('fill="#fff" stroke') == 2  # a5 and b: one seed each
    assert ">chance 30.0<" in drawn
    assert drawn.count("stroke-dasharray") == 1  # a level: it takes no time
    assert 'middle">60<' not in drawn  # nothing was run for so long
    assert ">CPU minutes of training; each point" in drawn
    assert ">minutes of training; each point" in picture(study, results, "gpu")
    # trained on another machine, for as many epochs as 97 minutes hold
    results["later"] = {0: row("later", 0, 70.0) | {"cpu_seconds": 9999.0, "length_of": "M"}}
    drawn = picture(study, results, "cpu")
    assert ">us 70.0<" in drawn
    assert 'middle">60<' in drawn


def test_a_page_has_the_machine_with_the_most_rows_or_the_one_that_is_named(tmp_path: Path) -> None:
    study = study_of(tmp_path, HEAD + "entries: {a: {cfg: configs/demo.yaml}}")
    recipe = study.recipe(study.entries[0], "cpu")
    for line in (
        row(recipe, 0, 70.0) | {"machine": "fast"},
        row(recipe, 0, 50.0),
        row(recipe, 1, 50.0),
    ):
        append_row(tmp_path / "studies.jsonl", line)
    command = [sys.executable, "tools/reproduce.py", str(tmp_path / "small.yaml"), "--render"]
    command += ["--results", str(tmp_path)]
    for words, shown, left in (
        ([], "50.0", "1 row of fast"),
        (["--machine", "fast"], "70.0", "2 rows of M"),
    ):
        done = subprocess.run(
            [*command, *words], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert f"left out: {left}; --machine shows them" in done.stderr
        assert f"| {shown} |" in (tmp_path / "small.md").read_text().replace(" ± 0.0", "")
