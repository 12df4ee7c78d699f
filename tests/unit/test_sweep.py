"""The sweep: its grid, its choice, and what it does with runs that ended, broke, or hang."""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools import sweep
from tools.parts import sweep_runs
from tools.parts.sweep_points import Point, Setting, as_csv, choose, markdown, table

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
argv = sys.argv[1:]
value = lambda flag: argv[argv.index(flag) + 1]
folder = Path(value("--output")) / value("--cfg").removesuffix(".yaml").split("/")[-1] / "default/semisup"
folder = folder / value("--run-name")
folder.mkdir(parents=True, exist_ok=True)
with (folder / "calls").open("a") as calls:
    calls.write(os.environ.get("CUDA_VISIBLE_DEVICES", "-") + " " + " ".join(argv) + chr(10))
(folder / "ckpt_00000001.pt").touch()
def state(name):
    (folder / "status.json").write_text(json.dumps({"state": name}))
def stop(*_):
    state("preempted")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
state("running")
if value("FINETUNE.TEST") == "True":
    assert (folder.parent / "sweep.choice.json").exists(), "no choice is written down"
plan = json.loads(os.environ.get("FAKE", "{}"))
rate, seed = float(value("--lr-backbone")), int(value("--seed"))
if plan.get("fail") == [rate, seed] and "search" in value("--run-name"):
    print("error: out of luck")
    sys.exit(plan.get("code", 2))
time.sleep(plan.get("sleep", 0))
good = 100 - 100 * abs(rate - 0.05) + seed
held = float(value("FINETUNE.HOLD_OUT"))
names = {"last_val_top1": good} if held else {"last_test_top1": good - 10, "last_test_top5": 99.0}
(folder / "result.json").write_text(json.dumps(names))
state("done")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a place where main_semisup.py is a stand-in that ends at once."""
    (tmp_path / "main_semisup.py").write_text(textwrap.dedent(FAKE))
    (tmp_path / "c.yaml").write_text("SEED: 0\nDATA: {DATASET: digits}\n")
    monkeypatch.setattr(sweep_runs, "ROOT", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def run(place: Path, *more: str) -> int:
    words = (
        f"--cfg {place}/c.yaml --output {place}/out --device cpu --start random --epochs 3".split()
    )
    return sweep.main([*words, "--lr-backbone", "0.01", "0.05", *more])


def sweep_process(place: Path, sleep: float) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a sweep of two runs side by side that take their time."""
    root = str(Path(sweep.__file__).parents[1])
    script = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job\n"
    script += f"import sys; from pathlib import Path; sys.path.insert(0, {root!r}); from tools import sweep\n"
    script += "from tools.parts import sweep_runs\n"
    script += f"sweep_runs.ROOT = Path({str(place)!r}); sys.exit(sweep.main(sys.argv[1:]))"
    words = f"--cfg {place}/c.yaml --output {place}/out --device cpu --start random --epochs 3 --jobs 2".split()
    command = [sys.executable, "-c", script, *words, "--lr-backbone", "0.01", "0.05"]
    return command, dict(os.environ, FAKE=json.dumps({"sleep": sleep}))


