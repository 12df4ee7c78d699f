"""What training changes, and what a checkpoint restores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from utils.schedules import Progress

State: TypeAlias = dict[str, Any]  # what a checkpoint holds: tensors, numbers, text, nested


class Framework(Protocol):
    """What the engine asks of the module that it trains."""

    def after_step(self, progress: Progress) -> None:
        """Update what follows the optimiser step without a gradient: target, queue."""

    def state_dict(self) -> State:
        """Return parameters and buffers."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Restore parameters and buffers; every key and shape must match."""


class Companion(Protocol):
    """What learns beside the module, from the same steps, without influence on it."""

    def update(self) -> dict[str, Tensor]:
        """Apply what the micro-batches of a step have taught; return scalars for the log."""

    def state_dict(self) -> State:
        """Return what a checkpoint holds."""

    def load_state_dict(self, state: State) -> None:
        """Restore it; {} if the checkpoint is of a run without."""


@dataclass
class TrainState:
    """All that a checkpoint restores, and `model`: the module as it is called in a step."""

    module: Framework
    optimizer: torch.optim.Optimizer
    model: nn.Module  # averages its gradients over the processes
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)  # best value of each evaluation so far
    lower_is_better: frozenset[str] = frozenset()  # the evaluations whose lowest value is the best
    clip_groups: Sequence[Sequence[nn.Parameter]] | None = None  # clipped apart; None: all together
    # (G,) int64: the step at which a group diverged and was closed, -1 while it is open. None: a
    # norm that is not finite stops the run.
    closed_at: Tensor | None = None
    probe: Companion | None = None

    def keep_best(self, values: Mapping[str, float]) -> None:
        """Update the best values with those of an evaluation."""
        for name, value in values.items():
            better = min if name in self.lower_is_better else max
            self.best[name] = better(self.best.get(name, value), value)

    def state_dict(self) -> State:
        """Return what a checkpoint holds."""
        state = {
            "framework": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "step": self.step,
            "best": dict(self.best),
        }
        if self.closed_at is not None:
            state["closed_at"] = self.closed_at
        if self.probe is not None:
            state["probe"] = self.probe.state_dict()
        return state

    def load_state_dict(self, state: State) -> None:
        """Restore a checkpoint."""
        self.module.load_state_dict(state["framework"])
        self.optimizer.load_state_dict(state["optimizer"])
        # A checkpoint of another precision has no scaler's state: the scale is found anew.
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.best = dict(state["best"])
        if self.closed_at is not None and "closed_at" in state:  # older checkpoints lack it
            self.closed_at.copy_(state["closed_at"])
        if self.probe is not None:
            self.probe.load_state_dict(state.get("probe", {}))
