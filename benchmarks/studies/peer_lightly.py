"""The CIFAR-10 benchmark of lightly (pip install lightly): recipe, views, losses and data path."""

import copy
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models import modules
from lightly.models.utils import update_momentum
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.studies.peer_status import note
from data.sources.base import Source
from models.parts.backbones import Backbone

# All values are of cifar10_benchmark.py in lightly's documentation (commit 0351a522). Its batch is
# 128 at rate 0.06 for all three methods.
_BATCH, _RATE, _WEIGHT_DECAY = 128, 0.06, 5e-4
_KEYS = 4096


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image by lightly's transform for small images."""

    def __init__(self, source: Source) -> None:
        self.source = source
        # as in its benchmark: no blur of images of 32 pixels
        self.transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return two views (3, 32, 32) of an image."""
        pixels = self.source.load(index).permute(1, 2, 0).numpy()
        first, second = self.transform(Image.fromarray(pixels))
        # lightly declares images or tensors; its transform ends with a tensor
        return cast("Tensor", first), cast("Tensor", second)


class Contrast(nn.Module):
    """MoCo as in lightly's benchmark: symmetric, memory bank, temperature 0.1.

    Without its batch norm in 8 parts, so that all entries of a study share one backbone. Batch norm
    over the whole batch makes shuffling the keys pointless.
    """

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.online = nn.Sequential(backbone, modules.MoCoProjectionHead(width, width, 128))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.loss = NTXentLoss(temperature=0.1, memory_bank_size=(_KEYS, 128))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the loss of two views (N, 3, H, W)."""
        update_target(self.online, self.target)
        return (self._half(one, other) + self._half(other, one)) / 2

    def _half(self, query: Tensor, key: Tensor) -> Tensor:
        with torch.no_grad():
            keys = self.target(key)
        return self.loss(self.online(query), keys)


class Predict(nn.Module):
    """BYOL (with a target) or SimSiam (without) as in lightly's benchmark."""

    def __init__(self, backbone: nn.Module, width: int, with_target: bool) -> None:
        super().__init__()
        if with_target:
            projector = modules.BYOLProjectionHead(width, 1024, 256)
            self.predictor = modules.BYOLPredictionHead(256, 1024, 256)
        else:
            # two layers for CIFAR-10; modules.SimSiamProjectionHead has three
            first = (width, 2048, nn.BatchNorm1d(2048), nn.ReLU(inplace=True))
            projector = modules.heads.ProjectionHead(
                [first, (2048, 2048, nn.BatchNorm1d(2048), None)]
            )
            self.predictor = modules.SimSiamPredictionHead(2048, 512, 2048)
        self.online = nn.Sequential(backbone, projector)
        self.target = copy.deepcopy(self.online).requires_grad_(False) if with_target else None

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the loss of two views (N, 3, H, W)."""
        if self.target is not None:
            update_target(self.online, self.target)
        projected = self.online(one), self.online(other)
        with torch.no_grad():
            keys = projected if self.target is None else (self.target(one), self.target(other))
        first = _cosine(self.predictor(projected[0]), keys[1].detach())
        return (first + _cosine(self.predictor(projected[1]), keys[0].detach())) / 2


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return -F.cosine_similarity(one, other, dim=1).mean()


@torch.no_grad()
def update_target(online: nn.Module, target: nn.Module) -> None:
    """Average the weights with momentum 0.99 by lightly's own function."""
    update_momentum(online, target, 0.99)


def _model(method: str, backbone: Backbone) -> nn.Module:
    width = backbone.num_features
    builders: dict[str, Callable[[], nn.Module]] = {
        "lightly_moco": lambda: Contrast(backbone, width),
        "lightly_byol": lambda: Predict(backbone, width, with_target=True),
        "lightly_simsiam": lambda: Predict(backbone, width, with_target=False),
    }
    return builders[method]()


def train(
    method: str,
    backbone: Backbone,
    source: Source,
    epochs: float,
    device: torch.device,
    folder: Path,
) -> None:
    """Train with SGD and a cosine, as in lightly's benchmark."""
    model = _model(method, backbone).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, _RATE, momentum=0.9, weight_decay=_WEIGHT_DECAY)
    loader = DataLoader(Views(source), _BATCH, shuffle=True, drop_last=True)
    total = round(epochs * len(loader))
    # the benchmark lowers the rate after each of 200 epochs; few epochs need it after each step
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    batches = (batch for _ in range(math.ceil(epochs)) for batch in loader)
    begin = time.monotonic()
    for step, (one, other) in enumerate(itertools.islice(batches, total), 1):
        loss = model(one.to(device), other.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == total:
            rate = step * _BATCH / (time.monotonic() - begin)
            note(folder, step, total, epochs, loss.item(), rate)
