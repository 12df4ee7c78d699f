"""tools/runs.py reads folders of runs, today's and older ones, whole and torn; run.json says where a run comes from."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools import runs
from tools.parts.run_files import find_runs, open_run_files, seconds_as_text
from utils.cli import provenance, version
from utils.cli.version import commit


def make_run(root: Path, tag: str, knn: float, state: str = "done", **status: object) -> Path:
    folder = root / "demo" / tag
    folder.mkdir(parents=True)
    config = f"TAG: {tag}\nMODEL: {{NAME: synco, BACKBONE: {{NAME: resnet8}}}}\nDATA: {{DATASET: digits}}\nTRAIN: {{EPOCHS: 4}}\n"
    (folder / "config.yaml").write_text(config)
    (folder / "status.json").write_text(json.dumps({"state": state, "step": 20, **status}))
    rows = [
        {"step": 10, "epoch": 1.0, "loss": 5.0, "images_per_second": 100.0, "lr": 0.1},
        {"step": 10, "epoch": 1.0, "knn20_top1": knn, "knn20_top5": 99.0},
        {"step": 20, "epoch": 2.0, "loss": "nan", "images_per_second": 300.0, "lr": 0.1},
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 30, "ep'
    (folder / "metrics.jsonl").write_text(text)
    return folder


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(runs.__file__)), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_list_shows_each_run_and_not_its_probes(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", 50.0)
    probe = folder / "linear" / "ckpt"
    probe.mkdir(parents=True)
    (probe / "status.json").write_text('{"state": "done"}')
    (probe / "result.json").write_text('{"labels": "100pct", "best_top1": 71.25}')
    for weights in ("random", "another_model"):  # neither says anything about this run
        (folder / "linear" / weights).mkdir()
        result = {"labels": "100pct", "weights": weights, "best_top1": 99.5}
        (folder / "linear" / weights / "result.json").write_text(json.dumps(result))
    (found,) = find_runs(tmp_path)
    row = runs.described(found)
    expected = {"run": "demo/a", "method": "synco", "state": "done", "step": "20/40"}
    expected |= {"loss": "5.000", "knn": "50.00", "linear": "71.25", "images/s": "300"}
    assert {key: row[key] for key in expected} == expected


def test_the_newer_status_gives_total_and_time_left(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 50.0, "running", total=77, eta=90.0)
    row = runs.described(find_runs(tmp_path)[0])
    assert (row["step"], row["left"], row["state"]) == ("20/77", "90 s", "running")


def test_a_run_that_writes_nothing_is_said_to_be_silent(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", 50.0, "running")
    old = time.time() - 3600
    for name in ("status.json", "metrics.jsonl"):
        os.utime(folder / name, (old, old))
    assert open_run_files(folder).state() == "running, silent"
    (folder / "log.txt").write_text("still here")  # one file that moves is a sign of life
    assert open_run_files(folder).state() == "running"


def test_best_sorts_and_diff_names_what_differs(tmp_path: Path) -> None:
    for tag, knn in (("a", 50.0), ("b", 70.0), ("c", 60.0)):
        make_run(tmp_path, tag, knn)
    lines = tool("best", tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "demo/b", "demo/c", "demo/a"]
    shown = tool("diff", tmp_path / "demo/a", tmp_path / "demo/b").stdout
    assert shown.splitlines()[1].split() == ["TAG", "a", "b"]
    assert "MODEL.NAME" not in shown
    assert "70.00" in shown


def test_export_writes_csv(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 50.0)
    assert tool("export", "--csv", tmp_path, "--output", tmp_path / "o.csv").stdout == ""
    head, line = (tmp_path / "o.csv").read_text().splitlines()
    assert head.split(",") == list(runs.COLUMNS)
    assert line.startswith("demo/a,synco,resnet8,digits,done,20/40,")


def test_no_run_is_one_clear_error(tmp_path: Path) -> None:
    done = tool("ls", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} holds no run; name the folder that --output named\n"
    assert "is no folder of a run" in tool("diff", tmp_path, tmp_path).stderr


def test_runs_needs_no_torch() -> None:
    code = "import sys, tools.runs; sys.exit('torch' in sys.modules)"
    root = Path(runs.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0


def test_durations_are_short() -> None:
    shown = [seconds_as_text(s) for s in (5, 600, 7200, 200_000)]
    assert shown == ["5 s", "10 min", "2.0 h", "2.3 d"]


def test_each_start_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main_pretrain.py", "--tag", "t"])
    (tmp_path / "run.json").write_text('{"starts"')  # torn: the run goes on
    for step in (0, 40):
        provenance.record_start(tmp_path / "run.json", step, torch.device("cpu"))
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 40]
    assert starts[0]["command"] == ["main_pretrain.py", "--tag", "t"]
    assert starts[0]["torch"] == torch.__version__
    assert starts[0]["host"]


def test_a_commit_is_marked_where_code_differs_but_not_where_pages_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    rows, code = tmp_path / "docs" / "rows.jsonl", tmp_path / "utils" / "cli" / "version.py"
    readme = tmp_path / "README.md"
    for file in (rows, code, readme):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "m")
    head = git("rev-parse", "--short=12", "HEAD")
    monkeypatch.setattr(version, "__file__", str(code))
    rows.write_text("2")
    readme.write_text("2")
    assert commit() == head
    code.write_text("2")
    assert commit() == head + "+"


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() == ""
