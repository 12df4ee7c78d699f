"""What a person reads when a run is complete: the best value, the weights, the next command."""

import argparse
import json
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.config.flags import FLAGS
from utils.config.key import Value
from utils.config.load import opts_pairs
from utils.logger import METRICS_FILE

logger = logging.getLogger("synco")

# What a probe must be told again, to find the run and its data.
_CARRIED = ("OUTPUT", "NAME", "TAG", "DEVICE", "DATA.", "MODEL.")


def show_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Log (title, text) pairs, texts aligned."""
    width = max((len(title) for title, _ in rows), default=0)
    for title, text in rows:
        logger.info("  %s  %s", title.ljust(width), text)


def watched(best: Mapping[str, float], keep_best: str) -> str:
    """Return the name of the value to judge a run by, "" if nothing was measured.

    That is `CHECKPOINT.KEEP_BEST`, else the highest top-1, else what was measured first.
    """
    if keep_best in best:
        return keep_best
    # a name with a slash is that of one head of a grid
    names = [name for name in best if "/" not in name]
    top1 = [name for name in names if name.endswith("top1")]
    if top1:
        return max(top1, key=lambda name: best[name])
    return names[0] if names else ""


def epoch_of(folder: Path, name: str, value: float) -> float:
    """Return the epoch after which `name` was first `value`, by metrics.jsonl; NaN if unknown."""
    try:
        with (folder / METRICS_FILE).open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                # only evaluations are parsed: a long run has 100,000 other lines
                if f'"{name}"' in line and (row := json.loads(line)).get(name) == value:
                    return float(row["epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no file, or not as we write it: the summary goes without
    return math.nan


def best_text(folder: Path, best: Mapping[str, float], keep_best: str) -> str:
    """Return `knn20_top1 84.60 after epoch 3`, "" if nothing was measured."""
    name = watched(best, keep_best)
    if not name:
        return ""
    epoch = epoch_of(folder, name, best[name])
    when = "" if math.isnan(epoch) else f" after epoch {epoch:g}"
    return f"{name} {best[name]:.2f}{when}"


def command(program: str, args: argparse.Namespace, flags: Mapping[str, Value]) -> str:
    """Return the command line of `program` on the run, data and backbone of this command line."""
    words = ["python", program]
    if args.cfg:
        words += ["--cfg", args.cfg]
    left = {key: value for key, value in flags.items() if key.startswith(_CARRIED)}
    for name, flag in FLAGS.items():
        if flag.key in left and flag.constant in (None, left[flag.key]):
            value = left.pop(flag.key)
            words += [name] if flag.constant is not None else [name, str(value)]
    opts = [(key, text) for key, text in opts_pairs(args.opts) if key.startswith(_CARRIED)]
    if opts:
        words += ["--opts", *(f"{key}={text}" for key, text in opts)]
    return shlex.join(words)
