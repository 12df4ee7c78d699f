"""Closed, full or narrow standard streams change neither the work nor the exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import cli

ROOT = Path(cli.__file__).parents[2]
START = "import os, sys; from pathlib import Path; from utils.cli import run_main\n"


def run(
    body: str, *, closed: tuple[int, ...] = (), **popen: object
) -> "subprocess.CompletedProcess[str]":
    """Run a program whose main is `body`, with standard streams closed as by 2>&-."""
    script = START + f"def main():\n    {body}\nrun_main(main)"
    close = " ".join(f"{number}>&-" for number in closed)
    command = ["bash", "-c", f'exec "$0" "$@" {close}', sys.executable, "-c", script]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
    return subprocess.run(command, env=env, text=True, timeout=60, **streams)  # type: ignore[call-overload]


@pytest.mark.parametrize("lines", [1, 10_000])  # fewer, and more, than a buffer holds
@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_closed_pipe_leaves_the_work_and_the_exit_code(
    lines: int, code: int, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = f"print('line\\n' * {lines}); Path(r'{tmp_path}/done').touch(); return {code}"
    result = run(done, stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (code, "")
    assert (tmp_path / "done").exists()


def test_a_full_disk_under_standard_output_is_said() -> None:
    with open("/dev/full", "w") as full:
        assert run("print('x' * 100_000); return 0", stdout=full).returncode == 2


@pytest.mark.parametrize("closed", [(2,), (1,), (1, 2), (0, 1, 2)])
def test_closed_streams_end_no_run_and_no_file_takes_their_number(
    closed: tuple[int, ...], tmp_path: Path
) -> None:
    body = f"file = open(r'{tmp_path}/file', 'wb'); os.write(2, b'from a library'); print('x'); "
    body += "sys.stderr.write('y'); return 7 if file.fileno() > 2 else 8"
    assert run(body, closed=closed).returncode == 7
    assert (tmp_path / "file").read_bytes() == b""


def test_an_error_keeps_its_code_without_standard_error() -> None:
    assert run("raise ValueError('bad')", closed=(2,)).returncode == 2


def test_names_on_the_terminal_are_visible() -> None:
    name = "a\x1b[2J\udcff"
    result = run(f"print({name!r}); raise ValueError({name + chr(10) + 'b'!r})")
    assert result.stdout == "a\\x1b[2J\\udcff\n"
    assert result.stderr == "error: a\\x1b[2J\\udcff\n  b\n"  # no line of its own
    assert result.returncode == 2
