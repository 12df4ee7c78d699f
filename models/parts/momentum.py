"""What all methods share: an online and a target network, and a queue of keys."""

import copy
import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.parts.backbones import Backbone
from models.parts.batchformer import BatchFormer
from models.parts.heads import Encoder
from models.parts.losses import Contrast, contrast_health
from models.parts.resolution import take_sizes
from utils.distributed import gather_rows, world_size
from utils.schedules import Progress


class MomentumFramework(nn.Module):
    """Base of all methods: an online encoder and a target encoder that follows it by averaging.

    A subclass implements `forward(views, progress)`, which returns a dict with "loss" and
    "embedding", and `after_step(progress)`, which is called without gradient after each optimiser
    step.
    """

    def __init__(self, online: Encoder, target_backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.online = online
        # The target's drop-path rate may differ, so its backbone may be built apart.
        self.target = type(online)(
            target_backbone or copy.deepcopy(online.backbone), copy.deepcopy(online.projector)
        )
        # a backbone that was built apart has other random weights
        self.target.load_state_dict(online.state_dict())
        # so the optimiser does not see it: it follows by averaging only
        self.target.requires_grad_(False)

    can_take_local_views = False  # True: views after the second are local ones, queries only
    can_stack_views = False  # True: a backbone may take both views in one pass
    needs_batchformer = False  # True: BatchFormer is a part of the method
    sums_batchformer_pairs = False  # True: the method has MODEL.BATCHFORMER.LOSS sum
    restores_images = False  # True: the method has `restore`
    sync_batch_norm = False  # True: batch norms see the batches of all processes
    lower_is_better: tuple[str, ...] = ("loss",)  # of the scalars that `forward` returns

    def after_step(self, progress: Progress) -> None:
        """Update target and queue after an optimiser step, without gradient."""
        raise NotImplementedError

    def left_out(self, last: Progress) -> str:
        """Say what of the method a run with this `last` step never reaches; "" if nothing."""
        return ""

    def health(self, *contrasts: Contrast, queue_age: Tensor | None = None) -> dict[str, Tensor]:
        """Return scalars that tell how hard a contrast is and how old its keys; none in eval."""
        if not self.training:
            return {}
        age = {} if queue_age is None else {"queue_age": queue_age}
        return contrast_health(*contrasts) | age

    def restore(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return corrupted copies of images (N, 3, H, W) and their reconstructions."""
        raise NotImplementedError

    def attach_batchformer(self, batchformer: BatchFormer) -> None:
        """Put BatchFormer before the projector of both encoders; the target's copy is averaged.

        Raises `ValueError` for a pairing of the streams that the method does not have.
        """
        if batchformer.loss == "sum" and not self.sums_batchformer_pairs:
            raise ValueError(
                f"MODEL.BATCHFORMER.LOSS: 'sum' is MoCo v3's; use 'mean' with {type(self).__name__}"
            )
        self.online.batchformer = batchformer
        # a copy: its weights are averaged with the rest of the target
        self.target.batchformer = copy.deepcopy(batchformer).requires_grad_(False)

    def compile_backbones(self, backend: str = "inductor", cuda_graphs: bool = False) -> None:
        """Compile both backbones at their first call; their state dicts stay the same.

        With `cuda_graphs` a GPU replays their kernels as graphs, whose outputs last until the next
        step.
        """
        options = {"mode": "reduce-overhead"} if cuda_graphs else {"backend": backend}
        for encoder in (self.online, self.target):
            # in place: torch.compile(module) would put "_orig_mod." before the names in checkpoints
            encoder.backbone.compile(**options)
        if cuda_graphs:
            # The step's mark lets a graph write over the outputs of the step before.
            self.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())

    def stack_views(self) -> None:
        """Let a backbone take all views in one pass; ValueError where the method cannot."""
        if not self.can_stack_views:
            raise ValueError(
                f"MODEL.STACK_VIEWS: {type(self).__name__} treats its views differently; set it to "
                "False"
            )
        self.online.stack_views = self.target.stack_views = True

    def take_view_sizes(
        self, img_size: int, view_size: int = 0, local_size: int = 0, channels: int = 3
    ) -> None:
        """Let the backbones take views of other sizes than the one they were built for; 0: none.

        Raises ValueError where method or backbone cannot.
        """
        if local_size and not self.can_take_local_views:
            raise ValueError(
                f"AUG.LOCAL_CROPS.NUMBER: {type(self).__name__} has no local views; set it to 0"
            )
        if view_size and self.restores_images:
            raise ValueError(
                f"AUG.VIEW_SIZE: {type(self).__name__} restores images of DATA.IMG_SIZE; "
                "set it to 0"
            )
        sizes = {"AUG.VIEW_SIZE": view_size, "AUG.LOCAL_CROPS.SIZE": local_size}
        sizes = {key: size for key, size in sizes.items() if size} | {"DATA.IMG_SIZE": img_size}
        # The target sees no local view. It changes too, so that both stay one network.
        for encoder in (self.online, self.target):
            take_sizes(cast(Backbone, encoder.backbone), sizes, channels)

    def stream_pairs(self, queries: Tensor, keys: Tensor, num: int) -> list[tuple[Tensor, Tensor]]:
        """Return the (query, key) rows that a loss compares: one pair, or four under BatchFormer.

        `num` is N: under BatchFormer queries and keys are (2N, D), a plain stream and an attended
        one. Queries of n local views have n times as many rows, view after view.
        """
        batchformer = self.online.batchformer
        if batchformer is None or batchformer.loss == "joint":
            return [(queries, keys)]
        streams = keys.split(num)
        parts = queries.split(num)
        # each view has its plain rows, then its attended ones
        asked = [torch.cat(parts[number :: len(streams)]) for number in range(len(streams))]
        return list(itertools.product(asked, streams))

    def crossed_pairs(
        self, queries: Sequence[Tensor], keys: Sequence[Tensor], num: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the `stream_pairs` of each view's queries with the other view's keys.

        Those of local queries follow, with the keys of view 2, then of view 1.
        """
        pairs = []
        for query, key in view_pairs(queries, keys):
            pairs += self.stream_pairs(query, key, num)
        return pairs

    def paired_rows(self, queries: Tensor, keys: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return `stream_pairs` stacked in rows, for a mean over independent rows."""
        pairs = self.stream_pairs(queries, keys, num)
        # the views of a batch share its keys
        matched = [key.repeat(len(query) // len(key), 1) for query, key in pairs]
        return torch.cat([query for query, _ in pairs]), torch.cat(matched)

    @torch.no_grad()
    def update_target(self, momentum: float, buffers: bool = False) -> None:
        """Move the target's parameters: target <- momentum * target + (1 - momentum) * online.

        With `buffers` its buffers are averaged too. Without it they hold the statistics of the
        target's own forwards.
        """
        # The published codes average before the forward. After the step, with the momentum of the
        # next one, the sequence is the same, and the forward changes no weights.
        # One call for all tensors: hundreds of small ones would wait for Python.
        torch._foreach_lerp_(
            list(self.target.parameters()), list(self.online.parameters()), 1.0 - momentum
        )
        if buffers:
            for own, other in zip(self.target.buffers(), self.online.buffers(), strict=True):
                # counters are whole numbers and cannot be averaged
                if own.is_floating_point():
                    own.lerp_(other, 1.0 - momentum)
                else:
                    own.copy_(other)


def view_pairs(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the queries and keys that meet: both directions, then local queries with each key."""
    pairs = [(queries[0], keys[1]), (queries[1], keys[0])]
    return pairs + [(local, keys[view]) for local in queries[2:] for view in (1, 0)]


class KeyQueue(nn.Module):
    """The K most recent keys of all processes, of unit length (He et al. 2020, section 3.2)."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", nn.functional.normalize(torch.randn(size, dim), dim=1))
        # On the host, so that reading it never waits for a device; a part of the state dict.
        self.position = 0
        self._pending: list[Tensor] = []

    keys: Tensor  # (K, D)

    def get_extra_state(self) -> Tensor:
        """Return the write position for the state dict."""
        return torch.tensor(self.position)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the write position."""
        self.position = int(state)

    def hold(self, keys: Tensor) -> None:
        """Keep keys (N, D) until `flush`: all micro-batches of a step see the same queue.

        In eval mode no keys are kept.
        """
        if self.training:
            self._pending.append(keys.detach())

    def age(self, progress: Progress) -> Tensor:
        """Return the age in steps of the oldest key, by what this step holds already; a scalar."""
        num = max(1, sum(map(len, self._pending)) * world_size())
        # filled on the device: a copy to it would wait
        return self.keys.new_full((), min(progress.step, self.keys.shape[0] / num))

    @torch.no_grad()
    def flush(self) -> None:
        """Write the held keys of all processes, in rank order, and advance.

        Raises `ValueError` when the queue length is not a multiple of the number of keys of one
        step.
        """
        # all ranks write the same rows, so their queues stay equal
        keys = gather_rows(torch.cat(self._pending))
        self._pending.clear()
        size, num = self.keys.shape[0], keys.shape[0]
        # As in the published codes: the queue always holds whole batches.
        if size % num:
            below = size // num * num
            fitting = f"{below} or {below + num}" if below else f"{num}"
            raise ValueError(
                f"QUEUE_SIZE: {size} is not a multiple of the {num} keys of one step (batch size x "
                "processes x accumulation, twice that under BatchFormer or SYMMETRIC); use e.g. "
                f"{fitting}"
            )
        rows = self.keys[self.position : self.position + num]
        # In fp16 a forward may overflow, and such a step is left out. Its keys must be too: they
        # would make every loss infinite until they leave the queue.
        finite = keys.isfinite().all(1, keepdim=True)
        rows.copy_(torch.where(finite, keys.to(rows.dtype), rows))
        self.position = (self.position + num) % size
