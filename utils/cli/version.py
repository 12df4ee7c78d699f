"""What `--version` says: the commit of this code, and the versions below it."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def version_line() -> str:
    """Return commit, torch and Python in one line; torch is not imported."""
    code = commit() or "(no git repository)"
    return f"synco {code}, torch {_version_of('torch')}, Python {platform.python_version()}"


def commit() -> str:
    """Return the commit of this code, with a + if files differ from it; empty if unknown."""
    root = Path(__file__).resolve().parents[2]
    # Untracked files are not looked for: that takes seconds on a slow disk.
    describe = ["describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    command = ["git", "-C", str(root), *describe]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"
