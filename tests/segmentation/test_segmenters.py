"""Segmenters of every kind: sizes as published, losses, groups of parameters, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.plan import iteration_plan
from models.parts.backbones import build_backbone
from models.parts.norm import SyncBatchNorm
from segmentation.defaults import load_segmentation_config
from segmentation.evaluation import inference_of
from segmentation.heads import pixel_loss
from segmentation.model import Segmenter, build_segmenter, optimizer_groups

CONFIGS = Path(__file__).parents[2] / "segmentation" / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
SMALL = {"MODEL__SEGMENTER__WIDTH": 8, "MODEL__SEGMENTER__AUX_WIDTH": 8}
VIT = {
    **{"MODEL__BACKBONE__NAME": "deit_tiny", "SEGMENTATION__TEST": "slide"},
    **{"DATA__IMG_SIZE": 32, "SEGMENTATION__CROP": [64, 64], "SEGMENTATION__STRIDE": [40, 40]},
}
LINEAR = {
    **{"MODEL__SEGMENTER__HEAD": "linear", "MODEL__SEGMENTER__FREEZE": True},
    "MODEL__SEGMENTER__AUX_WEIGHT": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "resnet": {"MODEL__BACKBONE__NAME": "timm/test_resnet"},
    "dilated": {
        **{"MODEL__BACKBONE__NAME": "resnet18", "MODEL__SEGMENTER__HEAD": "fcn"},
        "MODEL__SEGMENTER__OUTPUT_STRIDE": 8,
    },
    "swin": {"MODEL__BACKBONE__NAME": "swin_tiny"},
    "vit": VIT,
    "linear": {**VIT, **LINEAR},
}


def load(*files: Path, **keys: Any) -> Any:
    opts = []
    for key, value in keys.items():
        text = value if isinstance(value, str) else json.dumps(value)
        opts += [key.replace("__", "."), text]
    return load_segmentation_config([str(file) for file in files] or [], opts, {})


def build(classes: int = 5, **keys: Any) -> Segmenter:
    torch.manual_seed(0)
    return build_segmenter(load(**{**SMALL, **keys}), classes, None)


def batch(size: tuple[int, int] = (64, 64)) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, 5, (2, *size))
    labels[:, :10] = 255
    return torch.randn(2, 3, *size), labels


@pytest.mark.parametrize("kind", KINDS)
def test_a_segmenter_trains_every_parameter_and_labels(kind: str) -> None:
    segmenter = build(**KINDS[kind])
    assert any(isinstance(part, SyncBatchNorm) for part in segmenter.modules())
    images, labels = batch()
    losses = segmenter.train()(images, labels)
    auxiliary = [] if kind == "linear" else ["loss_auxiliary"]
    assert list(losses) == ["loss_decode", *auxiliary]
    sum(losses.values()).backward()
    for name, parameter in segmenter.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = {name for name, p in segmenter.named_parameters() if p.requires_grad}
    assert any(name.startswith("backbone.") for name in trained) == (kind != "linear")
    with torch.no_grad():
        logits = segmenter.eval()(images)
    side = {"dilated": 8, "linear": 4}.get(kind, 16)
    assert logits.shape == (2, 5, side, side)


def test_the_loss_is_that_of_both_heads() -> None:
    segmenter = build(**KINDS["resnet"], MODEL__SEGMENTER__DROPOUT=0.0).train()
    segmenter.backbone.eval()
    images, labels = batch((45, 61))
    losses = segmenter(images, labels)
    maps = segmenter.backbone(images)
    main = pixel_loss(segmenter.decode_head(maps), labels).detach()
    torch.testing.assert_close(losses["loss_decode"].detach(), main)
    auxiliary = 0.4 * pixel_loss(segmenter.auxiliary_head(maps), labels)
    torch.testing.assert_close(losses["loss_auxiliary"], auxiliary)
    segmenter.loss_over = "labelled"
    share = float((labels != 255).double().mean())
    other = segmenter(images, labels)["loss_decode"].detach()
    assert float(other) == pytest.approx(float(main) / share, rel=1e-5)


def test_the_second_head_is_gone_in_a_test() -> None:
    segmenter = build(**KINDS["resnet"]).eval()
    called = []
    segmenter.auxiliary_head.register_forward_hook(lambda *hooked: called.append(hooked))
    segmenter(batch()[0])
    assert not called
    segmenter.train()(*batch())
    assert len(called) == 1


# ---- as published --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tiny", 59_941_862), ("small", 81_259_766), ("base", 121_279_716)],
)
def test_upernet_on_swin_has_the_published_size(name: str, expected: int) -> None:
    cfg = load(CONFIGS / f"ade20k_upernet_swin_{name}.yaml")
    with torch.device("meta"):
        segmenter = build_segmenter(cfg, 150, None)
    assert sum(p.numel() for p in segmenter.parameters()) == expected


def test_norms_tables_and_positions_of_swin_do_not_decay_and_biases_do() -> None:
    cfg = load(CONFIGS / "ade20k_upernet_swin_tiny.yaml")
    with torch.device("meta"):
        segmenter = build_segmenter(cfg, 150, None)
    groups = optimizer_groups(segmenter, cfg)
    exempt = {p for group in groups if group.get("exempt") for p in group["params"]}
    assert len(exempt) == 76
    decayed = {name for name, p in segmenter.named_parameters() if p not in exempt}
    assert "decode_head.bottleneck.bn.weight" in decayed
    assert "decode_head.conv_seg.bias" in decayed
    assert not [name for name in decayed if "norm" in name or "position" in name]


def test_the_rate_of_swin_is_the_published_one() -> None:
    cfg = load(CONFIGS / "ade20k_upernet_swin_tiny.yaml")
    node = cfg.SEGMENTATION
    (rate,) = iteration_plan(
        cfg.OPTIM, node, 16, schedule=node.SCHEDULE, power=node.POWER, section="SEGMENTATION."
    ).rates
    expected = {0: 6e-11, 750: 2.98594e-5, 1500: 5.94375e-5, 80_000: 3e-5, 159_999: 3.75e-10}
    assert {step: rate.at(step) for step in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_plans_and_names_its_command(file: Path) -> None:
    cfg = load(file)
    with torch.device("meta"):
        segmenter = build_segmenter(cfg, 150, None)
    assert optimizer_groups(segmenter, cfg)
    assert inference_of(cfg).fixed == ("vit" in file.stem or "deit" in file.stem)
    node, text = cfg.SEGMENTATION, file.read_text()
    assert f"--cfg segmentation/configs/{file.name} --data-path D" in text
    if file.stem.startswith("mini_"):
        return
    processes = int(text.split("--nproc_per_node ")[1].split()[0])
    total = processes * cfg.TRAIN.BATCH_SIZE
    assert total == cfg.OPTIM.LR_BATCH  # the rate is that of the published batch
    assert f"{processes} GPUs x {cfg.TRAIN.BATCH_SIZE} images = {total} a step" in text or (
        "MoCo" in text and total == 16
    )
    plan = iteration_plan(
        cfg.OPTIM, node, total, schedule=node.SCHEDULE, power=node.POWER, section="SEGMENTATION."
    )
    assert plan.total_steps == node.MAX_ITER
    assert plan.rates[0].base == cfg.OPTIM.BASE_LR


def test_the_recipes_are_all_there() -> None:
    upernet = ("swin_tiny", "swin_small", "swin_base", "vit_small", "deit_small", "vit_base")
    names = {f"ade20k_upernet_{name}" for name in (*upernet, "resnet50")}
    names |= {"ade20k_linear_vit_small", "ade20k_linear_deit_small", "mini_pets", "mini_ade"}
    names |= {"mini_voc", "voc_fcn_resnet50", "voc_fcn_d8_resnet50_20k", "cityscapes_fcn_resnet50"}
    assert {file.stem for file in RECIPES} == names


# ---- parts ---------------------------------------------------------------------------------------


def test_a_layers_rate_is_that_of_the_next_times_the_decay() -> None:
    """Twelve blocks: patches and positions are layer 0, all that is no backbone layer 13."""
    cfg = load(**{**SMALL, **VIT, "SEGMENTATION__LAYER_DECAY": 0.5})
    segmenter = build_segmenter(cfg, 5, None)
    groups = optimizer_groups(segmenter, cfg)
    found = {p: group["lr_scale"] for group in groups for p in group["params"]}
    names = dict(segmenter.named_parameters())
    expected = {
        "backbone.body.pos_embed": 13,
        "backbone.body.patch_embed.proj.weight": 13,
        "backbone.body.blocks.0.attn.qkv.weight": 12,
        "backbone.body.blocks.11.mlp.fc2.bias": 1,
        "backbone.levels.1.weight": 0,
        "decode_head.conv_seg.weight": 0,
        "auxiliary_head.conv_seg.bias": 0,
    }
    assert {name: found[names[name]] for name in expected} == {
        name: 0.5**power for name, power in expected.items()
    }
    assert len(found) == len(names)


def test_layer_decay_is_for_vits() -> None:
    cfg = load(**{**SMALL, **KINDS["resnet"], "SEGMENTATION__LAYER_DECAY": 0.5})
    with pytest.raises(ValueError, match=r"LAYER_DECAY: 0\.5 is for ViTs.*test_resnet"):
        optimizer_groups(build_segmenter(cfg, 5, None), cfg)


def test_a_frozen_backbone_does_not_move_and_stays_in_eval_mode() -> None:
    keys = {**KINDS["resnet"], **LINEAR}
    segmenter = build(**keys).train()
    before = {name: tensor.clone() for name, tensor in segmenter.backbone.state_dict().items()}
    segmenter(*batch())["loss_decode"].backward()
    after = segmenter.backbone.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(part.training for part in segmenter.backbone.modules())
    assert segmenter.decode_head.training


@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_what_a_trunk_adds_to_a_frozen_backbone_learns(kind: str) -> None:
    """Convolutions and norms that no pretraining made would stay random numbers."""
    segmenter = build(**KINDS[kind], MODEL__SEGMENTER__FREEZE=True).train()
    sum(segmenter(*batch()).values()).backward()
    trained = {n for n, p in segmenter.backbone.named_parameters() if p.grad is not None}
    added = {n for n, _ in segmenter.backbone.named_parameters() if not n.startswith("body.")}
    assert trained == added != set()
    assert not any(part.training for part in segmenter.backbone.body.modules())
    linear = build(**{**KINDS[kind], **LINEAR})
    assert not any(p.requires_grad for p in linear.backbone.parameters())


def test_frozen_norms_are_those_of_the_pretrained_backbone() -> None:
    added = build(**VIT, MODEL__SEGMENTER__NORM="frozen").backbone.levels[0][1]
    assert isinstance(added, SyncBatchNorm)


def test_each_head_of_a_grid_learns_as_alone_at_its_rate() -> None:
    keys = {**VIT, **LINEAR, "SEGMENTATION__LRS": [0.1, 0.01]}
    cfg = load(**{**SMALL, **keys})
    torch.manual_seed(0)
    grid = build_segmenter(cfg, 5, None).train()
    alone = build(**{**VIT, **LINEAR}).train()
    alone.backbone.load_state_dict(grid.backbone.state_dict())
    alone.decode_head.load_state_dict(grid.decode_head.heads[0].state_dict())
    images, labels = batch()
    grid(images, labels)["loss_decode"].backward()
    alone(images, labels)["loss_decode"].backward()
    for head in grid.decode_head.heads:
        for ours, theirs in zip(head.parameters(), alone.decode_head.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    groups = optimizer_groups(grid, cfg)
    assert [group["rate"] for group in groups] == [0, 1]
    plan = iteration_plan(
        cfg.OPTIM, cfg.SEGMENTATION, 16, base_rates=cfg.SEGMENTATION.LRS, section="SEGMENTATION."
    )
    assert [rate.base for rate in plan.rates] == [0.1, 0.01]


def test_the_last_blocks_are_joined_for_a_linear_head() -> None:
    keys = {**VIT, **LINEAR, "MODEL__SEGMENTER__TAPS": [11, 12]}
    assert build(**keys).decode_head.conv_seg.in_channels == 2 * 192
    with pytest.raises(ValueError, match=r"TAPS: \[3, 12\]; .*\[11, 12\]"):
        build(**{**keys, "MODEL__SEGMENTER__TAPS": [3, 12]})


@pytest.mark.parametrize("norm", ["sync", "batch", "frozen"])
def test_norms_are_what_the_key_says(norm: str) -> None:
    """The backbone's are frozen, a head's have to learn."""
    segmenter = build(**KINDS["resnet"], MODEL__SEGMENTER__NORM=norm)

    def kinds(module: nn.Module) -> set[str]:
        return {type(m).__name__ for m in module.modules() if "BatchNorm" in type(m).__name__}

    own = {"sync": "SyncBatchNorm", "batch": "BatchNorm2d", "frozen": "FrozenBatchNorm2d"}[norm]
    assert kinds(segmenter.backbone) == {own}
    assert kinds(segmenter.decode_head) == {"BatchNorm2d" if norm == "batch" else "SyncBatchNorm"}


def test_pretrained_weights_are_in_the_backbone(tmp_path: Path) -> None:
    body = build_backbone("timm/test_resnet")
    torch.save(body.state_dict(), tmp_path / "weights.pt")
    cfg = load(**{**SMALL, **KINDS["resnet"]})
    segmenter = build_segmenter(cfg, 5, tmp_path / "weights.pt")
    for name, tensor in segmenter.backbone.state_dict().items():
        assert torch.equal(tensor, body.state_dict()[name])


def test_a_backbone_without_maps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.BACKBONE\.NAME"):
        build(MODEL__BACKBONE__NAME="timm/test_convnext")


def test_a_crop_that_no_patch_divides_is_refused_for_timms_vits() -> None:
    keys = {**VIT, "MODEL__BACKBONE__NAME": "timm/test_vit", "SEGMENTATION__CROP": [72, 72]}
    with pytest.raises(ValueError, match=r"SEGMENTATION\.CROP: \[72, 72\]"):
        build(**{**keys, "DATA__IMG_SIZE": 160})
