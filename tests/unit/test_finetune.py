"""Fine-tuning's parameter groups, folder names, accuracies and protocols."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.loop import set_rates
from engine.optim import build_optimizer
from engine.plan import make_plan
from evaluation import finetune
from models import framework_options
from models.classifier import Classifier, layer_ids
from models.parts.backbones import build_backbone
from utils.config.load import ConfigError, leaves, load_config
from utils.config.schema import declare
from utils.config.strict_yaml import load
from utils.schedules import cosine

CONFIGS = Path(__file__).parents[2] / "configs" / "_base_"
PROTOCOLS = sorted(path.stem.removeprefix("finetune_") for path in CONFIGS.glob("finetune_*.yaml"))
SCHEMA = declare(framework_options())
DEFAULTS = SCHEMA.defaults()


def config(*opts: Any, protocol: str = "") -> Any:
    file = CONFIGS / f"finetune_{protocol}.yaml" if protocol else None
    return load_config(SCHEMA, [file], [str(o) for o in opts], {"NAME": "x"})


def optimizer_of(
    node: Any, name: str = "resnet8", **options: Any
) -> tuple[torch.optim.Optimizer, Classifier]:
    model = Classifier(build_backbone(name, **options), 3)
    layers = layer_ids(model.backbone) if node.LAYER_DECAY < 1 else None
    return build_optimizer(
        node.OPTIM, finetune.finetune_groups(model.backbone, model.heads, node, layers)
    ), model


def plan_of(node: Any, steps: int = 2) -> Any:
    return make_plan(
        node.OPTIM,
        node.SCHEDULE,
        epochs=node.EPOCHS,
        steps_per_epoch=steps,
        global_batch=512,
        base_rates=[node.LR_BACKBONE, node.LR_CLASSIFIER],
    )


def rate_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> float:
    (rate,) = [g["lr"] for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return rate


# ---- rates ---------------------------------------------------------------------------------------


def test_backbone_and_head_follow_a_cosine_per_epoch_each() -> None:
    node = config(
        *"FINETUNE.LR_BACKBONE 0.02 FINETUNE.LR_CLASSIFIER 0.5 FINETUNE.EPOCHS 4".split()
    ).FINETUNE
    optimizer, model = optimizer_of(node)
    plan = plan_of(node)
    for step in range(8):
        set_rates(optimizer, plan, step)
        assert rate_of(optimizer, model.backbone.conv1.weight) == cosine(step // 2 / 4, 0.02, 0.0)
        assert rate_of(optimizer, model.heads[0][0].weight) == cosine(step // 2 / 4, 0.5, 0.0)
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters())
    assert {g["weight_decay"] for g in optimizer.param_groups} == {1e-6}


def test_layer_decay_lowers_each_layer_by_its_factor() -> None:
    node = config("FINETUNE.LAYER_DECAY", 0.5, protocol="deit").FINETUNE
    optimizer, model = optimizer_of(node, "deit_tiny", img_size=16, patch_size=8)
    plan = plan_of(node)
    set_rates(optimizer, plan, 77)
    top = rate_of(optimizer, model.heads[0][0].weight)
    assert top == plan.rates[0].at(77) > 0
    for block in range(12):
        assert rate_of(optimizer, model.backbone.blocks[block].attn.qkv.weight) == top * 0.5 ** (
            12 - block
        )
    assert rate_of(optimizer, model.backbone.pos_embed) == top * 0.5**13
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters())


def test_without_layer_decay_there_are_no_scales() -> None:
    optimizer, _ = optimizer_of(config(protocol="deit").FINETUNE)
    assert not any("lr_scale" in group for group in optimizer.param_groups)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_biases_tokens_and_positions_do_not_decay_with_deits_recipe(decay: float) -> None:
    node = config("FINETUNE.LAYER_DECAY", decay, protocol="sit").FINETUNE
    optimizer, model = optimizer_of(node, "deit_tiny", img_size=16, patch_size=8, num_tokens=2)
    spared = {p for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    backbone = model.backbone
    tokens = {backbone.cls_token, backbone.reg_token, backbone.pos_embed}
    assert spared == tokens | {p for p in model.parameters() if p.ndim == 1}


# ---- protocols -----------------------------------------------------------------------------------


def flat(tree: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return found


def test_protocols_set_only_fine_tuning_and_all_of_it() -> None:
    # not a matter of the recipe
    own = {"TRAIN_PERCENT", "SUBSET", "HOLD_OUT", "TEST", "EVAL_EPOCHS"}
    for name in PROTOCOLS:
        keys = flat(load((CONFIGS / f"finetune_{name}.yaml").read_text()))
        assert all(key.startswith("FINETUNE.") for key in keys)
        missing = {key for key, _ in leaves(DEFAULTS) if key.startswith("FINETUNE.")} - keys
        assert {k.split(".")[1] for k in missing} - {"OPTIM"} == own


def test_the_defaults_are_the_published_few_label_protocol() -> None:
    node = DEFAULTS.FINETUNE
    assert (node.WEIGHTS, node.LR_BACKBONE, node.LR_CLASSIFIER, node.EPOCHS) == (
        "freeze",
        0.0,
        0.3,
        100,
    )
    optim = node.OPTIM
    assert (optim.NAME, optim.MOMENTUM, optim.WEIGHT_DECAY, optim.LR_BATCH) == ("sgd", 0.9, 1e-6, 0)


@pytest.mark.parametrize(("name", "drop_path"), [("deit", 0.1), ("swin", 0.2), ("sit", 0.1)])
def test_the_transformer_recipes(name: str, drop_path: float) -> None:
    node = config(protocol=name).FINETUNE
    assert (node.MIXUP, node.CUTMIX, node.LABEL_SMOOTHING, node.DROP_PATH) == (
        0.8,
        1.0,
        0.1,
        drop_path,
    )
    assert (node.AUG.RAND_AUGMENT, node.AUG.ERASING) == ("rand-m9-mstd0.5-inc1", 0.25)
    plan = plan_of(node, steps=10)
    assert plan.rates[0].base == plan.rates[1].base == 5e-4
    assert plan.rates[0].warmup_steps == 50


@pytest.mark.parametrize(
    "opts",
    ["TRAIN_PERCENT 0", "TRAIN_PERCENT 101", "WEIGHTS thaw", "LAYER_DECAY 0", "MIXUP_MODE x"],
)
def test_values_out_of_range_are_refused(opts: str) -> None:
    key, value = f"FINETUNE.{opts}".split()
    with pytest.raises(ConfigError, match=key):
        config(key, value)


# ---- folders and batches -------------------------------------------------------------------------


def test_every_setting_that_matters_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    lists = [tmp_path / "a.txt", tmp_path / "b" / "a.txt", tmp_path / "c" / "a.txt"]
    for path, text in zip(lists, ("x\n", "y\n", "y\n"), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    base = "FINETUNE.LR_BACKBONE 0.01"
    changes = [
        "",
        "FINETUNE.LR_BACKBONE 0.02",
        "FINETUNE.LR_CLASSIFIER 0.5",
        "SEED 1",
        "FINETUNE.EPOCHS 60",
    ]
    changes += ["FINETUNE.OPTIM.WEIGHT_DECAY 0.0", "FINETUNE.WEIGHTS finetune", "DATA.IMG_SIZE 64"]
    changes += ["FINETUNE.TRAIN_PERCENT 1.0", "FINETUNE.BATCH_SIZE 64", "FINETUNE.HOLD_OUT 0.2"]
    changes += [f"FINETUNE.SUBSET {path}" for path in lists[:2]]
    names = [finetune.run_name(config(*f"{base} {more}".split()), Path("w.pt")) for more in changes]
    names.append(finetune.run_name(config(*base.split()), None))
    assert len(set(names)) == len(names)
    assert names[0].startswith("w-100pct-freeze-lr0.01-0.3-100ep-")
    assert names[-1].startswith("random-100pct")
    same = [f"FINETUNE.SUBSET {lists[2]}", f"FINETUNE.SUBSET {lists[1]} DATA.NUM_WORKERS 3 TAG t"]
    assert {
        finetune.run_name(config(*f"{base} {more}".split()), Path("w.pt")) for more in same
    } == {names[12]}


def test_the_same_global_batch_on_more_processes_is_the_same_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = finetune.run_name(config("FINETUNE.BATCH_SIZE", 128), None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert finetune.run_name(config("FINETUNE.BATCH_SIZE", 256), None) == two


def test_a_missing_list_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.txt"):
        finetune.run_name(config("FINETUNE.SUBSET", "nowhere.txt"), None)


@pytest.mark.parametrize(
    ("images", "wanted", "share", "even", "batch"),
    [
        (1000, 256, 1, False, 256),
        (30, 256, 2, False, 30),
        (31, 256, 2, False, 30),
        (31, 256, 1, True, 30),
    ],
)
def test_a_batch_fits_the_labels(
    images: int, wanted: int, share: int, even: bool, batch: int
) -> None:
    assert finetune.fitting_batch(images, wanted, share, even) == batch


@pytest.mark.parametrize(
    ("images", "wanted", "even", "word"), [(30, 3, True, "--batch-size"), (0, 4, True, "few")]
)
def test_a_batch_that_cannot_be_is_refused(images: int, wanted: int, even: bool, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        finetune.fitting_batch(images, wanted, 1, even)


@pytest.mark.parametrize(
    ("opts", "word"),
    [("FINETUNE.WEIGHTS finetune", "--lr-backbone"), ("FINETUNE.TEST False", "FINETUNE.TEST")],
)
def test_contradictions_are_refused(opts: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        finetune.check_finetune(config(*opts.split()).FINETUNE)


# ---- accuracies and the frozen backbone ----------------------------------------------------------


def test_accuracy_counts_images_not_batches() -> None:
    logits = torch.eye(8)[[0, 1, 2, 3, 0, 0]]
    batches = [
        SimpleNamespace(views=[logits[rows]], labels=torch.tensor([0, 1, 2, 3, 7, 6])[rows])
        for rows in (slice(0, 4), slice(4, 6))
    ]
    values = finetune.accuracy(lambda x: x, batches, "val_", torch.device("cpu"))
    assert values == {"val_top1": pytest.approx(400 / 6), "val_top5": pytest.approx(400 / 6)}


def test_a_moved_weight_or_statistic_is_noticed() -> None:
    for name in ("weight", "running_mean"):
        norm = nn.BatchNorm1d(3)
        frozen = finetune.FrozenCheck(norm)
        frozen.check()
        getattr(norm, name).data[1] += 1e-7
        with pytest.raises(RuntimeError, match=name):
            frozen.check()
