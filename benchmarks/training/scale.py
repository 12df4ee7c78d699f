"""What grows with a run: processes, images in the index, keys in the queue, and the method.

Steps are those of a small network with SGD, channels last. Processes are gloo ones on this machine:
their CPU time is meant, since cores that are shared say nothing about the clock.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import Side, autocast, measure, ratio, show
from benchmarks.input.index import write_pack
from benchmarks.training.step import framework_of, method_step
from benchmarks.training.supply import batches, random_images, views_of
from data.augment.recipes import build_recipe
from data.sampler import BatchPlan, epoch_order, global_batch, rank_batches
from data.sources.base import PackedStrings
from data.sources.packed import PackedSource
from engine.precision import Precision, resolve_precision
from models import FRAMEWORKS
from models.parts.momentum import MomentumFramework
from utils.schedules import Progress

_NAME = b"n00000000/n00000000_00000000.JPEG"
_LIMIT = 3600  # seconds that a group of processes may take for a round, on a loaded machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes."""
    parts = list(_PARTS)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--backbone", default="resnet8")
    parser.add_argument("--size", type=int, default=32, help="of the views, in pixels")
    parser.add_argument("--batch", type=int, default=64, help="images a process")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--images", nargs="+", type=int, default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--queues", nargs="+", type=int, default=[1024, 4096, 16384, 65536, 262144])


def run(args: argparse.Namespace) -> dict[str, float]:
    """Measure the chosen parts one after the other; within a part sides take turns."""
    torch.manual_seed(0)
    result: dict[str, float] = {}
    for name in args.parts:
        print(f"---- {name}")
        result |= _PARTS[name](args)
    return result


# ---- methods and queues --------------------------------------------------------------------------


def _step_side(args: argparse.Namespace, title: str, framework: MomentumFramework) -> Side:
    device = torch.device(args.device)
    step = method_step(framework, device, resolve_precision("auto", device))
    views = _views(args, device)
    return Side(title, lambda: step(views))


def _views(args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    images = torch.randn(2, args.batch, 3, args.size, args.size, device=device)
    return [view.contiguous(memory_format=torch.channels_last) for view in images]


def methods(args: argparse.Namespace) -> dict[str, float]:
    """Time a step of each method on the same views and backbone."""
    sides = [
        _step_side(args, name, framework_of(name, args.backbone, args.size)) for name in FRAMEWORKS
    ]
    times = measure(sides, args.rounds, torch.device(args.device))
    show(times)
    return _against_first("step", times)


def queues(args: argparse.Namespace) -> dict[str, float]:
    """Time MoCo's and SynCo's step at every length of the queue."""
    result: dict[str, float] = {}
    for method in ("moco_v2", "synco"):
        sides = []
        for size in args.queues:
            framework = framework_of(method, args.backbone, args.size, {"queue_size": size})
            sides.append(_step_side(args, str(size), framework))
        times = measure(sides, args.rounds, torch.device(args.device))
        print(f"{method}: by the length of the queue")
        show(times)
        result |= _against_first(f"queue_{method}", times)
    return result


def _against_first(title: str, times: dict[str, list[float]]) -> dict[str, float]:
    """Return the milliseconds of the first side, and what each other takes over it."""
    first = next(iter(times))
    result = {f"{title}_{first}_ms": statistics.median(times[first])}
    return result | {
        f"{title}_{n}_over_{first}": ratio(times, n, first) for n in times if n != first
    }


# ---- images in the index -------------------------------------------------------------------------


def indexes(args: argparse.Namespace) -> dict[str, float]:
    """Time what depends on the number of images: an epoch's order, a step's indices, a pack."""
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="synco-scale-") as made:
        packs = {number: _pack(Path(made) / f"{number}.pack", number) for number in args.images}
        for title, build in (("order", _order), ("indices", _indices), ("open", _opened)):
            sides = [Side(str(number), build(number, packs[number])) for number in args.images]
            times = measure(sides, args.rounds, torch.device("cpu"))
            print(f"{title}: by the number of images")
            for name, values in times.items():
                print(f"{name:>12s} {statistics.median(values):10.3f} ms")
                result[f"index_{title}_{name}_ms"] = statistics.median(values)
    return result


