"""Numbers derived from the configuration once: batches, steps, scaled learning rates."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from yacs.config import CfgNode

from utils.distributed import world_size
from utils.schedules import LearningRate, Progress, cosine

logger = logging.getLogger("synco")


@dataclass(frozen=True)
class Plan:
    """What a run will do, in optimiser steps."""

    epochs: int  # the last one may end early
    steps_per_epoch: int
    global_batch: int  # images an optimiser step sees, over processes and micro-batches
    accumulation: int
    clip_grad: float
    # one a parameter group's "rate" index; a grid of heads has several
    rates: tuple[LearningRate, ...]
    clip_per_tensor: bool = False
    weight_decay: float = 0.0
    weight_decay_end: float = 0.0  # 0: constant
    steps: int = 0  # of the whole run; 0: whole epochs

    @property
    def total_steps(self) -> int:
        """Return the number of optimiser steps of the whole run."""
        return self.steps or self.epochs * self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Return whether an epoch, or the run, is over after `step` steps."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    def progress(self, step: int) -> Progress:
        """Return how far the run is at optimiser step `step`."""
        return Progress(step, self.steps_per_epoch, self.total_steps)

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of optimiser step `step` of what decays at all."""
        if not self.weight_decay_end:
            return self.weight_decay
        return cosine(step / self.total_steps, self.weight_decay, self.weight_decay_end)

    def describe(self) -> str:
        """Say in one line what will be done."""
        rates = ", ".join(f"{rate.base:.4g}" for rate in self.rates)
        length = f"{self.epochs} epochs x {self.steps_per_epoch} steps = {self.total_steps} steps"
        if self.steps:
            epochs = self.steps / self.steps_per_epoch
            length = f"{self.steps} steps = {epochs:.4g} epochs of {self.steps_per_epoch} steps"
        return (
            f"{length}, global batch {self.global_batch} = {world_size()} process(es) x "
            f"{self.accumulation} micro-batch(es) x "
            f"{self.global_batch // (self.accumulation * world_size())}, peak lr {rates}"
        )


def global_batch_size(batch_size: int, accumulation: int = 1) -> int:
    """Return the images of one optimiser step for a batch size per process and micro-batch."""
    return batch_size * accumulation * world_size()


