"""When a run saves, what it saves, and from which checkpoint it goes on."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from yacs.config import CfgNode

from engine.meter import Meter
from engine.plan import Plan
from engine.state import State, TrainState
from utils import distributed
from utils.checkpoints import file as checkpoint
from utils.checkpoints import folder as retention
from utils.config.load import compare_for_resume, to_yaml
from utils.distributed import world_size

logger = logging.getLogger("synco")

_NEEDED = {"framework", "optimizer", "step", "config", "dataset", "global_batch"}


class Checkpoints:
    """The checkpoints of one run. Only rank 0 writes; all ranks call, and learn the same.

    `task` decides which keys identify a run (see `utils.config.schema`). Without `training` the
    folder may be another process's, and nothing in it changes. `check_lock` raises if the folder
    is no longer the run's.
    """

    def __init__(
        self,
        cfg: CfgNode,
        folder: Path,
        meter: Meter,
        *,
        task: str,
        training: bool,
        check_lock: Callable[[], None],
    ) -> None:
        self.cfg, self.folder, self.meter = cfg, folder, meter
        self.task, self.training, self._check_lock = task, training, check_lock
        self.known_evaluation: dict[str, float] = {}  # of the step that the run resumed at
        self._resumed_from: Path | None = None
        # the file of weights that the run began with: name, network, sha256; "" for random ones
        self.start = ""
        # of what is evaluated: digests of the images by split, see `images_of`
        self.images: dict[str, str] = {}
        self._images_before: dict[str, str] = {}  # of the checkpoint that the run resumed from
        self._origin: str | None = None  # the --resume file that the checkpoints descend from
        self._saved_step: int | None = None
        self._own: Path | None = None  # this folder's checkpoint that was saved or resumed last
        # after which step, with what result
        self._evaluated: tuple[int, dict[str, float]] = (0, {})

    # ---- save ------------------------------------------------------------------------------------

    def due(self, step: int, plan: Plan) -> bool:
        """Tell whether a checkpoint is due after `step` steps."""
        every = self.cfg.CHECKPOINT
        by_epoch = every.EVERY_EPOCHS and step % (every.EVERY_EPOCHS * plan.steps_per_epoch) == 0
        by_step = every.EVERY_STEPS and step % every.EVERY_STEPS == 0
        return bool(by_epoch or by_step or step == plan.total_steps)

    def is_saved(self, step: int) -> bool:
        """Tell whether the checkpoint of `step` is committed."""
        return self._saved_step == step

    def kept(self, state: TrainState) -> dict[str, Path]:
        """Return the newest checkpoint, and the best one by `CHECKPOINT.KEEP_BEST` if asked for."""
        found = {"weights": self._own} if self._own else {}
        if metric := self.cfg.CHECKPOINT.KEEP_BEST:
            best = retention.best(self.folder, metric, metric in state.lower_is_better)
            found |= {"best weights": best} if best else {}
        return found

    def save(self, state: TrainState, plan: Plan, fingerprint: str) -> None:
        """Commit the state; a failing disk leaves the older checkpoints and lets the run go on."""
        payload = {
            **state.state_dict(),
            "meter": self.meter.state_dict(),
            "config": to_yaml(self.cfg),
            "dataset": fingerprint,
            "global_batch": plan.global_batch,
            "start": self.start,
            "images": self.images,
        }
        problem = distributed.on_main(lambda: self._save(state, plan, payload))
        if not problem:
            self._saved_step = state.step
            self._own = checkpoint.path_of(self.folder, state.step)
        elif distributed.is_main():
            logger.error("%s", problem)

    def _save(self, state: TrainState, plan: Plan, payload: State) -> str:
        self._check_lock()
        evaluated_step, values = self._evaluated
        meta = {
            "torch": torch.__version__,
            "best": payload["best"],
            "name": f"{self.cfg.NAME}/{self.cfg.TAG}",
            "origin": self._origin,
            "evaluated": values if evaluated_step == state.step else {},
        }
        try:
            path = checkpoint.save(self.folder, state.step, payload, meta=meta)
            self._prune(state, plan)
        except OSError as error:
            return (
                f"checkpoint of step {state.step} failed ({error}); the older ones are intact. "
                "Free space: the run goes on"
            )
        logger.info("checkpoint %s", path)
        return ""

    def _prune(self, state: TrainState, plan: Plan) -> None:
        keep, metric = self.cfg.CHECKPOINT, self.cfg.CHECKPOINT.KEEP_BEST
        lower = metric in state.lower_is_better
        best = retention.best(self.folder, metric, lower) if metric else None
        # The checkpoint that the run resumed from stays: it may be the last that is known to work.
        protect = [path for path in (self._resumed_from, best) if path]
        keep_every = keep.KEEP_EVERY_EPOCHS * plan.steps_per_epoch or None
        retention.prune(self.folder, keep.KEEP_LAST, keep_every, protect)

    def evaluated(self, state: TrainState, plan: Plan, values: dict[str, float]) -> bool:
        """Log an evaluation and note it beside the checkpoint of its step, if there is one.

        Tells whether it is the best so far by `CHECKPOINT.KEEP_BEST`. Raises `ValueError` if that
        names nothing that was measured.
        """
        metric = self.cfg.CHECKPOINT.KEEP_BEST
        # Pretraining refuses a wrong name when it starts, and measures different things at
        # different epochs.
        if values and self.task != "pretrain":
            retention.require(metric, values)
        is_best = metric in values and retention.improves(
            values[metric], state.best.get(metric), metric in state.lower_is_better
        )
        self._evaluated = (state.step, values)
        state.keep_best(values)
        # A run that goes on from another folder's file (--resume) has no checkpoint of this step
        # here.
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

    # ---- resume ----------------------------------------------------------------------------------

    def resume(self, state: TrainState, plan: Plan, fingerprint: str) -> bool:
        """Restore `RESUME` or the folder's newest valid checkpoint; tell whether there was one.

        Raises `ValueError` if the checkpoint belongs to another configuration or data set, or if
        there are checkpoints and none verifies.
        """
        metrics = self.meter.metrics
        found = distributed.on_main(
            lambda: find_checkpoint(self.folder, self.cfg.RESUME, self.training)
        )
        if found is None:
            if self.training:
                # A run that was killed before its first checkpoint has left lines in the log.
                metrics.truncate_after(0)
            return False
        path, self._origin = found
        saved, changes = distributed.on_all(
            lambda: load_own(path, self.cfg, self.task, fingerprint, plan, self.start)
        )
        self.start = saved.get("start", self.start)  # older checkpoints lack it
        if self.training:  # an evaluation may look at other test images
            self._images_before = saved.get("images", {})  # older checkpoints lack it
            distributed.on_all(lambda: refuse_other_images(path, self._images_before, self.images))
        for change in changes:
            logger.warning("resuming with a changed %s", change)
        state.load_state_dict(saved)
        self.known_evaluation = distributed.on_main(lambda: evaluation_of(path))
        state.keep_best(self.known_evaluation)
        logger.info("resumed from %s at step %d", path, state.step)
        if not self.training:
            return True
        self._resumed_from, self._saved_step = path, state.step
        if path.resolve().parent == self.folder.resolve():
            self._own = checkpoint.path_of(self.folder, state.step)
        # Later checkpoints belong to another course of the run, and the next start would take them
        # for the newest.
        if self._origin:
            distributed.on_main(lambda: retention.set_aside(self.folder, after=state.step))
        if "meter" in saved:  # older checkpoints lack it
            self.meter.load_state_dict(saved["meter"])
        # fit() logs the evaluation of this step again
        metrics.truncate_after(state.step, evaluation_too=True)
        return True

    def watch(self, images: dict[str, str]) -> None:
        """Note which images a pretraining is tested on; warn if the resumed run had others.

        It is not refused as a probe is: the weights do not depend on these images.
        """
        for split in sorted(self._images_before.keys() & images.keys()):
            if self._images_before[split] != images[split]:
                logger.warning(
                    "the %s images of the k-NN are other ones now: its best value may be of those "
                    "before",
                    split,
                )
        self.images = images


def find_checkpoint(folder: Path, resume: str, training: bool) -> tuple[Path, str | None] | None:
    """Return the checkpoint to go on from and the `resume` file that it descends from, if any.

    Once the folder has gone on from `resume`, its own newest is taken: the same command with
    `--resume` may be started again and again. While `training` the folder is ours, and leftovers
    are removed.
    """
    wanted = str(Path(resume).resolve()) if resume else None
    if training:
        retention.sweep(folder)
    elif wanted:
        return Path(resume), wanted
    try:
        newest = checkpoint.newest_valid(folder)
    except checkpoint.CheckpointError:
        if wanted is None:
            raise
        return Path(resume), wanted  # a copy is the remedy for a folder of damaged ones
    if newest and (wanted is None or newest.meta.get("origin") == wanted):
        return newest.path, newest.meta.get("origin")
    if newest and wanted:
        logger.warning("--resume %s is used, not the folder's own %s", wanted, newest.path.name)
    return (Path(resume), wanted) if wanted else None


def evaluation_of(path: Path) -> dict[str, float]:
    """Return the evaluation that is noted beside a checkpoint, {} if there is none."""
    try:
        return checkpoint.evaluation_of(checkpoint.read_record(path))
    except (OSError, checkpoint.CheckpointError):
        return {}  # a file without a record, such as a copy


def load_own(
    path: Path, cfg: CfgNode, task: str, fingerprint: str, plan: Plan, start: str = ""
) -> tuple[State, list[str]]:
    """Return a checkpoint and the tunable keys that have changed since.

    Raises `ValueError` if it belongs to another configuration, data set or global batch, or to
    other weights than `start`, if they are named.
    """
    saved = checkpoint.load(path)
    if missing := _NEEDED - set(saved):
        raise checkpoint.CheckpointError(
            f"{path} is no checkpoint of such a run (no {', '.join(sorted(missing))}); to start "
            "from its weights use --pretrained, to resume give a ckpt_*.pt of a run"
        )
    changes = compare_for_resume(saved["config"], cfg, task)
    if saved["dataset"] != fingerprint:
        raise checkpoint.CheckpointError(
            f"{path} was trained on other data ({saved['dataset']}, now {fingerprint}): files were "
            "added, removed or renamed; restore them, or start a new run with another --tag"
        )
    began = saved.get("start", start)  # older checkpoints lack it
    if start and _contents(began) != _contents(start):
        raise checkpoint.CheckpointError(
            f"--pretrained: {path} began with {_short(began) or 'random weights'}, not with "
            f"{_short(start)}; leave the flag out to go on with it, or start a new run with "
            "another --tag"
        )
    wanted = saved["global_batch"]
    if wanted != plan.global_batch:
        raise checkpoint.CheckpointError(
            f"{path} was trained with a global batch of {wanted}, this command gives "
            f"{_product(plan)} = {plan.global_batch}; {sizes_that_work(wanted, plan)}"
        )
    return saved, changes


def refuse_other_images(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise `CheckpointError` if a split has other images than before, names or content.

    Its best values would be of both.
    """
    for split in sorted(before.keys() & now.keys()):
        if before[split] != now[split]:
            raise checkpoint.CheckpointError(
                f"{path}: the {split} images are other ones now ({before[split]}, now "
                f"{now[split]}); restore them, or start anew in another --output, with --pretrained"
            )


