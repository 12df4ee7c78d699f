"""What a person sees of a run: mean metrics, progress, time left, a warning of collapse."""

import logging
from collections.abc import Iterable, Iterator
from typing import TypedDict, TypeVar

import torch
from torch import Tensor

from engine.collapse import EARLY, HEALTHY, CollapseMonitor, CollapseState
from engine.plan import Plan
from engine.state import TrainState
from utils import distributed, heartbeat
from utils.logger import Metrics
from utils.names import shown_name
from utils.progress import Pace, ProgressLine, format_duration, progress_text
from utils.schedules import Progress

logger = logging.getLogger("synco")

T = TypeVar("T")

_LINE = 111  # columns of a log line: 120 with the time of day before it
_LONG = 3.0  # seconds after which the progress line says what takes so long


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
        self._plan: Plan | None = None
        self._line: ProgressLine | None = None
        self.step = 0  # steps that are done
        self._shown: dict[str, float] = {}  # of the newest log line
        self._window: list[dict[str, Tensor]] = []
        self._pace = Pace()
        self._collapse = CollapseMonitor()
        self._verdict = HEALTHY

    def start(self, plan: Plan) -> None:
        """Take the plan of the run."""
        self._plan = plan

    def around(self, steps: Iterable[T], step: int) -> Iterator[T]:
        """Yield the steps of a loader from `step` on, timed, under a progress line."""
        self.step = step
        if distributed.is_main() and self._plan is not None:
            self._line = ProgressLine(self._describe)
            self._line.start()
        return self._pace.around(steps)

    def status(self) -> dict[str, object]:
        """Return what a run that trains tells of itself, for `status.json`."""
        if self._plan is None:
            return {}
        total, left = self._plan.total_steps, self._seconds_left()
        return {
            "total": total,
            "epoch": round(self.step / self._plan.steps_per_epoch, 3),
            "epochs": self._plan.epochs,
            "eta": round(left, 1) if left == left else None,  # NaN while the run settles
            "loss": self._shown.get("loss"),
            "images_per_second": self._shown.get("images_per_second"),
        }

    def _seconds_left(self) -> float:
        assert self._plan is not None
        return self._pace.seconds_left(self._plan.total_steps - self.step)

    def state_dict(self) -> MeterState:
        """Return what a resumed run needs to log what an uninterrupted one logs.

        That is the metrics of each process since the last line, and rank 0's newest embeddings.
        """
        names = self._names_of_all()
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

    def shows(self, step: int, plan: Plan) -> bool:
        """Tell whether a line is written after `step` steps."""
        return step % self._every == 0 or step == plan.total_steps

    def log(self, progress: Progress, out: dict[str, Tensor], plan: Plan) -> None:
        """Note a step's scalars; every `LOG.PRINT_FREQ` steps write their means."""
        self._plan, self.step = plan, progress.step + 1
        self._window.append({name: v.detach().float() for name, v in out.items() if v.ndim == 0})
        if "embedding" in out and distributed.is_main():
            self._collapse.note(out["embedding"])
        if not self.shows(self.step, plan):
            self._pace.end_step()
            return
        distributed.meet()
        values = self._mean_of_window()
        if seen := self._collapse.look():
            values |= seen
            self._tell(self._collapse.verdict())
        # Reading the means has waited for the device: the step ends here, not at its launch.
        self._pace.end_step()
        seconds, waiting = self._pace.window()
        values["images_per_second"] = plan.global_batch / seconds
        values["data_wait_percent"] = 100.0 * waiting
        if torch.cuda.is_initialized():
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        values["lr"] = plan.rates[0].at(progress.step)
        values["epoch"] = progress.next.epoch_position
        self._window.clear()
        self._shown = values
        self.metrics.write(self.step, values)
        logger.info("%s", self._log_line(progress, values, plan))

    def record(self, progress: Progress, values: dict[str, float], state: TrainState) -> None:
        """Log an epoch's evaluation, if there was one, beside the best values so far."""
        if not values:
            return
        state.keep_best(values)
        self.metrics.write(progress.step, {**values, "epoch": progress.epoch_position})
        shown = ", ".join(
            f"{shown_name(name)} {value:.2f} (best {state.best[name]:.2f})"
            for name, value in values.items()
            if "/" not in name
        )
        logger.info("epoch %.4g done: %s", progress.epoch_position, shown)

    def _mean_of_window(self) -> dict[str, float]:
        names = self._names_of_all()
        means = self._table(names).mean(0)
        # What only the newest steps have is shown as it is in the last one: the norms that are
        # taken for a log line, and synthetic negatives that have just joined.
        newest = self._window[-1]
        if late := sorted(set(newest) - set(names)):
            means = torch.cat([means, torch.stack([newest[n].to(means.device) for n in late])])
        means = distributed.all_reduce_sum(means) / distributed.world_size()
        return dict(zip([*names, *late], means.tolist(), strict=True))

    def _names_of_all(self) -> list[str]:
        """Return the metrics that each step since the last line has."""
        return sorted(set.intersection(*map(set, self._window))) if self._window else []

    def _table(self, names: list[str]) -> Tensor:
        """Return the metrics since the last line, (steps, metrics) float32."""
        device = self._window[-1][names[0]].device
        rows = [torch.stack([row[name].to(device) for name in names]) for row in self._window]
        return torch.stack(rows)

    def _log_line(self, progress: Progress, values: dict[str, float], plan: Plan) -> str:
        """Return the line of a person: what does not fit is in metrics.jsonl."""
        speed = self._speed(values)
        ends = [f"ETA {format_duration(self._seconds_left())}"]
        # A grid's loss is a sum over its heads, which says little.
        loss = f"loss {values.get('best_loss', values['loss']):.4g}"
        start = [f"epoch {progress.epoch + 1}/{plan.epochs}"]
        start += [f"step {self.step}/{plan.total_steps}", loss]
        health = [f"embeddings {self._verdict}"] if "embedding_std" in values else []
        # The last of these leaves first where the line is full.
        middle = [*health, *speed, f"lr {values['lr']:.3g}"]
        middle += [f"{shown_name('acc1')} {values['acc1']:.1f}"] if "acc1" in values else []
        while len("  ".join([*start, *middle, *ends])) > _LINE and len(middle) > len(health):
            middle.pop()
        return "  ".join([*start, *middle, *ends])

    def _speed(self, values: dict[str, float]) -> list[str]:
        fields = [f"{values['images_per_second']:,.0f} img/s"]
        fields.append(f"data {values['data_wait_percent']:.0f} %")
        if "gpu_memory_gib" in values:
            fields.append(f"GPU {values['gpu_memory_gib']:.1f} GiB")
        return fields

    def _describe(self, columns: int) -> str:
        """Return the progress line. Its thread reads what the training thread has left."""
        plan, step, values = self._plan, self.step, self._shown
        assert plan is not None
        epoch = min(step // plan.steps_per_epoch + 1, plan.epochs)
        fields = [f"{step}/{plan.total_steps}"]
        doing, seconds = heartbeat.latest()
        if seconds > _LONG:
            fields.append(f"{doing}: {format_duration(seconds)}")
        elif values:
            pace = self._pace.seconds_per_step()
            # NaN while the run settles: then the speed is that of the newest log line
            now = {**values, "images_per_second": plan.global_batch / pace} if pace > 0 else values
            loss = values.get("best_loss", values["loss"])
            fields += [f"loss {loss:.4g}", *self._speed(now)]
        fields.append(f"ETA {format_duration(self._seconds_left())}")
        head = f"epoch {epoch}/{plan.epochs}"
        return progress_text(head, step / max(plan.total_steps, 1), fields, columns)

    def _tell(self, verdict: str) -> None:
        """Warn when the embeddings begin to collapse; the line of each look has the verdict too."""
        if verdict not in (HEALTHY, EARLY, self._verdict):
            logger.warning(
                "the embeddings are %s, and it does not get better: the method, its learning "
                "rate or its augmentation is broken",
                f"in {verdict}" if verdict.startswith("dimensional") else verdict,
            )
        self._verdict = verdict