def held_out_batch(num_images: int, batch_size: int) -> int:
    """Return the global batch, at most `batch_size` on each process, that leaves out fewest images.

    Raises `ValueError` where there is not one image for each process.
    """
    # All batches have one size, since in-batch losses depend on it. So a few images stay out.
    share = num_images // world_size()
    num_batches = -(-share // batch_size)
    per_process = share // num_batches if num_batches else 0
    if not per_process:
        raise ValueError(
            f"HELD_OUT.EVERY_EPOCHS: the val split has {num_images} images for {world_size()} "
            "processes; set it to 0"
        )
    return per_process * world_size()


def make_plan(
    optim: CfgNode,
    schedule: CfgNode,
    *,
    epochs: int,
    steps_per_epoch: int,
    global_batch: int,
    base_rates: Sequence[float],
    accumulation: int = 1,
    section: str = "",
    steps: int = 0,
) -> Plan:
    """Derive the plan from an `OPTIM` and a `SCHEDULE` section; `LR_BATCH` may scale the rates.

    `steps`, if not 0, replace `epochs`. `section` (`LINEAR.`) is the section around both, for
    messages.
    """
    if steps:
        epochs = math.ceil(steps / steps_per_epoch)
    total_steps = steps or epochs * steps_per_epoch
    warmup = schedule.WARMUP_EPOCHS * steps_per_epoch
    if warmup >= total_steps:
        # A trial of an epoch or two (--epochs 1) of a recipe of hundreds. Under PER_EPOCH an epoch
        # keeps the rate of its first step, which would be that of the warm-up's start.
        warmup = 0 if schedule.PER_EPOCH else total_steps // 10
        message = "%sSCHEDULE.WARMUP_EPOCHS: %d leaves nothing of %d epochs; shortened to %d steps"
        logger.warning(message, section, schedule.WARMUP_EPOCHS, epochs, warmup)
    scale = global_batch / optim.LR_BATCH if optim.LR_BATCH else 1.0
    rates = tuple(
        LearningRate(
            name=schedule.NAME,
            base=base * scale,
            warmup_start=optim.WARMUP_LR * scale,
            minimum=optim.MIN_LR * scale,
            warmup_steps=warmup,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            milestones=tuple(schedule.MILESTONES),
            gamma=schedule.GAMMA,
            decay_epochs=schedule.DECAY_EPOCHS,
            per_epoch=schedule.PER_EPOCH,
            shifted=schedule.SHIFTED,
            lag=schedule.LAG,
        )
        for base in base_rates
    )
    for rate in rates:
        rate.at(rate.warmup_steps)  # an unknown schedule is refused here, not after the warm-up
    return Plan(
        epochs,
        steps_per_epoch,
        global_batch,
        accumulation,
        optim.CLIP_GRAD,
        rates,
        optim.CLIP_PER_TENSOR,
        optim.WEIGHT_DECAY,
        optim.WEIGHT_DECAY_END,
        steps,
    )


def iteration_plan(
    optim: CfgNode,
    node: CfgNode,
    global_batch: int,
    accumulation: int = 1,
    *,
    schedule: str = "milestones",
    power: float = 1.0,
    section: str,
    base_rates: Sequence[float] = (),
) -> Plan:
    """Derive a plan that counts iterations, not epochs; the log's epoch is one `EVAL_PERIOD`.

    `node` is the section `DETECTION` or `SEGMENTATION`, `section` its name with a point, for
    messages; `base_rates` replace `BASE_LR`.
    """
    _say_what_comes_too_late(node, schedule, section)
    period = node.EVAL_PERIOD or node.MAX_ITER
    scale = global_batch / optim.LR_BATCH if optim.LR_BATCH else 1.0
    rates = tuple(
        LearningRate(
            name=schedule,
            base=base * scale,
            warmup_start=optim.WARMUP_LR * scale,
            minimum=optim.get("MIN_LR", 0.0) * scale,
            warmup_steps=node.WARMUP_ITERS,
            total_steps=node.MAX_ITER,
            steps_per_epoch=1,  # so that milestones count iterations
            milestones=tuple(node.STEPS),
            gamma=node.GAMMA,
            power=power,
        )
        for base in base_rates or [optim.BASE_LR]
    )
    return Plan(
        epochs=node.MAX_ITER // period,
        steps_per_epoch=period,
        global_batch=global_batch,
        accumulation=accumulation,
        clip_grad=optim.CLIP_GRAD,
        rates=rates,
        clip_per_tensor=optim.CLIP_PER_TENSOR,
        weight_decay=optim.WEIGHT_DECAY,
        weight_decay_end=optim.WEIGHT_DECAY_END,
    )


def _say_what_comes_too_late(node: CfgNode, schedule: str, section: str) -> None:
    """Warn of a warm-up or a drop of the rate at or after the last iteration."""
    # Likely a short trial of a long recipe, which should run, but is no short form of it.
    if node.WARMUP_ITERS >= node.MAX_ITER:
        logger.warning(
            "%sWARMUP_ITERS: %d of %d iterations: the rate never reaches its peak; set it to e.g. "
            "%d",
            section,
            node.WARMUP_ITERS,
            node.MAX_ITER,
            node.MAX_ITER // 10,
        )
    late = [step for step in node.STEPS if step >= node.MAX_ITER]
    if late and schedule == "milestones":
        logger.warning(
            "%sSTEPS: %s: the training ends after %d iterations, without these drops of the rate; "
            "choose smaller numbers",
            section,
            late,
            node.MAX_ITER,
        )
