"""What `--list` shows: the methods, backbones, recipes and data sets that there are."""

import os
from collections.abc import Callable
from pathlib import Path

from utils.config.datasets import DATASETS
from utils.config.methods import backbone_names, method_titles

_RECIPES = Path(__file__).resolve().parents[2] / "configs"


def listing(kind: str) -> str:
    """Return one line for each of a kind: its name and what it is."""
    rows = LISTS[kind]()
    width = max(len(name) for name in rows)
    return "".join(f"{name:{width}}  {text}".rstrip() + "\n" for name, text in rows.items())


def _backbones() -> dict[str, str]:
    rows = dict.fromkeys(backbone_names(), "")
    return {**rows, "timm/<model>": "any model of timm, e.g. timm/convnext_tiny"}


def _recipes() -> dict[str, str]:
    """Return the recipes by their path, with the first line of their comment."""
    rows = {}
    for path in sorted(_RECIPES.rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        if path.parent.name != "_base_":  # those are parts of recipes
            rows[os.path.relpath(path)] = first.removeprefix("#").strip()
    return rows


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "methods": method_titles,
    "backbones": _backbones,
    "recipes": _recipes,
    "datasets": lambda: DATASETS,
}
