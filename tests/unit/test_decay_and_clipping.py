"""What the engine does to optimiser groups and gradients beside the rate: decay that moves, clipping."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.guards import FiniteGuard
from engine.loop import gradient_shares, set_rates, update
from engine.optim import build_optimizer, parameter_groups
from engine.plan import Plan, held_out_batch, make_plan
from engine.state import TrainState
from models import framework_options
from utils.config.load import load_config
from utils.config.schema import declare

BATCH = SimpleNamespace(indices=torch.arange(2))
SCHEMA = declare(framework_options())


def prepare(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Plan]:
    flags = {
        f"OPTIM.{key}": value
        for key, value in {"NAME": "adamw", "EXCLUDE_1D": True, **options}.items()
    }
    cfg = load_config(SCHEMA, flags=flags)
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = build_optimizer(cfg.OPTIM, parameter_groups(module, cfg.OPTIM))
    plan = make_plan(
        cfg.OPTIM, cfg.SCHEDULE, epochs=10, steps_per_epoch=10, global_batch=8, base_rates=[0.1]
    )
    return module, optimizer, plan


def decays(optimizer: torch.optim.Optimizer, plan: Plan, step: int) -> list[float]:
    set_rates(optimizer, plan, step)
    return [group["weight_decay"] for group in optimizer.param_groups]


def test_weight_decay_follows_a_cosine_and_what_is_exempt_stays_exempt() -> None:
    _, optimizer, plan = prepare(WEIGHT_DECAY=0.04, WEIGHT_DECAY_END=0.1)
    found = [decays(optimizer, plan, step) for step in (0, 50, 100)]
    assert [row[0] for row in found] == pytest.approx([0.04, 0.07, 0.1])
    assert [row[1] for row in found] == [0.0] * 3


def test_weight_decay_is_constant_without_an_end() -> None:
    _, optimizer, plan = prepare(WEIGHT_DECAY=0.04)
    assert decays(optimizer, plan, 0) == decays(optimizer, plan, 99) == [0.04, 0.0]


@pytest.mark.parametrize("per_tensor", [True, False])
def test_clipping_of_each_tensor_by_itself(per_tensor: bool) -> None:
    module, optimizer, plan = prepare(CLIP_GRAD=3.0, CLIP_PER_TENSOR=per_tensor)
    seen: dict[str, float] = {}

    def note(*_: object) -> None:
        seen.update({name: float(p.grad.norm()) for name, p in module.named_parameters()})

    optimizer.register_step_pre_hook(note)
    sizes = {"0.weight": 30.0, "0.bias": 1.0, "1.weight": 6.0, "1.bias": 2.0}
    for name, parameter in module.named_parameters():
        parameter.grad = torch.ones_like(parameter) * sizes[name] / parameter.numel() ** 0.5
    norm = update(TrainState(module, optimizer, module), plan, FiniteGuard(), [BATCH])
    total = sum(size**2 for size in sizes.values()) ** 0.5
    assert float(norm) == pytest.approx(total)
    scales = {name: 3.0 / total for name in sizes}
    if per_tensor:
        scales = {name: min(1.0, 3.0 / size) for name, size in sizes.items()}
    assert seen == pytest.approx(
        {name: size * scales[name] for name, size in sizes.items()}, rel=1e-4
    )


def test_each_head_of_a_grid_clips_its_tensors_by_themselves() -> None:
    module, optimizer, plan = prepare(CLIP_GRAD=3.0, CLIP_PER_TENSOR=True)
    heads = [tuple(part.parameters()) for part in module.children()]
    closed = torch.full((2,), -1)
    state = TrainState(module, optimizer, module, clip_groups=heads, closed_at=closed)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 30.0 / parameter.numel() ** 0.5)
    heads[1][0].grad.fill_(torch.nan)
    norm = update(state, plan, FiniteGuard(), [BATCH])
    assert float(norm) == pytest.approx(2**0.5 * 30)  # of the head that goes on
    assert closed.tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("num_images", "batch_size", "wanted"), [(359, 200, 179), (8, 128, 8), (400, 200, 200)]
)
def test_held_out_images_are_cut_so_that_few_are_left(
    num_images: int, batch_size: int, wanted: int
) -> None:
    assert held_out_batch(num_images, batch_size) == wanted
    assert num_images % wanted < -(-num_images // batch_size)


def test_without_an_image_for_each_process_nothing_can_be_held_out() -> None:
    with pytest.raises(ValueError, match=r"HELD_OUT.EVERY_EPOCHS: the val split has 0 images"):
        held_out_batch(0, 8)


def test_the_gradient_of_each_part_is_a_share_of_all_whatever_the_scale() -> None:
    module = nn.ModuleDict()
    module["online"] = nn.ModuleDict({"backbone": nn.Linear(2, 2), "projector": nn.Linear(2, 2)})
    module["predictor"] = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    state = TrainState(module, optimizer, module)
    for scale in (1.0, 65536.0):
        for part, size in (("online.backbone", 3.0), ("predictor", 4.0)):
            weight = module.get_submodule(part).weight
            weight.grad = torch.ones_like(weight) * scale * size / 2
        shares = {part: value.item() for part, value in gradient_shares(state).items()}
        assert shares == pytest.approx({"backbone": 0.6, "predictor": 0.8})
    optimizer.zero_grad()
    module["predictor"].weight.grad = torch.ones(2, 2)
    assert gradient_shares(state) == {}
