"""Run the tests that provoke failures and write what they measured to docs/results/reliability.md.

It needs two cores and about half an hour, for two tests at a time. --only PATTERN runs the rows
whose failure or tests match and prints them instead. The exit code is 1 if a test failed or is
missing.
"""

import argparse
import collections
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.reliability.rows import NOT_TESTED, ROWS, Row  # noqa: E402

PAGE = ROOT / "docs" / "results" / "reliability.md"
COMMAND = "python tests/reliability/driver.py"
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "timm", "simplejpeg", "tensorboard")


@dataclass
class Result:
    """What became of a row's tests: outcomes by test, and figures in the order they were measured."""

    outcomes: dict[str, str] = field(default_factory=dict)  # passed, failed or skipped
    reasons: list[str] = field(default_factory=list)  # of what failed or was skipped
    figures: dict[str, list[str]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Tell whether something passed and nothing failed."""
        return "passed" in self.outcomes.values() and "failed" not in self.outcomes.values()


def main() -> int:
    """Run the tests, write or print the page; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="rows whose failure or tests match; writes no page"
    )
    args = parser.parse_args()
    rows = [row for row in ROWS if not args.only or matches(row, args.only)]
    if not rows:
        print(
            f"error: --only {args.only}: no row matches; the rows are: {', '.join(r.failure for r in ROWS)}"
        )
        return 2
    start = time.monotonic()
    load = os.getloadavg()[0]
    code, results = run(rows)
    failed = [row.failure for row, result in zip(rows, results, strict=True) if not result.good]
    minutes = (time.monotonic() - start) / 60
    page = render(rows, results, minutes, load)
    if args.only:
        print(page)
    else:
        PAGE.write_text(page, encoding="utf-8")
        print(f"{PAGE}, after {minutes:.0f} minutes")
    if failed:
        print(f"FAILED: {'; '.join(failed)}")
    return 1 if failed or code not in (0, 5) else 0


def matches(row: Row, pattern: str) -> bool:
    """Tell whether a row is meant by ``--only``."""
    return any(re.search(pattern, text, re.IGNORECASE) for text in (row.failure, *row.tests))


def run(rows: Sequence[Row]) -> tuple[int, list[Result]]:
    """Run pytest once over the tests of all rows; return its exit code and a result for each row."""
    there = {test for row in rows for test in row.tests if exists(test)}
    with tempfile.TemporaryDirectory() as folder:
        figures, report = Path(folder) / "figures.jsonl", Path(folder) / "report.xml"
        figures.touch()
        options = ["-n", "2", "--dist", "worksteal", "--tb=short", "-m", "slow or not slow"]
        options += ["--durations=25", f"--junitxml={report}"]
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *sorted(f"tests/{test}" for test in there)],
            cwd=ROOT,
            env={**os.environ, "RELIABILITY_FIGURES": str(figures)},
            check=False,
        ).returncode
        cases = read_cases(report)
        measured = [json.loads(line) for line in figures.read_text(encoding="utf-8").splitlines()]
    return code, [result_of(row, cases, measured) for row in rows]


def exists(test: str) -> bool:
    """Tell whether a file, or a function of it, is there: pytest runs nothing at all if one is not."""
    file, _, function = test.partition("::")
    path = ROOT / "tests" / file
    return path.is_file() and (
        not function or f"def {function}(" in path.read_text(encoding="utf-8")
    )


def read_cases(report: Path) -> dict[str, tuple[str, str]]:
    """Return outcome and reason of each test of a JUnit file: ``file::function[parameters]`` below tests/."""
    cases: dict[str, tuple[str, str]] = {}
    if not report.is_file():  # pytest itself died
        return cases
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").replace(".", "/").removeprefix("tests/") + ".py"
        kinds = {child.tag: child.get("message", "") for child in case}
        bad = kinds.get("failure", kinds.get("error"))
        outcome = "failed" if bad is not None else "skipped" if "skipped" in kinds else "passed"
        reason = bad if bad is not None else kinds.get("skipped", "")
        cases[f"{file}::{case.get('name')}"] = (
            outcome,
            reason.splitlines()[0][:200] if reason else "",
        )
    return cases


