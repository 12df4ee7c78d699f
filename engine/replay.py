"""Keep the batch that a run stopped on, and say what went wrong when it is played again.

`nonfinite_<step>.pt` in the run's folder holds the weights before the update, the views as they
were fed, and all that keys the draws; rank 0 writes it, the other processes send their part. It is
an ordinary torch file of tensors, numbers and text.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.guards import NonFiniteError
from engine.plan import Plan
from engine.precision import DTYPES
from engine.run import Run
from engine.state import TrainState
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
_NEEDED = {
    "step",
    "world",
    "seed",
    "config",
    "precision",
    "scale",
    "progress",
    "framework",
    "parts",
    "late",
}


@contextmanager
def kept_for_replay(run: Run, state: TrainState, plan: Plan) -> Iterator[None]:
    """Keep the batch of a `NonFiniteError` that leaves the block; whatever fails there is a warning."""
    try:
        yield
    except NonFiniteError as error:
        try:
            path = _keep(run, state, plan, error)
        # a full disk, a lost process: the first error is the one to tell
        except Exception as problem:
            logger.warning(
                "the batch of step %d is not kept for --replay (%s)", error.step, problem
            )
        else:
            if path:
                error.args = (f"{error}. To see what went wrong: --replay {path}",)
        raise


def _keep(run: Run, state: TrainState, plan: Plan, error: NonFiniteError) -> Path | None:
    """Write the file on rank 0 and return its path there; `None` where there is nothing to replay."""
    if run.task != "pretrain":
        return None
    parts = _gather(_own_part(error))
    if not distributed.is_main():
        return None
    progress = plan.progress(error.step)
    payload = {
        **{
            "step": error.step,
            "message": str(error),
            "parts": parts,
            "late": state.step > error.step,
        },
        **{"world": distributed.world_size(), "global_batch": plan.global_batch, "seed": run.seed},
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


def _own_part(error: NonFiniteError) -> dict[str, Any]:
    return {
        "rank": distributed.rank(),
        "loss": error.loss,
        "views": [[view.detach().cpu() for view in batch.views] for batch in error.batches],
        "indices": [batch.indices.cpu() for batch in error.batches],
        "labels": [batch.labels.cpu() for batch in error.batches],
    }


def _gather(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return on rank 0 the parts of the processes whose loss is not finite, of all if it is on each.

    One travels at a time, and as many as `_MOST_BYTES` allow, at least one.
    """
    size = sum(view.nbytes for views in part["views"] for view in views)
    told = distributed.all_objects((torch.isfinite(torch.tensor(part["loss"])).item(), size))
    wanted = [rank for rank, (finite, _) in enumerate(told) if not finite] or list(range(len(told)))
    fitting = max(1, int(_MOST_BYTES // max(size, 1)))
    found = [distributed.to_main(part, src=rank) for rank in wanted[:fitting]]
    return [one for one in found if one is not None]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def load_kept(path: Path) -> dict[str, Any]:
    """Return what `kept_for_replay` wrote; `CheckpointError` if the file is something else or damaged."""
    kept = checkpoint.load(path)
    if missing := _NEEDED - set(kept):
        raise checkpoint.CheckpointError(
            f"--replay: {path} holds no batch (no {', '.join(sorted(missing))}); name a nonfinite_*.pt file "
            "of a run's folder"
        )
    return kept


# ---- playing it again ----------------------------------------------------------------------------


@dataclass
class Finding:
    """What one forward and backward of a part gave: the first thing that is not finite, in words."""

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
        where = (
            f"the first output that is not finite is that of {self.module}"
            if self.module
            else f"all outputs are finite; the first gradient that is not is that of {self.parameter}"
        )
        return f"{self.precision}: loss {self.loss:.4g}; {where}" + (
            f"; samples {self.samples}" if self.samples else ""
        )


def replay(run: Run, framework: torch.nn.Module, kept: dict[str, Any], path: Path) -> list[Finding]:
    """Play each part in the run's precision and again in fp32, log what was found and return it."""
    step, world = kept["step"], kept["world"]
    versions = kept.get("versions", {})
    logger.info("replay of step %d: %s", step, kept.get("message", ""))
    logger.info(
        "it ran on %d process(es) of %s with torch %s, this is %s with torch %s",
        *(
            world,
            versions.get("device"),
            versions.get("torch"),
            _device_name(run.device),
            torch.__version__,
        ),
    )
    weights = _weights(kept, path)
    findings = []
    for part in kept["parts"]:
        bad_inputs = _bad_inputs(part)
        logger.info(
            "rank %d: %d images, its loss was %.4g; %s",
            *(part["rank"], sum(map(len, part["indices"])), part["loss"]),
            f"NOT FINITE in the input: samples {bad_inputs}"
            if bad_inputs
            else "all inputs are finite",
        )
        found = []
        for precision in dict.fromkeys((kept["precision"], "fp32")):
            framework.load_state_dict(weights)
            found.append(_play(run, framework, kept, part, precision))
            logger.info("rank %d, %s", part["rank"], found[-1].describe())
        logger.info("verdict: %s", verdict(found, bad_inputs, bool(_spoilt(weights)), world))
        findings += found
    return findings


def verdict(found: list[Finding], bad_inputs: str, bad_weights: bool, world: int) -> str:
    """Say in words what is wrong and what to do, from the findings in the run's precision and in fp32."""
    first, last = found[0], found[-1]
    if bad_weights:
        return "the weights are not finite, before any forward; resume from an older checkpoint (--resume FILE)"
    if bad_inputs:
        return f"the images are to blame, not the network: look at samples {bad_inputs} of the data set"
    if first.finite:
        other = " other processes took part (batch statistics, gathered keys): see their parts;" * (
            world > 1
        )
        return (
            f"not reproduced: this batch is finite on one process;{other} if it comes again, suspect the "
            "device (memory errors) and its kernels (TRAIN.DETERMINISTIC True)"
        )
    if last.finite:
        return (
            f"the numbers leave the range of {first.precision}, not that of fp32: --precision fp32"
            f"{' or bf16' if first.precision == 'fp16' else ''}, or a lower OPTIM.BASE_LR, OPTIM.CLIP_GRAD"
        )
    return (
        "fp32 does not help: the weights have grown too large; resume from an older checkpoint with a lower "
        "OPTIM.BASE_LR (a run of its own: another --tag), a longer SCHEDULE.WARMUP_EPOCHS or OPTIM.CLIP_GRAD"
    )


def _weights(kept: dict[str, Any], path: Path) -> dict[str, Any]:
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
    kept: dict[str, Any],
    part: dict[str, Any],
    precision: str,
) -> Finding:
    """Run forward and backward of one process's step."""
    finding = Finding(precision, 0.0)
    scale = kept["scale"] if precision == "fp16" else 1.0
    watched = [
        *(
            module.register_forward_hook(_watch_output(name, finding))
            for name, module in _named(framework)
        ),
        *(
            _watch_gradient(name, p, finding)
            for name, p in framework.named_parameters()
            if p.requires_grad
        ),
    ]
    framework.train().zero_grad(set_to_none=True)
    torch.manual_seed(keyed_seed("step", kept["seed"], kept["step"], part["rank"]))
    dtype = DTYPES.get(precision)
    try:
        for views, finding.indices in zip(part["views"], part["indices"], strict=True):
            images = [run.views(view.to(run.device)) for view in views]
            with torch.autocast(
                run.device.type, dtype or torch.bfloat16, enabled=dtype is not None
            ):
                out = framework(images, Progress(*kept["progress"]))
            loss = out["loss"] / len(part["views"])
            (loss * scale).backward()
            finding.loss += float(loss.detach())
    finally:
        for handle in watched:
            handle.remove()
    return finding


def _named(framework: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in framework.named_modules():
        yield f"{name or 'the method itself'} ({type(module).__name__})", module


def _watch_output(name: str, finding: Finding) -> Any:
    """Return a forward hook that notes the module if its output is the first that is not finite."""

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        bad = next((t for t in _tensors(output) if not _is_finite(t)), None)
        if bad is None or finding.module:
            return
        given = (
            "" if all(map(_is_finite, _tensors(inputs))) else ", whose input is already not finite"
        )
        count = int((~torch.isfinite(bad)).sum())
        finding.module = f"{name}: {count} of {bad.numel()} values{given}"
        finding.samples = _rows(bad, finding.indices)

    return hook


def _watch_gradient(name: str, parameter: torch.nn.Parameter, finding: Finding) -> Any:
    def hook(done: Tensor) -> None:
        if not finding.parameter and done.grad is not None and not _is_finite(done.grad):
            finding.parameter = name

    return parameter.register_post_accumulate_grad_hook(hook)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _is_finite(value: Any) -> bool:
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(
        torch.isfinite(value).all()
    )


def _spoilt(weights: dict[str, Any]) -> list[str]:
    """Return what is not finite of a state, but for running statistics, which no training step reads."""
    return [
        name for name, value in weights.items() if "running_" not in name and not _is_finite(value)
    ]


def _bad_inputs(part: dict[str, Any]) -> str:
    """Return the samples of which a view is not finite."""
    bad: set[int] = set()
    for views, indices in zip(part["views"], part["indices"], strict=True):
        for view in views:
            bad.update(indices[~torch.isfinite(view).flatten(1).all(1)].tolist())
    return _listed(sorted(bad))


def _rows(bad: Tensor, indices: Tensor | None) -> str:
    """Return the samples whose rows of an output (N, ...) are not finite; nothing if rows are no samples."""
    if bad.ndim < 2 or indices is None or len(bad) != len(indices):
        return ""
    rows = ~torch.isfinite(bad.detach()).flatten(1).all(1).cpu()
    return "all of them" if rows.all() else _listed(indices[rows].tolist())


def _listed(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:16])) + (
        f", ... ({len(samples)})" if len(samples) > 16 else ""
    )
