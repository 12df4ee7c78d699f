"""Tell whether two checkpoints hold bit-identical state.

Example: python tools/compare_checkpoints.py A.pt B.pt

Compares weights, target, queues, optimiser, scaler and step, but not the configuration, which names
the folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import Parser, answer_at_once, run_main


def _parser() -> Parser:
    parser = Parser(
        description=__doc__,
    )
    parser.add_argument("first", type=Path, metavar="A.pt", help="a checkpoint")
    parser.add_argument("second", type=Path, metavar="B.pt", help="another")
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

from collections.abc import Iterator, Mapping

import torch

from utils.checkpoints import file as checkpoint

_STATE = ("framework", "optimizer", "scaler", "step", "best")


def main() -> int:
    """Print the entries that differ; return 0 if none do."""
    args = _parser().parse_args()
    first, second = compared(args.first), compared(args.second)
    different = sorted(first.keys() ^ second.keys())
    different += [key for key in first.keys() & second.keys() if not same(first[key], second[key])]
    if different:
        some = ", ".join(sorted(different)[:5])
        print(f"{len(different)} of {len(first)} entries differ, e.g. {some}")
        return 1
    tensors = sum(isinstance(value, torch.Tensor) for value in first.values())
    step = first.get("step", "unknown")
    print(f"identical: {len(first)} entries, {tensors} of them tensors, at step {step}")
    return 0


def compared(path: Path) -> dict[str, object]:
    """Return the leaves of a checkpoint to compare; `ValueError` if it has none."""
    found = dict(entries(checkpoint.load(path)))
    if not found:
        raise ValueError(f"{path} holds none of {', '.join(_STATE)}; name two checkpoints of runs")
    return found


def entries(state: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every leaf of the compared part of a checkpoint with its path."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            if prefix or key in _STATE:
                yield from entries(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            yield from entries(value, f"{prefix}[{index}]")
    else:
        yield prefix, state


def same(first: object, second: object) -> bool:
    """Compare two leaves, tensors by type, shape and every bit."""
    # NaN differs from itself here; a checkpoint holds none, see `file.save`.
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and first == second


if __name__ == "__main__":
    run_main(main)