def result_of(
    row: Row, cases: Mapping[str, tuple[str, str]], measured: Sequence[Mapping[str, str]]
) -> Result:
    """Gather what belongs to a row; a test that is missing counts as failed."""
    result = Result()
    for test in row.tests:
        mine = {name: case for name, case in cases.items() if belongs(name, test)}
        for name, (outcome, reason) in (mine or {test: ("failed", "missing")}).items():
            result.outcomes[name] = outcome
            if outcome != "passed":
                result.reasons.append(f"{name} {outcome}: {reason}")
        for line in measured:
            if belongs(line["test"].removeprefix("tests/"), test):
                value = f"{line['value']} {line['unit']}".strip()
                result.figures.setdefault(line["name"], []).append(value)
    return result


def belongs(name: str, test: str) -> bool:
    """Tell whether a case is of a test: the function with any parameters, or anything of a file."""
    return name == test or name.startswith((f"{test}[", f"{test}::"))


# ---- the page ------------------------------------------------------------------------------------


def render(rows: Sequence[Row], results: Sequence[Result], minutes: float, load: float) -> str:
    """Return the page as Markdown."""
    tally = collections.Counter(o for result in results for o in result.outcomes.values())
    lines = [
        "# Reliability: what was provoked, and what happened",
        "",
        f"Written by `{COMMAND}` on {datetime.date.today().isoformat()} in {minutes:.0f} minutes, from "
        f"commit {commit()}. Every figure is noted by the assertion that it passed through.",
        "",
        f"- machine: {machine()}; load {load:.1f} at the start, two tests at a time",
        f"- versions: {versions()}",
        f"- tests: {tally['passed']} passed, {tally['failed']} failed, {tally['skipped']} skipped",
        "",
    ]
    bad = [reason for result in results for reason in result.reasons if " failed: " in reason]
    if bad:
        lines += ["**Some tests failed; what the page says of their rows is not shown:**", ""]
        lines += [f"- {reason}" for reason in bad] + [""]
    lines += ["| # | failure | how it is provoked | what happened |", "|---|---|---|---|"]
    for number, (row, result) in enumerate(zip(rows, results, strict=True), start=1):
        cells = (str(number), row.failure, row.how, "<br>".join(happened(result)))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "## Tests", ""]
    for number, (row, result) in enumerate(zip(rows, results, strict=True), start=1):
        lines.append(f"{number}. " + ", ".join(f"`{test}`" for test in row.tests))
        lines += [f"   - {reason}" for reason in result.reasons if " skipped: " in reason]
    lines += ["", "## Not tested", "", *(f"- {text}" for text in NOT_TESTED), ""]
    return "\n".join(lines)


def happened(result: Result) -> list[str]:
    """Return the lines of a row's last cell; values of one name stand together."""
    tally = collections.Counter(result.outcomes.values())
    lines = [] if result.good else ["**FAILED**"]
    for name, values in result.figures.items():
        lines.append(f"{name}: **{', '.join(dict.fromkeys(values))}**")
    skipped = f", {tally['skipped']} skipped" if tally["skipped"] else ""
    return [*lines, f"{tally['passed']}/{tally['passed'] + tally['failed']} tests passed{skipped}"]


def commit() -> str:
    """Return the commit's short name, and whether files differ from it."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!docs/results/reliability.md")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        " with uncommitted changes" if changed else ""
    )


def machine() -> str:
    """Return the processor, its cores and the memory."""
    model = platform.processor() or platform.machine()
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.is_file() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        model = found[1]
    memory = ""
    if meminfo.is_file() and (found := re.search(r"MemTotal:\s*(\d+) kB", meminfo.read_text())):
        memory = f", {int(found[1]) / 2**20:.0f} GiB"
    return f"{model}, {os.cpu_count()} cores{memory}, Linux {platform.release()}"


def versions() -> str:
    """Return the versions of Python and of the packages that take part."""
    found = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
