"""What a person sees of a run: mean metrics, progress, time left, a warning of collapse."""

import logging
import time
from typing import TypedDict

import torch
from torch import Tensor

from engine.collapse import EARLY, HEALTHY, CollapseMonitor, CollapseState
from engine.plan import Plan
from engine.state import TrainState
from utils import distributed
from utils.logger import Metrics, ProgressLine, format_duration
from utils.schedules import Progress

logger = logging.getLogger("synco")


class MeterState(TypedDict):
    """What a checkpoint holds of a `Meter`."""

    names: list[str]
    rows: list[list[list[float]]]  # processes x steps x metrics
    collapse: CollapseState


class Meter:
    """Gathers a step's metrics on the device and reads them only when they are shown."""

    def __init__(self, metrics: Metrics, every: int) -> None:
        self.metrics = metrics
        self._every = every
        self._line: ProgressLine | None = None
        self._window: list[dict[str, Tensor]] = []
        self._window_start = time.perf_counter()
        self._timed = 0  # steps since then
        self._collapse = CollapseMonitor()
        self._verdict = HEALTHY

    def start(self, total_steps: int) -> None:
        """Begin to measure the pace of a run of `total_steps`."""
        self._line = ProgressLine(total_steps) if distributed.is_main() else None
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._window_start, self._timed = time.perf_counter(), 0

    def state_dict(self) -> MeterState:
        """Return what a resumed run needs to log what an uninterrupted one logs.

        That is the metrics of each process since the last line, and rank 0's newest embeddings.
        """
        names = sorted(self._window[-1]) if self._window else []
        # Lists, since a checkpoint refuses tensors that are not finite, and a metric may be so.
        rows = self._table(names).tolist() if names else []
        return {
            "names": names,
            "rows": distributed.all_objects(rows),
            "collapse": self._collapse.state_dict(),
        }

    def load_state_dict(self, state: MeterState) -> None:
        """Go on from `state_dict`; on another number of processes each takes the mean of all."""
        parts = state["rows"]
        if parts and parts[0]:
            tables = torch.tensor(parts)  # (processes, steps, metrics)
            same = len(parts) == distributed.world_size()
            table = tables[distributed.rank()] if same else tables.mean(0)
            self._window = [dict(zip(state["names"], row.unbind(), strict=True)) for row in table]
        self._collapse.load_state_dict(state["collapse"])

    def close_line(self) -> None:
        """Wipe the progress line."""
        if self._line is not None:
            self._line.close()

    def log(self, progress: Progress, out: dict[str, Tensor], plan: Plan) -> None:
        """Note a step's scalars; every `LOG.PRINT_FREQ` steps write their means."""
        self._timed += 1
        self._window.append({name: v.detach().float() for name, v in out.items() if v.ndim == 0})
        if "embedding" in out and distributed.is_main():
            self._collapse.note(out["embedding"])
        if (progress.step + 1) % self._every and progress.step + 1 != plan.total_steps:
            return
        distributed.meet()
        values = self._mean_of_window()
        if seen := self._collapse.look():
            values |= seen
            self._tell(self._collapse.verdict())
        seconds_per_step = (time.perf_counter() - self._window_start) / self._timed
        values["images_per_second"] = plan.global_batch / seconds_per_step
        values["lr"] = plan.rates[0].at(progress.step)
        values["epoch"] = progress.next.epoch_position
        self._window.clear()
        self.metrics.write(progress.step + 1, values)
        self._say(
            progress, values, seconds_left=(plan.total_steps - progress.step - 1) * seconds_per_step
        )
        self._restart_clock()

    def record(self, progress: Progress, values: dict[str, float], state: TrainState) -> None:
        """Log an epoch's evaluation, if there was one, beside the best values so far."""
        if not values:
            return
        state.keep_best(values)
        self.metrics.write(progress.step, {**values, "epoch": progress.epoch_position})
        shown = ", ".join(
            f"{name} {value:.2f} (best {state.best[name]:.2f})"
            for name, value in values.items()
            if "/" not in name
        )
        logger.info("epoch %d done: %s", progress.epoch - 1, shown)
        self._restart_clock()  # the evaluation's time is not training's

    def _mean_of_window(self) -> dict[str, float]:
        names = sorted(self._window[-1])
        table = self._table(names).mean(0)
        table = distributed.all_reduce_sum(table) / distributed.world_size()
        return dict(zip(names, table.tolist(), strict=True))

    def _table(self, names: list[str]) -> Tensor:
        """Return the metrics since the last line, (steps, metrics) float32."""
        device = self._window[-1][names[0]].device
        rows = [torch.stack([row[name].to(device) for name in names]) for row in self._window]
        return torch.stack(rows)

    def _say(self, progress: Progress, values: dict[str, float], seconds_left: float) -> None:
        hidden = ("epoch", "images_per_second")
        verdict = f"| embeddings {self._verdict} " if "embedding_std" in values else ""
        shown = " ".join(
            f"{name} {values[name]:.4g}" for name in sorted(values) if name not in hidden
        )
        step, rate = progress.step + 1, values["images_per_second"]
        logger.info(
            "epoch %d step %d/%d %s %s| %.0f images/s | %s left",
            *(progress.epoch, step, progress.total_steps, shown, verdict, rate),
            format_duration(seconds_left),
        )
        if self._line is not None:
            self._line.update(progress.epoch, step, values["loss"], values["lr"], rate)

    def _tell(self, verdict: str) -> None:
        """Warn when the embeddings begin to collapse; the line of each look has the verdict too."""
        if verdict not in (HEALTHY, EARLY, self._verdict):
            logger.warning(
                "the embeddings are %s, and it does not get better: the method, its learning "
                "rate or its augmentation is broken",
                f"in {verdict}" if verdict.startswith("dimensional") else verdict,
            )
        self._verdict = verdict
