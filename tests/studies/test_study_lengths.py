"""How long an entry of a study trains, here and for the table of another machine."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from small_studies import HEAD, row, study_of

from tools.parts.study import costs, lengths, pictures
from tools.parts.study import trainer as trainer_module
from tools.parts.study.lengths import Lengths
from tools.parts.study.runs import Length, Runs, this_machine
from tools.parts.study.study import Row
from tools.parts.study.tables import markdown
from tools.parts.study.trainer import Trainer


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