def _contents(start: str) -> tuple[str, str]:
    """Return network and sha256 of weights; their file may have been renamed since."""
    about, _, digest = start.rpartition(", sha256 ")
    return about.partition(" --which ")[2], digest


def _short(start: str) -> str:
    about, _, digest = start.rpartition(", ")
    return f"{about}, {digest[:15]}" if about else ""


def _product(plan: Plan) -> str:
    per_process = plan.global_batch // (world_size() * plan.accumulation)
    micro = f" x --accumulation-steps {plan.accumulation}" if plan.accumulation > 1 else ""
    return f"--batch-size {per_process}{micro} x {world_size()} process(es)"


def sizes_that_work(global_batch: int, plan: Plan) -> str:
    """Say which --batch-size, or which number of processes, keeps the global batch."""
    world, micro = world_size(), plan.accumulation
    steps = f" --accumulation-steps {micro}" if micro > 1 else ""
    if global_batch % (world * micro) == 0:
        size = global_batch // (world * micro)
        return f"on {world} process(es) use --batch-size {size}{steps}"
    if global_batch % world == 0:
        size = global_batch // world
        return f"on {world} process(es) use --batch-size {size} --accumulation-steps 1"
    per_step = micro if global_batch % micro == 0 else 1
    numbers = [n for n in range(1, 2 * world + 1) if global_batch % (n * per_step) == 0]
    fitting = ", ".join(f"{n} with --batch-size {global_batch // (n * per_step)}" for n in numbers)
    remedy = f" (each with --accumulation-steps {per_step})" if micro > 1 else ""
    return f"{global_batch} cannot be divided over {world} processes; use {fitting}{remedy}"
