"""Every method over every family: two steps, the right things move, the wrong ones do not."""

import copy

import pytest
import runs
import timm
import torch
from torch import Tensor, nn

from models import FRAMEWORKS, assemble_framework, framework_options
from models.parts.backbones import _warn_of_cut, build_backbone, feature_map
from models.parts.heads import mlp
from models.parts.mocov3_vit import sincos_positions
from models.parts.momentum import KeyQueue, MomentumFramework
from utils.schedules import Progress, momentum_at

# smallest settings that keep each family's parts: stages, heads, windows
FAMILIES = {
    "resnet": {"name": "resnet18", "stem": "cifar"},
    "deit": {"name": "deit_tiny", "patch_size": 8, "drop_path": 0.1},
    "swin": {"name": "swin_tiny", "drop_path": 0.2},
}
# of each method that has such an option
_SIZES = {
    "queue_size": 16,
    "out_dim": 16,
    "hidden_dim": 32,
    "num_hard": 8,
    "num_synthetic": [4] * 6,
    "warmup_epochs": 0,
}
SMALL = {method: runs.small_options(method, _SIZES) for method in FRAMEWORKS}


def views(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(2)]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }


def small(
    method: str, family: str = "resnet", more: dict | None = None, **options: object
) -> MomentumFramework:
    """Build a method in its smallest form; SiT reads two tokens of a ViT."""
    backbone = {
        **FAMILIES[family],
        **({"num_tokens": 2} if (method, family) == ("sit", "deit") else {}),
    }
    return assemble_framework(
        method, {**SMALL[method], **(more or {})}, backbone, img_size=32, **options
    )


@pytest.mark.parametrize(
    ("method", "more"), [*((name, {}) for name in FRAMEWORKS), ("sit", {"variant": "gmml"})]
)
def test_a_method_declares_which_of_its_scalars_are_better_when_lower(
    method: str, more: dict[str, str]
) -> None:
    framework = small(method, more=more)
    out = framework(views(0), Progress(0, 4, 8))
    scalars = {name for name, value in out.items() if value.ndim == 0}
    losses = {name for name in scalars if name.startswith("loss")}
    assert losses == scalars & set(framework.lower_is_better)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", FRAMEWORKS)
