"""Exported weights load into the real libraries and give the same features, or have their exact names."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from models.parts.backbones import BACKBONES, build_backbone
from models.weights.architecture import describe, family, name_of
from models.weights.export import (
    check_plain_resnet,
    moco_head,
    relative_position_index,
    to_detectron2,
    to_huggingface,
    to_mmdet,
    to_moco,
    to_original_swin,
    to_torchvision,
)
from models.weights.find import find_network
from models.weights.load import load_backbone
from models.weights.naming import NAMINGS, to_our_names
from tests.small_models import small_swin, small_vit

State = dict[str, Tensor]


def resnet(name: str = "resnet18") -> Any:
    return shaken(timm.create_model(name, num_classes=0))


def vit(**options: Any) -> Any:
    return shaken(small_vit(**options))


def swin(**options: Any) -> Any:
    return shaken(small_swin(**options))


def shaken(model: Any) -> Any:
    """Move every tensor off its start, so that norms, biases and tables all matter."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor += 0.05 * torch.rand(tensor.shape, generator=generator)
        elif key.endswith("num_batches_tracked"):
            tensor += 7
    return model.eval()


@torch.no_grad()
def same(first: Tensor, second: Tensor) -> None:
    scale = first.abs().max()
    torch.testing.assert_close(first / scale, second / scale, rtol=0, atol=1e-5)


# ---- torchvision and timm ------------------------------------------------------------------------


def torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(
        32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=192
    )
    model.heads = nn.Identity()
    return model.eval()


def torchvision_swin() -> nn.Module:
    model = torchvision.models.SwinTransformer([2, 2], 16, [2, 2, 2, 2], [1, 2, 4, 8], [4, 4])
    model.head = nn.Identity()
    return model.eval()


def torchvision_resnet() -> nn.Module:
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model.eval()


TORCHVISION = {
    "resnet": (resnet, torchvision_resnet, 64),
    "vit": (vit, torchvision_vit, 32),
    "swin": (swin, torchvision_swin, 64),
}


@pytest.mark.parametrize("kind", TORCHVISION)
@torch.no_grad()
def test_torchvision_loads_strictly_and_gives_the_same_features(kind: str) -> None:
    ours, theirs, size = TORCHVISION[kind]
    backbone, model = ours(), theirs()
    if kind == "vit":
        assert model.encoder.ln.eps == 1e-6
        backbone.norm.eps = 1e-6
        assert backbone.blocks[0].norm1.eps == 1e-6
    model.load_state_dict(to_torchvision(backbone.state_dict()), strict=True)
    images = torch.randn(2, 3, size, size)
    same(backbone(images), model(images))


@pytest.mark.parametrize("kind", TORCHVISION)
@torch.no_grad()
def test_torchvision_files_with_their_heads_come_in(kind: str) -> None:
    ours, theirs, size = TORCHVISION[kind]
    model = theirs()
    head = {"resnet": "fc", "vit": "heads.head", "swin": "head"}[kind]
    shaken(model)
    published = {
        **model.state_dict(),
        f"{head}.weight": torch.ones(3, 2),
        f"{head}.bias": torch.ones(3),
    }
    backbone = ours()
    network = find_network(published, own=backbone.state_dict())
    load_backbone(backbone, network.state, "torchvision.pth")
    images = torch.randn(2, 3, size, size)
    same(backbone(images), model(images))


def test_what_torchvision_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="has one class token, this one two"):
        to_torchvision(vit(reg_tokens=1).state_dict())
    state = {**resnet().state_dict(), "conv1.weight": torch.ones(64, 3, 3, 3)}
    with pytest.raises(ValueError, match=r"7x7 stem, this one 3x3 \(MODEL\.BACKBONE\.STEM\)"):
        to_torchvision(state)
    with pytest.raises(
        ValueError, match=r"Detectron2 takes resnet here, not this backbone \(vit\)"
    ):
        to_detectron2(vit().state_dict())


