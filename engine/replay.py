"""Keep the batch that a run stopped on, and say what went wrong when it is played again.

`nonfinite_<step>.pt` in the run's folder holds the weights before the update, the views as they
were fed, and all that keys the draws; rank 0 writes it, the other processes send their part. It is
an ordinary torch file of tensors, numbers and text.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from engine.guards import NonFiniteError
from engine.plan import Plan
from engine.precision import DTYPES
from engine.run import Run
from engine.state import State, TrainState
from utils import distributed
from utils.checkpoints import file as checkpoint
from utils.checkpoints.atomic import write_file
from utils.checkpoints.folder import remove
from utils.config.load import to_yaml
from utils.randomness import keyed_seed
from utils.schedules import Progress

logger = logging.getLogger("synco")

_KEEP = 2  # files in a folder: a job that is started again and again must not fill the disk
_MOST_BYTES = 2 << 30  # of views in one file
_NEEDED = {"step", "world", "seed", "config", "precision", "scale", "progress"}
_NEEDED |= {"framework", "parts", "late"}


@contextmanager
def kept_for_replay(run: Run, state: TrainState, plan: Plan) -> Iterator[None]:
    """Keep the batch of a `NonFiniteError` that leaves the block; a failure to is a warning."""
    try:
        yield
    except NonFiniteError as error:
        try:
            path = _keep(run, state, plan, error)
        except Exception as problem:
            # A full disk or a lost process: the first error is the one to tell.
            logger.warning(
                "the batch of step %d is not kept for --replay (%s)", error.step, problem
            )
        else:
            if path:
                error.args = (f"{error}. To see what went wrong: --replay {path}",)
        raise


def _keep(run: Run, state: TrainState, plan: Plan, error: NonFiniteError) -> Path | None:
    """Let rank 0 write the file; return its path, `None` if there is nothing to replay."""
    if run.task != "pretrain":
        return None
    parts = _gather(_own_part(error))
    # The others wait: torchrun ends rank 0 soon after the first of them has gone.
    return distributed.on_main(lambda: _write(run, state, plan, error, parts))


def _write(
    run: Run, state: TrainState, plan: Plan, error: NonFiniteError, parts: list[State]
) -> Path:
    progress = plan.progress(error.step)
    # All that the step depended on: its batch, draws, weights and place in the schedule.
    payload = {
        "step": error.step,
        "message": str(error),
        "parts": parts,
        "late": state.step > error.step,
        "world": distributed.world_size(),
        "global_batch": plan.global_batch,
        "seed": run.seed,
        "config": to_yaml(run.cfg),
        "precision": run.precision,
        "scale": state.scaler.get_scale() if state.scaler else 1.0,
        "progress": [progress.step, progress.steps_per_epoch, progress.total_steps],
        "framework": {
            name: value.detach().cpu() for name, value in state.module.state_dict().items()
        },
        "checkpoint": next((path.name for path in checkpoint.committed(run.folder)), ""),
        "versions": {"torch": str(torch.__version__), "device": _device_name(run.device)},
    }
    path = run.folder / f"nonfinite_{error.step:08d}.pt"
    write_file(path, lambda file: torch.save(payload, file))
    others = [other for other in run.folder.glob("nonfinite_*.pt") if other != path]
    for other in sorted(others, key=lambda item: item.stat().st_mtime, reverse=True)[_KEEP - 1 :]:
        remove(other)
    return path


def _own_part(error: NonFiniteError) -> State:
    return {
        "rank": distributed.rank(),
        "loss": error.loss,
        "views": [[view.detach().cpu() for view in batch.views] for batch in error.batches],
        "indices": [batch.indices.cpu() for batch in error.batches],
        "labels": [batch.labels.cpu() for batch in error.batches],
    }


def _gather(part: State) -> list[State]:
    """Gather to rank 0 the parts of the ranks whose loss is not finite (all if none is)."""
    size = sum(view.nbytes for views in part["views"] for view in views)
    told = distributed.all_objects((torch.isfinite(torch.tensor(part["loss"])).item(), size))
    wanted = [rank for rank, (finite, _) in enumerate(told) if not finite] or list(range(len(told)))
    # One part travels at a time, so that rank 0 never holds more than the file will.
    fitting = max(1, int(_MOST_BYTES // max(size, 1)))
    found = [distributed.to_main(part, src=rank) for rank in wanted[:fitting]]
    return [one for one in found if one is not None]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def load_kept(path: Path) -> State:
    """Return what `kept_for_replay` wrote; `CheckpointError` for any other or a damaged file."""
    kept = checkpoint.load(path)
    if missing := _NEEDED - set(kept):
        raise checkpoint.CheckpointError(
            f"--replay: {path} holds no batch (no {', '.join(sorted(missing))}); name a "
            "nonfinite_*.pt file of a run's folder"
        )
    return kept


# ---- playing it again ----------------------------------------------------------------------------


@dataclass
class Finding:
    """The first thing that is not finite in the forward and backward of a part."""

    precision: str
    loss: float
    module: str = ""  # first module whose output is not finite
    parameter: str = ""  # first parameter, in the order of the backward pass, whose gradient is not
    samples: str = ""
    indices: Tensor | None = None  # of the micro-batch that is being played

    @property
    def finite(self) -> bool:
        """Tell whether loss and gradients are finite."""
        return not self.module and not self.parameter and self.loss - self.loss == 0

    def describe(self) -> str:
        """Say it in one line."""
        if self.finite:
            return f"{self.precision}: loss {self.loss:.4g}, all outputs and gradients are finite"
        where = f"the first output that is not finite is that of {self.module}"
        if not self.module:
            where = "all outputs are finite; the first gradient that is not is that of "
            where += self.parameter
        samples = f"; samples {self.samples}" if self.samples else ""
        return f"{self.precision}: loss {self.loss:.4g}; {where}{samples}"


def replay(run: Run, framework: torch.nn.Module, kept: State, path: Path) -> list[Finding]:
    """Play each part in the run's precision and again in fp32, log what was found and return it."""
    step, world = kept["step"], kept["world"]
    versions = kept.get("versions", {})
    logger.info("replay of step %d: %s", step, kept.get("message", ""))
    then = f"{versions.get('device')} with torch {versions.get('torch')}"
    now = f"{_device_name(run.device)} with torch {torch.__version__}"
    logger.info("it ran on %d process(es) of %s, this is %s", world, then, now)
    weights = _weights(kept, path)
    findings = []
    for part in kept["parts"]:
        bad_inputs = _bad_inputs(part)
        count, inputs = sum(map(len, part["indices"])), "all inputs are finite"
        if bad_inputs:
            inputs = f"NOT FINITE in the input: samples {bad_inputs}"
        logger.info(
            "rank %d: %d images, its loss was %.4g; %s", part["rank"], count, part["loss"], inputs
        )
        # In both precisions: a number that is finite in fp32 only is an overflow.
        found = []
        # once where the run was in fp32 already
        for precision in dict.fromkeys((kept["precision"], "fp32")):
            # Each play starts from the same state: a forward moves batch statistics.
            framework.load_state_dict(weights)
            found.append(_play(run, framework, kept, part, precision))
            logger.info("rank %d, %s", part["rank"], found[-1].describe())
        logger.info("verdict: %s", verdict(found, bad_inputs, bool(_spoilt(weights)), world))
        findings += found
    return findings


