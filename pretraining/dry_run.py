"""`main_pretrain.py --dry-run`: what a run would do and need, from three real steps.

Nothing of the run's folder is read or written. Pictures go to OUTPUT/dry_run/NAME.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from data import build_loader
from data.augment.base import Recipe
from data.augment.preview import save_preview
from data.loader import GlobalLoader
from data.sources.base import Source
from engine.guards import FiniteGuard
from engine.loop import StepFunction, train_step
from engine.plan import Plan
from engine.run import Run
from engine.state import TrainState
from models.parts.momentum import KeyQueue, MomentumFramework
from pretraining.needs import Queue, Shared, cores, describe
from utils.batch import Batch
from utils.config.load import leaves
from utils.distributed import count_shared
from utils.schedules import momentum_at

_SHOWN = 8  # images of the contact sheet
_READ = 64  # images for the speed of the disk
_SIZE = (640, 160)  # pixels of one curve


def dry_run(
    cfg: CfgNode,
    origins: Mapping[str, str],
    run: Run,
    source: Source,
    recipe: Recipe,
    loader: GlobalLoader,
    framework: MomentumFramework,
    state: TrainState,
    plan: Plan,
    step: StepFunction[Batch],
) -> str:
    """Return one screen of text; write the pictures that it names."""
    folder = Path(cfg.OUTPUT) / "dry_run" / cfg.NAME
    folder.mkdir(parents=True, exist_ok=True)
    batches = loader.from_step(0, 3)
    lines = _given(cfg, origins)
    trained = sum(p.numel() for p in framework.parameters() if p.requires_grad)
    lines.append(f"images: {len(source)}; {plan.describe()}")
    lines.append(f"trained parameters: {trained / 1e6:.2f} M in {run.precision} on {run.device}")

    # the first step is counted: it also compiles and allocates, so it is not timed
    guard = FiniteGuard(scaler=state.scaler is not None)
    counting = count_traffic(framework)
    with FlopCounterMode(display=False) as counter, counting as traffic:
        train_step(state, plan, guard, step, next(batches)[1], run.seed)
    queues = queues_of(framework)
    lines.append(f"a step on this process: {counter.get_total_flops() / 1e9:.1f} GFLOP")
    seconds = []
    for _, micro_batches in batches:
        started = time.perf_counter()
        loss = float(train_step(state, plan, guard, step, micro_batches, run.seed)["loss"])
        # after the loss was read, which waits for the device
        seconds.append(time.perf_counter() - started)
    hours = min(seconds) * plan.total_steps / 3600
    speed = plan.global_batch / min(seconds)
    lines.append(
        f"two steps: loss {loss:.4f}, {min(seconds):.3f} s each, {speed:.0f} images/s; the run "
        f"would take {hours:.1f} h, if loading keeps up"
    )
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.device) / 2**30
        lines.append(f"memory of the GPU: {peak:.1f} GiB")
    lines += [_loading(cfg, source, recipe, speed), _disk(source, speed)]
    lines += describe(
        plan.global_batch,
        cfg.OPTIM.BASE_LR,
        cfg.OPTIM.LR_BATCH,
        min(seconds),
        shared_numbers(framework, traffic),
        queues,
    )
    _draw_curves(folder / "schedule.png", plan, framework)
    save_preview(folder / "views.png", source, recipe, cfg.SEED, _SHOWN)
    lines.append(f"pictures: {folder / 'schedule.png'}, {folder / 'views.png'}")
    return "\n".join(lines) + "\n"


def _given(cfg: CfgNode, origins: Mapping[str, str]) -> list[str]:
    """Return a line for each key that is not at its default, with the file or flag it is from."""
    values = dict(leaves(cfg))
    return [
        f"{key} {values[key]} ({origin})"
        for key, origin in origins.items()
        if origin != "default" and not key.startswith(("LINEAR.", "FINETUNE."))
    ]


def _loading(cfg: CfgNode, source: Source, recipe: Recipe, speed: float) -> str:
    """Say how many cores make the views for a device of `speed` images/s."""
    one_core = _views_a_second(cfg, source, recipe)
    return (
        f"one core makes the views of {one_core:.0f} images/s: the device needs "
        f"{cores(speed, one_core):.1f} cores, there are {os.cpu_count()}"
    )


def _views_a_second(cfg: CfgNode, source: Source, recipe: Recipe) -> float:
    """Return the images/s that one core decodes and augments."""
    size = min(len(source), 32)
    loader = build_loader(
        _without_workers(cfg), source, recipe, torch.device("cpu"), global_batch=size
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batches = loader.from_step(0, 3)
    next(batches)  # may compile
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    torch.set_num_threads(threads)
    return count * size / (time.perf_counter() - started)


def _without_workers(cfg: CfgNode) -> CfgNode:
    # The configuration itself is frozen.
    alone = cfg.clone()
    alone.defrost()
    alone.DATA.NUM_WORKERS = 0
    return alone


def _disk(source: Source, images_per_second: float) -> str:
    """Say how fast the files of images are read; some may be in the memory of the system."""
    started = time.perf_counter()
    stride = max(1, len(source) // _READ)
    # far from the first images, which the steps have just read
    read = [source.encoded(index) for index in range(stride - 1, len(source), stride)][:_READ]
    size = sum(len(data) for data in read if data is not None) / 2**20
    # An array in memory has no encoded images.
    if not size:
        return "images are held in memory"
    found = size / (time.perf_counter() - started)
    needed = size / len(read) * images_per_second
    return f"disk: {found:.0f} MiB/s in {len(read)} images; the device needs {needed:.1f} MiB/s"


# ---- several processes ---------------------------------------------------------------------------


@contextmanager
def count_traffic(framework: MomentumFramework) -> Iterator[Counter[str]]:
    """Count what a step shares with other processes, also where there is only one."""

    def statistics(norm: nn.Module, _inputs: object, output: Tensor) -> None:
        assert isinstance(norm, _BatchNorm)
        # mean, deviation and count one way; two sums a channel back, where gradients flow
        counted["norms_forward"] += 2 * norm.num_features + 1
        if output.requires_grad:
            counted["norms_backward"] += 2 * norm.num_features

    hooks = []
    for module in framework.modules():
        if framework.sync_batch_norm and isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_hook(statistics))
    with count_shared() as counted:
        yield counted
    for hook in hooks:
        hook.remove()


def shared_numbers(framework: nn.Module, counted: Mapping[str, int]) -> Shared:
    """Return what a process shares in a step, from what one step counted."""
    return Shared(
        gradients=sum(p.numel() for p in framework.parameters() if p.requires_grad),
        keys=counted["gathered"],
        images=counted["shuffled"],
        norms_forward=counted["norms_forward"],
        norms_backward=counted["norms_backward"],
    )


def queues_of(framework: nn.Module) -> list[Queue]:
    """Return the queues after the first step, whose place tells how many keys it added."""
    queues = [module for module in framework.modules() if isinstance(module, KeyQueue)]
    found = []
    for queue in queues:
        size, dim = queue.keys.shape
        # after a whole round the place is 0 again
        found.append(Queue(size, dim, queue.position or size))
    return found


def _draw_curves(path: Path, plan: Plan, framework: nn.Module) -> None:
    """Draw learning rate, weight decay and momentum of the target over the run."""
    width, height = _SIZE
    points = [plan.total_steps * x // width for x in range(width)]
    curves = {
        "learning rate": [plan.rates[0].at(step) for step in points],
        "weight decay": [plan.weight_decay_at(step) for step in points],
    }
    base = getattr(framework, "base_momentum", None)
    if isinstance(base, float):
        how = str(getattr(framework, "momentum_schedule", "constant"))
        fractions = [step / plan.total_steps for step in points]
        curves["momentum of the target"] = [momentum_at(part, base, how) for part in fractions]
    page = Image.new("RGB", (width, height * len(curves)), "white")
    draw = ImageDraw.Draw(page)
    for number, (title, values) in enumerate(curves.items()):
        top, most = number * height, max(*values, 1e-30)
        # a momentum that goes from 0.99 to 1 would be a flat line above zero
        low = min(values) if most / 2 < min(values) < most else 0.0
        scale = (height - 36) / (most - low)
        line = [(x, top + height - 8 - (v - low) * scale) for x, v in enumerate(values)]
        draw.line(line, fill="navy", width=2)
        epochs = plan.total_steps / plan.steps_per_epoch
        text = f"{title}, {min(values):.4g} to {most:.4g}, over {epochs:.4g} epochs"
        draw.text((6, top + 4), text, fill="black")
    page.save(path)
