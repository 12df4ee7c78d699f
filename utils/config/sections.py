"""Sections of the configuration tree as the builders of models read them."""

from typing import Any

from yacs.config import CfgNode

# `batchformer` is MoCo v3 with BatchFormer always on, so it reads the options of MoCo v3.
SECTION_OF = {"batchformer": "MOCOV3"}


def section_options(node: CfgNode) -> dict[str, Any]:
    """Return a section as keyword arguments, names in lower case."""
    return {key.lower(): value for key, value in node.items()}


def method_section(method: str) -> str:
    """Return the name of the section of `MODEL` that holds a method's options."""
    return SECTION_OF.get(method, method.upper())