def verdict(found: list[Finding], bad_inputs: str, bad_weights: bool, world: int) -> str:
    """Return the cause and the remedy, from the findings in the run's precision and in fp32."""
    first, last = found[0], found[-1]
    if bad_weights:
        return (
            "the weights are not finite, before any forward; "
            "resume from an older checkpoint (--resume FILE)"
        )
    if bad_inputs:
        return (
            "the images are to blame, not the network: "
            f"look at samples {bad_inputs} of the data set"
        )
    if first.finite:
        other = ""
        if world > 1:
            other = " other processes took part (batch statistics, gathered keys): see their parts;"
        return (
            f"not reproduced: this batch is finite on one process;{other} if it comes again, "
            "suspect the device (memory errors) and its kernels (TRAIN.DETERMINISTIC True)"
        )
    if last.finite:
        return (
            f"the numbers leave the range of {first.precision}, not that of fp32: --precision "
            f"fp32{' or bf16' if first.precision == 'fp16' else ''}, or a lower OPTIM.BASE_LR, "
            "OPTIM.CLIP_GRAD"
        )
    return (
        "fp32 does not help: the weights have grown too large; resume from an older checkpoint "
        "with a lower OPTIM.BASE_LR (another run: choose another --tag), a longer "
        "SCHEDULE.WARMUP_EPOCHS or OPTIM.CLIP_GRAD"
    )


