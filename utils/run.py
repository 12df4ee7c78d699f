"""A run: its device, folder, log, checkpoints and precision. Knows no method and no data set."""

import fcntl
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from utils import checkpoint, distributed
from utils.atomic import write_text
from utils.config import compare_for_resume, to_yaml
from utils.device import DTYPES, choose_device, resolve_precision
from utils.logger import Metrics, setup_logger
from utils.meter import Meter
from utils.plan import Plan

if TYPE_CHECKING:
    from utils.engine import TrainState

logger = logging.getLogger("synco")

M = TypeVar("M", bound=nn.Module)


class Run:
    """The place and the means of one run; only rank 0 writes."""

    def __init__(
        self, cfg: CfgNode, folder: Path, device: torch.device, task: str = "pretrain", training: bool = True
    ) -> None:
        self.cfg = cfg
        self.task = task  # decides which keys are its identity, see utils.defaults
        self.folder = folder
        self.device = device
        self.precision = resolve_precision(cfg.TRAIN.PRECISION, device)
        self.seed: int = cfg.SEED
        self.fingerprint = ""  # of the data (and, in a probe, the weights) that the run is about
        self.training = training  # an evaluation looks at a folder that may be another process's
        writes = training and distributed.is_main()
        self.metrics = Metrics(folder if writes else None, cfg.LOG.TENSORBOARD)
        self.meter = Meter(self.metrics, cfg.LOG.PRINT_FREQ)
        self._lock: IO[str] | None = None
        self._resumed_from: Path | None = None
        self._origin: str | None = None  # the --resume file that the folder's checkpoints descend from
        self._saved_step: int | None = None

    # ---- precision and processes ---------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward in ``TRAIN.PRECISION``."""
        dtype = DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return a gradient scaler for fp16, which needs one."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def prepare(self, module: M) -> M:
        """Move a module to the device, in the memory format of the run, equal on all ranks."""
        if self.cfg.TRAIN.CHANNELS_LAST:
            module = module.to(memory_format=torch.channels_last)
        module = module.to(self.device)
        distributed.broadcast_module(module)
        return module

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap a prepared module for gradient averaging if there are several processes.

        Buffers are not broadcast: queue and statistics are computed alike, or are meant to be local.
        """
        if distributed.world_size() == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # torch 2.15 renames broadcast_buffers
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(module, device_ids=ids, **options)

    def views(self, images: Tensor) -> Tensor:
        """Return images (N, 3, H, W) in the run's memory format."""
        return (
            images.contiguous(memory_format=torch.channels_last) if self.cfg.TRAIN.CHANNELS_LAST else images
        )

    def shard(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's share of rows that all ranks hold; the last shares may be shorter."""
        mine = slice(distributed.rank(), None, distributed.world_size())
        return features[mine], labels[mine]

    @contextmanager
    def evaluating(self, module: M) -> Iterator[M]:
        """Put a module into eval mode, under autocast and without gradients, and each part back as it was.

        Every rank evaluates with rank 0's running statistics, those that a checkpoint holds: the others' may
        differ.
        """
        was_training = [(part, part.training) for part in module.modules()]
        for buffer in module.buffers():
            distributed.broadcast(buffer)
        module.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield module
        finally:
            for part, training in was_training:
                part.training = training

    # ---- the folder ----------------------------------------------------------------------------------------

    def open_folder(self) -> None:
        """Create the folder and take its lock: one folder, one run."""
        distributed.on_main(self._open_folder)

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a+")
        except OSError as error:
            raise ValueError(
                f"--output: {self.folder} cannot be written ({error}); choose another folder"
            ) from error
        try:
            # The kernel releases it with the process; loader workers do not inherit it, as they do flock's.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"--output: another run is using {self.folder}; wait for it, or choose another --tag"
            ) from error
        if self._status().get("state") != "done":  # e.g. preempted: a start that fails must not be requeued
            self.finish("starting", 0)

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
    def reporting(self, state: "TrainState") -> Iterator[None]:
        """Write the configuration, now accepted, and keep ``status.json`` true while a block trains."""
        self.write_extra("config.yaml", lambda path: write_text(path, to_yaml(self.cfg)))
        self.finish("running", state.step)
        try:
            yield
        except BaseException as error:
            self.finish("failed", state.step, f"{type(error).__name__}: {error}")
            raise

    def preempted(self, step: int, signal_name: str) -> None:
        """Say that the run stopped on request, and from where it will go on."""
        if self._saved_step == step:
            outcome = "saved"
        else:
            outcome = "NOT saved, it will go on from the checkpoint before"
        self.finish("preempted", step, f"asked to stop ({signal_name}), {outcome}")
        message = "asked to stop (%s) at step %d: %s; start the same command again to go on"
        logger.warning(message, signal_name, step, outcome)

    def done(self, step: int) -> None:
        """Say that the run is complete; raise ``OSError`` if its last checkpoint could not be written."""
        if self._saved_step != step:
            error = OSError(f"{self.folder}: training is complete, but its last checkpoint was not saved")
            error.reporter = 0  # type: ignore[attr-defined]  # all ranks know it, one says it
            raise error
        self.finish("done", step)

    def finish(self, state: str, step: int, reason: str = "") -> None:
        """Write ``status.json``, which a requeue script reads.

        The state is starting, running, done, preempted (the same command goes on from here) or failed.
        """
        self.meter.close_line()
        if not self.training:
            return
        status = json.dumps({"state": state, "step": step, "reason": reason})
        self.write_extra("status.json", lambda path: write_text(path, status))

    def close(self) -> None:
        """Close the logs and release the folder."""
        self.metrics.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def due(self, step: int, plan: Plan) -> bool:
        """Tell whether a checkpoint is due after ``step`` steps."""
        every = self.cfg.CHECKPOINT
        by_epoch = every.EVERY_EPOCHS and step % (every.EVERY_EPOCHS * plan.steps_per_epoch) == 0
        by_step = every.EVERY_STEPS and step % every.EVERY_STEPS == 0
        return bool(by_epoch or by_step or step == plan.total_steps)

    def checkpoint(self, state: "TrainState", plan: Plan) -> None:
        """Commit the state (rank 0); a failing disk leaves the older checkpoints and lets the run go on."""
        keep_every = self.cfg.CHECKPOINT.KEEP_EVERY_EPOCHS * plan.steps_per_epoch or None
        payload = {
            **state.state_dict(),
            "config": to_yaml(self.cfg),
            "dataset": self.fingerprint,
            "global_batch": plan.global_batch,
        }
        problem = distributed.on_main(lambda: self._save(state.step, payload, keep_every))
        if not problem:
            self._saved_step = state.step
        elif distributed.is_main():
            logger.error("%s", problem)

    def _save(self, step: int, payload: dict[str, Any], keep_every: int | None) -> str:
        meta = {
            "torch": torch.__version__,
            "best": payload["best"],
            "name": f"{self.cfg.NAME}/{self.cfg.TAG}",
            "origin": self._origin,
        }
        protect = [self._resumed_from] if self._resumed_from else []
        try:
            path = checkpoint.save(self.folder, step, payload, meta=meta)
            checkpoint.prune(self.folder, self.cfg.CHECKPOINT.KEEP_LAST, keep_every, protect)
        except OSError as error:
            return (
                f"checkpoint of step {step} failed ({error}); the older ones are intact. "
                "Free space: the run goes on"
            )
        logger.info("checkpoint %s", path)
        return ""

    def resume(self, state: "TrainState", plan: Plan) -> bool:
        """Restore ``RESUME``, or the newest checkpoint of the folder that verifies; tell whether there was
        one.

        Raises ``ValueError`` if the checkpoint belongs to another configuration or data set, or if there are
        checkpoints and none verifies.
        """
        found = distributed.on_main(self._find)
        if found is None:
            if self.training:
                self.metrics.truncate_after(0)  # of a run that was killed before its first checkpoint
            return False
        path, self._origin = found
        saved = distributed.on_all(lambda: self._load(path, plan))
        for change in compare_for_resume(saved["config"], self.cfg, self.task):
            logger.warning("resuming with a changed %s", change)
        state.load_state_dict(saved)
        logger.info("resumed from %s at step %d", path, state.step)
        if not self.training:
            return True
        self._resumed_from, self._saved_step = path, state.step
        if self._origin:  # later ones belong to another course of the run, and would be taken for newer
            distributed.on_main(lambda: checkpoint.set_aside(self.folder, after=state.step))
        self.metrics.truncate_after(state.step)
        return True

    def _load(self, path: Path, plan: Plan) -> dict[str, Any]:
        saved = checkpoint.load(path)
        missing = {"framework", "optimizer", "step", "config", "dataset", "global_batch"} - set(saved)
        if missing:
            raise checkpoint.CheckpointError(
                f"{path} is no checkpoint of such a run (no {', '.join(sorted(missing))}); to start from its "
                "weights use main_linear.py --pretrained, to resume give a ckpt_*.pt of a run"
            )
        compare_for_resume(saved["config"], self.cfg, self.task)
        self._check_identity(path, saved, plan)
        return saved

    def _find(self) -> tuple[Path, str | None] | None:
        """Return the checkpoint to go on from and the ``--resume`` file that it descends from, if any.

        ``--resume`` may stand in a command that is started again and again: once the folder has gone on from
        it, the folder's own newest is taken.
        """
        wanted = str(Path(self.cfg.RESUME).resolve()) if self.cfg.RESUME else None
        if self.training:
            checkpoint.sweep(self.folder)
        elif wanted:
            return Path(self.cfg.RESUME), wanted
        try:
            newest = checkpoint.newest_valid(self.folder)
        except checkpoint.CheckpointError:
            if wanted is None:
                raise
            return Path(self.cfg.RESUME), wanted  # a copy is the remedy for a folder of damaged ones
        if newest and (wanted is None or newest.meta.get("origin") == wanted):
            return newest.path, newest.meta.get("origin")
        if newest and wanted:
            logger.warning("--resume %s is used, not the folder's own %s", wanted, newest.path.name)
        return (Path(self.cfg.RESUME), wanted) if wanted else None

    def _check_identity(self, path: Path, saved: dict[str, Any], plan: Plan) -> None:
        if saved["dataset"] != self.fingerprint:
            raise checkpoint.CheckpointError(
                f"{path} was trained on other data ({saved['dataset']}, now {self.fingerprint}): files were "
                "added, removed or renamed; restore them, or start a run of its own with another --tag"
            )
        if saved["global_batch"] != plan.global_batch:
            raise checkpoint.CheckpointError(
                f"{path} was trained with a global batch of {saved['global_batch']}, this command gives "
                f"{plan.global_batch} (processes x --batch-size x --accumulation-steps); restore the product"
            )

    # ---- what a person sees --------------------------------------------------------------------------------

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


def start_run(cfg: CfgNode, subfolder: str = "", task: str = "pretrain", training: bool = True) -> Run:
    """Join the processes, seed, choose the device and open ``OUTPUT/NAME/TAG[/subfolder]``.

    Without ``training`` (``--eval``, ``--throughput``) nothing is locked or written.
    """
    device = choose_device(cfg.DEVICE)
    distributed.init_processes(device)
    torch.manual_seed(distributed.keyed_seed("model", cfg.SEED))  # equal on all ranks: so are the weights
    torch.use_deterministic_algorithms(cfg.TRAIN.DETERMINISTIC)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not cfg.TRAIN.DETERMINISTIC
    elif distributed.world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // distributed.world_size()))
    folder = Path(cfg.OUTPUT) / cfg.NAME / cfg.TAG / subfolder
    run = Run(cfg, folder, device, task, training)
    if training:
        run.open_folder()
    setup_logger(folder if training else None, distributed.is_main())
    logger.info("%s on %s, torch %s", folder, device, torch.__version__)
    return run
