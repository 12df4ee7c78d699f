"""How an entry of a study is trained and judged, and what its row says; a miniature from end to end."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_studies import HEAD, study_of

from tools.parts.study import costs
from tools.parts.study.costs import tree_cpu_seconds
from tools.parts.study.lengths import Lengths
from tools.parts.study.runs import Length, Runs, this_machine
from tools.parts.study.study import (
    Entry,
    Row,
)
from tools.parts.study.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


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


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: Path) -> bool:
    stat = Path("/proc", pid.read_text(), "stat")
    # a zombie waits only for its new parent to look
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


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
