"""What a person meets first: the help of a tool."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# any import of torch, which takes seconds, is an error in this process
SCRIPT = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
AT_ONCE = ["tools/sweep.py", "tools/pack.py", "tools/convert.py", "tools/demo.py"]


@pytest.mark.parametrize("name", [*AT_ONCE, "benchmarks/__main__.py"])
def test_help_needs_no_torch_and_has_an_example(name: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(ROOT / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    module = name.removesuffix("/__main__.py")
    example = f"python -m {module}" if module != name else f"python {name}"
    assert f"\nExample: {example}" in done.stdout  # as it is written, so that it can be copied
