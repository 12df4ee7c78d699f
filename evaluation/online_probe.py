"""A linear classifier that learns beside a pretraining run and has no influence on it."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from engine.run import Run
from engine.state import State
from evaluation.accuracy import topk_correct
from utils.distributed import all_reduce_sum, world_size
from utils.randomness import keyed_seed

logger = logging.getLogger("synco")


class OnlineProbe:
    """Train one linear layer on the online backbone's features of the first view (`PROBE.ONLINE`).

    The features are detached, scaled per image and in float32. Optimiser, first weights and
    gradient average are the probe's own. SiT's features are those of its corrupted images.
    """

    def __init__(
        self, width: int, num_classes: int, lr: float, seed: int, device: torch.device
    ) -> None:
        # The probe has a separate generator, so the run draws the same numbers with and without it.
        generator = torch.Generator().manual_seed(keyed_seed("online probe", seed))
        weight = torch.empty(num_classes, width)
        nn.init.normal_(weight, std=0.01, generator=generator)
        self.weight = nn.Parameter(weight.to(device))
        self.bias = nn.Parameter(torch.zeros(num_classes, device=device))
        self._parameters = [self.weight, self.bias]
        # Adam, since the features change their distribution while the backbone trains
        self.optimizer = torch.optim.AdamW(self._parameters, lr=lr, weight_decay=0.0, fused=True)
        self._losses: list[Tensor] = []  # of the micro-batches since the last update

    def logits(self, features: Tensor) -> Tensor:
        """Return float32 logits (N, C) of features (N, F)."""
        # Without state, unlike a batch norm. The length of features differs much between methods,
        # and one learning rate has to do for all.
        return F.linear(F.layer_norm(features.float(), features.shape[1:]), self.weight, self.bias)

    def learn(self, features: Tensor, labels: Tensor) -> None:
        """Add the gradient for a micro-batch; its first N features are those of labels (N,)."""
        features = features[: len(labels)]
        # autocast would round the head's products
        with torch.autocast(features.device.type, enabled=False):
            loss = F.cross_entropy(self.logits(features), labels)
        loss.backward()
        self._losses.append(loss.detach())

    def update(self) -> dict[str, Tensor]:
        """Apply the mean gradient of all processes and micro-batches; return the mean loss."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        # one exchange; every rank gets the same sum, so that the heads stay equal
        mean = all_reduce_sum(torch.cat([grad.flatten() for grad in grads]))
        mean /= world_size() * len(self._losses)
        # fp16 may overflow while the scaler finds its scale: such a batch is left out. A mask,
        # since a look would wait for the device.
        mean.masked_fill_(~torch.isfinite(mean).all(), 0)
        for grad, part in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        return {"probe_loss": loss}

    @torch.no_grad()
    def accuracy(self, blocks: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Return percent top-1 of all processes' blocks of (features, labels); {} untrained."""
        if not self.optimizer.state:
            return {}
        counts = torch.zeros(2, dtype=torch.int64, device=self.weight.device)
        for features, labels in blocks:
            counts[:1] += topk_correct(self.logits(features), labels, (1,))
            counts[1] += len(labels)
        right, total = all_reduce_sum(counts).tolist()
        return {"probe_top1": 100.0 * right / total}

    def state_dict(self) -> State:
        """Return what a checkpoint holds of the probe."""
        head = {"weight": self.weight.detach(), "bias": self.bias.detach()}
        return {"head": head, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Restore the probe; {}, of a run that had none, keeps its start."""
        if not state:
            logger.warning("PROBE.ONLINE: the checkpoint holds no on-line probe; it starts now")
            return
        with torch.no_grad():
            self.weight.copy_(state["head"]["weight"])
            self.bias.copy_(state["head"]["bias"])
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        # `PROBE.LR` may change on the way, and the state holds the old one
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def open_probe(cfg: CfgNode, run: Run, backbone: nn.Module, num_classes: int) -> OnlineProbe | None:
    """Return the probe of a `PROBE` section, None if it is off.

    Raises `ValueError` for 0 classes: an image of the training set has no label.
    """
    if not cfg.PROBE.ONLINE:
        return None
    if not num_classes:
        raise ValueError(
            f"PROBE.ONLINE: DATA.DATASET {cfg.DATA.DATASET!r} has training images without labels, "
            "and the on-line probe learns from them; set it to False, or use a labelled set"
        )
    width = backbone.num_features
    assert isinstance(width, int)
    return OnlineProbe(width, num_classes, cfg.PROBE.LR, run.seed, run.device)
