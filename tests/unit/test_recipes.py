"""Every recipe in configs/ builds, plans and states the published values, which are written out here."""

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from data import build_views
from data.augment.recipes import build_recipe
from engine.optim import build_optimizer, parameter_groups
from engine.plan import Plan, make_plan
from models import assemble_framework, framework_options
from models.parts.momentum import MomentumFramework
from utils.config.load import leaves, load_config
from utils.config.schema import declare
from utils.config.sections import method_section, section_options
from utils.config.strict_yaml import load

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEMA = declare(framework_options())
DEFAULTS = SCHEMA.defaults()
IMAGENET, CIFAR = 1_281_167, 50_000
PIECES = sorted(CONFIGS.glob("_base_/*.yaml"))
CIFAR_RECIPES = sorted(CONFIGS.glob("cifar10/*.yaml"))
RECIPE_FILES = [
    path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if not path.stem.startswith(("demo", "own_images", "continue", "multi_crop"))
]
OTHERS = [path for path in CONFIGS.glob("*.yaml") if path not in RECIPE_FILES]

# name -> processes of the published run; what the file says about a recipe stands in the tests
# below
V2_BACKBONES = ("swin_tiny", "swin_small", "swin_base", "vit_small", "vit_base")
MOCO = {"moco_v1_resnet50": 8, "moco_v2_resnet50": 8, "moco_v2_resnet50_800ep": 8}
SYNCO = {"synco_resnet50": 4, "synco_resnet50_800ep": 4}
BYOL = {f"byol_{backbone}": 4 for backbone in V2_BACKBONES}
MOBY = {
    **{f"moby_{backbone}": 4 for backbone in V2_BACKBONES},
    "moby_swin_tiny": 8,
    "moby_deit_small": 8,
}
SYNCO_V2 = {f"synco_v2_{backbone}": 4 for backbone in V2_BACKBONES}
RESNETS = {"byol_resnet50": 4, "moby_resnet50": 4, "synco_v2_resnet50": 4}
MOCOV3 = {
    **{f"mocov3_resnet50{length}": 16 for length in ("", "_300ep", "_1000ep")},
    **{
        f"mocov3_{name}": 32
        for name in ("vit_small", "vit_base", "vit_conv_small", "vit_conv_base", "swin_tiny")
    },
}
BATCHFORMER = {
    "batchformer_resnet50": 16,
    "batchformer_resnet50_300ep": 16,
    "moco_v2_batchformer_resnet50": 8,
}
SIT = {f"sit_{backbone}": 4 for backbone in ("deit_base", "deit_small", "swin_tiny", "resnet50")}
SIT |= {"sit_gmml_deit_small": 1}
PROCESSES = {**MOCO, **SYNCO, **BYOL, **MOBY, **SYNCO_V2, **RESNETS, **MOCOV3, **BATCHFORMER, **SIT}


@cache
def recipe(name: str) -> CfgNode:
    return load_config(SCHEMA, [CONFIGS / f"{name}.yaml"])


def build(cfg: CfgNode) -> MomentumFramework:
    """Build the framework without memory for its weights."""
    options = section_options(cfg.MODEL[method_section(cfg.MODEL.NAME)])
    backbone = section_options(cfg.MODEL.BACKBONE)
    more = {"batchformer": section_options(cfg.MODEL.BATCHFORMER), "img_size": cfg.DATA.IMG_SIZE}
    with torch.device("meta"):
        return assemble_framework(cfg.MODEL.NAME, options, backbone, **more)


def plan(cfg: CfgNode, images: int, processes: int) -> Plan:
    total = cfg.TRAIN.BATCH_SIZE * cfg.TRAIN.ACCUMULATION_STEPS * processes
    return make_plan(
        cfg.OPTIM,
        cfg.SCHEDULE,
        epochs=cfg.TRAIN.EPOCHS,
        steps_per_epoch=images // total,
        global_batch=total,
        base_rates=[cfg.OPTIM.BASE_LR],
    )


def linear_plan(cfg: CfgNode, total: int) -> Plan:
    return make_plan(
        cfg.LINEAR.OPTIM,
        cfg.LINEAR.SCHEDULE,
        epochs=cfg.LINEAR.EPOCHS,
        steps_per_epoch=IMAGENET // total,
        global_batch=total,
        base_rates=cfg.LINEAR.LRS,
    )


