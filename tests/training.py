"""A few optimiser steps through the engine, on one process or several, in float64."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import loop as engine
from engine.guards import FiniteGuard
from engine.optim import build_optimizer, parameter_groups
from engine.plan import Plan
from engine.run import Run
from engine.state import TrainState
from models import FRAMEWORKS, framework_options
from models.parts.backbones import build_backbone
from models.parts.norm import convert_sync_batch_norm
from utils import distributed
from utils.batch import Batch
from utils.config.schema import declare
from utils.schedules import LearningRate

# float64 is asked for, sizes are the smallest that keep each method's parts
SMALL: dict[str, dict[str, Any]] = {
    "moco_v2": {"queue_size": 64, "out_dim": 8},
    "synco": {
        "queue_size": 64,
        "out_dim": 8,
        "num_hard": 16,
        "num_synthetic": [4] * 6,
        "warmup_epochs": 0,
    },
    "byol": {"hidden_dim": 16, "out_dim": 8},
    "moby": {"queue_size": 64, "hidden_dim": 16, "out_dim": 8},
    "synco_v2": {
        **{"queue_size": 64, "hidden_dim": 16, "out_dim": 8},
        **{"num_hard": 16, "num_synthetic": [4] * 6, "warmup_epochs": 0},
    },
    "mocov3": {"hidden_dim": 16, "out_dim": 8, "temperature": 0.2},
}
BATCH = 16  # of an optimiser step, over all processes and micro-batches


class LayerNormBackbone(nn.Module):
    """A backbone in which no sample knows of another."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.norm = nn.LayerNorm(12)
        self.mlp = nn.Linear(12, 12)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.patches(images).flatten(2).mT)
        return nn.functional.gelu(self.mlp(tokens)).mean(1)


def build(method: str, options: dict[str, Any], batch_norm: bool) -> Any:
    """Build a framework in float64 from the same draws on every process."""
    torch.manual_seed(7)
    backbone = (
        build_backbone("resnet8", stem="cifar_stride2") if batch_norm else LayerNormBackbone()
    )
    framework = FRAMEWORKS[method](backbone, **{**SMALL[method], **options})
    if distributed.world_size() > 1 and framework.sync_batch_norm:
        convert_sync_batch_norm(framework)
    return framework.double()


def joint_views(step: int, num_local: int = 0) -> list[Tensor]:
    """Draw the two views (BATCH, 3, 8, 8) of a step's global batch, and local ones (BATCH, 3, 4, 4)."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
    views = [
        images + 0.3 * torch.randn(images.shape, generator=generator).double() for _ in range(2)
    ]
    corners = [images[:, :, 4 * n % 8 :, :4][:, :, :4] for n in range(num_local)]
    return views + corners


def micro_batches(step: int, accumulation: int, num_local: int = 0) -> list[Batch]:
    """Cut this process's rows out of the global batch: contiguous, since queues keep rank order."""
    share = BATCH // distributed.world_size()
    mine = torch.arange(share) + distributed.rank() * share
    return [
        Batch(
            [view[rows] for view in joint_views(step, num_local)], torch.full_like(rows, -1), rows
        )
        for rows in mine.chunk(accumulation)
    ]


def prepare(
    method: str, options: dict[str, Any], batch_norm: bool, accumulation: int = 1
) -> tuple[TrainState, Plan]:
    """Return what ``fit`` works on: framework, optimiser, DDP, a plan of 8 steps with clipping."""
    cfg = declare(framework_options()).defaults()
    run = Run(cfg, Path("unused"), torch.device("cpu"))
    framework = run.prepare(build(method, options, batch_norm))
    optimizer = build_optimizer(cfg.OPTIM, parameter_groups(framework, cfg.OPTIM))
    rate = LearningRate("constant", 0.1, 0.0, 0.0, 0, 8, 2)
    plan = Plan(4, 2, BATCH, accumulation, 0.5, (rate,))
    return TrainState(framework, optimizer, run.wrap(framework)), plan


def train_step(state: TrainState, plan: Plan, num_local: int = 0) -> dict[str, Tensor]:
    """Do one step of ``fit``."""
    batches = micro_batches(state.step, plan.accumulation, num_local)
    out = engine.train_step(
        state, plan, FiniteGuard(), lambda b, p: state.model(b.views, p), batches, 0
    )
    return {name: value.detach() for name, value in out.items()}


def train(
    method: str,
    options: dict[str, Any],
    batch_norm: bool,
    accumulation: int = 1,
    steps: int = 3,
    num_local: int = 0,
) -> dict[str, Any]:
    """Train a few steps; return every step's outputs and the last state."""
    state, plan = prepare(method, options, batch_norm, accumulation)
    outputs = [train_step(state, plan, num_local) for _ in range(steps)]
    return {"outputs": outputs, "state": state.module.state_dict()}
