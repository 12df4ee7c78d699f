"""What the programs that fine-tune for a task share: the weights, the run, its result."""

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, cast

from torch import nn
from yacs.config import CfgNode

from engine.loop import Evaluation, Loader, Outcome, StepFunction, fit
from engine.plan import Plan
from engine.run import Run
from engine.state import TrainState
from evaluation.probe import find_weights, weights_fingerprint
from utils.batch import Batch
from utils.checkpoints.atomic import write_text

logger = logging.getLogger("synco")

B = TypeVar("B", bound=Batch)


def starting_weights(cfg: CfgNode, pretrained: str | None) -> Path | None:
    """Return the file that `--pretrained` names, None for random weights."""
    if not pretrained:
        raise ValueError(
            "--pretrained: is not given; name a file of weights, or none for random ones"
        )
    return None if pretrained == "none" else find_weights(cfg, pretrained)


def start_fingerprint(weights: Path | None, network: str, data: str) -> str:
    """Say from which weights and on which data a run trains."""
    return f"{weights_fingerprint(weights, network)}, data {data}"


@dataclass(frozen=True)
class Transfer(Generic[B]):
    """A task ready to train: its step, its evaluation and what it leaves at the end."""

    state: TrainState
    plan: Plan
    loader: Loader[B]
    step: StepFunction[B]
    measure: Evaluation
    conclude: Callable[[], Mapping[str, object]]  # the result of the run, or of --eval
    throughput: Callable[[], object]
    draw: Callable[[], object]
    split: str  # that is tested
    num_images: int  # of training
    trained: bool = False  # the weights that it starts from can be judged as they are


def run_transfer(run: Run, task: Transfer[B], args: argparse.Namespace, network: str) -> int:
    """Resume, train and evaluate; write `result.json` and a picture; return the exit code."""
    state, plan = task.state, task.plan
    resumed = run.resume(state, plan)
    run.describe(cast(nn.Module, state.module), plan, task.num_images)
    if args.throughput:
        task.throughput()
        return 0
    if args.eval and not resumed and not task.trained:
        raise ValueError(
            f"--eval: {run.folder} holds no checkpoint; train first, or give --resume FILE"
        )
    outcome = Outcome.DONE
    if not args.eval:
        outcome = fit(state, task.loader, task.step, plan, run, task.measure)
    if outcome is Outcome.DONE:
        result = task.conclude()
        # other entries are tables, for the file only
        figures = [f"{name} {value:.2f}" for name, value in result.items() if type(value) is float]
        logger.info("%s: %s", task.split, ", ".join(figures))
        if not args.eval:
            start: dict[str, object] = {"weights": args.pretrained}
            if args.pretrained != "none":  # of a file with several networks
                start["network"] = network
            text = json.dumps({**start, "step": state.step, **result}, indent=1)
            run.write_extra("result.json", lambda path: write_text(path, text))
            logger.info("  result: %s", run.folder / "result.json")
            task.draw()
    return outcome.value
