"""What a person meets first: the help of a tool, and what it says to a mistyped flag."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")
# any import of torch, which takes seconds, is an error in this process
SCRIPT = """
import runpy, sys
sys.modules["torch"] = None
place, *sys.argv = sys.argv[1:]
sys.argv.insert(0, place)
runpy.run_path(place, run_name="__main__")
"""


def answer(place: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(place), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)


MAINS = ("main_pretrain.py", "main_linear.py", "main_semisup.py", "detection/main_detection.py")
OTHERS = (
    "segmentation/main_segmentation.py",
    "tools/prepare/channel_statistics.py",
    "benchmarks/__main__.py",
    "detection/train_net.py",
    "detection/convert_to_detectron2.py",
)


@pytest.mark.parametrize("name", [*(f"tools/{tool}" for tool in TOOLS), *MAINS, *OTHERS])
def test_help_needs_no_torch_and_has_an_example(name: str) -> None:
    done = answer(ROOT / name, "--help")
    assert done.returncode == 0, done.stderr
    module = name.removesuffix("/__main__.py")
    command = f"python -m {module}" if module != name else f"python {name}"
    assert f"\nExample: {command}" in done.stdout  # as it is written, so that it can be copied
    assert done.stdout.isascii()
    lines = done.stdout.splitlines()
    assert len(lines) <= 60
    assert "default: None" not in done.stdout
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        # an option or an argument is followed by its text, in its line or the next
        if re.match(r"  \S+(, \S+)?( \S+)*$", line) and line.startswith("  -"):
            assert below.startswith(" " * 12), line


@pytest.mark.parametrize("command", ["ls", "best", "export", "diff"])
def test_the_help_of_a_command_names_the_program_that_was_typed(command: str) -> None:
    done = answer(ROOT / "tools/runs.py", command, "--help")
    assert done.stdout.startswith(f"usage: {ROOT}/tools/runs.py {command} ")
    wrong = answer(ROOT / "tools/runs.py", command, "--silent-after", "soon")
    if command != "diff":
        error, see = wrong.stderr.splitlines()
        assert error == "error: argument --silent-after: invalid float value: 'soon'"
        assert see == f"See {ROOT}/tools/runs.py {command} --help"


@pytest.mark.parametrize("name", [tool for tool in TOOLS if tool != "demo.py"])
def test_a_mistyped_flag_is_one_line_and_needs_no_torch(name: str) -> None:
    """But for the demo, which hands on what it does not know."""
    required = {"convert.py": ["inspect", "F"], "compare_checkpoints.py": ["A", "B"]}
    required |= {
        "pack.py": ["--output", "P"],
        "runs.py": ["ls"],
        "reproduce.py": ["peers"],
        "embed.py": ["--output", "F.npz"],
    }
    done = answer(ROOT / "tools" / name, *required.get(name, []), "--oups")
    assert done.returncode == 2
    error, see = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert "--oups" in error
    assert see.startswith("See ")
    assert see.endswith(f"{name} --help")


@pytest.mark.parametrize("name", ["retrieval.py", "propagate.py"])
@pytest.mark.parametrize("flag", ["--epochs", "--resume", "--precision", "--throughput"])
def test_a_shared_flag_that_would_do_nothing_is_refused(name: str, flag: str) -> None:
    done = answer(ROOT / "tools" / name, flag)
    assert done.returncode == 2
    assert f"unknown argument '{flag}'" in done.stderr


@pytest.mark.parametrize("words", [["--oups", "--", "--opts"], ["--seeds", "0", "--", "--oups"]])
def test_the_sweep_reads_its_own_flags_only(words: list[str]) -> None:
    done = answer(ROOT / "tools/sweep.py", *words)
    # behind -- stand flags of the runs, so the sweep goes on to import torch
    own = words[0] == "--oups"
    assert ("unknown argument '--oups'" in done.stderr) == own, done.stderr
    assert ("torch" in done.stderr) != own


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_names_every_target() -> None:
    done = subprocess.run(["make", "-s"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in set(phony.split()) - {"help"}:
        assert re.search(rf"\bmake {target}\b", done.stdout), target
    assert all(line.startswith(("make ", "All ")) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("rank", "local", "said"),
    [("0", "0", "error: "), ("1", "1", ""), ("2", "0", "error (rank 2): ")],
)
def test_one_process_of_a_machine_says_what_all_find(rank: str, local: str, said: str) -> None:
    words = ["--cfg", "configs/demo.yaml", "--dataset", "imagefolder", "--data-path", "/nowhere"]
    command = [sys.executable, "main_pretrain.py", *words]
    ranks = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": "4"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **ranks}, timeout=100
    )
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert ("'/nowhere' is not a folder" in done.stderr) == bool(said)
    assert len(done.stderr.splitlines()) == bool(said)
    command[2:] = ["--oups"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **ranks}, timeout=100
    )
    assert done.returncode == 2
    assert ("unknown argument '--oups'" in done.stderr) == (local == "0")
