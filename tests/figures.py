"""Figures that assertions measure, noted for the page that tests/reliability/driver.py writes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "RELIABILITY_FIGURES"


def figure(name: str, value: float | int | str, unit: str = "") -> None:
    """Append a figure of the running test to the file that the environment names; without one do nothing."""
    if VARIABLE in os.environ:
        test = os.environ["PYTEST_CURRENT_TEST"].rsplit(" (", 1)[0]
        line = {"test": test, "name": name, "value": value, "unit": unit}
        with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return median and maximum of values as text."""
    ordered = sorted(values)
    if not ordered:
        return "none"
    return f"median {ordered[len(ordered) // 2]:.{digits}f}, max {ordered[-1]:.{digits}f}"
