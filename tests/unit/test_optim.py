"""Which tensors decay, and each optimiser against a slow loop that follows the paper."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
import training
from timm.layers import RmsNorm
from torch import Tensor, nn
from yacs.config import CfgNode

from engine.guards import FiniteGuard
from engine.loop import train_step
from engine.optim import (
    LARS,
    build_optimizer,
    check_optimizer,
    parameter_groups,
    with_layer_decay,
)
from engine.run import start_run
from models import assemble_framework, framework_options
from models.parts.backbones import build_backbone
from utils.config.load import ConfigError, load_config
from utils.config.schema import declare

SCHEMA = declare(framework_options())


def optim(**options: Any) -> CfgNode:
    return load_config(
        SCHEMA, flags={f"OPTIM.{key}": value for key, value in options.items()}
    ).OPTIM


def decays(module: nn.Module, node: CfgNode) -> dict[str, bool]:
    """Return for every parameter in the groups, by name, whether it decays."""
    names = {id(p): name for name, p in module.named_parameters()}
    groups = parameter_groups(module, node)
    listed = [
        (names[id(p)], group.get("weight_decay", node.WEIGHT_DECAY) > 0)
        for group in groups
        for p in group["params"]
    ]
    assert len(listed) == len(dict(listed)), "a parameter is in two groups"
    return dict(listed)


def vit(name: str = "deit_tiny", **options: Any) -> nn.Module:
    return build_backbone(name, img_size=16, patch_size=8, **options)


# ---- groups --------------------------------------------------------------------------------------


def test_moco_decays_everything() -> None:
    found = decays(build_backbone("resnet8", stem="cifar"), optim(NAME="sgd"))
    assert found
    assert all(found.values())


def test_moby_decays_tokens_and_positions_but_no_biases_and_norms() -> None:
    found = decays(vit(), optim(NAME="adamw", EXCLUDE_1D=True))
    assert found["cls_token"]
    assert found["pos_embed"]
    assert found["blocks.0.attn.qkv.weight"]
    assert found["patch_embed.proj.weight"]
    assert not found["patch_embed.proj.bias"]
    assert not found["blocks.0.norm1.weight"]
    assert not found["norm.bias"]
    for name, parameter in vit().named_parameters():
        assert found[name] == (parameter.ndim > 1), name


def test_exclude_tokens_exempts_tokens_positions_and_tables() -> None:
    found = decays(vit(), optim(NAME="adamw", EXCLUDE_1D=True, EXCLUDE_TOKENS=True))
    assert (found["cls_token"], found["pos_embed"], found["patch_embed.proj.weight"]) == (
        False,
        False,
        True,
    )
    with torch.device("meta"):
        swin = build_backbone("swin_tiny", img_size=224)
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert decays(swin, optim(EXCLUDE_1D=True))[table]
    assert not decays(swin, optim(EXCLUDE_1D=True, EXCLUDE_TOKENS=True))[table]


def test_norm_layers_are_exempt_whatever_their_names_and_no_other_bias_is() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), RmsNorm(4))
    found = decays(module, optim(EXCLUDE_1D=True, EXCLUDE_RULE="norm_layers"))
    expected = {"0": True, "1": False, "2": True, "3": False}
    assert found == {name: expected[name[0]] for name, _ in module.named_parameters()}


def test_lars_exempts_one_dimensional_tensors_without_being_asked() -> None:
    backbone = build_backbone("resnet8", stem="cifar")
    found = decays(backbone, optim(NAME="lars"))
    assert found == {name: p.ndim > 1 for name, p in backbone.named_parameters()}
    assert [g.get("adapt", True) for g in parameter_groups(backbone, optim(NAME="lars"))] == [
        True,
        False,
    ]
    assert all(
        "adapt" not in g for g in parameter_groups(backbone, optim(NAME="sgd", EXCLUDE_1D=True))
    )


def test_what_does_not_train_is_in_no_group() -> None:
    options = {"name": "vit_small", "patch_size": 8, "freeze_patch_embed": True}
    framework = assemble_framework("byol", {"hidden_dim": 8, "out_dim": 4}, options, img_size=16)
    found = decays(framework, optim(EXCLUDE_1D=True))
    assert not any(name.startswith("target.") for name in found)
    frozen = {"online.backbone.pos_embed", "online.backbone.patch_embed.proj.weight"}
    assert not frozen & set(found)
    trained = {name for name, p in framework.named_parameters() if p.requires_grad}
    assert set(found) == trained
    assert found["predictor.0.weight"]
    assert not found["predictor.0.bias"]


def test_an_empty_group_is_left_out() -> None:
    assert len(parameter_groups(nn.Linear(2, 2), optim())) == 1
    assert len(parameter_groups(nn.LayerNorm(2), optim(EXCLUDE_1D=True))) == 1


# ---- updates -------------------------------------------------------------------------------------


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (3, 4, 2, 2), (5,), (2, 3), (6, 2)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(
    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], grads: list[list[Tensor]]
) -> list[Tensor]:
    """Apply three steps at changing rates to two groups: the 1-D tensor apart."""
    params = [nn.Parameter(t) for t in tensors(0)]
    params[3].data.zero_()  # a weight of norm zero
    exempt = {"params": [params[2]], "weight_decay": 0.0}
    optimizer = build([{"params": [p for p in params if p.ndim > 1]}, exempt])
    for step, grad in enumerate(grads):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 / (step + 1)
        for parameter, g in zip(params, grad, strict=True):
            parameter.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


def gradients() -> list[list[Tensor]]:
    grads = [tensors(seed) for seed in (1, 2, 3)]
    grads[1][4].zero_()  # a gradient of norm zero (its weight does not vanish)
    grads[0][3].zero_()  # both zero
    return grads


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_equals_a_slow_loop(decay: float) -> None:
    def lars(groups: list[dict[str, Any]]) -> LARS:
        return LARS(
            [groups[0], {**groups[1], "adapt": False}],
            0.0,
            decay,
            momentum=0.9,
            trust_coefficient=0.01,
        )

    weights = tensors(0)
    weights[3].zero_()
    buffers = [torch.zeros_like(w) for w in weights]
    for step, grads in enumerate(gradients()):
        for index, (w, g) in enumerate(zip(weights, grads, strict=True)):
            if w.ndim > 1:  # You et al. 2017, algorithm 1, as in spec C4
                g = g + decay * w
                w_norm, g_norm = float(w.norm()), float(g.norm())
                g = g * (0.01 * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0)
            buffers[index] = 0.9 * buffers[index] + g
            weights[index] = w - 0.5 / (step + 1) * buffers[index]
    for found, expected in zip(run(lars, gradients()), weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_lars_by_tensor_equals_lars_by_group() -> None:
    by_tensor, by_group = ([nn.Parameter(t) for t in tensors(0)] for _ in range(2))
    optimizers = [
        LARS([{"params": ps, "weight_decay": 0.1}], lr=0.3) for ps in (by_tensor, by_group)
    ]
    for grads in gradients():
        for params in (by_tensor, by_group):
            for parameter, g in zip(params, grads, strict=True):
                parameter.grad = g.clone()
        optimizers[0].step()
        with torch.no_grad():  # as on a GPU
            optimizers[1]._update(by_group, optimizers[1].param_groups[0])
    for one, other in zip(by_tensor, by_group, strict=True):
        assert torch.equal(one, other)


def test_lars_leaves_gradients_and_unused_parameters_alone_and_resumes() -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    first = LARS([{"params": [used, unused]}], lr=0.1, weight_decay=0.1)
    used.grad = torch.ones(2, 2)
    first.step()
    assert torch.equal(used.grad, torch.ones(2, 2))
    assert torch.equal(unused, torch.ones(2, 2))
    twin = nn.Parameter(used.detach().clone())
    second = LARS([{"params": [twin, unused]}])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for parameter, optimizer in ((used, first), (twin, second)):
        parameter.grad = torch.full((2, 2), 2.0)
        optimizer.step()
    assert torch.equal(used, twin)


PLAIN: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(
        groups, 0.0, 0.9, weight_decay=0.1, foreach=False, fused=False
    ),
    "nesterov": lambda groups: torch.optim.SGD(
        groups, 0.0, 0.9, weight_decay=0.1, nesterov=True, foreach=False, fused=False
    ),
    "adamw": lambda groups: torch.optim.AdamW(
        groups, 0.0, (0.8, 0.95), 1e-6, weight_decay=0.1, foreach=False, fused=False
    ),
}
OURS: dict[str, dict[str, Any]] = {
    "sgd": {"NAME": "sgd", "MOMENTUM": 0.9, "WEIGHT_DECAY": 0.1},
    "nesterov": {"NAME": "sgd", "MOMENTUM": 0.9, "WEIGHT_DECAY": 0.1, "NESTEROV": True},
    "adamw": {"NAME": "adamw", "BETAS": [0.8, 0.95], "EPS": 1e-6, "WEIGHT_DECAY": 0.1},
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_fused_optimiser_equals_its_plain_twin(name: str) -> None:
    ours = run(lambda groups: build_optimizer(optim(**OURS[name]), groups), gradients())
    for found, expected in zip(ours, run(PLAIN[name], gradients()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("WEIGHT_DECAY", 0.3, "sgd"),
        ("MOMENTUM", 0.5, "sgd"),
        ("NESTEROV", True, "sgd"),
        ("BETAS", [0.5, 0.999], "adamw"),
        ("EPS", 0.1, "adamw"),
        ("WEIGHT_DECAY", 0.3, "adamw"),
        ("TRUST_COEFFICIENT", 0.1, "lars"),
        ("MOMENTUM", 0.5, "lars"),
        ("WEIGHT_DECAY", 0.3, "lars"),
        ("NAME", "adamw", "sgd"),
    ],
)
def test_every_optimiser_key_changes_the_update(key: str, value: Any, name: str) -> None:
    before = run(lambda groups: build_optimizer(optim(NAME=name), groups), gradients())
    after = run(
        lambda groups: build_optimizer(optim(**{"NAME": name, key: value}), groups), gradients()
    )
    assert not torch.equal(before[0], after[0])


def test_an_unknown_optimiser_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"OPTIM\.NAME: 'adam' is not one of sgd, adamw, lars"):
        optim(NAME="adam")
    node = optim().clone()
    node.defrost()
    node.NAME = "adam"
    with pytest.raises(ValueError, match=r"OPTIM\.NAME: 'adam'"):
        build_optimizer(node, [{"params": [nn.Parameter(torch.ones(1))]}])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_that_overflows_under_a_scaler_touches_nothing(name: str) -> None:
    """Fused SGD would return early and leave a momentum buffer of whatever the memory held."""
    layer = nn.Linear(64, 64)
    node = optim(NAME=name)
    optimizer = build_optimizer(node, [{"params": list(layer.parameters())}], fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = [p.detach().clone() for p in layer.parameters()]
    scaler.scale(layer(torch.ones(1, 64)).sum() * float("inf")).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert all(not state for state in optimizer.state.values())
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize("method", ["moco_v2", "byol"])
def test_a_forward_that_overflows_under_a_scaler_spoils_no_later_step(method: str) -> None:
    state, plan = training.prepare(method, {}, batch_norm=True)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    training.train_step(state, plan)
    norms = [norm for norm in state.module.modules() if isinstance(norm, nn.BatchNorm2d)]
    kept = copy.deepcopy([norm.state_dict() for norm in norms])
    batches = training.micro_batches(1, 1)
    batches[0].views[0].fill_(torch.inf)
    batches[0].views[1].fill_(torch.inf)
    guard = FiniteGuard(scaler=True)
    out = train_step(state, plan, guard, lambda b, p: state.model(b.views, p), batches, 0)
    assert not torch.isfinite(out["loss"])
    for norm, before in zip(norms, kept, strict=True):
        for name in ("running_mean", "running_var"):
            assert torch.equal(norm.state_dict()[name], before[name])
    assert all(torch.isfinite(value).all() for value in state.module.state_dict().values())
    assert torch.isfinite(training.train_step(state, plan)["loss"])


# ---- optimisers of timm --------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    convolution = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolution, nn.Linear(8 * 16, 10), nn.Linear(10, 4))


def opened(model: nn.Module, node: CfgNode) -> torch.optim.Optimizer:
    groups = with_layer_decay(parameter_groups(model, node), {model[0].weight: 0.5})
    return build_optimizer(node, groups)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1) * group["lr_scale"]
        model(torch.randn(16, 3, 6, 6)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def usable(name: str) -> bool:
    try:
        check_optimizer(optim(NAME=f"timm/{name}"))
    except ValueError:
        return False
    return True


USABLE = [name for name in timm.optim.list_optimizers() if usable(name)]
COMMON = ("lamb", "muon", "adamw", "lion", "nadamw", "adopt", "madgrad", "sgd")


def test_the_common_optimisers_of_timm_are_usable() -> None:
    assert set(COMMON) & set(timm.optim.list_optimizers()) <= set(USABLE)
    assert {"lamb", "adamw", "lion"} <= set(USABLE)


@pytest.mark.parametrize(
    "name", [n if n in COMMON else pytest.param(n, marks=pytest.mark.slow) for n in USABLE]
)
def test_an_optimiser_of_timm_follows_the_groups_and_resumes_bit_identically(name: str) -> None:
    node = optim(NAME=f"timm/{name}", EXCLUDE_1D=True, WEIGHT_DECAY=0.1)
    whole, first, second = network(), network(), network()
    train(whole, opened(whole, node), range(6))
    optimizer = opened(first, node)
    assert [(g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.1),
        (1.0, 0.1),
        (1.0, 0.0),
    ]
    train(first, optimizer, range(3))
    saved = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    second.load_state_dict(weights)
    optimizer = opened(second, node)
    optimizer.load_state_dict(state)
    train(second, optimizer, range(3, 6))
    for found, expected in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)
    start = network()
    moved = zip(whole.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("WEIGHT_DECAY", 0.3, "lamb"),
        ("BETAS", [0.5, 0.99], "lamb"),
        ("EPS", 0.1, "lamb"),
        ("MOMENTUM", 0.5, "sgdw"),
    ],
)
def test_the_keys_reach_an_optimiser_of_timm(key: str, value: Any, name: str) -> None:
    def after(**options: Any) -> list[Tensor]:
        node = optim(NAME=f"timm/{name}", **{"WEIGHT_DECAY": 0.1, **options})
        return run(lambda groups: build_optimizer(node, groups), gradients())

    assert not torch.equal(after()[0], after(**{key: value})[0])


def test_without_a_key_an_optimiser_of_timm_keeps_its_own_defaults() -> None:
    parameter = [{"params": [nn.Parameter(torch.ones(2, 2))]}]
    (lion,) = build_optimizer(optim(NAME="timm/lion"), parameter).param_groups
    (lamb,) = build_optimizer(optim(NAME="timm/lamb"), parameter).param_groups
    assert (tuple(lion["betas"]), lamb["eps"]) == ((0.9, 0.99), 1e-6)
    # three betas: OPTIM.BETAS has two
    build_optimizer(optim(NAME="timm/adan", BETAS=[0.5, 0.9]), parameter)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lambs", "is not in timm .*nearest is timm/lamb"),
        ("moun", "is not in timm .*nearest is timm/muon"),
        ("", "is not in timm"),
        ("adahessian", "needs second derivatives"),
        ("lambcd", "corrects its weight decay by one peak rate"),
    ],
)
@pytest.mark.parametrize(
    ("task", "section"),
    [
        *[(task, "") for task in ("pretrain", "detection", "segmentation")],
        *[("linear", "LINEAR."), ("semisup", "FINETUNE.")],
    ],
)
def test_an_optimiser_that_timm_lacks_or_we_cannot_serve_is_refused_before_the_run(
    tmp_path: Path, name: str, words: str, task: str, section: str
) -> None:
    key = f"{section}OPTIM.NAME"
    cfg = load_config(SCHEMA, flags={key: f"timm/{name}", "OUTPUT": str(tmp_path)})
    with pytest.raises(ValueError, match=f"^{key}: 'timm/{name}' {words}"):
        start_run(cfg, task=task)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may run there")
def test_an_optimiser_that_needs_a_gpu_is_refused() -> None:
    for name in {"bnbadam", "fusedadam"} & set(timm.optim.list_optimizers()):
        with pytest.raises(ValueError, match=rf"'timm/{name}' cannot run here \(CUDA"):
            check_optimizer(optim(NAME=f"timm/{name}"))
