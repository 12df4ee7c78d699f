"""From which checkpoint a run goes on, and whether that one is its own: configuration, data, global batch."""

import logging
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from engine.plan import Plan
from utils.checkpoints import file as checkpoint
from utils.checkpoints.folder import sweep
from utils.config.load import compare_for_resume
from utils.distributed import world_size

logger = logging.getLogger("synco")

_NEEDED = {"framework", "optimizer", "step", "config", "dataset", "global_batch"}


def find_checkpoint(folder: Path, resume: str, training: bool) -> tuple[Path, str | None] | None:
    """Return the checkpoint to go on from and the ``resume`` file that it descends from, if any.

    ``--resume`` may stand in a command that is started again and again: once the folder has gone on
    from it, the folder's own newest is taken. While ``training`` the folder is ours, and leftovers
    are removed.
    """
    wanted = str(Path(resume).resolve()) if resume else None
    if training:
        sweep(folder)
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
    path: Path, cfg: CfgNode, task: str, fingerprint: str, plan: Plan
) -> tuple[dict[str, Any], list[str]]:
    """Return a checkpoint and the tunable keys that have changed since.

    Raises ``ValueError`` if it belongs to another configuration, data set or global batch.
    """
    saved = checkpoint.load(path)
    if missing := _NEEDED - set(saved):
        raise checkpoint.CheckpointError(
            f"{path} is no checkpoint of such a run (no {', '.join(sorted(missing))}); to start from its "
            "weights use main_linear.py --pretrained, to resume give a ckpt_*.pt of a run"
        )
    changes = compare_for_resume(saved["config"], cfg, task)
    if saved["dataset"] != fingerprint:
        raise checkpoint.CheckpointError(
            f"{path} was trained on other data ({saved['dataset']}, now {fingerprint}): files were "
            "added, removed or renamed; restore them, or start a run of its own with another --tag"
        )
    if saved["global_batch"] != plan.global_batch:
        raise checkpoint.CheckpointError(
            f"{path} was trained with a global batch of {saved['global_batch']}, this command gives "
            f"{_product(plan)} = {plan.global_batch}; {sizes_that_work(saved['global_batch'], plan)}"
        )
    return saved, changes


def _product(plan: Plan) -> str:
    per_process = plan.global_batch // (world_size() * plan.accumulation)
    micro = f" x --accumulation-steps {plan.accumulation}" if plan.accumulation > 1 else ""
    return f"--batch-size {per_process}{micro} x {world_size()} process(es)"


def sizes_that_work(global_batch: int, plan: Plan) -> str:
    """Say which --batch-size keeps ``global_batch`` on this many processes, or on which numbers of them."""
    world, micro = world_size(), plan.accumulation
    steps = f" --accumulation-steps {micro}" if micro > 1 else ""
    if global_batch % (world * micro) == 0:
        size = global_batch // (world * micro)
        return f"on {world} process(es) use --batch-size {size}{steps}"
    if global_batch % world == 0:
        return f"on {world} process(es) use --batch-size {global_batch // world} --accumulation-steps 1"
    per_step = micro if global_batch % micro == 0 else 1
    numbers = [n for n in range(1, 2 * world + 1) if global_batch % (n * per_step) == 0]
    fitting = ", ".join(f"{n} with --batch-size {global_batch // (n * per_step)}" for n in numbers)
    remedy = f" (each with --accumulation-steps {per_step})" if micro > 1 else ""
    return f"{global_batch} cannot be divided over {world} processes; use {fitting}{remedy}"