def wait_for(place: Path, state: str, count: int) -> None:
    """Wait until so many runs are in a state."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        texts = [path.read_text() for path in place.rglob("status.json")]
        if sum(f'"{state}"' in text for text in texts) == count:
            return
        time.sleep(0.05)
    raise AssertionError(f"not {count} runs {state}: {texts}")


def folders(place: Path, part: str = "") -> list[Path]:
    return sorted(
        p for p in (place / "out" / "c" / "default" / "semisup").glob(f"{part}*") if p.is_dir()
    )


def calls(place: Path) -> list[str]:
    return [
        line for folder in folders(place) for line in (folder / "calls").read_text().splitlines()
    ]


def test_the_choice_is_by_validation_and_only_the_choice_sees_the_test_split(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, "--seeds", "0", "2", "--", "--opts", "LOG.TENSORBOARD", "False") == 0
    searched, chosen = folders(place, "search-"), folders(place, "chosen-")
    assert len(searched) == 4
    assert len(chosen) == 2
    assert all(
        "FINETUNE.HOLD_OUT 0.2 FINETUNE.TEST False" in (f / "calls").read_text() for f in searched
    )
    assert all(
        "FINETUNE.HOLD_OUT 0 FINETUNE.TEST True" in (f / "calls").read_text() for f in chosen
    )
    assert all("LOG.TENSORBOARD False" in line for line in calls(place))
    assert all("lr0.05" in folder.name for folder in chosen)
    text = (place / "out/c/default/semisup/sweep.md").read_text()
    assert "| random | finetune | 1 % | 3 | 0.01 | 0.5 | 2 | 97.00 ± 1.41 |  |  |  |" in text
    assert (
        "| random | finetune | 1 % | 3 | 0.05 | 0.5 | 2 | 101.00 ± 1.41 | yes | 91.00 ± 1.41 | 99.00"
        in text
    )
    shown = capsys.readouterr()
    assert text in shown.out
    logs = [path.read_text() for path in (place / "out/c/default/semisup").glob("*.log")]
    assert sum(log.startswith("$ ") and "main_semisup.py --run-name" in log for log in logs) == 6
    assert "4 runs; logs: " in shown.err
    assert re.search(
        r"1 of 4, \d+ s left: random, finetune on 1 %, 3 epochs, lr 0.01/0.5, seed 0: "
        r"validation top-1 96.00 \(\d+ s\)",
        shown.err,
    )
    assert re.search(r"2 of 2: random, .*, seed 2: test top-1 92.00 \(", shown.err)
    assert "lr 0.05" not in shown.out  # results only
    rows = (place / "out/c/default/semisup/sweep.csv").read_text().splitlines()
    assert len(rows) == 3
    assert not list(place.rglob("ckpt_*")), (
        "checkpoints of finished runs are as large as the models"
    )


def test_what_is_finished_is_skipped_and_what_broke_goes_on(place: Path) -> None:
    assert run(place, "--keep-checkpoints") == 0
    assert len(list(place.rglob("ckpt_*"))) == 3
    broken = folders(place, "search-")[0]
    (broken / "status.json").write_text(json.dumps({"state": "preempted"}))
    assert run(place) == 0
    counts = {folder: len((folder / "calls").read_text().splitlines()) for folder in folders(place)}
    assert counts.pop(broken) == 2
    assert set(counts.values()) == {1}


def test_other_flags_are_other_runs(place: Path) -> None:
    run(place)
    run(place, "--batch-size", "8")
    assert len(folders(place)) == 6


def test_a_file_that_changed_makes_other_runs(place: Path) -> None:
    """A finished run is skipped by its name, which knows the contents of yaml, weights and lists."""
    lists = place / "lists"
    lists.mkdir()
    (lists / "1percent.txt").write_text("a.png\n")
    words = ("--train-percent", "1", "--subsets", str(lists))
    run(place, *words)
    run(place, *words)
    assert len(calls(place)) == 3
    (lists / "1percent.txt").write_text("b.png\n")
    run(place, *words)
    assert len(calls(place)) == 6
    (place / "c.yaml").write_text("SEED: 0\nDATA: {DATASET: digits}\nFINETUNE: {EPOCHS: 9}\n")
    run(place, *words)
    assert len(calls(place)) == 9


def test_images_that_changed_make_other_runs(place: Path) -> None:
    for split, label in itertools.product(("train", "val"), ("a", "b")):
        save_image(place / "images" / split / label / "0.png", label)
    (place / "c.yaml").write_text("SEED: 0\n")
    words = ("--dataset", "imagefolder", "--data-path", str(place / "images"))
    run(place, *words)
    run(place, *words)
    assert len(calls(place)) == 3
    save_image(place / "images" / "val" / "a" / "1.png", "one more")
    run(place, *words)
    assert len(calls(place)) == 6
    save_image(place / "images" / "train" / "a" / "0.png", "the same name")
    run(place, *words)
    assert len(calls(place)) == 9


def save_image(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(hashlib.sha256(text.encode()).digest()[:3])
    Image.new("RGB", (8, 8), colour).save(path)


def test_no_jobs_are_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="--jobs: -1"):
        run(place, "--jobs", "-1")


def test_a_table_is_not_written_elsewhere(place: Path) -> None:
    with pytest.raises(ValueError, match=r"^--name: .* is no name of a folder"):
        run(place, "--name", "../evil")
    assert not folders(place)


def test_nothing_is_chosen_before_all_points_are_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE", json.dumps({"fail": [0.05, 0]}))
    assert run(place, "--seeds", "0", "1") == 1
    out = capsys.readouterr().err
    assert "2 of 4" in out
    assert "seed 0: FAILED, exit code 2: error: out of luck (" in out
    assert "start the same command again" in out
    assert folders(place, "chosen-") == []  # the test split is not read
    monkeypatch.delenv("FAKE")
    assert run(place, "--seeds", "0", "1") == 0  # the failed point is run again, the best one
    assert all("lr0.05" in folder.name for folder in folders(place, "chosen-"))


def test_wrong_input_is_refused_before_any_run_or_ends_with_code_2(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'/nowhere' is not a folder"):
        run(place, "--dataset", "imagefolder", "--data-path", "/nowhere")
    assert folders(place) == []
    monkeypatch.setenv("FAKE", json.dumps({"fail": [0.05, 0]}))
    assert run(place, "--lr-backbone", "0.05") == 2


def test_a_point_that_diverged_has_lost(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", json.dumps({"fail": [0.05, 0], "code": 3}))
    assert run(place, "--seeds", "0", "1") == 1
    assert len(folders(place, "chosen-")) == 2
    assert all("lr0.01" in folder.name for folder in folders(place, "chosen-"))


def test_seeds_that_diverged_apart_leave_no_candidate() -> None:
    a, b = (Setting("none", "finetune", 1.0, 3, rate, 0.5) for rate in (0.1, 0.2))
    assert choose(results((a, 0, 90.0), (b, 1, 60.0)), 2) == {}


def test_a_grid_that_diverged_is_chosen_from_once_a_point_is_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"--cfg {place}/c.yaml --output {place}/out --device cpu --start random --epochs 3".split()
    )
    monkeypatch.setenv("FAKE", json.dumps({"fail": [0.05, 0], "code": 3}))
    assert sweep.main([*words, "--lr-backbone", "0.05"]) == 1
    assert "start the same command again" not in capsys.readouterr().err  # it would diverge again
    assert not list(place.rglob("*.choice.json"))
    monkeypatch.delenv("FAKE")
    assert sweep.main([*words, "--lr-backbone", "0.05"]) == 0
    assert len(folders(place, "chosen-")) == 1


def test_a_choice_that_was_missing_leaves_the_others_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", json.dumps({"fail": [0.0, 0], "code": 3}))
    assert run(place, "--weights", "finetune", "freeze") == 1  # the one frozen point diverged
    (winner,) = folders(place, "search-random-1pct-finetune-lr0.05")
    (winner / "result.json").write_text(json.dumps({"last_val_top1": 1.0}))
    monkeypatch.delenv("FAKE")
    assert run(place, "--weights", "finetune", "freeze") == 0
    finetuned, frozen = folders(place, "chosen-")
    assert "finetune-lr0.05" in finetuned.name
    assert "freeze" in frozen.name


def test_the_test_split_is_read_for_one_choice_only(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place) == 0
    (winner,) = folders(place, "search-random-1pct-finetune-lr0.05")
    (winner / "result.json").write_text(json.dumps({"last_val_top1": 1.0}))  # another would win now
    capsys.readouterr()
    assert run(place) == 0
    assert "another point is the best now; the choice in" in capsys.readouterr().err
    assert run(place, "--name", "other") == 0  # another name of the table is no other grid
    (chosen,) = folders(place, "chosen-")
    assert "lr0.05" in chosen.name
    assert len((chosen / "calls").read_text().splitlines()) == 1
    assert (
        "| 0.05 | 0.5 | 1 | 1.00 | yes |" in (place / "out/c/default/semisup/sweep.md").read_text()
    )


def test_a_sweep_that_is_killed_takes_its_runs_with_it_and_the_next_one_waits(place: Path) -> None:
    command, env = sweep_process(place, sleep=60)
    job = subprocess.Popen(command, env=env)
    wait_for(place, "running", 2)
    job.kill()
    job.wait()
    wait_for(place, "preempted", 2)  # SIGTERM reached them: saved and ended
    assert run(place) == 0
    assert len(folders(place, "chosen-")) == 1


def test_a_run_of_an_earlier_sweep_is_waited_for(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(place) == 0
    folder = folders(place, "search-")[0]
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'a+'); "
            "fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()",
            str(folder / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert held.stdin is not None
    assert held.stdout is not None
    assert held.stdout.readline() == b"held\n"
    said, holds = sweep_runs.logger.info, held.stdin

    def say(*args: object) -> None:
        said(*args)
        if "waiting for" in str(args[0]):
            holds.close()  # it ends

    monkeypatch.setattr(sweep_runs.logger, "info", say)
    assert run(place) == 0
    out = capsys.readouterr().err
    assert out.count(f"waiting for {folder.name}") == 1
    assert "FAILED" not in out
    held.wait()


def test_a_run_that_finished_while_it_was_waited_for_is_not_run_again(place: Path) -> None:
    """A chosen one would read the test split a second time."""
    assert run(place) == 0
    (folder,) = folders(place, "chosen-")
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, pathlib, sys, time; f = open(sys.argv[1] + '/.lock', 'a+'); "
            "fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(2); "
            "pathlib.Path(sys.argv[1], 'status.json').write_text('{\"state\": \"done\"}')",
            str(folder),
        ],
        stdout=subprocess.PIPE,
    )
    assert held.stdout is not None
    assert held.stdout.readline() == b"held\n"
    assert run(place) == 0
    held.wait()
    assert len((folder / "calls").read_text().splitlines()) == 1


def test_two_equal_sweeps_at_once_share_the_points(place: Path) -> None:
    command, env = sweep_process(place, sleep=1.5)
    command += ["--seeds", "0", "1", "2"]
    both = [
        subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [job.communicate(timeout=240) for job in both]
    assert [job.returncode for job in both] == [0, 0], said
    # each point once: a second reading of the test split among them
    assert len(folders(place, "search-")) == 6
    assert len(folders(place, "chosen-")) == 3
    assert len(calls(place)) == 9
    assert said[0][0] == said[1][0]  # the same table
    assert not any(b"FAILED" in err for _, err in said)


def test_a_run_whose_sweep_died_before_it_began_does_not_begin() -> None:
    script = "import os, sys; sys.path.insert(0, sys.argv[1]); from tools.parts import children; "
    script += "children.end_with_parent(os.getppid() + int(sys.argv[2])); print('began')"
    root = str(Path(sweep.__file__).parents[1])
    for other, begins in ((0, True), (1, False)):
        child = subprocess.run(
            [sys.executable, "-c", script, root, str(other)], capture_output=True
        )
        assert (b"began" in child.stdout) == begins, child.stderr


def test_each_job_sees_its_own_gpu(place: Path) -> None:
    folder = place / "out" / "c" / "default" / "semisup"
    setting = Setting("none", "finetune", 1.0, 3, 0.05, 0.5)
    shared = ["--cfg", f"{place}/c.yaml", "--output", str(place / "out")]
    runner = sweep_runs.Runner(folder, shared, None, ["5", "7"])
    assert len(runner.run([Point(setting, seed, 0.2) for seed in range(4)])) == 4
    assert {line.split()[0] for line in calls(place)} == {"5", "7"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_runs_save_and_leaves_none_behind(
    place: Path, number: signal.Signals
) -> None:
    command, env = sweep_process(place, sleep=60)
    job = subprocess.Popen(command, env=env)
    wait_for(place, "running", 2)
    time.sleep(0.2)
    job.send_signal(number)
    assert job.wait(60) == 130
    states = [json.loads(path.read_text())["state"] for path in place.rglob("status.json")]
    assert states == ["preempted", "preempted"]


# ---- grid, choice, table -------------------------------------------------------------------------


def test_epochs_may_depend_on_the_percentage() -> None:
    assert sweep.epochs_of(["1:60", "10:30"], 10.0) == [30]
    assert sweep.epochs_of(["20", "10:30"], 10.0) == [20, 30]
    with pytest.raises(ValueError, match="10:60"):
        sweep.epochs_of(["1:60"], 10.0)


def test_lists_and_percentages_reach_the_runs() -> None:
    point = Point(Setting("w.pt", "finetune", 10.0, 3, 0.1, 0.5), 4, 0.25)
    words = point.arguments(["--cfg", "c"], Path("splits"))
    for flag, value in {
        "--subset": "splits/10percent.txt",
        "--pretrained": "w.pt",
        "--seed": "4",
    }.items():
        assert words[words.index(flag) + 1] == value


def results(*values: tuple[Setting, int, float]) -> dict[Point, dict[str, Any]]:
    return {Point(s, seed, 0.2): {"last_val_top1": value} for s, seed, value in values}


def test_the_mean_over_seeds_decides_and_groups_choose_apart() -> None:
    a, b = (Setting("none", "finetune", 1.0, 3, rate, 0.5) for rate in (0.1, 0.2))
    c = Setting("w.pt", "finetune", 1.0, 3, 0.1, 0.5)
    found = results(
        (a, 0, 90.0), (a, 1, 10.0), (b, 0, 60.0), (b, 1, 60.0), (c, 0, 5.0), (c, 1, 5.0)
    )
    choice = choose(found, 2)
    assert choice == {b.group: b, c.group: c}
    rows = table(found, choice, {Point(b, 0, 0.0): {"last_test_top1": 7.0, "last_test_top5": 8.0}})
    assert [row["chosen"] for row in rows] == ["", "yes", "yes"]
    assert [row["test_top1"] for row in rows] == ["", "7.00", "failed"]
    assert markdown(rows).count("\n") == 5
    assert (
        as_csv(rows).splitlines()[1].startswith("random,finetune,1 %,3,0.1,0.5,2,50.00 ± 56.57,,")
    )


def test_no_cell_is_a_formula_or_two_cells() -> None:
    odd = Setting("=cmd|calc!A0.pt", "finetune", 1.0, 3, 0.1, 0.5)
    rows = table(results((odd, 0, 1.0)), {}, {})
    assert as_csv(rows).splitlines()[1].startswith("'=cmd|calc!A0,finetune")
    assert "| =cmd\\|calc!A0 | finetune |" in markdown(rows)
    rows[0]["start"] = "a\\|b\nc"
    assert markdown(rows).splitlines()[-1].startswith("| a\\\\\\|b c | finetune |")
    rows[0]["val_top1"] = "-1.50 ± 0.20"
    assert ",-1.50 ± 0.20," in as_csv(rows)
