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
    """Return the commit of this code, with a + if its files differ from it; empty if unknown."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    head = [*git, "rev-parse", "--short=12", "HEAD"]
    # Untracked files are not looked for: that takes seconds on a slow disk. Pages are no code, and
    # a study writes its rows among them while it runs.
    differs = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!docs", ":!*.md"]
    try:
        found = subprocess.run(head, capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(differs, capture_output=True, timeout=10).returncode
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() + ("+" if changed else "")


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"
