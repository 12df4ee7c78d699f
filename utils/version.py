"""What `--version` says: the commit of this code, and the versions below it."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def version_line() -> str:
    """Return commit, torch and Python in one line; torch is not imported."""
    return f"synco {_commit()}, torch {_version_of('torch')}, Python {platform.python_version()}"


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "(no git repository)"
    return found.stdout.strip()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"
