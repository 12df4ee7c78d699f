"""The online/target pair and the queue of keys: what all methods of this family share."""

import copy
import itertools

import torch
from torch import Tensor, nn

from models.parts.batchformer import BatchFormer
from models.parts.heads import Encoder
from utils.distributed import gather_rows


class MomentumFramework(nn.Module):
    """Base of all methods: an online encoder and a target encoder that follows it by exponential averaging.

    A subclass implements ``forward(views, progress)``, which returns ``{"loss": ..., "embedding": ...}``, and
    ``after_step(progress)``, called without gradient once after each optimiser step. The published codes
    average *before* the forward; averaging after the step with the next step's momentum is the same sequence
    (pinned by the golden values), and it keeps the forward free of side effects on weights.
    """

    def __init__(self, online: Encoder, target_backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.online = online
        # A target with a drop-path rate of its own needs a backbone of its own; the weights are the online's.
        self.target = type(online)(
            target_backbone or copy.deepcopy(online.backbone), copy.deepcopy(online.projector)
        )
        self.target.load_state_dict(online.state_dict())
        self.target.requires_grad_(False)

    can_stack_views = False  # True: both views go through an encoder alike, so they may go together
    needs_batchformer = False  # True: BatchFormer is a part of the method
    sums_batchformer_pairs = False  # True: the method has the published sum over pairs of streams

    def attach_batchformer(self, batchformer: BatchFormer) -> None:
        """Put BatchFormer before the projector of both encoders; the target's copy follows by averaging.

        Raises ``ValueError`` for a pairing of the streams that the method does not have.
        """
        if batchformer.loss == "sum" and not self.sums_batchformer_pairs:
            raise ValueError(
                f"MODEL.BATCHFORMER.LOSS: 'sum' is MoCo v3's; use 'mean' with {type(self).__name__}"
            )
        self.online.batchformer = batchformer
        self.target.batchformer = copy.deepcopy(batchformer).requires_grad_(False)

    def compile_backbones(self, backend: str = "inductor", cuda_graphs: bool = False) -> None:
        """Let ``torch.compile`` fuse both backbones at their first call; names and state stay as they are.

        With ``cuda_graphs`` a GPU replays their kernels as graphs, whose outputs last until the next step.
        """
        options = {"mode": "reduce-overhead"} if cuda_graphs else {"backend": backend}
        for encoder in (self.online, self.target):
            encoder.backbone.compile(**options)
        if cuda_graphs:
            self.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())

    def stack_views(self) -> None:
        """Let all views go through a backbone in one pass; raise ``ValueError`` where the method cannot."""
        if not self.can_stack_views:
            raise ValueError(
                f"MODEL.STACK_VIEWS: {type(self).__name__} treats its views differently; set it to False"
            )
        self.online.stack_views = self.target.stack_views = True

    def stream_pairs(self, queries: Tensor, keys: Tensor, num: int) -> list[tuple[Tensor, Tensor]]:
        """Return the (query, key) rows that a loss compares: one pair, or four under BatchFormer.

        ``num`` is N: under BatchFormer queries and keys are (2N, D), a plain stream and an attended one.
        """
        batchformer = self.online.batchformer
        joint = batchformer is None or batchformer.loss == "joint"
        return [(queries, keys)] if joint else list(itertools.product(queries.split(num), keys.split(num)))

    def paired_rows(self, queries: Tensor, keys: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return ``stream_pairs`` one below the other, for a loss that is a mean over independent rows."""
        pairs = self.stream_pairs(queries, keys, num)
        return torch.cat([query for query, _ in pairs]), torch.cat([key for _, key in pairs])

    @torch.no_grad()
    def update_target(self, momentum: float, buffers: bool = False) -> None:
        """Move the target's parameters: target <- momentum * target + (1 - momentum) * online.

        Its buffers stay its own, since its own forwards fill them, or with ``buffers`` follow likewise.
        """
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 1.0 - momentum)
        if buffers:
            for own, other in zip(self.target.buffers(), self.online.buffers(), strict=True):
                if own.is_floating_point():
                    own.lerp_(other, 1.0 - momentum)
                else:
                    own.copy_(other)


class KeyQueue(nn.Module):
    """The K most recent keys of all processes, rows of unit length (He et al. 2020, section 3.2).

    The write position lives on the host, so reading it never waits for a device; it travels in the state
    dict.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", nn.functional.normalize(torch.randn(size, dim), dim=1))
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
        """Keep this process's keys (N, D) until ``flush``: all micro-batches of a step see the same queue.

        An evaluation leaves no keys.
        """
        if self.training:
            self._pending.append(keys.detach())

    @torch.no_grad()
    def flush(self) -> None:
        """Write the held keys of all processes, in rank order, and advance.

        Raises ``ValueError`` when the queue length is no multiple of the keys of one step (as the published
        codes require, so that the queue always holds whole batches).
        """
        keys = gather_rows(torch.cat(self._pending))
        self._pending.clear()
        size, num = self.keys.shape[0], keys.shape[0]
        if size % num:
            fitting = f"{max(size // num, 1) * num} or {(size // num + 1) * num}"
            raise ValueError(
                f"QUEUE_SIZE: {size} is not a multiple of the {num} keys of one step (batch size x processes "
                f"x accumulation, twice that under BatchFormer or SYMMETRIC); use e.g. {fitting}"
            )
        self.keys[self.position : self.position + num] = keys.to(self.keys.dtype)
        self.position = (self.position + num) % size
