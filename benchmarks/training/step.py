"""What a step costs beside forward and backward, and whole steps."""

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from timm.optim import Lars
from torch import Tensor, nn

from benchmarks.common import Side, autocast, measure, ratio, show
from engine.optim import LARS, Group, build_optimizer, parameter_groups
from engine.precision import resolve_precision
from models import assemble_framework, framework_options
from models.parts.backbones import build_backbone
from models.parts.momentum import MomentumFramework
from utils.config.load import load_config
from utils.config.schema import declare
from utils.schedules import Progress

MOMENTUM = 0.99


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument("--batch", type=int, default=64, help="of the small CNN's step")
    parser.add_argument(
        "--large-batch", type=int, default=256, help="of ResNet-50 at 224 px, on a GPU only"
    )


def run(args: argparse.Namespace) -> dict[str, float]:
    """Measure both parts; on a GPU also whole steps of MoCo v2 and SynCo with a ResNet-50."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    result = update_speedup(device, args.rounds) | lars_ratio(device, args.rounds)
    result |= cnn_step(device, args.batch, args.rounds)
    if device.type == "cuda":
        result |= whole_steps(device, args.large_batch, args.rounds)
    return result


# ---- target average and optimiser ----------------------------------------------------------------


def update_speedup(device: torch.device, rounds: int) -> dict[str, float]:
    """Compare the published loops over ResNet-50's parameters with multi-tensor operations."""

    def side(name: str, average: Callable[[nn.Module, nn.Module], None], fused: bool) -> Side:
        online = build_backbone("resnet50").to(device)
        target = copy.deepcopy(online).requires_grad_(False)
        for parameter in online.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        if fused:
            node = load_config(declare(framework_options()), flags={"OPTIM.NAME": "adamw"}).OPTIM
            optimizer = build_optimizer(node, parameter_groups(online, node))
        else:
            # One parameter after the other, as torch did when these codes were published.
            optimizer = torch.optim.AdamW(online.parameters(), lr=0.0, foreach=False, fused=False)

        def once() -> None:
            optimizer.step()
            average(online, target)

        return Side(name, once)

    sides = [
        side("ResNet-50 average + AdamW, published loops", average_in_a_loop, fused=False),
        side("ResNet-50 average + AdamW, ours", average_at_once, fused=True),
    ]
    times = measure(sides, rounds, device)
    show(times)
    return {"ema_optimizer_speedup": ratio(times, sides[0].name, sides[1].name)}


def lars_ratio(device: torch.device, rounds: int) -> dict[str, float]:
    """Compare a step of timm's LARS on ResNet-50's parameters with ours."""

    def side(name: str, build: Callable[[list[Group]], torch.optim.Optimizer]) -> Side:
        parameters = list(build_backbone("resnet50").to(device).parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        matrices: Group = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-6}
        others: Group = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
        return Side(name, build([matrices, others | {"adapt": False}]).step)

    sides = [
        side("ResNet-50 LARS, timm's", lambda groups: Lars(groups, lr=0.1, momentum=0.9)),
        side("ResNet-50 LARS, ours", lambda groups: LARS(groups, lr=0.1)),
    ]
    times = measure(sides, rounds, device)
    show(times)
    return {"lars_over_timm": ratio(times, sides[1].name, sides[0].name)}


@torch.no_grad()
def average_in_a_loop(online: nn.Module, target: nn.Module) -> None:
    """Average parameter by parameter, as the published codes do."""
    for ours, theirs in zip(online.parameters(), target.parameters(), strict=True):
        theirs.data = theirs.data * MOMENTUM + ours.data * (1.0 - MOMENTUM)


@torch.no_grad()
def average_at_once(online: nn.Module, target: nn.Module) -> None:
    """Average as `MomentumFramework.update_target` does."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1.0 - MOMENTUM)


# ---- steps ---------------------------------------------------------------------------------------


def cnn_step(device: torch.device, batch: int, rounds: int) -> dict[str, float]:
    """Compare steps of a ResNet-18 at 32 px in several precisions and memory formats."""
    images = torch.randn(batch, 3, 32, 32, device=device)
    auto = resolve_precision("auto", device)

    def side(name: str, precision: str, channels_last: bool) -> Side:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        net = build_backbone("resnet18", stem="cifar").to(device).to(memory_format=layout)
        views = images.contiguous(memory_format=layout)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, foreach=False)

        def once() -> None:
            with autocast(device, precision):
                features = net(views)
            features.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return Side(name, once)

    plain = "ResNet-18 step, fp32 NCHW"
    best = "ResNet-18 step, bf16 channels last"
    sides = [side(plain, "fp32", False), side(best, "bf16", True)]
    if auto != "bf16":
        sides.append(side(f"ResNet-18 step, {auto} channels last (auto)", auto, True))
    times = measure(sides, rounds, device)
    show(times)
    print(f"precision auto is {auto} here")
    result = {"cnn_step_speedup": ratio(times, plain, best)}
    return result | {"cnn_step_auto_speedup": ratio(times, plain, sides[-1].name)}


def framework_of(
    method: str, backbone: str, size: int, options: dict[str, object] | None = None
) -> MomentumFramework:
    """Return a method with its default options over a backbone, for views of `size` pixels."""
    given = dict(options or {})
    if method.startswith("synco"):
        given["warmup_epochs"] = 0  # it makes no synthetic negatives while it warms up
    named: dict[str, object] = {"name": backbone, "stem": stem_of(size)}
    if method == "sit" and backbone.startswith(("deit_", "vit_")):
        named["num_tokens"] = 2  # one for contrast, one for the rotation
    return assemble_framework(method, given, named, img_size=size)


def stem_of(size: int) -> str:
    """Return the stem that suits views of `size` pixels."""
    return "cifar" if size <= 64 else "imagenet"


def method_step(
    framework: MomentumFramework, device: torch.device, precision: str
) -> Callable[[list[Tensor]], None]:
    """Return a method's training step on two views, channels last, with SGD."""
    framework = framework.to(device).to(memory_format=torch.channels_last)
    parameters = [p for p in framework.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)
    progress = Progress(0, 10, 100)

    def step(views: list[Tensor]) -> None:
        with autocast(device, precision):
            loss: Tensor = framework(views, progress)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        framework.after_step(progress)

    return step


def whole_steps(device: torch.device, batch: int, rounds: int) -> dict[str, float]:
    """Time ResNet-50 steps at 224 px in bf16: MoCo v2, SynCo, MoCo v2 compiled."""
    images = torch.randn(2, batch, 3, 224, 224, device=device)
    views = [view.contiguous(memory_format=torch.channels_last) for view in images]

    def side(name: str, method: str, compiled: bool = False) -> Side:
        framework = framework_of(method, "resnet50", 224)
        if compiled:
            framework.compile_backbones()
        step = method_step(framework, device, "bf16")
        return Side(name, lambda: step(views))

    sides = [
        side("MoCo v2 ResNet-50 step", "moco_v2"),
        side("SynCo ResNet-50 step", "synco"),
        side("MoCo v2 ResNet-50 step, compiled", "moco_v2", compiled=True),
    ]
    times = measure(sides, rounds, device)
    show(times)
    moco, synco, compiled = (side.name for side in sides)
    return {
        "synco_over_moco_step": ratio(times, synco, moco),
        "compile_speedup": ratio(times, moco, compiled),
        "moco_step_images_per_s": 1e3 * batch / statistics.median(times[moco]),
    }
