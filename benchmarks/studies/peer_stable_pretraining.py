"""The CIFAR-10 benchmarks of stable-pretraining (pip install stable-pretraining), SimCLR and BYOL.

Its module, views, losses, optimiser and schedule, trained by Lightning as it asks for.
"""

import itertools
import math
import time
from pathlib import Path
from typing import cast

import lightning
import stable_pretraining as spt
import torch
from PIL import Image
from stable_pretraining import forward
from stable_pretraining.data import transforms
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.studies.peer_status import note
from data.sources.base import Source
from models.parts.backbones import Backbone

# All values are of benchmarks/cifar10/{simclr,byol}-resnet18.py in its repository (9a9c1985,
# 35e277db). Its sampler repeats each image of a batch, which its older transform needed; left out.
_BATCH, _RATE, _WEIGHT_DECAY = 256, 5.0, 1e-6
_MOMENTUM = {"base_ema_coefficient": 0.996, "final_ema_coefficient": 1.0}


class Pictures(Dataset[tuple[Image.Image, int]]):
    """The images of a source, as torchvision's data sets give them."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and a label that nothing reads."""
        return Image.fromarray(self.source.load(index).permute(1, 2, 0).numpy()), 0


class Notes(lightning.Callback):
    """Write the status every ten steps and at the end."""

    def __init__(self, folder: Path, total: int, epochs: float) -> None:
        self.folder, self.total, self.epochs = folder, total, epochs
        self.begin = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: object, outputs: object, *_: object
    ) -> None:
        """Write the status after some steps."""
        step = trainer.global_step
        if step % 10 == 0 or step == self.total:
            loss = float(cast("dict[str, torch.Tensor]", outputs)["loss"])
            rate = step * _BATCH / (time.monotonic() - self.begin)
            note(self.folder, step, self.total, self.epochs, loss, rate)


def _view(least: float) -> transforms.Compose:
    return transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((32, 32), scale=(least, 1.0)),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.ToImage(**spt.data.static.CIFAR10),
    )


def _mlp(*widths: int) -> nn.Sequential:
    """Return linear layers with batch norm and ReLU between them."""
    layers: list[nn.Module] = []
    for width, wider in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(width, wider), nn.BatchNorm1d(wider), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def _parts(method: str, backbone: Backbone) -> dict[str, object]:
    width = backbone.num_features
    if method == "stable_pretraining_simclr":
        return {
            "forward": forward.simclr,
            "backbone": backbone,
            "projector": _mlp(width, 2048, 2048, 256),
            "simclr_loss": spt.losses.NTXEntLoss(temperature=0.5),
        }
    return {
        "forward": forward.byol,
        "backbone": spt.TeacherStudentWrapper(backbone, warm_init=True, **_MOMENTUM),
        "projector": spt.TeacherStudentWrapper(_mlp(width, 2048, 128), warm_init=True, **_MOMENTUM),
        "predictor": _mlp(128, 2048, 128),
        "byol_loss": spt.losses.BYOLLoss(),
    }


def train(
    method: str,
    backbone: Backbone,
    source: Source,
    epochs: float,
    device: torch.device,
    folder: Path,
) -> None:
    """Train with LARS, 1 % warm-up and a cosine, as in its benchmark."""
    least = (0.08, 0.08) if method == "stable_pretraining_simclr" else (0.2, 0.08)
    data = spt.data.FromTorchDataset(
        Pictures(source),
        names=["image", "label"],
        transform=transforms.MultiViewTransform([_view(share) for share in least]),
    )
    loader = DataLoader(data, _BATCH, shuffle=True, drop_last=True)
    total = round(epochs * len(loader))
    optimizer = {"type": "LARS", "lr": _RATE, "weight_decay": _WEIGHT_DECAY}
    schedule = {"type": "LinearWarmupCosineAnnealing", "total_steps": total}
    module = spt.Module(
        **_parts(method, backbone),
        # the benchmark changes the rate each of 1,000 epochs; few epochs need it each step
        optim={"optimizer": optimizer, "scheduler": schedule, "interval": "step"},
    )
    trainer = lightning.Trainer(
        max_steps=total,
        max_epochs=math.ceil(epochs),
        accelerator=device.type,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        # its manager adds the second one, which moves the teacher
        callbacks=[Notes(folder, total, epochs), spt.TeacherStudentCallback()],
    )
    trainer.fit(module, loader)
