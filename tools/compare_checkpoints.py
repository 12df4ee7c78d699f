"""Tell whether two checkpoints hold bit-identical state: python tools/compare_checkpoints.py A.pt B.pt

Compares weights, target, queues, optimiser, scaler and step, but not the configuration: the folder
differs.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.checkpoints import file as checkpoint
from utils.cli import run_main

_STATE = ("framework", "optimizer", "scaler", "step", "best")


def main() -> int:
    """Print the entries that differ; return 0 if none do."""
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    first, second = (compared(Path(path)) for path in sys.argv[1:])
    different = sorted(first.keys() ^ second.keys())
    different += [key for key in first.keys() & second.keys() if not same(first[key], second[key])]
    if different:
        print(
            f"{len(different)} of {len(first)} entries differ, e.g. {', '.join(sorted(different)[:5])}"
        )
        return 1
    tensors = sum(isinstance(value, torch.Tensor) for value in first.values())
    print(
        f"identical: {len(first)} entries, {tensors} of them tensors, at step {first.get('step', 'unknown')}"
    )
    return 0


def compared(path: Path) -> dict[str, Any]:
    """Return the leaves of a checkpoint to compare; `ValueError` if it has none."""
    found = dict(entries(checkpoint.load(path)))
    if not found:
        raise ValueError(f"{path} holds none of {', '.join(_STATE)}; name two checkpoints of runs")
    return found


def entries(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of the compared part of a checkpoint with its path."""
    if isinstance(state, dict):
        for key, value in state.items():
            if prefix or key in _STATE:
                yield from entries(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            yield from entries(value, f"{prefix}[{index}]")
    else:
        yield prefix, state


def same(first: Any, second: Any) -> bool:
    """Compare two leaves, tensors by type, shape and every bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and first == second


if __name__ == "__main__":
    run_main(main)