def _weights(kept: State, path: Path) -> State:
    """Return the state to play from, and say where it is not that of the step.

    On a GPU a step is read when the next one has begun: the queue then holds the spoilt step's
    keys, the target has moved once more, and an optimiser that cannot skip has spoilt the weights.
    """
    weights = dict(kept["framework"])
    if not kept["late"]:
        return weights
    logger.info("read a step late, on a GPU: target and queue are one step further than the batch")
    spoilt = _spoilt(weights)
    source = path.parent / kept.get("checkpoint", "")
    if all(name.endswith(".keys") for name in spoilt):
        for name in spoilt:
            weights[name] = torch.nan_to_num(weights[name], 0.0, 0.0, 0.0)
    elif source.is_file():
        saved = checkpoint.load(source)
        logger.info("the update has spoilt the weights; those of %s are used", source.name)
        weights = dict(saved["framework"])
    return weights


def _play(
    run: Run,
    framework: torch.nn.Module,
    kept: State,
    part: State,
    precision: str,
) -> Finding:
    """Run forward and backward of one process's step."""
    finding = Finding(precision, 0.0)
    scale = kept["scale"] if precision == "fp16" else 1.0
    watched = []
    for name, module in framework.named_modules():
        called = f"{name or 'the method itself'} ({type(module).__name__})"
        watched.append(module.register_forward_hook(_watch_output(called, finding)))
    for name, parameter in framework.named_parameters():
        if parameter.requires_grad:
            watched.append(_watch_gradient(name, parameter, finding))
    framework.train().zero_grad(set_to_none=True)
    # the draws of the step that failed, see engine.loop.seed_step
    torch.manual_seed(keyed_seed("step", kept["seed"], kept["step"], part["rank"]))
    dtype = DTYPES.get(precision)
    try:
        for views, finding.indices in zip(part["views"], part["indices"], strict=True):
            images = [run.views(view.to(run.device)) for view in views]
            with torch.autocast(run.device.type, dtype) if dtype else nullcontext():
                out = framework(images, Progress(*kept["progress"]))
            loss = out["loss"] / len(part["views"])
            (loss * scale).backward()
            finding.loss += float(loss.detach())
    finally:
        for handle in watched:
            handle.remove()
    return finding


def _watch_output(name: str, finding: Finding) -> Callable[[torch.nn.Module, object, object], None]:
    """Return a forward hook that notes the module with the first output that is not finite."""

    def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
        bad = next((t for t in _tensors(output) if not _is_finite(t)), None)
        if bad is None or finding.module:
            return
        # a module that only passes on what it got is not to blame
        clean = all(map(_is_finite, _tensors(inputs)))
        given = "" if clean else ", whose input is already not finite"
        count = int((~torch.isfinite(bad)).sum())
        finding.module = f"{name}: {count} of {bad.numel()} values{given}"
        finding.samples = _rows(bad, finding.indices)

    return hook


def _watch_gradient(name: str, parameter: torch.nn.Parameter, finding: Finding) -> RemovableHandle:
    def hook(done: Tensor) -> None:
        if not finding.parameter and done.grad is not None and not _is_finite(done.grad):
            finding.parameter = name

    return parameter.register_post_accumulate_grad_hook(hook)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _is_finite(value: object) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value).all())


def _spoilt(weights: State) -> list[str]:
    """Return the names of a state's tensors that are not finite."""
    # No training step reads the running statistics.
    return [
        name for name, value in weights.items() if "running_" not in name and not _is_finite(value)
    ]


def _bad_inputs(part: State) -> str:
    """Return the samples of which a view is not finite."""
    bad: set[int] = set()
    for views, indices in zip(part["views"], part["indices"], strict=True):
        for view in views:
            bad.update(indices[~torch.isfinite(view).flatten(1).all(1)].tolist())
    return _listed(sorted(bad))


def _rows(bad: Tensor, indices: Tensor | None) -> str:
    """Return the samples whose rows of an output (N, ...) are not finite, if rows are samples."""
    # a scalar or an output of several views has no row for each sample
    if bad.ndim < 2 or indices is None or len(bad) != len(indices):
        return ""
    rows = ~torch.isfinite(bad.detach()).flatten(1).all(1).cpu()
    return "all of them" if rows.all() else _listed(indices[rows].tolist())


def _listed(samples: list[int]) -> str:
    more = f", ... ({len(samples)})" if len(samples) > 16 else ""
    return ", ".join(map(str, samples[:16])) + more