def test_two_steps(method: str, family: str) -> None:
    framework = small(method, family)
    assert [p for p in framework.target.parameters() if p.requires_grad] == []
    for ours, theirs in zip(
        framework.online.parameters(), framework.target.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    trained = [p for p in framework.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    before = snapshot(framework)
    for step in range(2):
        progress = Progress(step, 2, 8)
        out = framework(views(step), progress)
        assert out["loss"].ndim == 0
        assert torch.isfinite(out["loss"])
        assert out["embedding"].shape == (4, 16)
        # a positive is nearer than a negative, and the queue's oldest keys are of the first step
        contrasts = method not in ("byol", "sit")
        assert ("positive_logit" in out) == ("negative_logit" in out) == contrasts
        assert ("synthetic_share" in out) == method.startswith("synco")
        assert out.get("queue_age", torch.tensor(step)).item() == step
        optimizer.zero_grad()
        out["loss"].backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
        assert not any(p.grad is not None for p in framework.target.parameters())
        optimizer.step()
        framework.after_step(progress)
    assert "positive_logit" not in framework.eval()(views(2), progress)
    after = snapshot(framework)
    heads = [name for name in after if "projector" in name and name.endswith("weight")]
    assert {name.split(".")[0] for name in heads} == {"online", "target"}
    assert not any(torch.equal(before[name], after[name]) for name in heads)
    assert ("queue.keys" in after) == (method in ("moco_v2", "synco"))
    for name in (n for n in after if n.endswith(".keys")):
        changed = (before[name] != after[name]).any(1)
        assert changed.tolist() == [True] * 8 + [False] * 8  # two batches of four keys
    assert all(queue.position == 8 for queue in framework.modules() if isinstance(queue, KeyQueue))


@pytest.mark.parametrize("method", [name for name in FRAMEWORKS if name != "batchformer"])
def test_batchformer_joins_any_method_and_leaves_at_evaluation(method: str) -> None:
    framework = small(method, batchformer={"enabled": True})
    plain = small(method)
    trained = [p for p in framework.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    before = snapshot(framework)
    for step in range(2):
        out = framework(views(step), Progress(step, 2, 8))
        assert out["embedding"].shape == (4, 16)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        framework.after_step(Progress(step, 2, 8))
    after = snapshot(framework)
    layer = [name for name in after if "batchformer" in name]
    assert {name.split(".")[0] for name in layer} == {"online", "target"}
    assert not any(
        torch.equal(before[name], after[name]) for name in layer if "in_proj_bias" not in name
    )
    # in eval mode, and in the backbone's weights, there is no trace of it
    plain.load_state_dict(
        {name: value for name, value in framework.state_dict().items() if name not in layer}
    )
    images = views(0)[0]
    ours, theirs = (model.eval().online(images) for model in (framework, plain))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    assert not any("batchformer" in name for name in framework.online.backbone.state_dict())


def test_batchformer_as_published_is_frozen_and_stays_equal_in_both_encoders() -> None:
    framework = small("batchformer", batchformer={"trained": False, "loss": "sum"})
    assert [
        name
        for name, p in framework.named_parameters()
        if "batchformer" in name and p.requires_grad
    ] == []
    framework(views(0), Progress(0, 2, 8))["loss"].backward()
    framework.after_step(Progress(0, 2, 8))
    layers = [module.batchformer.state_dict() for module in (framework.online, framework.target)]
    assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])


def test_batchformer_attends_over_the_batch() -> None:
    """One image's attended row depends on the others; its plain row does not."""
    framework = small("moco_v2", batchformer={"enabled": True, "dropout": 0.0})
    module = framework.online.batchformer
    rows = torch.randn(4, 512)
    changed = rows.clone()
    changed[3] += 1.0
    one, other = module(rows), module(changed)
    assert torch.equal(one[:3], other[:3])
    assert not any(torch.equal(one[i], other[i]) for i in (4, 5, 6))


@pytest.mark.parametrize(
    ("method", "batchformer", "message"),
    [
        ("byol", {"loss": "sum"}, "MODEL.BATCHFORMER.LOSS"),
        ("moco_v2", {"loss": "all"}, "MODEL.BATCHFORMER.LOSS"),
        ("moby", {"num_heads": 3}, "MODEL.BATCHFORMER.NUM_HEADS"),
    ],
)
def test_batchformer_refuses(method: str, batchformer: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(method, batchformer={"enabled": True, **batchformer})


@pytest.mark.parametrize("method", ["synco", "synco_v2"])
def test_synthetics_change_the_loss_only_in_their_window(method: str) -> None:
    options = {**SMALL[method], "warmup_epochs": 1}
    torch.manual_seed(0)
    framework = assemble_framework(method, options, FAMILIES["resnet"], img_size=32)
    losses = []
    for step in (1, 2):  # two steps an epoch: the first is in epoch 0, the second in epoch 1
        torch.manual_seed(5)
        losses.append(copy.deepcopy(framework)(views(0), Progress(step, 2, 600))["loss"].item())
    assert losses[1] > losses[0] + 0.1
    if method == "synco_v2":  # epochs 1 to 100, both included
        windows = [
            framework.synthetics(Progress(e * 2, 2, 600)) is not None for e in (0, 1, 100, 101)
        ]
        assert windows == [False, True, True, False]


@pytest.mark.parametrize(
    ("method", "options", "steps", "said"),
    [
        ("synco", {"warmup_epochs": 3}, 30, "MODEL.SYNCO.WARMUP_EPOCHS 3: the run ends before"),
        ("synco", {"warmup_epochs": 3}, 31, ""),
        ("synco_v2", {"warmup_epochs": 3}, 30, "MODEL.SYNCO_V2.WARMUP_EPOCHS 3: the run ends"),
        ("synco_v2", {"warmup_epochs": 3}, 31, ""),
        ("synco_v2", {"warmup_epochs": 3, "legacy_window": 4}, 119, "so it trains MoBY"),
        ("synco_v2", {"warmup_epochs": 3, "legacy_window": 4}, 120, ""),
        ("synco_v2", {"warmup_epochs": 1, "cooldown_epochs": 2}, 60, ""),  # begun and ended
        ("byol", {}, 1, ""),
    ],
)
def test_a_run_that_ends_before_its_synthetics_begin_says_so(
    method: str, options: dict[str, int], steps: int, said: str
) -> None:
    framework = FRAMEWORKS[method](Tiny(), **(SMALL[method] | options))
    found = framework.left_out(Progress(steps - 1, 10, steps))
    assert said in found
    assert bool(said) == bool(found)


def test_legacy_window_divides_by_the_published_world() -> None:
    """On 4 GPUs the published window opened at epoch 120 and never closed within 300 epochs."""
    framework = FRAMEWORKS["synco_v2"](
        Tiny(), hidden_dim=8, legacy_window=4, num_hard=128, queue_size=256
    )
    open_epochs = [
        e for e in range(300) if framework.synthetics(Progress(e * 100 + 99, 100, 30000))
    ]
    assert open_epochs == list(range(119, 300))


class Tiny(nn.Module):
    """A backbone of one linear layer without norm."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


def test_symmetric_moco_is_the_mean_of_both_directions() -> None:
    images = [torch.randn(4, 3, 4, 4) for _ in range(2)]
    options = {"queue_size": 16, "out_dim": 8, "batch_norm": "local"}
    symmetric = FRAMEWORKS["moco_v2"](Tiny(), symmetric=True, **options)
    single = FRAMEWORKS["moco_v2"](Tiny(), **options)
    single.load_state_dict(symmetric.state_dict())
    progress = Progress(0, 1, 1)
    both = [single(order, progress)["loss"].item() for order in (images, images[::-1])]
    assert symmetric(images, progress)["loss"].item() == pytest.approx(sum(both) / 2, rel=1e-6)


def test_target_is_an_exponential_average() -> None:
    model = byol_of_two_layers()
    online, target = (next(part.parameters()) for part in (model.online, model.target))
    start = target.clone()
    with torch.no_grad():
        online.add_(1.0)
    model.update_target(0.75)
    torch.testing.assert_close(target, 0.75 * start + 0.25 * online)


def byol_of_two_layers() -> MomentumFramework:
    return FRAMEWORKS["byol"](Tiny(), hidden_dim=8, out_dim=4)


def test_momentum_rises_to_one() -> None:
    assert momentum_at(0.0, 0.99, "cosine") == pytest.approx(0.99)
    assert momentum_at(1.0, 0.99, "cosine") == 1.0
    assert momentum_at(0.5, 0.99, "constant") == 0.99
    with pytest.raises(ValueError, match="MOMENTUM_SCHEDULE"):
        momentum_at(0.5, 0.99, "linear")


def test_queue_holds_keys_until_the_step_ends_and_wraps() -> None:
    queue = KeyQueue(8, 3)
    before = queue.keys.clone()
    torch.testing.assert_close(
        before.norm(dim=1), torch.ones(8)
    )  # rows; the published code normalised columns
    queue.hold(torch.full((2, 3), 1.0))
    queue.hold(torch.full((2, 3), 2.0))
    assert torch.equal(queue.keys, before)
    queue.flush()
    assert queue.keys[:4, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert queue.position == 4
    queue.hold(torch.full((4, 3), 3.0))
    queue.flush()
    assert queue.position == 0
    restored = KeyQueue(8, 3)
    queue.hold(torch.zeros(2, 3))
    queue.flush()
    restored.load_state_dict(queue.state_dict())
    assert restored.position == 2


def test_keys_that_are_not_finite_stay_out_of_the_queue() -> None:
    """They come from an fp16 step that is left out, and would spoil all losses for many steps."""
    queue = KeyQueue(8, 3)
    before = queue.keys.clone()
    keys = torch.ones(4, 3)
    keys[1, 2] = torch.nan
    queue.hold(keys)
    queue.flush()
    assert torch.equal(queue.keys[1], before[1])
    assert torch.equal(queue.keys[[0, 2, 3]], torch.ones(3, 3))
    assert queue.position == 4


def test_queue_that_does_not_divide_is_refused() -> None:
    queue = KeyQueue(8, 3)
    queue.hold(torch.zeros(3, 3))
    with pytest.raises(
        ValueError, match=r"QUEUE_SIZE: 8 is not a multiple of the 3 keys.*use e.g. 6 or 9"
    ):
        queue.flush()
    queue.hold(torch.zeros(16, 3))
    with pytest.raises(ValueError, match=r"use e.g. 16$"):  # not "16 or 16"
        queue.flush()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("moco_v2", {"num_mlp_layers": 0}, "a head of 0 layers .* keeps the 6 .* OUT_DIM is 128"),
        ("byol", {"pred_num_layers": 0, "out_dim": 8}, None),  # in and out are alike
        ("moco_v2", {"batch_norm": "sync", "bn_groups": 2}, "set BN_GROUPS to 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    method: str, options: dict[str, object], message: str | None
) -> None:
    if message is None:
        FRAMEWORKS[method](Tiny(), **options)
        return
    with pytest.raises(ValueError, match=message):
        FRAMEWORKS[method](Tiny(), **options)


def test_drop_path_rates_differ_between_online_and_target() -> None:
    framework = assemble_framework(
        "moby",
        SMALL["moby"],
        {"name": "swin_tiny", "drop_path": 0.2, "target_drop_path": 0.0},
        img_size=32,
    )
    rates = lambda module: [m.drop_prob for m in module.modules() if type(m).__name__ == "DropPath"]  # noqa: E731
    assert max(rates(framework.online)) == pytest.approx(0.2)
    assert max(rates(framework.target), default=0.0) == 0.0


def test_options_are_the_signatures() -> None:
    options = framework_options()
    defaults = {
        name: {option: key.default for option, key in keys.items()}
        for name, keys in options.items()
    }
    assert set(defaults) == set(FRAMEWORKS)
    assert options["synco"]["queue_size"].least == 1  # the limits are inherited too
    assert defaults["synco"]["queue_size"] == 65536  # inherited
    assert defaults["synco"]["num_synthetic"] == [256, 256, 256, 64, 64, 64]
    assert defaults["synco_v2"]["sigma"] == 0.1
    assert defaults["moco_v2"]["base_momentum"] == 0.999
    assert "num_hard" not in defaults["moby"]


# ---- backbones -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet50", 23_508_032),
        ("swin_tiny", 27_519_354),
        ("vit_small", 21_665_664),
        ("deit_small", 21_665_664),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    backbone = build_backbone(name)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    if name == "vit_small":  # fixed positions
        assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 21_590_016
    heads = {"vit_small": 12, "deit_small": 6}
    if name in heads:
        assert backbone.blocks[0].attn.num_heads == heads[name]


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", ["resnet18", "deit_tiny", "swin_tiny", "vit_small"])
def test_other_image_sizes(name: str, size: int) -> None:
    backbone = build_backbone(name, img_size=size).eval()
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert backbone(images).shape == (1, backbone.num_features)
        maps = feature_map(backbone, images)
    assert maps.shape[:2] == (1, backbone.num_features)
    assert maps.shape[2] == maps.shape[3]


def test_any_timm_model_and_small_resnet() -> None:
    assert build_backbone("timm/mobilenetv3_small_050", img_size=32).num_features > 0
    small = build_backbone("resnet8", stem="cifar_stride2")
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 128)
    assert sum(p.numel() for p in small.parameters()) < 320_000


def test_mocov3_vit_initialisation() -> None:
    vit = build_backbone("vit_small", freeze_patch_embed=True)
    assert not vit.patch_embed.proj.weight.requires_grad
    assert vit.blocks[0].attn.qkv.weight.abs().max() <= (6 / (384 + 384)) ** 0.5
    assert vit.blocks[0].mlp.fc1.weight.abs().max() <= (6 / (384 + 1536)) ** 0.5
    assert vit.patch_embed.proj.weight.abs().max() <= (6 / (3 * 256 + 384)) ** 0.5
    assert vit.norm.eps == 1e-6
    position = sincos_positions(2, 3, 8)
    assert position.shape == (1, 7, 8)
    assert position[0, 0].tolist() == [0.0] * 8
    row, column = 1, 2  # token 1 + 1 * 3 + 2
    w = [1.0, 10000**-0.5]
    expected = [
        f(a * w_i)
        for a in (row, column)
        for f in (torch.sin, torch.cos)
        for w_i in map(torch.tensor, w)
    ]
    torch.testing.assert_close(position[0, 6], torch.stack([torch.as_tensor(v) for v in expected]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet51"}, "did you mean resnet50"),
        ({"name": "timm/no_such_model_at_all"}, r"MODEL.BACKBONE.NAME: 'timm/no_such"),
        ({"name": "resnet18", "patch_size": 4}, "PATCH_SIZE: 4 does not apply to resnet18"),
        ({"name": "swin_tiny", "stem": "cifar"}, "STEM: 'cifar' does not apply to swin_tiny"),
        ({"name": "resnet18", "stem": "small"}, "STEM: 'small' is not one of"),
        ({"name": "timm/mobilenetv3_small_050", "freeze_patch_embed": True}, "FREEZE_PATCH_EMBED"),
        ({"name": "resnet18", "norm_eps": 1e-6}, "NORM_EPS: 1e-06 does not apply to resnet18"),
        (
            {"name": "deit_tiny", "img_size": 15},
            "IMG_SIZE: 15 is smaller than a patch.*, 16 pixels; use 16",
        ),
        ({"name": "vit_small", "img_size": 15}, "DATA.IMG_SIZE: 15 is smaller than a patch"),
        ({"name": "vit_conv_small", "img_size": 8}, "DATA.IMG_SIZE: 8 is smaller than a patch"),
        (
            {"name": "vit_conv_small", "img_size": 40},
            "IMG_SIZE: 40 is not a multiple.*; use 32 or 48",
        ),
        (
            {"name": "swin_tiny", "img_size": 3},
            "DATA.IMG_SIZE: 3 is smaller than a patch.*, 4 pixels",
        ),
        (
            {"name": "deit_tiny", "img_size": 7, "patch_size": 8},
            "DATA.IMG_SIZE: 7 is smaller than a patch",
        ),
        *(
            (
                {"name": f"timm/{name}", "img_size": 8},
                f"IMG_SIZE: timm/{name} cannot take images of 8 pixels",
            )
            for name in ("vit_tiny_patch16_224", "convnext_atto", "maxvit_tiny_rw_224", "vgg11")
        ),
    ],
)
def test_bad_backbones(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(**options)


@pytest.mark.parametrize(
    ("name", "size", "cut", "sizes"),
    [
        ("deit_tiny", 31, 15, "16 or 32"),
        ("vit_small", 33, 1, "32 or 48"),
        ("swin_tiny", 30, 2, "28 or 32"),
        ("timm/vit_tiny_patch16_224", 47, 15, "32 or 48"),
        ("timm/convnext_atto", 67, 3, "64 or 96"),
        *((name, 40, 0, "") for name in ("swin_tiny", "resnet8", "timm/mobilenetv3_small_050")),
        *(
            (f"timm/{name}", 64, 0, "")
            for name in ("convnext_atto", "vit_tiny_patch16_224", "resnet10t")
        ),
    ],
)
def test_pixels_that_no_patch_covers_are_reported(
    name: str, size: int, cut: int, sizes: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is said is true: the features depend on the pixel before the cut, and on none behind it."""
    _warn_of_cut.cache_clear()
    backbone = build_backbone(name, img_size=size).eval()
    build_backbone(name, img_size=size)  # as for the target network: nothing is said twice
    said = [record.getMessage() for record in caplog.records if "IMG_SIZE" in record.getMessage()]
    assert len(said) == bool(cut)
    if cut:
        assert f"DATA.IMG_SIZE: {size} is not a multiple of" in said[0]
        assert f"the last {cut} rows and columns" in said[0]
        assert said[0].endswith(f"use {sizes}")
    images = torch.randn(1, 3, size, size)
    other = images.clone()
    with torch.no_grad():
        if cut:
            other[..., -cut:, :], other[..., -cut:] = 0.0, 0.0
            assert torch.equal(backbone(images), backbone(other))
        other[..., size - cut - 1, :] += 1.0
        assert not torch.equal(backbone(images), backbone(other))


@pytest.mark.parametrize("name", ["regnety_002", "resnext50_32x4d", "resnet18"])
def test_branches_that_start_shut_do_not_count_as_cut_off(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At 32 pixels the shortcuts alone reach the first pixels only; all opens with the training."""
    _warn_of_cut.cache_clear()
    torch.manual_seed(0)
    backbone = build_backbone(f"timm/{name}", img_size=32)
    assert "IMG_SIZE" not in caplog.text
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0).state_dict()
    assert any(key.endswith("weight") and not value.any() for key, value in plain.items())
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, plain[key]), key


def test_the_eps_of_norms_reaches_all_but_those_before_the_mlps() -> None:
    """As in SynCo-v2's Swin, which passes its own norm on everywhere but there."""
    swin = build_backbone("swin_tiny", img_size=32, norm_eps=1e-6)
    found = {
        path: part.eps for path, part in swin.named_modules() if isinstance(part, nn.LayerNorm)
    }
    assert {eps for path, eps in found.items() if path.endswith("norm2")} == {1e-5}
    assert {eps for path, eps in found.items() if not path.endswith("norm2")} == {1e-6}
    assert len(found) == 12 * 2 + 3 + 2  # two a block, one a merging, the patches' and the last
    assert {
        m.eps for m in build_backbone("swin_tiny").modules() if isinstance(m, nn.LayerNorm)
    } == {1e-5}


@pytest.mark.parametrize(("name", "tokens", "std"), [
    ("deit_tiny", 1, 0.02), ("deit_small", 2, 0.02), ("vit_small", 1, 1e-6), ("vit_small", 2, 0.02),
])  # fmt: skip
def test_class_tokens_start_as_published(name: str, tokens: int, std: float) -> None:
    vit = build_backbone(name, img_size=32, num_tokens=tokens)
    for token in [vit.cls_token, vit.reg_token][:tokens]:
        assert float(token.detach().std()) == pytest.approx(std, rel=0.2)


def test_mlp_shapes() -> None:
    """Names and norms of the published heads: hidden norm with bias, none after the last layer."""
    head = mlp(6, 8, 4, 2)
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head[0].bias is not None
    assert [type(layer).__name__ for layer in mlp(6, 8, 4, 1)] == ["Linear"]
    assert [type(layer).__name__ for layer in mlp(6, 8, 6, 0)] == ["Identity"]
    v3 = mlp(6, 8, 4, 3, bias=False, last_batch_norm=True)
    assert v3[0].bias is None
    assert not v3[-1].affine


# ---- all views in one pass of the backbone -------------------------------------------------------

STACKING = ["byol", "moby", "synco_v2", "mocov3", "batchformer"]


def loss_and_passes(method: str, family: str, stack: bool) -> tuple[Tensor, int]:
    torch.manual_seed(3)
    framework = small(method, family, stack_views=stack).double()
    for part in framework.modules():  # the draws of drop path come in another order
        if hasattr(part, "drop_prob"):
            part.drop_prob = 0.0
    passes = []
    framework.online.backbone.register_forward_hook(lambda *_: passes.append(1))
    torch.manual_seed(4)
    loss = framework([view.double() for view in views(0)], Progress(0, 2, 4))["loss"]
    return loss.detach(), len(passes)


@pytest.mark.parametrize("method", ["byol", "moby", "synco_v2", "mocov3"])
def test_stacked_views_give_the_same_loss_without_batch_norm(method: str) -> None:
    (apart, two), (together, one) = (
        loss_and_passes(method, "deit", stack) for stack in (False, True)
    )
    assert (two, one) == (2, 1)
    torch.testing.assert_close(apart, together, rtol=1e-9, atol=1e-9)


def test_stacked_views_share_the_statistics_of_batch_norm() -> None:
    (apart, _), (together, _) = (
        loss_and_passes("byol", "resnet", stack) for stack in (False, True)
    )
    assert abs(apart - together) > 1e-6


@pytest.mark.parametrize("method", sorted(set(FRAMEWORKS) - set(STACKING)))
def test_methods_whose_views_differ_refuse_to_stack_them(method: str) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.STACK_VIEWS"):
        small(method, stack_views=True)