def _pack(path: Path, number: int) -> Path:
    """Write a pack whose index has full size; all images share a name."""
    offsets = len(_NAME) * np.arange(number + 1, dtype=np.int64)
    blob = np.frombuffer(_NAME * number, dtype=np.uint8)
    labels = np.arange(number) % 1000
    names = PackedStrings.of_arrays(blob, offsets)
    write_pack(path, labels, [str(label) for label in range(1000)], names)
    return path


def _order(number: int, _pack: Path) -> Callable[[], object]:
    return lambda: epoch_order(number, 0, 0)


def _indices(number: int, _pack: Path) -> Callable[[], object]:
    plan = BatchPlan(number, 256, seed=0)
    order = epoch_order(number, 0, 0)

    def once() -> None:
        for position in range(10):
            rank_batches(global_batch(order, plan, position), plan, 0)

    return once


def _opened(_number: int, pack: Path) -> Callable[[], object]:
    return lambda: PackedSource(pack)


# ---- processes -----------------------------------------------------------------------------------


def processes(args: argparse.Namespace) -> dict[str, float]:
    """Let groups of 1, 2, 4 processes take turns; each process has the same batch in all groups."""
    context = multiprocessing.get_context("spawn")
    groups: dict[int, list[Connection]] = {}
    started = []
    with tempfile.TemporaryDirectory(prefix="synco-scale-") as made:
        for world in args.processes:
            groups[world] = []
            for rank in range(world):
                ours, theirs = context.Pipe()
                place = (rank, world, str(Path(made) / f"store{world}"))
                process = context.Process(target=_serve, args=(args, place, theirs), daemon=True)
                process.start()
                theirs.close()  # so that a process that dies is noticed
                started.append(process)
                groups[world].append(ours)
        step: dict[str, list[float]] = {str(world): [] for world in groups}
        supply: dict[str, list[float]] = {str(world): [] for world in groups}
        for number in range(args.rounds + 1):
            for world, pipes in groups.items():
                taken = _turn(pipes)
                if number:
                    step[str(world)].append(taken[0])
                    supply[str(world)].append(taken[1])
        for pipe in [pipe for pipes in groups.values() for pipe in pipes]:
            pipe.send(False)
        for process in started:
            process.join(30)
    for title, times in (("step", step), ("input", supply)):
        print(f"{title} of {args.batch} images a process, CPU of one: by the number of processes")
        show(times)
    return _against_first("processes_step", step) | _against_first("processes_input", supply)


def _turn(pipes: list[Connection]) -> tuple[float, float]:
    """Let one group make a round; return its first process's milliseconds of step and input."""
    for pipe in pipes:
        pipe.send(True)
    taken = []
    for pipe in pipes:
        if not pipe.poll(_LIMIT):
            raise RuntimeError(f"no answer from a process within {_LIMIT} s")
        taken.append(pipe.recv())
    return taken[0]


def _serve(args: argparse.Namespace, place: tuple[int, int, str], pipe: Connection) -> None:
    """Be one process of a group: a step and its input for every True that arrives."""
    rank, world, store = place
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    precision = Precision("auto", torch.device("cpu"), channels_last=True)
    options: dict[str, object] = {"queue_size": 1024 * world}
    framework = precision.prepare(framework_of("moco_v2", args.backbone, args.size, options))
    model = precision.wrap(framework)
    trained = [p for p in framework.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, fused=True)
    supply = _supply(args, world)
    progress = Progress(0, 10, 100)
    while pipe.recv():
        begin = time.process_time()
        views = next(supply)
        between = time.process_time()
        with autocast(precision.device, precision.precision):
            loss = model(views, progress)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        framework.after_step(progress)
        end = time.process_time()
        pipe.send(((end - between) * 1e3, (between - begin) * 1e3))
    if world > 1:
        dist.destroy_process_group()


def _supply(args: argparse.Namespace, world: int) -> Iterator[list[Tensor]]:
    """Yield this process's views from images in memory."""
    source = random_images(4 * args.batch * world, args.size)
    recipe = build_recipe("moco_v2", args.size)
    return map(views_of, batches(source, recipe, torch.device("cpu"), args.batch * world))


_PARTS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "methods": methods,
    "queue": queues,
    "index": indexes,
    "processes": processes,
}
