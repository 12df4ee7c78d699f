"""What stops a run in time: stop signals that all ranks obey at the same step, and gradients that are not finite."""

import logging
import signal
from types import FrameType, TracebackType

import torch
from torch import Tensor

from utils.distributed import any_rank

logger = logging.getLogger("synco")

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class NonFiniteError(RuntimeError):
    """A gradient that is not finite: training stops before it can reach weights, target and queue."""


class StopFlag:
    """Turn SIGTERM, SIGUSR1 and SIGINT into a flag; a second signal stops at once.

    Handlers only set the flag: a save inside a handler would catch the state between two lines.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopFlag":
        """Install the handlers."""
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}: stopping at once")
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Tell, equally on all ranks, whether any rank was asked to stop."""
        return any_rank(self.received is not None)


class FiniteGuard:
    """Stop on a gradient norm that is not finite, which all ranks see alike once gradients are averaged.

    On a CPU it is read before the update. On a GPU it is read one step late, so that no step waits for the device; the
    spoilt step is never saved, since checkpoints refuse tensors that are not finite.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, int, str] | None = None

    def check(self, norm: Tensor, step: int, samples: str) -> None:
        """Note the norm of ``step``; raise ``NonFiniteError`` if it, or the pending one, is not finite."""
        if norm.device.type == "cpu":
            self._raise_if_bad(norm, step, samples)
            return
        self.flush()
        self._pending = (norm, step, samples)

    def flush(self) -> None:
        """Read what is pending, e.g. before a checkpoint."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._raise_if_bad(*pending)

    @staticmethod
    def _raise_if_bad(norm: Tensor, step: int, samples: str) -> None:
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"step {step}: the gradient norm is {float(norm)}; stopped, and the last checkpoint is intact. "
                f"Samples of this rank: {samples}. Remedies: a lower OPTIM.BASE_LR, a longer SCHEDULE.WARMUP_EPOCHS, "
                "OPTIM.CLIP_GRAD, or --precision fp32"
            )
