"""A run: its device, folder, log, checkpoints and precision. Knows no method and no data set."""

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import torch
from torch import nn
from yacs.config import CfgNode

from engine import checkpointing as resume
from engine.meter import Meter
from engine.plan import Plan
from engine.precision import Precision, choose_device
from engine.state import TrainState
from utils import distributed, heartbeat
from utils.checkpoints import file as checkpoint
from utils.checkpoints import folder as retention
from utils.checkpoints.atomic import write_text
from utils.cli import lost_processes
from utils.config.load import to_yaml
from utils.locks import try_lock
from utils.logger import Metrics, setup_logger
from utils.names import visible
from utils.randomness import keyed_seed

logger = logging.getLogger("synco")


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
        self.metrics = Metrics(folder if writes else None, cfg.LOG.TENSORBOARD)
        self.meter = Meter(self.metrics, cfg.LOG.PRINT_FREQ)
        self._lock: IO[str] | None = None
        self._resumed_from: Path | None = None
        # the --resume file that the folder's checkpoints descend from
        self._origin: str | None = None
        self._saved_step: int | None = None
        # the checkpoint of this folder that was saved or resumed last
        self._own: Path | None = None
        self.known_evaluation: dict[str, float] = {}  # of the step that the run resumed at
        # after which step, with what result
        self._evaluated: tuple[int, dict[str, float]] = (0, {})

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
                f"--output: another run is using {self.folder}; wait for it, or choose another --tag"
            )
        # e.g. preempted: a start that fails must not be requeued
        if self._status().get("state") != "done":
            self.finish("starting", 0)

    def _check_lock(self) -> None:
        """Refuse to write into a folder that is no longer the one that this run locked."""
        if self._lock is None:
            return
        held = os.fstat(self._lock.fileno())
        try:
            found = os.stat(self.folder / ".lock")
        except (FileNotFoundError, NotADirectoryError):
            found = None
        except OSError as error:  # a file server that stutters says nothing about the lock
            logger.warning("%s/.lock cannot be looked at (%s)", self.folder, error)
            return
        if found is None or (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            self.training = False  # nothing more is written there, not even status.json
            raise ValueError(
                f"--output: {self.folder}/.lock is not the one that this run locked: the folder was moved or "
                "removed, or another run uses it. Nothing was written. Move the folder back and start again"
            )

    def _status(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def write_extra(self, name: str, write: Callable[[Path], object]) -> None:
        """Let rank 0 ``write(path)`` a file that the run can do without: a disk that fails is a warning."""
        if distributed.is_main():
            try:
                write(self.folder / name)
            except OSError as error:
                logger.warning("cannot write %s (%s)", self.folder / name, error)

    @contextmanager
    def reporting(self, state: TrainState) -> Iterator[None]:
        """Write the configuration, now accepted, and keep ``status.json`` true while a block trains."""
        self.write_extra("config.yaml", lambda path: write_text(path, to_yaml(self.cfg)))
        self.finish("running", state.step)
        try:
            yield
        except BaseException as error:
            lost = f" ({heartbeat.missing()})" if lost_processes(error) else ""
            self.finish("failed", state.step, f"{type(error).__name__}: {error}{lost}")
            raise

    def begin_step(self, step: int, resumed_at: int) -> None:
        """Note the step for the other processes; after the first one, which compiles, waits are limited."""
        heartbeat.beat(f"step {step}")
        if step == resumed_at + 1:
            distributed.limit_waits(self.cfg.TRAIN.RANK_TIMEOUT)

    def preempted(self, step: int, signal_name: str) -> None:
        """Say that the run stopped on request, and from where it will go on."""
        if self._saved_step == step:
            outcome = "saved"
        else:
            outcome = "NOT saved, it will go on from the checkpoint before"
        self.finish("preempted", step, f"asked to stop ({signal_name}), {outcome}")
        message = "asked to stop (%s) at step %d: %s; start the same command again to go on"
        logger.warning(message, signal_name, step, outcome)

    def stop_before_training(self, number: int, frame: FrameType | None) -> NoReturn:
        """Leave as preempted: a signal while data are listed and the model is built loses nothing."""
        status = self._status()
        if status.get("state") == "starting":
            self.finish(
                "preempted", status["step"], f"{signal.Signals(number).name} before the first step"
            )
        raise SystemExit(75)

    def done(self, step: int) -> None:
        """Say that the run is complete; raise ``OSError`` if its last checkpoint could not be written."""
        if self._saved_step != step:
            error = OSError(
                f"{self.folder}: training is complete, but its last checkpoint was not saved"
            )
            error.reporter = 0  # type: ignore[attr-defined]  # all ranks know it, one says it
            raise error
        self.finish("done", step)

    def finish(self, state: str, step: int, reason: str = "") -> None:
        """Write ``status.json``, which a requeue script reads.

        The state is starting, running, done, preempted (the same command goes on from here) or
        failed. The reason may hold a file's name: whoever prints it prints no control characters.
        """
        self.meter.close_line()
        if not self.training:
            return
        status = json.dumps({"state": state, "step": step, "reason": visible(reason)})
        self.write_extra("status.json", lambda path: write_text(path, status))

    def close(self) -> None:
        """Close the logs and release the folder."""
        self.metrics.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ---- checkpoints -----------------------------------------------------------------------------

    def due(self, step: int, plan: Plan) -> bool:
        """Tell whether a checkpoint is due after ``step`` steps."""
        every = self.cfg.CHECKPOINT
        by_epoch = every.EVERY_EPOCHS and step % (every.EVERY_EPOCHS * plan.steps_per_epoch) == 0
        by_step = every.EVERY_STEPS and step % every.EVERY_STEPS == 0
        return bool(by_epoch or by_step or step == plan.total_steps)

    def is_saved(self, step: int) -> bool:
        """Tell whether the checkpoint of ``step`` is committed."""
        return self._saved_step == step

    def evaluated(self, state: TrainState, plan: Plan, values: dict[str, float]) -> bool:
        """Log an evaluation and note it beside the checkpoint of its step, if there is one.

        Tells whether it is the best so far by ``CHECKPOINT.KEEP_BEST``. Raises ``ValueError`` if
        that names nothing that was measured.
        """
        metric = self.cfg.CHECKPOINT.KEEP_BEST
        # which has told at once, and measures now this, now that
        if values and self.task != "pretrain":
            retention.require(metric, values)
        is_best = metric in values and retention.improves(
            values[metric], state.best.get(metric), metric in state.lower_is_better
        )
        self._evaluated = (state.step, values)
        state.keep_best(values)
        # not --resume's file from elsewhere
        own = self._own == checkpoint.path_of(self.folder, state.step)
        if values and own:  # noted before it is logged: a resume logs what is noted
            distributed.on_main(lambda: self._note_evaluation(state, plan))
        self.meter.record(plan.progress(state.step), values, state)
        return is_best

    def _note_evaluation(self, state: TrainState, plan: Plan) -> None:
        self._check_lock()
        path = checkpoint.path_of(self.folder, state.step)
        try:
            checkpoint.amend(path, evaluated=self._evaluated[1], best=dict(state.best))
            self._prune(state, plan)
        except (OSError, checkpoint.CheckpointError) as error:
            logger.error(
                "the evaluation of step %d is not noted in its checkpoint (%s)", state.step, error
            )

    def checkpoint(self, state: TrainState, plan: Plan) -> None:
        """Commit the state (rank 0); a failing disk leaves the older checkpoints and lets the run go on."""
        payload = {
            **state.state_dict(),
            "meter": self.meter.state_dict(),
            "config": to_yaml(self.cfg),
            "dataset": self.fingerprint,
            "global_batch": plan.global_batch,
        }
        problem = distributed.on_main(lambda: self._save(state, payload, plan))
        if not problem:
            self._saved_step = state.step
            self._own = checkpoint.path_of(self.folder, state.step)
        elif distributed.is_main():
            logger.error("%s", problem)

    def _save(self, state: TrainState, payload: dict[str, Any], plan: Plan) -> str:
        self._check_lock()
        step = state.step
        meta = {
            "torch": torch.__version__,
            "best": payload["best"],
            "name": f"{self.cfg.NAME}/{self.cfg.TAG}",
            "origin": self._origin,
            "evaluated": self._evaluated[1] if self._evaluated[0] == step else {},
        }
        try:
            path = checkpoint.save(self.folder, step, payload, meta=meta)
            self._prune(state, plan)
        except OSError as error:
            return (
                f"checkpoint of step {step} failed ({error}); the older ones are intact. "
                "Free space: the run goes on"
            )
        logger.info("checkpoint %s", path)
        return ""

    def _prune(self, state: TrainState, plan: Plan) -> None:
        keep, metric = self.cfg.CHECKPOINT, self.cfg.CHECKPOINT.KEEP_BEST
        lower = metric in state.lower_is_better
        best = retention.best(self.folder, metric, lower) if metric else None
        protect = [path for path in (self._resumed_from, best) if path]
        keep_every = keep.KEEP_EVERY_EPOCHS * plan.steps_per_epoch or None
        retention.prune(self.folder, keep.KEEP_LAST, keep_every, protect)

    def resume(self, state: TrainState, plan: Plan) -> bool:
        """Restore ``RESUME``, or the newest checkpoint of the folder that verifies; tell whether there was
        one.

        Raises ``ValueError`` if the checkpoint belongs to another configuration or data set, or if
        there are checkpoints and none verifies.
        """
        found = distributed.on_main(
            lambda: resume.find_checkpoint(self.folder, self.cfg.RESUME, self.training)
        )
        if found is None:
            if self.training:
                # of a run that was killed before its first checkpoint
                self.metrics.truncate_after(0)
            return False
        path, self._origin = found
        saved, changes = distributed.on_all(
            lambda: resume.load_own(path, self.cfg, self.task, self.fingerprint, plan)
        )
        for change in changes:
            logger.warning("resuming with a changed %s", change)
        state.load_state_dict(saved)
        self.known_evaluation = distributed.on_main(lambda: resume.evaluation_of(path))
        state.keep_best(self.known_evaluation)
        logger.info("resumed from %s at step %d", path, state.step)
        if not self.training:
            return True
        self._resumed_from, self._saved_step = path, state.step
        if path.resolve().parent == self.folder.resolve():
            self._own = checkpoint.path_of(self.folder, state.step)
        # later ones belong to another course of the run, and would be taken for newer
        if self._origin:
            distributed.on_main(lambda: retention.set_aside(self.folder, after=state.step))
        if "meter" in saved:  # older checkpoints lack it
            self.meter.load_state_dict(saved["meter"])
        self.metrics.truncate_after(state.step, evaluation_too=True)  # fit writes it again
        return True

    # ---- what a person sees ----------------------------------------------------------------------

    def describe(self, module: nn.Module, plan: Plan, num_images: int) -> None:
        """Say what is about to be trained, on what, for how long."""
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        logger.info(
            "%s with %.2f M trained parameters, %s",
            type(module).__name__,
            trained / 1e6,
            self.precision,
        )
        logger.info("%d images (%s): %s", num_images, self.fingerprint, plan.describe())
        self.meter.start(plan.total_steps)


def start_run(
    cfg: CfgNode, subfolder: str = "", task: str = "pretrain", training: bool = True
) -> Run:
    """Join the processes, seed, choose the device and open ``OUTPUT/NAME/TAG[/subfolder]``.

    Without ``training`` (``--eval``, ``--throughput``) nothing is locked or written.
    """
    device = choose_device(cfg.DEVICE)
    distributed.init_processes(device)
    torch.manual_seed(keyed_seed("model", cfg.SEED))  # equal on all ranks: so are the weights
    # imports the compiler
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
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):  # until fit() takes them
                signal.signal(number, run.stop_before_training)
    setup_logger(folder if training else None, distributed.is_main())
    logger.info("%s on %s, torch %s", folder, device, torch.__version__)
    return run
