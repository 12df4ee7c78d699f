"""tools/reproduce.py: what a study may say, what its rows become, and a miniature run from end to end."""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from tools.parts.study import costs, lengths, pictures
from tools.parts.study import study as study_module
from tools.parts.study import trainer as trainer_module
from tools.parts.study.costs import tree_cpu_seconds
from tools.parts.study.lengths import Lengths
from tools.parts.study.pictures import picture
from tools.parts.study.runs import Length, Runs, this_machine
from tools.parts.study.study import (
    EVALUATION,
    Entry,
    Row,
    Study,
    append_row,
    machine_named,
    machines_of,
    read_rows,
    read_study,
    results_of,
    rows_of,
)
from tools.parts.study.tables import gains, interval, markdown
from tools.parts.study.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))


def study_of(tmp_path: Path, text: str) -> Study:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return read_study(path)


HEAD = "title: T\ndataset: mnist5k\nminutes: 1\nseeds: [0, 1]\n"
CLAIM = (
    HEAD
    + "claims: [{first: a, second: b, measure: linear, gain: 0.4, source: a paper}]\n"
    + "entries: {a: {cfg: c}, b: {cfg: c}}"
)


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


def row(entry: str, seed: int, knn: float) -> dict[str, object]:
    return {
        "recipe": entry, "seed": seed, "knn20": knn, "knn200": knn - 1, "linear": knn + 1, "epochs": 3,
        "cpu_seconds": 60.0, "wall_seconds": 90.0, "peak_mib": 512.0, "evaluation": EVALUATION, "commit": "abc", "machine": "M",
    }  # fmt: skip


def test_rows_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "small.jsonl"
    append_row(file, row("a", 0, 50.0))
    with file.open("a") as torn:
        torn.write('{"entry": "a", "se')
    append_row(file, row("a", 1, 52.0))
    assert sorted(rows_of(read_rows(file), "a")) == [0, 1]


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
    assert "| a - b | 2 | 0.85 | **+2.00 ± 0.00**" in markdown(study, results, "cpu", "p")
    results["b"][1]["epochs"] = 0
    assert "| a - b | 2 |  | **+2.00 ± 0.00**" in markdown(study, results, "cpu", "p")


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
    assert "chosen on the test images" in page  # its data set has no held-out images
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


def test_cpu_seconds_hold_those_of_children() -> None:
    work = "sum(i * i for i in range(3_000_000))"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{work}']); print('x', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    one = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert tree_cpu_seconds(process.pid) > tree_cpu_seconds(one.pid) + 0.05
    for started in (process, one):
        started.communicate(None if started is one else "")


def test_a_recorded_command_names_no_place_of_this_machine(tmp_path: Path) -> None:
    study = study_of(tmp_path, HEAD + "entries: {a: {cfg: configs/demo.yaml}}")
    trainer = Trainer(Runs(study, tmp_path / "work", "/data/somewhere", "cpu", this_machine("cpu")))
    shown = trainer.runs.shown(
        trainer.runs.training(Entry("a", "configs/demo.yaml"), "a-0-3ep", 0, Length(3))
    )
    assert shown.startswith(
        "OMP_NUM_THREADS=1 python main_pretrain.py --cfg configs/demo.yaml --data-path D"
    )
    assert "--output O" in shown
    assert "/" not in shown.replace("configs/demo.yaml", "")


