"""A run: its folder with lock, log and status, and the process that it runs in."""

import contextlib
import json
import logging
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from torch import nn
from yacs.config import CfgNode

from engine.checkpointing import Checkpoints
from engine.meter import Meter
from engine.optim import check_optimizer
from engine.plan import Plan
from engine.precision import Precision, choose_device
from engine.state import TrainState
from utils import distributed, heartbeat
from utils.checkpoints.atomic import write_text
from utils.checkpoints.locks import try_lock
from utils.cli import at_failure, lost_processes
from utils.cli.closing import best_text, show_rows
from utils.cli.provenance import RUN_FILE, record_start
from utils.config.load import to_yaml
from utils.logger import Metrics, finite_json, now, setup_logger
from utils.names import visible
from utils.progress import format_duration
from utils.randomness import keyed_seed
from utils.sinks import SINKS

logger = logging.getLogger("synco")

_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b")  # a person compares the first digits
_STATUS_SECONDS = 5.0  # between two looks at a run that trains
_SECTIONS = {"linear": "LINEAR", "semisup": "FINETUNE"}  # whose OPTIM it is; else that at the top


class Run(Precision):
    """The place and the means of one run; only rank 0 writes."""

    def __init__(
        self,
        cfg: CfgNode,
        folder: Path,
        device: torch.device,
        task: str = "pretrain",
        training: bool = True,
    ) -> None:
        self.cfg = cfg
        self.task = task  # decides which keys are its identity, see utils.config.schema
        self.folder = folder
        super().__init__(cfg.TRAIN.PRECISION, device, cfg.TRAIN.CHANNELS_LAST)
        self.seed: int = cfg.SEED
        self.fingerprint = ""  # of the data (and, in a probe, the weights) that the run is about
        self.training = training  # an evaluation looks at a folder that may be another process's
        writes = training and distributed.is_main()
        sinks = [name for name in SINKS if cfg.LOG[name.upper()]]
        self.metrics = Metrics(folder if writes else None, sinks, task)
        self.meter = Meter(self.metrics, cfg.LOG.PRINT_FREQ)
        self._lock: IO[str] | None = None
        self._next_status = 0.0
        self._began = (time.monotonic(), 0)  # when the training began, and at which step
        self._failed = False  # an error ends the run, and is being told
        self._done_at = ""  # when an earlier start completed the run
        self.next_commands: list[str] = []  # what a person may want to start then
        self.checkpoints = Checkpoints(
            cfg, folder, self.meter, task=task, training=training, check_lock=self._check_lock
        )

    # ---- the folder ------------------------------------------------------------------------------

    def open_folder(self) -> None:
        """Create the folder and take its lock: one folder, one run."""
        distributed.on_main(self._open_folder)

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a+")
            ours = try_lock(self._lock, self.folder)
        except OSError as error:
            raise ValueError(
                f"--output: {self.folder} cannot be written ({error}); choose another folder"
            ) from error
        if not ours:
            raise ValueError(
                f"--output: another run is using {self.folder}; wait for it, or choose another "
                "--tag"
            )
        # Else the state stays e.g. preempted, and a start that fails is requeued for ever.
        if self._status().get("state") != "done":
            self.finish("starting", 0)

    def _check_lock(self) -> None:
        """Refuse to write into a folder that is no longer the one that this run locked."""
        try:
            ours = self._holds_lock()
        except OSError as error:  # a file server that stutters says nothing about the lock
            logger.warning("%s/.lock cannot be looked at (%s)", self.folder, error)
            return
        if not ours:
            self.training = False  # nothing more is written there, not even status.json
            raise ValueError(
                f"--output: {self.folder}/.lock is not the one that this run locked: the folder "
                "was moved or removed, or another run uses it. Nothing was written. Move the "
                "folder back and start again"
            )

    def _holds_lock(self) -> bool:
        if self._lock is None:
            return True
        held = os.fstat(self._lock.fileno())
        try:
            found = os.stat(self.folder / ".lock")
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

    def _status(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def write_extra(self, name: str, write: Callable[[Path], object]) -> None:
        """Let rank 0 write a file that the run can do without: a disk that fails is a warning."""
        if distributed.is_main():
            try:
                write(self.folder / name)
                if name.endswith(".png"):
                    self.metrics.picture(self.folder / name, self.meter.step)
            except OSError as error:
                logger.warning("cannot write %s (%s)", self.folder / name, error)

    @contextmanager
    def reporting(self, state: TrainState, plan: Plan) -> Iterator[None]:
        """Write the accepted configuration; keep `status.json` true while the block trains."""
        self._began = (time.monotonic(), state.step)
        status = self._status()
        if status.get("state") == "done" and state.step == plan.total_steps == status.get("step"):
            self._done_at = str(status.get("time", "before"))
            yield  # a complete run keeps the files that say when and how it was completed
            return
        config = to_yaml(self.cfg)
        self.write_extra("config.yaml", lambda path: write_text(path, config))
        self.metrics.text("config", config, state.step)
        self.write_extra(RUN_FILE, lambda path: record_start(path, state.step, self.device))
        self.finish("running", state.step)
        try:
            yield
        except BaseException as error:
            self._failed = True
            lost = f" ({heartbeat.missing()})" if lost_processes(error) else ""
            self.finish("failed", state.step, f"{type(error).__name__}: {error}{lost}")
            raise

    def begin_step(self, step: int, resumed_at: int) -> None:
        """Note the step for the other processes, and now and then in `status.json`."""
        heartbeat.beat(f"step {step}")
        if time.monotonic() >= self._next_status and distributed.is_main():
            self._refresh_status(step)
        # The first step may compile for minutes, so waits are limited from the second on.
        if step == resumed_at + 1:
            distributed.limit_waits(self.cfg.TRAIN.RANK_TIMEOUT)

    def preempted(self, step: int, signal_name: str) -> None:
        """Say that the run stopped on request, and from where it will go on."""
        if self.checkpoints.is_saved(step):
            outcome = "saved"
        else:
            outcome = "NOT saved, it will go on from the checkpoint before"
        self.finish("preempted", step, f"asked to stop ({signal_name}), {outcome}")
        # torchrun signals the others as soon as one has gone: they must find the status written
        distributed.on_main(lambda: None)
        message = "asked to stop (%s) at step %d: %s; start the same command again to go on"
        logger.warning(message, signal_name, step, outcome)

    def stop_before_training(self, number: int, frame: FrameType | None) -> None:
        """Leave as preempted: before the first step nothing is lost.

        torchrun sends the same signal to all processes when one has failed. A process that tells
        its own error goes on with that; one that has none names the error of the other.
        """
        if self._failed:
            return
        status = self._status()
        if told := heartbeat.error_of_another():
            self.start_failed(told)
            raise SystemExit(5)
        if status.get("state") == "starting":
            self.finish(
                "preempted", status["step"], f"{signal.Signals(number).name} before the first step"
            )
        raise SystemExit(75)

    def start_failed(self, reason: str) -> None:
        """Keep why a run ended before its first step: in `status.json` and in the log."""
        self._failed = True
        status = self._status()
        if not self.training or status.get("state") != "starting":
            return
        self.finish("failed", status["step"], reason)
        for handler in logger.handlers:
            # the terminal shows the reason anyway
            if isinstance(handler, logging.FileHandler):
                handler.emit(logger.makeRecord(logger.name, logging.ERROR, "", 0, reason, (), None))

    def done(self, state: TrainState) -> None:
        """Say that the run is complete, and what it gave.

        Raises `OSError` if its last checkpoint was not written.
        """
        if not self.checkpoints.is_saved(state.step):
            error = OSError(
                f"{self.folder}: training is complete, but its last checkpoint was not saved"
            )
            error.reporter = 0  # type: ignore[attr-defined]  # all ranks know it, one says it
            raise error
        if not self._done_at:
            self.finish("done", state.step)
        if distributed.is_main():
            self._summarise(state)

    def _summarise(self, state: TrainState) -> None:
        """Log what a person wants to know of a complete run."""
        began, first = self._began
        if self._done_at:
            logger.info("this run is complete: done %s, at step %d", self._done_at, state.step)
        else:
            seconds = format_duration(time.monotonic() - began)
            logger.info("done in %s%s", seconds, f", from step {first} on" if first else "")
        keep_best = self.cfg.CHECKPOINT.KEEP_BEST
        rows = [("best", best_text(self.folder, state.best, keep_best))]
        rows += [(name, str(path)) for name, path in self.checkpoints.kept(state).items()]
        titles = ["next"] + [""] * len(self.next_commands)
        rows += zip(titles, self.next_commands, strict=False)
        show_rows([(title, text) for title, text in rows if text])

    def finish(self, state: str, step: int, reason: str = "") -> None:
        """Write `status.json`, which a requeue script reads.

        The state is starting, running, done, preempted (the same command goes on from here) or
        failed. The reason may hold a file's name: whoever prints it prints no control characters.
        """
        self.meter.close_line()
        if not self.training:
            return
        status = self._status_text(state, step, reason)
        self.write_extra("status.json", lambda path: write_text(path, status))

    def _status_text(self, state: str, step: int, reason: str = "") -> str:
        status = {"state": state, "step": step, "reason": visible(reason), **self.meter.status()}
        status |= {"host": platform.node(), "pid": os.getpid(), "time": now()}
        return json.dumps(finite_json(status), allow_nan=False)

    def _refresh_status(self, step: int) -> None:
        """Write the status of a run that trains, unless the folder or the disk is in trouble."""
        start = time.monotonic()
        # The next checkpoint reports a full disk; a lost status must not end a run.
        with contextlib.suppress(OSError):
            if self.training and self._holds_lock():
                write_text(self.folder / "status.json", self._status_text("running", step))
        took = time.monotonic() - start
        # a slow disk is asked more rarely: less than 1 % of the time goes into this
        self._next_status = start + max(_STATUS_SECONDS, 200 * took)

    def close(self) -> None:
        """Close the logs and release the folder."""
        self.metrics.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ---- checkpoints -----------------------------------------------------------------------------

    def checkpoint(self, state: TrainState, plan: Plan) -> None:
        """Commit the state, and that it is of this run's data."""
        self.checkpoints.save(state, plan, self.fingerprint)

    def resume(self, state: TrainState, plan: Plan) -> bool:
        """Restore the checkpoint to go on from; tell whether there was one."""
        return self.checkpoints.resume(state, plan, self.fingerprint)

    # ---- what a person sees ----------------------------------------------------------------------

    def describe(self, module: nn.Module, plan: Plan, num_images: int) -> None:
        """Log the model, the data and the plan of the run."""
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        size = f"{trained / 1e6:.2f} M" if trained >= 1e5 else f"{trained:,}"
        name = type(module).__name__
        logger.info("%s with %s trained parameters, %s", name, size, self.precision)
        about = _HASH.sub(r"\1", self.fingerprint)
        logger.info("%d images (%s): %s", num_images, about, plan.describe())
        self.meter.start(plan)


def start_run(
    cfg: CfgNode, subfolder: str = "", task: str = "pretrain", training: bool = True
) -> Run:
    """Join the processes, seed, choose the device and open `OUTPUT/NAME/TAG[/subfolder]`.

    Without `training` (`--eval`, `--throughput`) nothing is locked or written.
    """
    section = _SECTIONS.get(task, "")
    check_optimizer((cfg[section] if section else cfg).OPTIM, f"{section}." if section else "")
    device = choose_device(cfg.DEVICE)
    distributed.init_processes(device)
    torch.manual_seed(keyed_seed("model", cfg.SEED))  # equal on all ranks: so are the weights
    # asked first, since to set it imports the compiler
    if cfg.TRAIN.DETERMINISTIC != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(cfg.TRAIN.DETERMINISTIC)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not cfg.TRAIN.DETERMINISTIC
    elif distributed.world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // distributed.world_size()))
    folder = Path(cfg.OUTPUT) / cfg.NAME / cfg.TAG / subfolder
    run = Run(cfg, folder, device, task, training)
    if training:
        run.open_folder()
        at_failure.append(run.start_failed)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):  # until fit() takes them
                signal.signal(number, run.stop_before_training)
    setup_logger(folder if training else None, distributed.is_main())
    logger.info("%s on %s, torch %s", folder, device, torch.__version__)
    return run