# ---- all of them ---------------------------------------------------------------------------------


def test_the_published_recipes_are_all_there() -> None:
    assert {path.stem for path in RECIPE_FILES} == set(PROCESSES)
    assert {path.stem for path in CIFAR_RECIPES} == {
        *("moco_v2_resnet18", "synco_resnet18", "byol_resnet18", "moby_vit", "synco_v2_vit"),
        *("mocov3_resnet18", "batchformer_resnet18", "sit_resnet18", "sit_vit"),
        *("best_cpu_5", "best_cpu_20", "best_cpu_60"),
    }


@pytest.mark.parametrize("path", [*RECIPE_FILES, *CIFAR_RECIPES, *OTHERS], ids=lambda p: p.stem)
def test_a_recipe_builds_and_plans(path: Path) -> None:
    cfg = load_config(SCHEMA, [path])
    framework = build(cfg)
    optimizer = build_optimizer(cfg.OPTIM, parameter_groups(framework, cfg.OPTIM))
    assert sum(len(group["params"]) for group in optimizer.param_groups) > 0
    assert len(build_recipe(cfg.AUG.RECIPE, cfg.DATA.IMG_SIZE, cfg.AUG.CROP_MIN or None)) == 2
    processes = PROCESSES.get(path.stem, 1)
    planned = plan(cfg, IMAGENET, processes)
    assert planned.total_steps > planned.rates[0].warmup_steps
    assert math.isfinite(planned.rates[0].at(planned.total_steps - 1))
    assert linear_plan(cfg, cfg.LINEAR.BATCH_SIZE).total_steps > 0
    queue = cfg.MODEL[method_section(cfg.MODEL.NAME)].get("QUEUE_SIZE", 0)
    assert queue % planned.global_batch == 0


