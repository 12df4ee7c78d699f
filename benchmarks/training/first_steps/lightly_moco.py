"""MoCo v2 as lightly's documentation writes it in plain PyTorch: up to the first step.

Example: python -m benchmarks.training.first_steps.lightly_moco FOLDER --size 32 --batch 16
"""

import copy

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from torch import nn

from benchmarks.training.first_steps.arguments import DONE, parse


def main() -> None:
    """Make one step and say so."""
    args = parse(__doc__)
    resnet = torchvision.models.resnet18()
    online = nn.Sequential(*list(resnet.children())[:-1], nn.Flatten())
    online.append(MoCoProjectionHead(512, 512, 128))
    target = copy.deepcopy(online)
    deactivate_requires_grad(target)
    criterion = NTXentLoss(memory_bank_size=(4096, 128))
    optimizer = torch.optim.SGD(online.parameters(), lr=0.06)
    dataset = LightlyDataset(args.folder, transform=MoCoV2Transform(input_size=args.size))
    loader = torch.utils.data.DataLoader(dataset, args.batch, shuffle=True, drop_last=True)
    views = next(iter(loader))[0]
    update_momentum(online, target, 0.99)
    with torch.no_grad():
        keys = target(views[1])
    loss = criterion(online(views[0]), keys)
    loss.backward()
    optimizer.step()
    print(DONE, float(loss.detach()), flush=True)


if __name__ == "__main__":
    main()
