"""One backbone of each family of timm: a step, weight decay, layer decay, a round trip and export."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from engine.optim import build_optimizer, parameter_groups
from models import assemble_framework, framework_options
from models.classifier import layer_ids
from models.parts.backbones import Backbone, build_backbone
from models.weights import export
from models.weights.load import load_network
from utils.config.load import load_config
from utils.config.schema import declare
from utils.schedules import Progress

# name in timm, image size
SMALL = [
    ("test_convnext", 32),
    ("test_convnext2", 32),
    ("test_vit", 32),  # class token
    ("test_vit2", 32),  # register, layer scale
    ("test_vit3", 32),  # attention pooling
    ("test_vit_relpos", 32),
    ("test_efficientnet", 32),
    ("test_efficientnet_gn", 32),
    ("test_byobnet", 32),
    ("test_resnet", 32),
    ("test_nfnet", 32),
    ("test_maxvit", 64),
    ("test_coatnet", 64),
    ("mobilenetv3_small_050", 32),
    ("regnetx_002", 32),
]
LARGE = [
    ("vit_small_patch16_dinov3", 32),  # RoPE, registers
    ("vit_small_patch14_reg4_dinov2", 28),
    ("deit3_small_patch16_224", 32),
    ("resnext50_32x4d", 32),
    ("swinv2_tiny_window8_256", 64),
    ("convnext_tiny", 32),
]
CASES = [*SMALL, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE)]
families = pytest.mark.parametrize(("name", "size"), CASES)
OPTIM = [
    *("OPTIM.NAME", "adamw", "OPTIM.EXCLUDE_1D", "True"),
    *("OPTIM.EXCLUDE_TOKENS", "True", "OPTIM.WEIGHT_DECAY", "0.1"),
]
CFG = load_config(declare(framework_options()), (), OPTIM)


def build(name: str, size: int) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(f"timm/{name}", img_size=size)


@families
def test_a_step_moves_every_parameter_and_the_target(name: str, size: int) -> None:
    torch.manual_seed(0)
    options = {"queue_size": 16, "out_dim": 8}
    backbone = {"name": f"timm/{name}"}
    method = assemble_framework("moco_v2", options, backbone, img_size=size)
    optimizer = build_optimizer(CFG.OPTIM, parameter_groups(method, CFG.OPTIM))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    views = [torch.randn(4, 3, size, size) for _ in range(2)]
    progress = Progress(step=0, total_steps=2, steps_per_epoch=2)
    loss = method(views, progress)["loss"]
    loss.backward()
    still = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not still
    before = [p.clone() for p in method.target.parameters()]
    optimizer.step()
    method.after_step(progress)
    assert torch.isfinite(loss)
    after = list(method.target.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@families
def test_weight_decay_spares_what_timm_spares(name: str, size: int) -> None:
    backbone = build(name, size)
    (decayed, exempt) = parameter_groups(torch.nn.ModuleDict({"b": backbone}), CFG.OPTIM)
    names = {parameter: key for key, parameter in backbone.named_parameters()}
    spared = {names[parameter] for parameter in exempt["params"]}
    wanted = {key for key, p in backbone.named_parameters() if p.ndim <= 1}
    wanted |= getattr(backbone, "no_weight_decay", set)() & set(names.values())
    assert wanted <= spared
    assert all(names[p].endswith("weight") or p.ndim > 1 for p in decayed["params"])


@families
def test_each_parameter_has_a_layer_that_grows_from_the_stem(name: str, size: int) -> None:
    backbone = build(name, size)
    layers = layer_ids(backbone)
    assert set(layers) >= {key for key, _ in backbone.named_parameters()}
    stem = min(layers.values())
    first = [key for key, layer in layers.items() if layer == stem]
    assert stem == 0
    assert any(key.startswith(("stem", "patch_embed", "conv", "bn1")) for key in first)
    assert max(layers.values()) >= 4


def test_a_family_without_layers_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="LAYER_DECAY: timm knows no layers"):
        layer_ids(build("poolformer_s12", 32))


@families
def test_a_file_of_timm_loads_back(name: str, size: int, tmp_path: Path) -> None:
    backbone = build(name, size)
    content = {"framework": {f"online.backbone.{k}": v for k, v in backbone.state_dict().items()}}
    torch.manual_seed(1)
    other = build_backbone(f"timm/{name}", img_size=size)
    for file in (backbone.state_dict(), content):
        load_network(other, file, "file.pth")
        for key, tensor in backbone.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), key


Writer = Callable[[Backbone, dict[str, Tensor]], object]
WRITERS: dict[str, Writer] = {
    "torchvision": lambda backbone, state: export.to_torchvision(state),
    "detectron2": lambda backbone, state: export.to_detectron2(state),
    "mmdet": lambda backbone, state: export.to_mmdet(state),
    "swin": lambda backbone, state: export.to_original_swin(state),
    "huggingface": lambda backbone, state: export.to_huggingface(backbone, 32),
}
# what has the same tensors there under the names that we write
WRITTEN = {
    ("test_vit", "torchvision"),
    ("test_vit", "huggingface"),
    ("resnext50_32x4d", "torchvision"),
    ("resnext50_32x4d", "detectron2"),
    ("resnext50_32x4d", "mmdet"),
}


@pytest.mark.parametrize("to", WRITERS)
@families
def test_export_is_right_or_refused_in_words(name: str, size: int, to: str) -> None:
    backbone = build(name, size)
    if (name, to) in WRITTEN:
        assert WRITERS[to](backbone, backbone.state_dict())
        return
    with pytest.raises(ValueError, match="--to timm"):
        WRITERS[to](backbone, backbone.state_dict())


@pytest.mark.slow
def test_torchvision_computes_a_resnext_alike() -> None:
    backbone = build("resnext50_32x4d", 64).eval()
    theirs = torchvision.models.resnext50_32x4d().eval()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(export.to_torchvision(backbone.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(backbone(images), theirs(images), atol=1e-5)
