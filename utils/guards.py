"""What stops a run in time: stop signals that all ranks obey at the same step, and gradients that are not
finite.
"""

import logging
import signal
import time
from types import FrameType, TracebackType

import torch
from torch import Tensor

from utils.distributed import any_rank

logger = logging.getLogger("synco")

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ECHO_SECONDS = 3.0  # a launcher forwards what the terminal or the scheduler has sent to its workers too
_MAX_OVERFLOWS = 20  # steps in a row that a gradient scaler may skip


class NonFiniteError(RuntimeError):
    """A gradient that is not finite: training stops before it can reach weights, target and queue."""


class StopFlag:
    """Turn SIGTERM, SIGUSR1 and SIGINT into a flag; a second signal, three seconds later, stops at once.

    Handlers only set the flag: a save inside a handler would catch the state between two lines. A sooner
    second signal is an echo: Ctrl-C under torchrun reaches a worker from the terminal and from the agent.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._first = 0.0
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
        if self.received is None:
            self.received, self._first = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._first >= _ECHO_SECONDS:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}: stopping at once")

    def agreed(self) -> bool:
        """Tell, equally on all ranks, whether any rank was asked to stop."""
        return any_rank(self.received is not None)


class FiniteGuard:
    """Stop on a gradient norm that is not finite, which all ranks see alike once gradients are averaged.

    On a CPU it is read before the update. On a GPU it is read one step late, so that no step waits for the
    device; the spoilt step is never saved, since checkpoints refuse tensors that are not finite. With a
    gradient ``scaler``, which skips such steps itself while it finds its scale, only many in a row are an
    error.
    """

    def __init__(self, scaler: bool = False) -> None:
        self._allowed = _MAX_OVERFLOWS if scaler else 0
        self._in_a_row = 0
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

    def _raise_if_bad(self, norm: Tensor, step: int, samples: str) -> None:
        self._in_a_row = 0 if torch.isfinite(norm) else self._in_a_row + 1
        if self._in_a_row > self._allowed:
            often = f", for the {self._in_a_row}th step in a row" if self._allowed else ""
            raise NonFiniteError(
                f"step {step}: the gradient norm is {float(norm)}{often}; stopped, and the last checkpoint "
                f"is intact. Samples of this rank: {samples}. Remedies: a lower OPTIM.BASE_LR, a longer "
                "SCHEDULE.WARMUP_EPOCHS, OPTIM.CLIP_GRAD, or --precision fp32"
            )