def test_a_run_that_is_done_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, HEAD + "entries: {a: {cfg: configs/demo.yaml}}")
    trainer = Trainer(Runs(study, tmp_path / "work", "", "cpu", this_machine("cpu")))
    tag = f"demo-{trainer.runs.recipe(study.entries[0])}-0-7ep"
    folder = tmp_path / "work" / "demo" / tag
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "done"}')
    (folder / "ckpt_00000007.pt").touch()
    cost = {"cpu_seconds": 5.0, "wall_seconds": 6.0, "peak_mib": 7.0}
    (tmp_path / "work" / f"{tag}.cost.json").write_text(json.dumps(cost))
    (tmp_path / "work" / f"{tag}.where.json").write_text('{"commit": "of the training"}')
    monkeypatch.setattr(
        Lengths, "_measured_speed", lambda *_: {"start": 4.0, "epoch": 8.0, "epoch_steps": 50}
    )
    monkeypatch.setattr(Trainer, "_judge", lambda *_: {"knn20": 1.0, "linear": 2.0})
    monkeypatch.setattr("tools.parts.study.trainer.run", lambda *_: pytest.fail("trained again"))
    row = trainer.measure(study.entries[0], 0, [])
    assert row["epochs"] == 7  # (60 - 4) / 8
    assert row["commit"] == "of the training"
    assert "main_linear.py --cfg configs/demo.yaml" in str(row["probe"])
    assert f"--pretrained O/demo/{tag}/ckpt_00000007.pt" in str(row["probe"])
    assert row["cpu_seconds"] == 5.0
    # the speed is measured once for a seed
    monkeypatch.setattr(
        Lengths, "_measured_speed", lambda *_: {"start": 4.0, "epoch": 7.0, "epoch_steps": 50}
    )
    assert Lengths(trainer.runs).of(study.entries[0], 0, []) == Length(7, 350)
    assert Lengths(trainer.runs).of(study.entries[0], 1, []) == Length(8, 400)


def test_the_length_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(
        tmp_path,
        HEAD + "entries: {a: {cfg: configs/demo.yaml}, as: {cfg: configs/demo.yaml, epochs_of: a}, "
        "slow: {cfg: configs/demo.yaml, peer: lightly_moco}}",
    )
    trainer = Trainer(Runs(study, tmp_path, "", "cpu", this_machine("cpu")))
    monkeypatch.setattr(
        Lengths, "_measured_speed", lambda *_: {"start": 4.0, "epoch": 30.0, "epoch_steps": 117}
    )
    ours, same, slow = study.entries
    # (60 - 4) / 30 epochs: whole ones would lose half of the time
    assert Lengths(trainer.runs).of(ours, 0, []) == Length(1.86, 218)
    assert Lengths(trainer.runs).of(slow, 0, []) == Length(1.86)
    command = trainer.runs.training(ours, "t", 0, Length(1.86, 218))
    assert "--epochs" not in command
    assert "TRAIN.STEPS=218" in command
    assert "1.86" in trainer.runs.training(slow, "t", 0, Length(1.86))
    # a time that holds only the start: an untrained network must not pass for the library's
    for entry in (ours, slow):
        with pytest.raises(ValueError, match=r"give more minutes than 0\.05"):
            Lengths(trainer.runs).of(replace(entry, minutes=0.05, opts=("SEED=1",)), 0, [])
    recipe = trainer.runs.recipe(ours)
    here = {"machine": this_machine("cpu")}
    rows: list[Row] = [
        row(recipe, 0, 50.0) | here,
        row(recipe, 1, 50.0) | here | {"epochs": 5.5, "steps": 9},
    ]
    # those of its seed
    assert [Lengths(trainer.runs).of(same, seed, rows) for seed in (0, 1)] == [
        Length(3),
        Length(5.5, 9),
    ]
    with pytest.raises(ValueError, match=r"entry as: epochs_of needs a row of a with seed 2"):
        Lengths(trainer.runs).of(same, 2, rows)
    fixed = replace(ours, epochs=200.0)
    assert Lengths(trainer.runs).of(fixed, 0, []) == Length(200)
    assert trainer.runs.recipe(fixed) != recipe


