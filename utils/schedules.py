"""Schedules as pure functions of the step, so that a resumed run continues them exactly."""

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimiser steps done, out of how many."""

    step: int
    steps_per_epoch: int
    total_steps: int

    @property
    def epoch(self) -> int:
        """Return the epoch this step belongs to, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def epoch_position(self) -> float:
        """Return the position in epochs, e.g. 2.5 in the middle of the third."""
        return self.step / self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Return the share of the run that is done, in [0, 1]."""
        return self.step / self.total_steps

    @property
    def next(self) -> "Progress":
        """Return the progress of the following step."""
        return Progress(self.step + 1, self.steps_per_epoch, self.total_steps)


def cosine(fraction: float, start: float, end: float) -> float:
    """Go from `start` at 0 to `end` at 1 along half a cosine."""
    return end - (end - start) * (math.cos(math.pi * fraction) + 1.0) / 2.0


def momentum_at(fraction: float, base: float, schedule: str) -> float:
    """Return the target network's momentum: `constant` (MoCo) or `cosine` to 1 (BYOL, MoBY)."""
    if schedule == "constant":
        return base
    if schedule == "cosine":
        # BYOL (arXiv 2006.07733, section 3.3): 1 - (1 - base) * (cos(pi * fraction) + 1) / 2
        return cosine(fraction, base, 1.0)
    raise ValueError(f"MOMENTUM_SCHEDULE: {schedule!r} is not 'constant' or 'cosine'; use one")


class LearningRate(NamedTuple):
    """A learning-rate schedule; rates are scaled to the global batch, lengths are in steps."""

    name: str
    base: float
    warmup_start: float
    minimum: float
    warmup_steps: int
    total_steps: int
    steps_per_epoch: int
    milestones: tuple[int, ...] = ()  # epochs
    gamma: float = 0.1
    decay_epochs: int = 30
    per_epoch: bool = False  # hold the rate of the epoch's first step (MoCo)
    # start the cosine after the warm-up (MoCo v3) and not at step 0 (timm, MoBY)
    shifted: bool = False
    # the one-step lag of the published MoBY and SiT code: steps 0 and 1 share a rate
    lag: bool = False
    power: float = 1.0  # of poly

    def at(self, step: int) -> float:
        """Return the learning rate of optimiser step `step`."""
        unit = self.steps_per_epoch if self.per_epoch else 1
        time = (step // unit - int(self.lag)) * unit if self.lag else step // unit * unit
        return self._at_time(max(time, 0))

    def _at_time(self, time: int) -> float:
        if self.name == "poly":
            return self._poly(time)
        if time < self.warmup_steps:
            return self.warmup_start + time * (self.base - self.warmup_start) / self.warmup_steps
        start = self.warmup_steps if self.shifted else 0
        match self.name:
            case "cosine":
                fraction = (time - start) / max(self.total_steps - start, 1)
                return cosine(fraction, self.base, self.minimum)
            case "linear":  # timm's linear schedule as MoBY uses it: down to 1 % of the base
                fraction = (time - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
                return self.base * (1.0 - 0.99 * fraction)
            case "step":
                drops = time // (self.decay_epochs * self.steps_per_epoch)
                return self.base * self.gamma**drops
            case "milestones":
                epoch = time // self.steps_per_epoch
                return self.base * self.gamma ** sum(epoch >= m for m in self.milestones)
            case "constant":
                return self.base
        raise ValueError(f"SCHEDULE.NAME: {self.name!r} is not one of {', '.join(SCHEDULES)}")

    def _poly(self, time: int) -> float:
        """Return the rate of segmentation's schedule, to which the warm-up is a factor.

        So there is no jump at its end, where the other schedules jump from the base to their own
        value.
        """
        span = self.base - self.minimum
        rate = span * (1.0 - time / self.total_steps) ** self.power + self.minimum
        if time >= self.warmup_steps or not self.base:
            return rate
        missing = (1.0 - time / self.warmup_steps) * (1.0 - self.warmup_start / self.base)
        return rate * (1.0 - missing)


SCHEDULES = ("cosine", "linear", "step", "milestones", "constant")
