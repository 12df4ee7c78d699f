"""SimCLR as stable-pretraining's README writes it, with Lightning's trainer: up to the first step.

Example: python -m benchmarks.training.first_steps.stable_pretraining_simclr FOLDER --size 32
             --batch 16
"""

import lightning
import stable_pretraining as spt
import torch
from stable_pretraining.forward import simclr
from torch import Tensor
from torchvision.datasets import ImageFolder

from benchmarks.training.first_steps.arguments import DONE, parse


class _Say(lightning.Callback):
    """Say that the first step is done."""

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: dict[str, Tensor],
        *_: object,
    ) -> None:
        print(DONE, float(outputs["loss"]), flush=True)


def main() -> None:
    """Make one step and say so."""
    args = parse(__doc__)
    transforms = spt.data.transforms
    view = transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((args.size, args.size)),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomHorizontalFlip(),
        transforms.ToImage(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    )
    dataset = spt.data.FromTorchDataset(
        ImageFolder(args.folder),
        names=["image", "label"],
        transform=transforms.MultiViewTransform([view, view]),
    )
    loader = torch.utils.data.DataLoader(dataset, args.batch, shuffle=True, drop_last=True)
    module = spt.Module(
        backbone=spt.backbone.from_timm("resnet18", num_classes=0),
        projector=torch.nn.Linear(512, 128),
        forward=simclr,
        simclr_loss=spt.losses.NTXEntLoss(temperature=0.5),
        optim={"optimizer": {"type": "SGD", "lr": 0.06}},
    )
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[_Say()]
    )
    spt.Manager(trainer=trainer, module=module, data=spt.data.DataModule(train=loader))()


if __name__ == "__main__":
    main()
