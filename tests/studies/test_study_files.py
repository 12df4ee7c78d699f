"""What a study may say, what makes a recipe, and which rows count for it."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_studies import CLAIM, HEAD, row, study_of

from tools.parts.study import study as study_module
from tools.parts.study.study import (
    EVALUATION,
    Row,
    append_row,
    machine_named,
    machines_of,
    read_rows,
    read_study,
    results_of,
    rows_of,
)
from tools.parts.study.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_can_be_read_and_name_recipes_that_exist(path: Path) -> None:
    study = read_study(path)
    assert study.entries
    for entry in study.entries:
        assert (ROOT / entry.cfg).is_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD, "expects `entries:`"),
        (
            HEAD + "entries: {a: {cfg: c.yaml, lr: 3}}",
            "entries.a.lr is unknown; known keys: name, cfg",
        ),
        (HEAD + "entries: {a: {cfg: 3}}", "entries.a.cfg is 3, expected text"),
        (HEAD + "measure: knn\nentries: {a: {cfg: c}}", "there is no measure 'knn'; known: knn20"),
        (HEAD + "seed: 3\nentries: {a: {cfg: c.yaml}}", "study.seed is unknown"),
        (HEAD + "entries: {a: {cfg: c, epochs_of: b}}", "there is no entry 'b'; entries: a"),
        (HEAD + "entries: {a: {cfg: c, speed_like: b}}", "there is no entry 'b'; entries: a"),
        (
            HEAD + "entries: {a: {cfg: c, epochs: 3, minutes: 2}}",
            "entries.a has minutes and epochs; give minutes, epochs or epochs_of",
        ),
        (HEAD.replace("s: 1", "s: 0") + "entries: {a: {cfg: c}}", "entries.a has no length"),
        (HEAD + "differences: [[a, z]]\nentries: {a: {cfg: c}}", "there is no entry 'z'"),
        (CLAIM.replace("b,", "z,"), "there is no entry 'z'"),
        (CLAIM.replace("linear", "probe"), "there is no measure 'probe'"),
        (CLAIM.replace("0.4", "0.0"), "claims[0].gain is 0"),
        (CLAIM.replace("gain:", "gains:"), "claims[0].gains is unknown; known keys: first, second"),
    ],
)
def test_a_wrong_study_is_refused_with_its_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match="small") as error:
        study_of(tmp_path, text)
    assert said in str(error.value)


def test_an_unknown_study_is_answered_with_the_known_ones() -> None:
    done = subprocess.run(
        [sys.executable, "tools/reproduce.py", "method"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no study 'method'" in done.stderr
    assert "methods_resnet8" in done.stderr


def test_rows_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "small.jsonl"
    append_row(file, row("a", 0, 50.0))
    with file.open("a") as torn:
        torn.write('{"entry": "a", "se')
    append_row(file, row("a", 1, 52.0))
    assert sorted(rows_of(read_rows(file), "a")) == [0, 1]


def test_a_changed_peer_is_another_recipe_and_a_comment_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, HEAD + "entries: {a: {cfg: configs/demo.yaml, peer: lightly_moco}}")
    code = tmp_path / "peer_lightly.py"
    monkeypatch.setattr(study_module, "PEERS", tmp_path)
    digests = []
    for text in ("RATE = 0.06", "RATE = 0.06  # of its page", "RATE = 0.015"):
        code.write_text(text)
        digests.append(study.recipe(study.entries[0], "cpu"))
    assert digests[0] == digests[1] != digests[2]


def test_studies_share_rows_of_one_recipe_and_no_others(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("_BASE_: base.yaml\nSEED: 3\n")
    (tmp_path / "base.yaml").write_text("TRAIN: {EPOCHS: 5}\n")
    text = (
        f"entries: {{one: {{cfg: {recipe}}}, slow: {{cfg: {recipe}, opts: [SEED=4]}}, "
        f"as: {{cfg: {recipe}, epochs_of: slow}}, long: {{cfg: {recipe}, minutes: 2}}, "
        f"chance: {{cfg: {recipe}, peer: random}}}}"
    )
    study = study_of(tmp_path, HEAD + text)
    digests = {entry.name: study.recipe(entry, "cpu") for entry in study.entries}
    assert len(set(digests.values())) == 5
    other = study_of(tmp_path, HEAD.replace("T", "U") + f"entries: {{ours: {{cfg: {recipe}}}}}")
    assert other.recipe(other.entries[0], "cpu") == digests["one"]
    assert other.recipe(other.entries[0], "gpu") != digests["one"]
    rows: list[Row] = [
        {"recipe": digests["one"], "seed": 0, "evaluation": EVALUATION, "machine": "M"}
    ]
    # judged in another way: it does not count
    rows += [{"recipe": digests["slow"], "seed": 0, "evaluation": EVALUATION - 1, "machine": "M"}]
    assert results_of(study, rows, "cpu", "M")["one"] == {0: rows[0]}
    assert results_of(study, rows, "cpu", "M")["slow"] == {}
    # what makes a recipe may stand in its base
    (tmp_path / "base.yaml").write_text("TRAIN: {EPOCHS: 6}\n")
    assert study.recipe(study.entries[0], "cpu") != digests["one"]


def test_rows_of_two_machines_are_not_averaged(tmp_path: Path) -> None:
    """A faster machine trains more epochs in the same time."""
    text = "entries: {a: {cfg: configs/demo.yaml}, chance: {cfg: configs/demo.yaml, peer: random}}"
    study = study_of(tmp_path, HEAD + text)
    recipe, untrained = (study.recipe(entry, "cpu") for entry in study.entries)
    rows = [row(recipe, 0, 50.0), row(recipe, 1, 50.0), row(recipe, 0, 70.0) | {"machine": "fast"}]
    rows += [row(untrained, 0, 30.0) | {"machine": "fast"}]
    # neither a row that was judged in another way nor one that a newer row replaced
    rows += [row(recipe, seed, 9.0) | {"machine": "fast", "evaluation": 0} for seed in range(3)]
    rows += [row(recipe, 0, 70.0) | {"machine": "fast"}] * 3
    assert machines_of(study, rows, "cpu") == {"M": 2, "fast": 1}
    results = results_of(study, rows, "cpu", "M")
    assert [line["knn20"] for line in results["a"].values()] == [50.0, 50.0]
    # what is not trained is the same on all
    assert results["chance"][0]["knn20"] == 30.0
    assert "fast" not in markdown(study, {"a": results["a"], "chance": {}}, "cpu", "p")
    assert results_of(study, rows, "cpu", "fast")["a"][0]["knn20"] == 70.0
    assert machine_named("as", rows) == "fast"
    longer = row(recipe, 0, 70.0) | {"machine": "fast, 16 cores"}
    assert machine_named("fast", [*rows, longer]) == "fast"
    with pytest.raises(ValueError, match=r"--machine 'slow' is in 0 names .* rows: M; fast"):
        machine_named("slow", rows)