def test_the_speed_is_that_of_steps_with_synthetic_negatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SynCo once got 6 % more time than MoCo: its first epochs, which are cheap, were measured."""
    text = "{cfg: benchmarks/studies/recipes/synco_resnet8.yaml}"
    study = study_of(tmp_path, HEAD + f"entries: {{a: {text}}}")
    trainer, given = Trainer(Runs(study, tmp_path, "", "cpu", this_machine("cpu"))), []
    monkeypatch.setattr(lengths, "start", lambda command, _: given.append(command) or mock.Mock())
    # one interval of three was slowed by other work
    points = [(1, 2.0), (11, 12.0), (21, 42.0), (31, 52.0)]
    monkeypatch.setattr(Lengths, "_watched", lambda *_: points)
    monkeypatch.setattr(Lengths, "_steps", lambda *_: 30.0)
    assert Lengths(trainer.runs)._speed(study.entries[0], 0, 60.0) == {
        "start": 1.0,
        "epoch": 30.0,
        "epoch_steps": 30.0,
    }
    assert given[0][-1] == "MODEL.SYNCO.WARMUP_EPOCHS=0"
    assert "--opts" in given[0]
    # the run itself has its warm-up
    assert "MODEL.SYNCO.WARMUP_EPOCHS=0" not in trainer.runs.training(
        study.entries[0], "t", 0, Length(3)
    )


def test_a_gpu_is_measured_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits for its GPU uses no CPU: its epochs would look free."""
    study = study_of(tmp_path, HEAD + "entries: {a: {cfg: configs/demo.yaml}}")
    steps = iter(range(1, 100))
    monkeypatch.setattr(Runs, "status", lambda *_: {"step": next(steps)})
    monkeypatch.setattr(lengths, "tree_cpu_seconds", lambda _: 0.25 * next(steps))
    monkeypatch.setattr(lengths, "POLL", 0.05)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        by_cpu = list(
            Lengths(Runs(study, tmp_path, "", "cpu", this_machine("cpu")))._watched(child, "a", 1.0)
        )
        by_clock = list(
            Lengths(Runs(study, tmp_path, "", "gpu", this_machine("cpu")))._watched(child, "a", 0.2)
        )
        child.communicate()
    # the CPU's seconds are those of the stand-in: half a second from one look to the next
    assert by_cpu == [(1, 0.5), (3, 1.0), (5, 1.5)]
    assert 0.2 <= by_clock[-1][1] - by_clock[0][1] < 60


def test_a_run_is_judged_by_all_labels_and_a_rate_chosen_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published k-NN once had the bank of 1 % of the labels, by the order of the folders."""

    def probes(_: Trainer, entry: Entry, tag: str, seed: int, dataset: str) -> dict[str, object]:
        held_out = dataset.endswith("held_out")
        few = {"knn20_top1": 30.0, "knn200_top1": 31.0}
        many = {"knn20_top1": 50.0, "knn200_top1": 51.0}
        # the best rate on the test images is another one than the best on the held-out ones
        rates = (
            {"0.1": [40.0, 0], "1": [20.0, 0]} if held_out else {"0.1": [41.0, 0], "1": [60.0, 0]}
        )
        found = {"100pct": many | {"final_by_lr": rates}, "1pct": few | {"final_by_lr": rates}}
        return dict(reversed(found.items())) if seed else found

    monkeypatch.setattr(Trainer, "_probes", probes)
    study = study_of(tmp_path, HEAD + "entries: {a: {cfg: configs/demo.yaml}}")
    trainer = Trainer(
        Runs(replace(study, dataset="cifar10"), tmp_path, "", "cpu", this_machine("cpu"))
    )
    expected: Row = {"knn20": 50.0, "knn200": 51.0, "linear": 41.0, "linear_1pct": 41.0}
    expected["probe_rates"] = {"100pct": 0.1, "1pct": 0.1}
    assert trainer._judge(study.entries[0], "a", 0) == expected
    assert trainer._judge(study.entries[0], "a", 1) == expected


def test_of_two_equal_rates_the_first_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of rates once gave another accuracy in each process."""
    rates = {f"{rate}": [50.0, 0] for rate in range(1, 40)}
    result = {"final_by_lr": rates, "knn20_top1": 50.0, "knn200_top1": 51.0}
    monkeypatch.setattr(Trainer, "_probes", lambda *_: {"100pct": result})
    study = study_of(tmp_path, HEAD + "entries: {a: {cfg: configs/demo.yaml}}")
    judged = Trainer(Runs(study, tmp_path, "", "cpu", this_machine("cpu")))._judge(
        study.entries[0], "a", 0
    )
    assert judged["probe_rates"] == {"100pct": 1.0}


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