@pytest.mark.parametrize("library", ["torchvision", "MMDetection"])
def test_windows_of_several_sizes_are_refused_where_a_library_has_one(library: str) -> None:
    export = {"torchvision": to_torchvision, "MMDetection": to_mmdet}[library]
    with pytest.raises(ValueError, match=rf"{library}'s Swin has one window size.*\[2, 4\]"):
        export(swin(img_size=32).state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet26", "resnext50_32x4d", "wide_resnet50_2"])
def test_only_plain_resnets_pass_for_plain_ones(name: str) -> None:
    """Also wide ones, and those with groups; a backbone's mode stays."""
    backbone = resnet(name).train()
    check_plain_resnet(backbone, "torchvision")
    assert backbone.training
    check_plain_resnet(build_backbone("resnet8"), "transformers")
    with pytest.raises(ValueError, match="torchvision's ResNets have four stages, this one three"):
        check_plain_resnet(build_backbone("resnet8"), "torchvision")
    check_plain_resnet(vit(), "torchvision")


@pytest.mark.parametrize("name", ["resnetaa50", "resnetblur18", "resnet50_gn"])
def test_relatives_of_the_resnet_with_its_names_are_refused(name: str) -> None:
    """Their tensors would load into the plain one, which has other features."""
    with pytest.raises(ValueError, match=r"^Detectron2('s ResNets have batch norms| would load)"):
        check_plain_resnet(resnet(name), "Detectron2")


# ---- Hugging Face --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resnet18", "resnet50", "vit", "vit with two tokens", "swin"])
@torch.no_grad()
def test_transformers_load_the_folder_and_give_the_same_features(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    backbone = {
        "resnet18": resnet,
        "resnet50": lambda: resnet("resnet50"),
        "vit": vit,
        "vit with two tokens": lambda: vit(reg_tokens=1),
        "swin": swin,
    }[kind]()
    size = 32 if kind.startswith("vit") else 64
    state, config = to_huggingface(backbone, size)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    extra = {"add_pooling_layer": False} if kind.startswith("vit") else {}
    model, info = transformers.AutoModel.from_pretrained(
        tmp_path, output_loading_info=True, **extra
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = torch.randn(2, 3, size, size)
    out = model.eval()(images)
    same(backbone(images), out.last_hidden_state[:, 0] if extra else out.pooler_output.flatten(1))
    assert type(model).__name__ == config["architectures"][0]


def test_a_swin_smaller_than_its_window_is_not_forced_into_transformers() -> None:
    with pytest.raises(ValueError, match="one window size; this model's last stages are smaller"):
        to_huggingface(swin(img_size=32), 32)


def test_wide_resnets_are_not_forced_into_transformers() -> None:
    with torch.device("meta"):
        wide = timm.create_model("wide_resnet50_2", num_classes=0)
    with pytest.raises(ValueError, match="transformers' ResNets are not wide"):
        to_huggingface(wide, 64)


# ---- Detectron2: exact names and shapes ----------------------------------------------------------


def published_names(blocks: tuple[int, ...]) -> set[str]:
    """Return the names of MoCo v2's converted ResNet-50, spelt out."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"stem.conv1.weight", *(f"stem.conv1.norm.{part}" for part in norm)}
    for stage, count in enumerate(blocks, start=2):
        for block, conv in itertools.product(range(count), ("conv1", "conv2", "conv3", "shortcut")):
            if conv != "shortcut" or block == 0:
                names.add(f"res{stage}.{block}.{conv}.weight")
                names |= {f"res{stage}.{block}.{conv}.norm.{part}" for part in norm}
    return names | {f"stem.fc.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}


def test_detectron2_gets_the_322_published_arrays() -> None:
    backbone = resnet("resnet50")
    head = {"0.weight": torch.ones(2048, 2048), "0.bias": torch.ones(2048)}
    head |= {"2.weight": torch.ones(128, 2048), "2.bias": torch.ones(128)}
    arrays = to_detectron2({**backbone.state_dict(), **moco_head(head)})
    assert len(arrays) == 322
    assert arrays.keys() == published_names((3, 4, 6, 3))
    assert all(type(array) is np.ndarray for array in arrays.values())
    assert arrays["res4.5.conv2.weight"].shape == (256, 256, 3, 3)
    assert arrays["res2.0.shortcut.weight"].shape == (256, 64, 1, 1)
    assert arrays["stem.conv1.norm.num_batches_tracked"].shape == ()
    state = backbone.state_dict()
    assert np.array_equal(
        arrays["res3.1.conv2.norm.running_var"], state["layer2.1.bn2.running_var"]
    )
    assert np.array_equal(arrays["res5.0.shortcut.norm.bias"], state["layer4.0.downsample.1.bias"])
    arrays["stem.conv1.weight"][:] = 0
    assert state["conv1.weight"].abs().sum() > 0  # a copy


def test_only_mocos_heads_are_called_so() -> None:
    assert moco_head({"0.weight": torch.ones(1), "0.bias": torch.ones(1)}).keys() == {
        "fc.weight",
        "fc.bias",
    }
    assert moco_head({"0.weight": torch.ones(1), "1.weight": torch.ones(1)}) == {}
    exported = to_moco({"conv1.weight": torch.ones(1)}, {"fc.0.bias": torch.ones(1)})
    assert exported.keys() == {"module.encoder_q.conv1.weight", "module.encoder_q.fc.0.bias"}


# ---- MMDetection and Swin's own code -------------------------------------------------------------


class UnfoldMerging(nn.Module):
    """Merge patches as MMCV does: nn.Unfold over (N, C, H, W), norm, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        cells = nn.functional.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2)
        merged = self.reduction(self.norm(cells.transpose(1, 2)))
        return merged.unflatten(1, (x.shape[1] // 2, -1))


@torch.no_grad()
def test_mmdetections_merging_gets_its_own_order_of_channels() -> None:
    backbone = swin()
    exported = to_mmdet(backbone.state_dict())
    merging = UnfoldMerging(16)
    prefix = "backbone.stages.0.downsample."
    merging.load_state_dict(
        {k.removeprefix(prefix): t for k, t in exported.items() if k.startswith(prefix)}
    )
    x = torch.randn(2, 8, 8, 16)
    same(backbone.layers[1].downsample(x), merging(x))


def test_mmdetection_gets_its_names() -> None:
    exported = to_mmdet(swin().state_dict())
    block = {
        *(
            f"{part}.{kind}"
            for part in ("norm1", "norm2", "attn.w_msa.qkv", "attn.w_msa.proj")
            for kind in WB
        ),
        *(f"{part}.{kind}" for part in ("ffn.layers.0.0", "ffn.layers.1") for kind in WB),
        "attn.w_msa.relative_position_bias_table",
        "attn.w_msa.relative_position_index",
    }
    expected = {
        f"backbone.stages.{i}.blocks.{j}.{name}"
        for i in range(4)
        for j in range(2)
        for name in block
    }
    for name in ("reduction.weight", "norm.weight", "norm.bias"):
        expected |= {f"backbone.stages.{i}.downsample.{name}" for i in range(3)}
    expected |= {
        f"backbone.patch_embed.{part}.{kind}" for part in ("projection", "norm") for kind in WB
    }
    assert exported.keys() == expected | {"backbone.norm.weight", "backbone.norm.bias"}
    table = exported["backbone.stages.2.blocks.1.attn.w_msa.relative_position_bias_table"]
    assert table.shape == (49, 4)
    assert exported["backbone.stages.1.downsample.reduction.weight"].shape == (64, 128)
    assert to_mmdet(resnet().state_dict()).keys() == resnet().state_dict().keys()


WB = ("weight", "bias")


def test_swins_own_code_gets_the_merging_at_the_end_of_stages() -> None:
    state = swin().state_dict()
    exported = to_original_swin(state)
    assert torch.equal(
        exported["layers.2.downsample.norm.bias"], state["layers.3.downsample.norm.bias"]
    )
    assert "layers.3.downsample.norm.bias" not in exported
    assert exported["layers.0.blocks.0.attn.relative_position_index"].shape == (16, 16)


@pytest.mark.parametrize("window", [2, 4, 7])
def test_the_index_of_relative_positions_is_timms(window: int) -> None:
    attention = SwinTransformer(
        img_size=window, patch_size=1, window_size=window, embed_dim=4, depths=(1,), num_heads=(1,)
    )
    assert torch.equal(
        attention.layers[0].blocks[0].attn.relative_position_index, relative_position_index(window)
    )


# ---- there and back ------------------------------------------------------------------------------


def written_names(naming_index: int) -> State:
    state = {"resnet": resnet, "vit": vit, "swin": swin}[
        KIND_OF[NAMINGS[naming_index].name]
    ]().state_dict()
    if NAMINGS[naming_index].name.startswith("SiT"):
        state = vit(reg_tokens=1).state_dict()
    if "convolutional" in NAMINGS[naming_index].name:
        state = {**state, "patch_embed.stem.0.weight": torch.randn(2, 3, 3, 3)}
        del state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    return state


KIND_OF = {
    **{naming.name: "vit" for naming in NAMINGS},
    **{
        naming.name: "swin"
        for naming in NAMINGS
        if "Swin" in naming.name or "merging" in naming.name
    },
    **{naming.name: "resnet" for naming in NAMINGS if "ResNet" in naming.name},
}


@pytest.mark.parametrize("index", range(len(NAMINGS)), ids=[naming.name for naming in NAMINGS])
def test_every_naming_is_found_again_and_leads_back_bit_by_bit(index: int) -> None:
    state = written_names(index)
    theirs = NAMINGS[index].to_theirs(state)
    assert NAMINGS[index].signature in theirs
    back, names = to_our_names(theirs)
    assert names == {"": NAMINGS[index].name}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    wrapped, names = to_our_names({f"odd.module.{key}": t for key, t in theirs.items()})
    assert names == {"odd.module.": NAMINGS[index].name}
    assert wrapped.keys() == {f"odd.module.{key}" for key in state}


def test_our_own_names_are_no_foreign_ones() -> None:
    for state in (resnet().state_dict(), vit().state_dict(), swin().state_dict()):
        assert to_our_names(state)[1] == {}


def test_a_tensor_without_a_name_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torchvision ViT has no name for blocks\.0\.ls1\.gamma"):
        to_torchvision({**vit().state_dict(), "blocks.0.ls1.gamma": torch.ones(48)})


def test_architectures_are_described() -> None:
    assert (
        describe(resnet("resnet50").state_dict()) == "ResNet, bottleneck blocks 3/4/6/3, width 2048"
    )
    assert describe(vit(embed_dim=192).state_dict()).startswith(
        "ViT, width 192, 2 blocks, 3 heads by its learned"
    )
    assert describe(swin().state_dict()) == "Swin, width 16, blocks 2/2/2/2"
    assert describe({"a": torch.ones(1)}) == "another"
    assert family(swin().state_dict()) == "swin"


@pytest.mark.parametrize("name", [n for n in BACKBONES if "base" not in n])
def test_each_backbone_is_known_by_its_weights(name: str) -> None:
    assert name_of(build_backbone(name).state_dict()) == name


def test_half_a_network_or_an_odd_one_has_no_name() -> None:
    swin_tiny = build_backbone("swin_tiny").state_dict()
    del swin_tiny["patch_embed.proj.weight"]
    odd = {"cls_token": torch.ones(1), "blocks.0.attn.qkv.weight": torch.ones(2, 2)}
    for pos_embed in (torch.ones(1), torch.ones(1, 5, 7), torch.ones(1, 0, 384)):
        assert name_of({**odd, "pos_embed": pos_embed}) == ""
    assert name_of(swin_tiny) == name_of(vit(embed_dim=192).state_dict()) == ""
    assert name_of({"layer1.0.conv1.weight": torch.ones(1)}) == ""
