"""What stops a run in time: signals, and gradients that are not finite."""

import logging
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType

import torch
from torch import Tensor

from utils.batch import Batch
from utils.distributed import any_rank

logger = logging.getLogger("synco")

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# a launcher forwards what the terminal or the scheduler has sent to its workers too
_ECHO_SECONDS = 3.0
_NAMED = 16  # samples in a message
_MAX_OVERFLOWS = 20  # steps in a row that a gradient scaler may skip


class NonFiniteError(RuntimeError):
    """A gradient that is not finite: training stops before it can reach weights, target and queue.

    `step`, `batches` (this process's micro-batches of that step) and `loss` say what to
    replay.
    """

    step = 0
    batches: Sequence[Batch] = ()
    loss = float("nan")


class StopFlag:
    """Turn SIGTERM, SIGUSR1 and SIGINT into a flag; a second signal stops at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._first = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopFlag":
        """Install the handlers."""
        # Python allows them only in the main thread.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Only a flag is set: a save inside a handler would catch the state between two lines.
        if self.received is None:
            self.received, self._first = signal.Signals(number).name, time.monotonic()
        # A second signal within seconds is the same Ctrl-C: under torchrun it reaches a worker from
        # the terminal and from the agent.
        elif time.monotonic() - self._first >= _ECHO_SECONDS:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}: stopping at once")

    def agreed(self) -> bool:
        """Tell, equally on all ranks, whether any rank was asked to stop."""
        return any_rank(self.received is not None)


class FiniteGuard:
    """Stop on a gradient norm that is not finite. All ranks see the same averaged gradient.

    A CPU's norm is read before the update, a GPU's one step late. With a gradient `scaler`, which
    skips such steps itself while it finds its scale, only many in a row are an error.
    """

    def __init__(self, scaler: bool = False) -> None:
        self._allowed = _MAX_OVERFLOWS if scaler else 0
        self._in_a_row = 0
        self._pending: tuple[Tensor, int, Sequence[Batch], Tensor | None] | None = None

    def check(
        self, norm: Tensor, step: int, batches: Sequence[Batch], loss: Tensor | None = None
    ) -> None:
        """Note the norm of `step`; raise `NonFiniteError` if it, or the pending one, is not finite.

        `batches` and `loss` are this process's own, read only for the error.
        """
        if norm.device.type == "cpu":
            self._raise_if_bad(norm, step, batches, loss)
            return
        # Read one step late, so that no step waits for the device. That holds one batch of views
        # longer. The spoilt step is never saved: `save` flushes first.
        self.flush()
        self._pending = (norm, step, batches, loss)

    def flush(self) -> None:
        """Check the pending norm now, e.g. before a checkpoint."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._raise_if_bad(*pending)

    def _raise_if_bad(
        self, norm: Tensor, step: int, batches: Sequence[Batch], loss: Tensor | None
    ) -> None:
        self._in_a_row = 0 if torch.isfinite(norm) else self._in_a_row + 1
        if self._in_a_row > self._allowed:
            often = f", for the {self._in_a_row}th step in a row" if self._allowed else ""
            own = "" if loss is None else f" (this process's loss: {float(loss):.4g})"
            error = NonFiniteError(
                f"step {step}: the gradient norm is {float(norm)}{often}{own}; stopped, and the "
                f"last checkpoint is intact. Samples of this rank: {sample_names(batches)}. "
                "Remedies: a lower OPTIM.BASE_LR, a longer SCHEDULE.WARMUP_EPOCHS, "
                "OPTIM.CLIP_GRAD, or --precision fp32"
            )
            error.step, error.batches = step, batches
            error.loss = float("nan") if loss is None else float(loss)
            raise error


def sample_names(batches: Sequence[Batch]) -> str:
    """Return the first indices of a step's samples, and how many there are."""
    indices = [int(index) for batch in batches for index in batch.indices]
    return ", ".join(map(str, indices[:_NAMED])) + (
        f", ... ({len(indices)} in all)" if len(indices) > _NAMED else ""
    )
