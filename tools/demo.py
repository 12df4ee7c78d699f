"""Pretrain a small backbone on images of an installed package, and show what it has learned.

Example: python tools/demo.py

An interrupted demo goes on where it stopped; a finished one shows its report again. Other flags go
to main_pretrain.py and tools/report.py.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.cli.streams import guard_streams

SCRIPTS = ("main_pretrain.py", "tools/report.py")
THREADS = 8  # more do not make this network faster


def main() -> int:
    """Run the mains as a person would; return the exit code of the first that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over, beside the demos there are"
    )
    parser.add_argument("--cfg", default=str(ROOT / "configs" / "demo.yaml"), help="what to train")
    parser.add_argument("--output", default="output", help="output root")
    args, passed_on = parser.parse_known_args()
    tag = choose_tag(Path(args.output) / Path(args.cfg).stem, args.fresh)
    flags = ["--cfg", args.cfg, "--output", args.output, "--tag", tag, *passed_on]
    start = time.monotonic()
    for script in SCRIPTS:
        code = run(script, flags)
        if code == 75:
            say("interrupted and saved: the same command goes on from here")
        if code:
            return code
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    say(f"took {minutes} min {seconds} s; --fresh starts over")
    return 0


def choose_tag(folder: Path, fresh: bool) -> str:
    """Return the newest demo's tag (demo1, demo2, ...); the next one if `fresh` or if none is."""
    numbers = [int(path.name[4:]) for path in folder.glob("demo*") if path.name[4:].isdigit()]
    newest = max(numbers, default=0)
    return f"demo{newest + 1 if fresh or not newest else newest}"


def run(script: str, flags: list[str]) -> int:
    """Run a script of the repository with its output on this terminal and return its exit code.

    An interrupt reaches it as well: it is left to save its state, and waited for.
    """
    command = [sys.executable, str(ROOT / script), *flags]
    say(" ".join(["python", script, *flags]))
    # The report fits small problems, where a second thread costs more than it gives.
    threads = 1 if script.startswith("tools/") else THREADS
    child = subprocess.Popen(command, env=environment(threads))
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the script has it too and saves; wait on
            continue


def environment(threads: int) -> dict[str, str]:
    """Return the environment with a thread a core, at most `threads`; the user's choice wins."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return {"OMP_NUM_THREADS": str(min(cores, threads)), **os.environ}


def say(text: str) -> None:
    """Write a line among the output of the scripts."""
    with contextlib.suppress(OSError):  # nobody reads any more: the scripts go on
        sys.stderr.write(f"\n== {text}\n")


if __name__ == "__main__":
    guard_streams()
    sys.exit(main())
