"""Watch the embeddings of a run for collapse, and report it in words.

Two signs: their spread (std of unit embeddings x sqrt(D): near 1 on the whole sphere, 0 in one
point; Chen & He 2020, arXiv:2011.10566) and their uncentred effective rank (RankMe,
arXiv:2210.02885). An untrained network may have either small, but then it grows; only what is small
and does not grow is an alarm.
"""

import math
from collections import deque
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

HEALTHY = "healthy"
EARLY = "not spread yet"
_LEAST_SPREAD = 0.3
_LEAST_RANK = 0.05  # of the rank that so many rows of so many dimensions can have
_CHECKS = 3  # looks after the first small one
_ROWS = 1024
_ELEMENTS = 1 << 18  # rows x dimensions that are decomposed: a few milliseconds
_EVERY_ON_GPU = 5  # looks: the decomposition waits for the device


class CollapseState(TypedDict):
    """What a checkpoint holds of a `CollapseMonitor`."""

    embeddings: list[Tensor]
    looks: int


class CollapseMonitor:
    """Keep the newest embeddings of this process and judge them when asked."""

    def __init__(self) -> None:
        self._rows: deque[Tensor] = deque()
        self._looks = 0
        self._spread = _Watched(_LEAST_SPREAD)
        self._rank = _Watched(_LEAST_RANK)
        self._of = 0

    def note(self, embedding: Tensor) -> None:
        """Remember a step's embeddings (N, D), without waiting for the device."""
        # a copy: with CUDA graphs the next step writes into the same memory
        self._rows.append(embedding.detach().clone())
        most = min(_ROWS, _ELEMENTS // max(embedding.shape[1], 1))
        while len(self._rows) > 1 and sum(map(len, self._rows)) - len(self._rows[0]) >= most:
            self._rows.popleft()

    def state_dict(self) -> CollapseState:
        """Return the newest embeddings and the number of looks."""
        # a checkpoint refuses tensors that are not finite
        rows = [row for row in self._rows if torch.isfinite(row).all()]
        return {"embeddings": rows, "looks": self._looks}

    def load_state_dict(self, state: CollapseState) -> None:
        """Go on from `state_dict`."""
        self._rows, self._looks = deque(state["embeddings"]), state["looks"]

    def look(self) -> dict[str, float]:
        """Return the spread and, now and then, the effective rank of the noted embeddings."""
        # One embedding has a spread of 0, which is no collapse.
        if not self._rows or len(self._rows[-1]) < 2:
            return {}
        values = {"embedding_std": float(embedding_std(self._rows[-1]))}
        self._spread.see(values["embedding_std"])
        on_gpu = self._rows[-1].device.type == "cuda"
        if self._looks % (_EVERY_ON_GPU if on_gpu else 1) == 0:
            device = self._rows[-1].device  # those of a checkpoint are on the CPU
            rows = torch.cat([row.to(device) for row in self._rows])[-_ROWS:]
            self._of = min(rows.shape)
            values["embedding_rank"] = float(effective_rank(rows))
            self._rank.see(values["embedding_rank"] / self._of)
        self._looks += 1
        return values

    def verdict(self) -> str:
        """Say what the looks so far amount to."""
        if self._spread.alarming:
            return "collapsing to a point"
        if self._rank.alarming:
            return f"dimensional collapse: rank {self._rank.value * self._of:.1f} of {self._of}"
        return HEALTHY if self._spread.large and self._rank.large else EARLY


class _Watched:
    """Track a number and raise an alarm if it stays small for several looks."""

    def __init__(self, least: float) -> None:
        self._least = least
        self._seen: deque[float] = deque([math.inf], maxlen=_CHECKS + 1)
        self._alarm_at: float | None = None

    def see(self, value: float) -> None:
        """Note a look."""
        self._seen.append(value)
        if self._alarm_at is not None:
            # Half as large again ends the alarm: noise must not end and repeat it.
            if value >= self._least or value > 1.5 * self._alarm_at:
                self._alarm_at = None
        # A small number that grows is a network that learns.
        elif max(self._seen) < self._least and value <= 1.05 * self._seen[0]:
            self._alarm_at = value

    @property
    def value(self) -> float:
        """Return the last look."""
        return self._seen[-1]

    @property
    def large(self) -> bool:
        """Tell whether the last look is no worry."""
        return self.value >= self._least

    @property
    def alarming(self) -> bool:
        """Tell whether it is small and has not grown."""
        return self._alarm_at is not None


@torch.no_grad()
def effective_rank(embedding: Tensor) -> Tensor:
    """Return the effective rank of (N, D), a scalar: 1 if collapsed, min(N, D) at best.

    RankMe (Garrido et al. 2023, arXiv:2210.02885): the exponential of the entropy of the singular
    values. NaN if the input is not finite. On CUDA it waits for the device.
    """
    # Not centred: centring would hide a collapse to one point.
    values = torch.linalg.svdvals(embedding.float().nan_to_num())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    rank = torch.special.entr(share).sum().exp()
    return torch.where(torch.isfinite(embedding).all(), rank, torch.nan)


@torch.no_grad()
def embedding_std(embedding: Tensor) -> Tensor:
    """Return the mean over dimensions of std(z/|z|) * sqrt(D) of (N, D), a scalar on its device.

    About 1 when spread over the sphere, 0 when collapsed (Chen & He 2020, arXiv:2011.10566, section
    4.1).
    """
    unit = F.normalize(embedding.float(), dim=1)
    return unit.std(dim=0, correction=0).mean() * embedding.shape[1] ** 0.5