def test_a_row_is_added_to_the_table_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains what the other machine's time holds; its own time says nothing there."""
    text = "entries: {a: {cfg: configs/demo.yaml}, new: {cfg: configs/demo.yaml, opts: [SEED=1]}, "
    text += "as: {cfg: configs/demo.yaml, epochs_of: a}, slow: {cfg: c, peer: lightly_moco}}"
    study = study_of(tmp_path, HEAD + text.replace("cfg: c,", "cfg: configs/demo.yaml,"))
    trainer = Trainer(Runs(study, tmp_path, "", "cpu", "M"))
    ours, new, same, slow = study.entries
    rows = [row(trainer.runs.recipe(ours), 0, 50.0)]
    monkeypatch.setattr(Lengths, "_measured_speed", lambda *_: pytest.fail("measured here"))
    monkeypatch.setattr(Trainer, "_weights", lambda *_: Path("w.pt"))
    monkeypatch.setattr(Trainer, "_judge", lambda *_: {"knn20": 52.0, "linear": 2.0})
    cost = costs.Cost(600.0, 600.0, 7.0)
    given: list[list[str]] = []
    monkeypatch.setattr(trainer_module, "run", lambda command, *_: given.append(command) or cost)
    added = trainer.measure(ours, 1, rows)
    assert (added["epochs"], added["length_of"]) == (3, "M")
    assert added["machine"] == this_machine("cpu") != "M"
    # bfloat16 may be slow here; a precision that is the recipe's stays
    assert given[0][-1] == "TRAIN.PRECISION=auto"
    fixed = replace(ours, opts=("TRAIN.PRECISION=fp32",))
    assert trainer.runs.training(fixed, "t", 0, Length(3))[-1] == "TRAIN.PRECISION=fp32"
    assert "TRAIN.PRECISION=auto" not in trainer.runs.training(slow, "t", 0, Length(3))
    assert trainer.measure(same, 0, rows)["length_of"] == "M"
    # nobody knows what its time holds on M
    assert not Lengths(trainer.runs).is_known(new, rows)
    assert Lengths(trainer.runs).is_known(ours, rows)
    found = trainer.runs.rows(ours, [*rows, json.loads(json.dumps(added))])
    page = markdown(study, {"a": found, "new": {}, "as": {}, "slow": {}}, "cpu", "p")
    assert "| a | 1 + 1 | 3 | 1.0 | 1.5 | 20 | 0.5 GiB | 51.0 ± 1.4 |" in page
    assert "for as many epochs as M trains in the time" in page
    assert "That took 10 to 10 CPU minutes" in page
    assert "The machine is shared: 1.00 to 1.00 of the time was used." in page
    # a point over time lies where M needed it
    point = pictures._point(list(found.values()), "cpu", "knn20")
    assert point
    assert (point.minutes, point.mean) == (1.0, 51.0)
    only_added = {"a": {1: added}, "new": {}, "as": {}, "slow": {}}
    assert "| a | 0 + 1 | 3 |  |  |  |  | 52.0 |" in markdown(study, only_added, "cpu", "p")