@pytest.mark.parametrize("path", [*PIECES, *RECIPE_FILES, *CIFAR_RECIPES], ids=lambda p: p.stem)
def test_a_recipe_is_short_and_a_piece_stands_alone(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (20 if path in PIECES else 15)
    load_config(SCHEMA, [path])


@pytest.mark.parametrize("path", [*RECIPE_FILES, *CIFAR_RECIPES], ids=lambda p: p.stem)
def test_a_header_states_the_command_and_whose_numbers_they_are(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert f"main_pretrain.py --cfg configs/{path.relative_to(CONFIGS)} --data-path D" in header
    assert "--output O --tag T" in header
    if path in CIFAR_RECIPES:
        best = path.stem.startswith("best")
        assert f"Values are ours, {'chosen on' if best else 'not yet measured'}" in header
        return
    cfg, processes = recipe(path.stem), PROCESSES[path.stem]
    batch = cfg.TRAIN.BATCH_SIZE
    assert f"torchrun --nproc_per_node={processes} " in header
    assert (
        f"{processes} GPUs x {batch} images = {processes * batch} a step, {cfg.TRAIN.EPOCHS} epochs"
        in header
    )
    assert re.search(r"Published (linear top-1: \d\d\.\d|accuracy: none)", header)
    assert "Ours: not measured" in header


@pytest.mark.parametrize("name", PROCESSES)
def test_a_header_says_where_the_published_run_was_in_mixed_precision(name: str) -> None:
    """MoBY used apex, MoCo v3 and its heirs float16 autocast; MoCo, SynCo and SynCo-v2's code float32."""
    mixed = {"moby_swin_tiny", "moby_deit_small", "sit_deit_base", "sit_gmml_deit_small"}
    # ours
    mixed |= {"batchformer_resnet50", "batchformer_resnet50_300ep", *MOCOV3} - {"mocov3_swin_tiny"}
    header = (CONFIGS / f"{name}.yaml").read_text()
    assert ("The published run was in mixed precision" in header) == (name in mixed)


@pytest.mark.parametrize("path", [*PIECES, *RECIPE_FILES, *CIFAR_RECIPES], ids=lambda p: p.stem)
def test_a_recipe_says_nothing_about_a_method_that_it_does_not_select(path: Path) -> None:
    changed = dict(leaves(load_config(SCHEMA, [path])))
    defaults = dict(leaves(DEFAULTS))
    method = changed["MODEL.NAME"].upper()
    touched = {key for key in changed if key.startswith("MODEL.") and changed[key] != defaults[key]}
    known = ("NAME", "BACKBONE", "BATCHFORMER", method_section(method.lower()))
    assert all(key.split(".")[1] in known for key in touched)


# ---- the published values ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MOCO, *SYNCO])
def test_moco_and_synco_follow_the_published_table(name: str) -> None:
    cfg = recipe(name)
    options = cfg.MODEL[method_section(cfg.MODEL.NAME)]
    v1 = name.startswith("moco_v1")
    assert cfg.MODEL.NAME == ("synco" if name in SYNCO else "moco_v2")
    assert cfg.MODEL.BACKBONE.NAME == "resnet50"
    assert cfg.MODEL.BACKBONE.STEM == "imagenet"
    assert (options.OUT_DIM, options.QUEUE_SIZE, options.BASE_MOMENTUM) == (128, 65536, 0.999)
    assert (options.TEMPERATURE, options.NUM_MLP_LAYERS) == ((0.07, 1) if v1 else (0.2, 2))
    assert (options.SYMMETRIC, options.BATCH_NORM, options.BN_GROUPS) == (False, "shuffle", 1)
    assert cfg.AUG.RECIPE == ("moco_v1" if v1 else "moco_v2")
    assert (cfg.OPTIM.NAME, cfg.OPTIM.MOMENTUM, cfg.OPTIM.NESTEROV) == ("sgd", 0.9, False)
    assert (cfg.OPTIM.WEIGHT_DECAY, cfg.OPTIM.EXCLUDE_1D, cfg.OPTIM.CLIP_GRAD) == (1e-4, False, 0.0)
    assert cfg.TRAIN.EPOCHS == (800 if name.endswith("800ep") else 200)
    assert cfg.SCHEDULE.WARMUP_EPOCHS == 0
    planned = plan(cfg, IMAGENET, PROCESSES[name])
    assert (planned.global_batch, planned.rates[0].base, planned.steps_per_epoch) == (
        256,
        0.03,
        5004,
    )
    steps = [0, 5003, 5004, 120 * 5004, 160 * 5004]
    rates = [planned.rates[0].at(step) for step in steps]
    if v1:
        assert rates == pytest.approx([0.03, 0.03, 0.03, 0.003, 0.0003])
    elif cfg.TRAIN.EPOCHS == 200:  # 0.015 (1 + cos(pi e / 200)) at epochs 0, 0, 1, 120, 160
        assert rates == pytest.approx([0.03, 0.03, 0.0299981495, 0.01036474508, 0.00286474508])


@pytest.mark.parametrize("name", SYNCO)
def test_synco_follows_the_published_counts(name: str) -> None:
    options = recipe(name).MODEL.SYNCO
    assert (options.NUM_HARD, options.NUM_SYNTHETIC) == (1024, [256, 256, 256, 64, 64, 64])
    assert (options.SIGMA, options.DELTA, options.ETA) == (0.01, 0.01, 0.01)
    assert (options.WARMUP_EPOCHS, options.LEGACY_GRADIENTS) == (10, False)


@pytest.mark.parametrize("name", [*BYOL, *MOBY, *SYNCO_V2])
def test_the_transformer_recipes_follow_the_published_table(name: str) -> None:
    cfg = recipe(name)
    method, backbone = re.fullmatch(r"(byol|moby|synco_v2)_(\w+)", name).groups()  # type: ignore[union-attr]
    lr, decay, momentum = {"byol": (2e-4, 0.03, 0.996)}.get(method, (1e-3, 0.05, 0.99))
    options = cfg.MODEL[method.upper()]
    assert (cfg.MODEL.NAME, cfg.MODEL.BACKBONE.NAME) == (method, backbone)
    assert (cfg.MODEL.BACKBONE.DROP_PATH, cfg.MODEL.BACKBONE.TARGET_DROP_PATH) == (0.2, 0.0)
    assert not cfg.MODEL.BACKBONE.FREEZE_PATCH_EMBED
    # SynCo-v2's code; MoBY's has 1e-5 everywhere
    own_swin = "swin" in backbone and method != "moby"
    assert cfg.MODEL.BACKBONE.NORM_EPS == (1e-6 if own_swin else 0.0)
    assert (options.HIDDEN_DIM, options.OUT_DIM) == (4096, 256)
    assert (options.PROJ_NUM_LAYERS, options.PRED_NUM_LAYERS) == (2, 2)
    assert (options.BASE_MOMENTUM, options.MOMENTUM_SCHEDULE) == (momentum, "cosine")
    if method != "byol":
        assert (options.QUEUE_SIZE, options.TEMPERATURE) == (4096, 0.2)
    assert (cfg.AUG.RECIPE, cfg.AUG.CROP_MIN, cfg.DATA.IMG_SIZE) == ("byol", 0.0, 224)
    assert (cfg.OPTIM.NAME, cfg.OPTIM.BETAS, cfg.OPTIM.EPS) == ("adamw", [0.9, 0.999], 1e-8)
    assert (cfg.OPTIM.BASE_LR, cfg.OPTIM.WARMUP_LR, cfg.OPTIM.MIN_LR) == (lr, 5e-7, 5e-6)
    assert (cfg.OPTIM.WEIGHT_DECAY, cfg.OPTIM.CLIP_GRAD) == (decay, 5.0)
    assert (cfg.OPTIM.EXCLUDE_1D, cfg.OPTIM.EXCLUDE_TOKENS) == (True, False)
    assert (cfg.SCHEDULE.NAME, cfg.SCHEDULE.LAG, cfg.SCHEDULE.SHIFTED) == ("cosine", False, False)
    assert cfg.TRAIN.PRECISION == "fp32"
    planned = plan(cfg, IMAGENET, PROCESSES[name])
    assert (planned.global_batch, planned.epochs, planned.steps_per_epoch) == (512, 300, 2502)
    (rate,) = planned.rates
    assert (rate.base, rate.warmup_start, rate.minimum) == (lr, 5e-7, 5e-6)
    assert rate.warmup_steps == 5 * 2502
    larger = plan(cfg, IMAGENET, 2 * PROCESSES[name]).rates[0]
    assert (larger.base, larger.warmup_start, larger.minimum) == (2 * lr, 1e-6, 1e-5)


@pytest.mark.parametrize("name", [*SYNCO_V2, "synco_v2_resnet50"])
def test_synco_v2_has_the_published_window_and_the_counts_that_took_effect(name: str) -> None:
    options = recipe(name).MODEL.SYNCO_V2
    assert (options.NUM_HARD, options.NUM_SYNTHETIC) == (256, [128, 128, 128, 64, 64, 64])
    assert (options.SIGMA, options.DELTA, options.ETA) == (0.1, 0.01, 0.01)
    assert (options.WARMUP_EPOCHS, options.COOLDOWN_EPOCHS) == (30, 100)
    assert (options.LEGACY_WINDOW, options.LEGACY_GRADIENTS) == (0, False)


def test_the_resnet_recipes_follow_the_deleted_files() -> None:
    byol, moby, synco = (recipe(name) for name in RESNETS)
    for cfg in (byol, moby, synco):
        assert cfg.MODEL.BACKBONE.NAME == "resnet50"
        assert (cfg.MODEL.BACKBONE.DROP_PATH, cfg.LINEAR.DROP_PATH) == (0.0, 0.0)
        assert (cfg.OPTIM.CLIP_GRAD, cfg.OPTIM.LR_BATCH, cfg.TRAIN.EPOCHS) == (5.0, 512, 300)
        assert cfg.AUG.RECIPE == "byol"
        assert cfg.MODEL.BACKBONE.ZERO_INIT_RESIDUAL
    assert [cfg.MODEL.NAME for cfg in (byol, moby, synco)] == ["byol", "moby", "synco_v2"]
    assert (byol.OPTIM.NAME, byol.OPTIM.BASE_LR, byol.OPTIM.WEIGHT_DECAY) == ("lars", 0.4, 1e-6)
    assert (byol.OPTIM.TRUST_COEFFICIENT, byol.SCHEDULE.WARMUP_EPOCHS) == (1e-3, 10)
    assert byol.MODEL.BYOL.BASE_MOMENTUM == 0.996
    for cfg in (moby, synco):
        assert (cfg.OPTIM.NAME, cfg.OPTIM.NESTEROV, cfg.OPTIM.MOMENTUM) == ("sgd", True, 0.9)
        assert (cfg.OPTIM.BASE_LR, cfg.OPTIM.WEIGHT_DECAY, cfg.SCHEDULE.WARMUP_EPOCHS) == (
            1e-3,
            0.05,
            5,
        )


@pytest.mark.parametrize(
    ("name", "online", "trained"),
    [  # parameters of the backbone without head
        ("moby_swin_tiny", 27_519_354, 27_519_354),
        ("moby_vit_small", 21_665_664, 21_590_016),
        ("byol_vit_small", 21_665_664, 21_590_016),
    ],
)
def test_the_backbones_have_the_published_sizes(name: str, online: int, trained: int) -> None:
    backbone = build(recipe(name)).online.backbone
    assert sum(p.numel() for p in backbone.parameters()) == online
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == trained


def test_deit_small_has_6_heads_and_vit_small_12() -> None:
    for name, heads in (("moby_deit_small", 6), ("moby_vit_small", 12)):
        assert build(recipe(name)).online.backbone.blocks[0].attn.num_heads == heads


# ---- the probes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MOCOV3, "batchformer_resnet50", "sit_gmml_deit_small"])
def test_moco_v3_carries_its_own_probe(name: str) -> None:
    linear, planned = recipe(name).LINEAR, linear_plan(recipe(name), 1024)
    rate, steps = planned.rates[0], planned.steps_per_epoch
    assert (linear.EPOCHS, linear.HEAD_INIT, linear.LABEL_SMOOTHING, linear.DROP_PATH) == (
        90,
        "normal",
        0.0,
        0.0,
    )
    assert (linear.OPTIM.NAME, linear.OPTIM.MOMENTUM, linear.OPTIM.NESTEROV) == ("sgd", 0.9, False)
    assert (linear.OPTIM.WEIGHT_DECAY, linear.OPTIM.CLIP_GRAD) == (0.0, 0.0)
    assert rate.base == pytest.approx(4 * linear.LRS[0])
    assert rate.at(0) == rate.at(steps - 1) == rate.base  # held for an epoch, no warm-up
    assert rate.at(45 * steps) == pytest.approx(rate.base / 2)


NOT_MOCOV3 = [name for name in PROCESSES if recipe(name).LINEAR.EPOCHS == 100]


@pytest.mark.parametrize("name", NOT_MOCOV3)
def test_every_recipe_carries_its_own_probe(name: str) -> None:
    linear = recipe(name).LINEAR
    moco = name in MOCO or name in SYNCO or name.startswith("moco_v2")
    assert linear.EPOCHS == 100
    assert (linear.OPTIM.NAME, linear.OPTIM.MOMENTUM, linear.OPTIM.WEIGHT_DECAY) == (
        "sgd",
        0.9,
        0.0,
    )
    assert linear.HEAD_INIT == ("normal" if moco else "trunc")
    assert linear.LABEL_SMOOTHING == (0.0 if moco else 0.1)
    assert linear.DROP_PATH == (0.0 if moco or name in RESNETS or name in SIT else 0.2)
    assert linear.OPTIM.NESTEROV == (not moco)
    assert linear.OPTIM.CLIP_GRAD == (0.0 if moco else 5.0)
    total = 256 if moco else 512
    planned = linear_plan(recipe(name), total)
    steps = IMAGENET // total
    rate = planned.rates[0]
    assert rate.base == (30.0 if moco else 1.0)
    if moco:
        ends = [rate.at(epoch * steps + shift) for epoch in (60, 80) for shift in (-1, 0)]
        assert ends == pytest.approx([30.0, 3.0, 3.0, 0.3])
        assert rate.at(0) == 30.0
    else:
        assert (rate.warmup_start, rate.minimum, rate.warmup_steps) == (5e-7, 5e-6, 5 * steps)
        assert linear_plan(recipe(name), 256).rates[0].base == 0.5  # published: 64 x 4


def test_the_two_protocols_set_the_same_keys_and_only_probe_keys() -> None:
    def keys(tree: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for key, value in tree.items():
            found |= (
                keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
            )
        return found

    moco, moby, mocov3 = (
        keys(load((CONFIGS / f"_base_/linear_{name}.yaml").read_text()))
        for name in ("moco", "moby", "mocov3")
    )
    assert moco == moby == mocov3  # so that --protocol replaces a recipe's own probe entirely
    assert all(key.startswith("LINEAR.") for key in moco)
    for name in ("moby_swin_tiny", "moco_v2_resnet50"):
        for protocol in ("moco", "moby"):
            piece = CONFIGS / f"_base_/linear_{protocol}.yaml"
            switched = load_config(SCHEMA, [CONFIGS / f"{name}.yaml", piece])
            alone = load_config(SCHEMA, [piece])
            assert all(dict(leaves(switched))[key] == dict(leaves(alone))[key] for key in moco)


# ---- the small recipes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MOCOV3, *BATCHFORMER])
def test_moco_v3_follows_the_published_flags(name: str) -> None:
    cfg = recipe(name)
    if name.startswith("moco_v2"):
        assert (cfg.MODEL.NAME, cfg.MODEL.BATCHFORMER.ENABLED) == ("moco_v2", True)
        return
    options, resnet = cfg.MODEL.MOCOV3, "resnet" in name
    assert cfg.MODEL.NAME == ("batchformer" if name in BATCHFORMER else "mocov3")
    assert (options.HIDDEN_DIM, options.OUT_DIM, options.PRED_NUM_LAYERS) == (4096, 256, 2)
    assert (options.PROJ_NUM_LAYERS, options.PRED_LAST_BATCH_NORM) == (
        (2, False) if resnet else (3, True)
    )
    assert (options.TEMPERATURE, options.MOMENTUM_SCHEDULE) == (1.0 if resnet else 0.2, "cosine")
    assert options.BASE_MOMENTUM == (0.996 if name.endswith("1000ep") else 0.99)
    assert cfg.MODEL.BACKBONE.ZERO_INIT_RESIDUAL == resnet
    assert cfg.MODEL.BACKBONE.FREEZE_PATCH_EMBED == (
        name in ("mocov3_vit_small", "mocov3_vit_base")
    )
    assert (cfg.AUG.RECIPE, cfg.AUG.CROP_MIN) == ("mocov3", 0.2 if resnet else 0.0)
    long = cfg.TRAIN.EPOCHS > 100
    rate = (0.3 if long else 0.6) if resnet else 1.5e-4
    decay = (1.5e-6 if name.endswith("1000ep") else 1e-6) if resnet else 0.1
    assert (cfg.OPTIM.NAME, cfg.OPTIM.BASE_LR, cfg.OPTIM.WEIGHT_DECAY) == (
        "lars" if resnet else "adamw", rate, decay,
    )  # fmt: skip
    assert not cfg.OPTIM.EXCLUDE_1D  # AdamW decays everything; LARS exempts by itself
    planned = plan(cfg, IMAGENET, PROCESSES[name])
    warmup, steps = (10 if resnet else 40), planned.steps_per_epoch
    assert (planned.global_batch, planned.rates[0].base) == (4096, rate * 16)
    rates = planned.rates[0]
    assert rates.at(0) == 0.0  # as published: the first step changes nothing
    assert rates.at(warmup * steps) == pytest.approx(rate * 16)
    half = (warmup * steps + planned.total_steps) // 2
    assert rates.at(half) == pytest.approx(rate * 8, rel=1e-3)
    assert (cfg.LINEAR.EPOCHS, cfg.LINEAR.LRS) == (90, [0.1 if resnet else 3.0])


@pytest.mark.parametrize("name", SIT)
def test_sit_follows_the_published_flags(name: str) -> None:
    cfg = recipe(name)
    options, planned = cfg.MODEL.SIT, plan(cfg, IMAGENET, PROCESSES[name])
    if "gmml" in name:
        assert (options.VARIANT, options.OUT_DIM, options.TEMPERATURE) == ("gmml", 256, 0.2)
        assert (options.DROP_FRACTION, options.REPLACE_FRACTION, options.DROP_ALIGN) == (
            0.5,
            0.3,
            1,
        )
        assert (options.BASE_MOMENTUM, options.MOMENTUM_SCHEDULE, options.DROP_TYPE) == (
            0.996,
            "cosine",
            "zeros",
        )
        assert (cfg.OPTIM.CLIP_GRAD, cfg.OPTIM.CLIP_PER_TENSOR) == (3.0, True)
        assert planned.weight_decay_at(0) == pytest.approx(0.04)
        assert planned.weight_decay_at(planned.total_steps) == pytest.approx(0.1)
        assert (cfg.TRAIN.EPOCHS, planned.rates[0].base) == (800, 5e-4 * 32 / 256)
        # which the published code does not scale
        assert planned.rates[0].minimum == pytest.approx(1e-6)
        return
    assert (options.VARIANT, options.OUT_DIM, options.TEMPERATURE) == ("rotation", 512, 0.5)
    assert (options.BASE_MOMENTUM, options.LEGACY_WEIGHTING) == (0.99996, False)
    assert cfg.MODEL.BACKBONE.NUM_TOKENS == (2 if "deit" in name else 1)
    assert (cfg.AUG.RECIPE, cfg.TRAIN.EPOCHS, planned.global_batch) == ("sit", 501, 288)
    assert (cfg.OPTIM.WEIGHT_DECAY, cfg.OPTIM.EXCLUDE_1D, cfg.OPTIM.EXCLUDE_TOKENS) == (
        0.05,
        True,
        True,
    )
    rates, epoch = planned.rates[0], planned.steps_per_epoch
    assert rates.base == pytest.approx(1e-3 * 288 / 512)
    assert [rates.at(0), rates.at(epoch)] == [1e-6, 1e-6]  # epochs 0 and 1, as published
    assert rates.at(2 * epoch) == pytest.approx(1e-6 + (rates.base - 1e-6) / 5)
    assert rates.at(501 * epoch - 1) == pytest.approx(5e-6, rel=0.01)


@pytest.mark.parametrize("path", CIFAR_RECIPES, ids=lambda p: p.stem)
def test_a_small_recipe_fits_cifar10(path: Path) -> None:
    cfg = load_config(SCHEMA, [path])
    if path.stem.startswith("best"):  # of minutes on a CPU
        assert 0 < cfg.AUG.VIEW_SIZE < 32
        assert 0 < cfg.KNN.EVERY_EPOCHS < cfg.TRAIN.EPOCHS
        return
    assert (cfg.DATA.DATASET, cfg.DATA.IMG_SIZE, cfg.AUG.RECIPE) == ("cifar10", 32, "cifar")
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.BATCH_SIZE) == (200, 512)
    assert cfg.KNN.EVERY_EPOCHS > 0
    assert plan(cfg, CIFAR, 1).steps_per_epoch == 97
    backbone = build(cfg).online.backbone
    features = backbone.forward_features(torch.empty(8, 3, 32, 32, device="meta"))
    assert features.shape[-2:] == (
        (4, 4) if path.stem.endswith("18") else (64 + cfg.MODEL.BACKBONE.NUM_TOKENS, 192)
    )
    options = section_options(cfg.MODEL[method_section(cfg.MODEL.NAME)])
    assert cfg.TRAIN.BATCH_SIZE % options.get("bn_groups", 1) == 0


def test_multi_crop_has_the_crops_of_dino() -> None:
    """Arguments of DINO's ViTs: global_crops_scale 0.25 1, local_crops_scale 0.05 0.25."""
    local_views = build_views(recipe("multi_crop_vit_small"))
    assert [view[0].size for view in local_views] == [224] * 2 + [96] * 6
    assert [view[0].scale for view in local_views] == [(0.25, 1.0)] * 2 + [(0.05, 0.25)] * 6
    base = recipe("mocov3_vit_small")
    values = dict(leaves(base))
    changed = {key for key, v in leaves(recipe("multi_crop_vit_small")) if v != values[key]}
    assert changed == {*("NAME", "TRAIN.EPOCHS", "AUG.CROP_MIN", "AUG.LOCAL_CROPS.NUMBER")}