def test_an_entry_that_the_other_machine_never_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its epochs come from an entry like it, which that machine did run."""
    text = "entries: {a: {cfg: configs/demo.yaml}, new: {cfg: configs/demo.yaml, opts: [SEED=1], "
    text += "minutes: 2, speed_like: a}, alone: {cfg: configs/demo.yaml, opts: [SEED=2]}}"
    study = study_of(tmp_path, HEAD + text)
    trainer = Trainer(Runs(study, tmp_path, "", "cpu", "M"))
    ours, new, alone = study.entries
    speeds = {"a": {"start": 5.0, "epoch": 25.0}, "new": {"start": 10.0, "epoch": 38.0}}
    monkeypatch.setattr(
        Lengths, "_measured_speed", lambda _, entry, *__: speeds[entry.name] | {"epoch_steps": 100}
    )
    monkeypatch.setattr(Trainer, "_weights", lambda *_: Path("w.pt"))
    monkeypatch.setattr(Trainer, "_judge", lambda *_: {"knn20": 52.0, "linear": 2.0})
    monkeypatch.setattr(trainer_module, "run", lambda *_: costs.Cost(600.0, 600.0, 7.0))
    known = Lengths(trainer.runs).is_known
    assert not known(new, [])  # nor does anyone know what the time of M is worth
    rows = [row(trainer.runs.recipe(ours), 0, 50.0)]
    assert known(new, rows)
    assert not known(alone, rows)
    # 3 epochs of `a`, 60 seconds there, take 5 + 3 * 25 = 80 here; so 120 there are 160 here
    added = trainer.measure(new, 0, rows)
    assert (added["epochs"], added["steps"]) == (3.94, 394)  # (160 - 10) / 38
    assert (added["length_of"], added["length_like"]) == ("M", "a")
    page = markdown(study, {"a": {0: rows[0]}, "new": {0: added}, "alone": {}}, "cpu", "p")
    assert "M never ran `new`." in page
    # the other seeds train as long, and a row that M timed counts more than the computed ones
    monkeypatch.setattr(Lengths, "_measured_speed", lambda *_: pytest.fail("measured again"))
    rows.append(added)
    assert trainer.measure(new, 1, rows)["length_like"] == "a"
    timed = row(trainer.runs.recipe(new), 2, 50.0)
    rows.append(timed)
    later = trainer.measure(new, 1, rows)
    assert later["epochs"] == timed["epochs"] == 3
    assert "length_like" not in later
    page = markdown(study, {"a": {}, "new": {0: added, 2: timed}, "alone": {}}, "cpu", "p")
    assert "never ran" not in page


def test_a_cost_is_kept_while_the_run_lasts_and_added_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_TELL", 0.0)
    kept, seen = tmp_path / "cost.json", []
    keep = costs._keep
    monkeypatch.setattr(costs, "_keep", lambda *given: seen.append(given) or keep(*given))
    # every run has one thread, whatever the shell says
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    work = "import os; assert os.environ['OMP_NUM_THREADS'] == '1'; "
    work += "import time, sys; sum(i * i for i in range(3_000_000)); time.sleep(1.5)"
    first = costs.run([sys.executable, "-c", work], tmp_path / "log", kept)
    assert len(seen) > 1  # not only at the end: a driver that is killed loses little
    assert all(mib > 1 for *_, mib in seen)
    assert first.cpu_seconds > 0.05
    second = costs.run([sys.executable, "-c", work], tmp_path / "log", kept)
    assert second.cpu_seconds > first.cpu_seconds + 0.05
    assert second.peak_mib >= first.peak_mib > 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_a_killed_driver_leaves_no_run_behind(tmp_path: Path) -> None:
    """A run that measures the speed would train on for 100,000 epochs."""
    child = f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(120)"
    script = "import sys; from pathlib import Path; from tools.parts.study import costs; "
    script += "costs.run([sys.executable, '-c', sys.argv[1]], Path(sys.argv[2]), None)"
    log = str(tmp_path / "log")
    driver = subprocess.Popen([sys.executable, "-c", script, child, log], cwd=ROOT)
    pid = tmp_path / "pid"
    until(lambda: pid.exists() and bool(pid.read_text()))
    driver.kill()
    driver.wait()
    until(lambda: not alive(pid))


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: Path) -> bool:
    stat = Path("/proc", pid.read_text(), "stat")
    # a zombie waits only for its new parent to look
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_miniature_study_from_end_to_end(tmp_path: Path) -> None:
    text = (
        "title: T\ndataset: mnist5k\nminutes: 0.4\nseeds: [0]\nentries:\n  a: {cfg: configs/demo.yaml}\n"
        "  b: {cfg: configs/demo.yaml, epochs_of: a, opts: [OPTIM.BASE_LR=1e-3]}\n"
        "  random: {cfg: configs/demo.yaml, peer: random}\ndifferences: [[a, b]]\n"
    )
    (tmp_path / "mini.yaml").write_text(text)
    command = [sys.executable, "tools/reproduce.py", str(tmp_path / "mini.yaml")]
    command += ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (tmp_path / "studies.jsonl").read_text().splitlines()]
    assert [row["entry"] for row in rows] == ["a", "b", "random"]
    assert rows[0]["epochs"] == rows[1]["epochs"] > 0
    assert rows[0]["knn20"] > rows[2]["knn20"]  # trained is above random
    assert rows[0]["cpu_seconds"] > 0
    before = (tmp_path / "studies.jsonl").read_bytes()
    subprocess.run(command, cwd=ROOT, check=True)  # nothing is measured twice
    assert (tmp_path / "studies.jsonl").read_bytes() == before
    assert "| a - b | 1 |" in (tmp_path / "mini.md").read_text()
