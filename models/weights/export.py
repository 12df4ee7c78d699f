"""Write backbones in the layouts of other libraries, from a state dict in our (timm's) names."""

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from models.weights.architecture import block_type, family, stages_of
from models.weights.naming import (
    DETECTRON2_RESNET,
    HF_RESNET,
    HF_SWIN,
    HF_VIT,
    MMDET_SWIN,
    ORIGINAL_SWIN,
    TORCHVISION_SWIN,
    TORCHVISION_VIT,
    Naming,
)

State = dict[str, Tensor]
_TABLE = "relative_position_bias_table"
_ANY_CHANNELS = ("transformers", "Swin's own code")  # their configurations say how many
_RESNET_KEY = re.compile(
    r"(?:conv1|bn1|fc(?:\.\d)?|layer[1-4]\.\d+\.(?:(?:conv|bn)[123]|downsample\.[01]))\.\w+$"
)


def to_torchvision(state: Mapping[str, Tensor]) -> State:
    """Return the state for torchvision's ResNet, VisionTransformer or SwinTransformer, no head."""
    kind = _known(state, "torchvision", {"resnet", "vit", "swin"})
    if kind == "resnet":
        return _resnet(state, "torchvision")
    if kind == "vit":
        if "reg_token" in state:
            raise ValueError("torchvision's ViT has one class token, this one two; use --to timm")
        return TORCHVISION_VIT.to_theirs(state)
    _refuse_mixed_windows(state, "torchvision")
    return _with_indices(TORCHVISION_SWIN.to_theirs(state), flat=True)


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return a ResNet's state in Detectron2's names, as arrays.

    As in MoCo's published converter, all tensors go along: batch-norm counters, and heads as
    `stem.fc.*`.
    """
    _known(state, "Detectron2", {"resnet"})
    _refuse_variants(state, "Detectron2")
    renamed = DETECTRON2_RESNET.to_theirs(state)
    return {key: np.array(tensor.detach().cpu().numpy()) for key, tensor in renamed.items()}


def to_mmdet(state: Mapping[str, Tensor]) -> State:
    """Return the state for MMDetection >= 2: a ResNet in torchvision's names, a Swin in its own."""
    if _known(state, "MMDetection", {"resnet", "swin"}) == "resnet":
        return _resnet(state, "MMDetection")
    _refuse_mixed_windows(state, "MMDetection")
    renamed = _with_indices(MMDET_SWIN.to_theirs(state))
    return {f"backbone.{key}": tensor for key, tensor in renamed.items()}


def to_original_swin(state: Mapping[str, Tensor]) -> State:
    """Return the state in the names of Swin's own code, for detection and segmentation too."""
    _known(state, "Swin's own code", {"swin"})
    return _with_indices(ORIGINAL_SWIN.to_theirs(state))


def to_moco(state: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> State:
    """Return the state under MoCo's query prefix; `head` is its projector, as `fc.*`."""
    return {f"module.encoder_q.{key}": tensor for key, tensor in {**state, **head}.items()}


def moco_head(projector: Mapping[str, Tensor]) -> State:
    """Return a projector's tensors (`0.weight`, ...) as MoCo's `fc.*`; empty for another form."""
    if projector.keys() == {"0.weight", "0.bias"}:
        return {f"fc.{key.removeprefix('0.')}": tensor for key, tensor in projector.items()}
    if projector.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}:
        return {f"fc.{key}": tensor for key, tensor in projector.items()}
    return {}


def to_huggingface(backbone: nn.Module, img_size: int) -> tuple[State, dict[str, object]]:
    """Return state and configuration of transformers' ResNet, ViT, DeiT or Swin model."""
    state = backbone.state_dict()
    kind = _known(state, "transformers", {"resnet", "vit", "swin"})
    if kind == "resnet":
        plain = _resnet(state, "transformers")
        if any(
            key.endswith("conv2.weight") and t.shape[0] != t.shape[1] for key, t in plain.items()
        ):
            raise ValueError("transformers' ResNets have no groups (ResNeXt); use --to timm")
        if block_type(state) == "bottleneck":
            inner, outer = (len(state[f"layer1.0.conv{number}.weight"]) for number in (1, 3))
            if outer != 4 * inner:
                raise ValueError("transformers' ResNets are not wide; use --to timm")
        return HF_RESNET.to_theirs(plain), _resnet_config(state)
    naming: Naming = HF_VIT if kind == "vit" else HF_SWIN
    renamed = naming.to_theirs(state)
    config = _vit_config(backbone, img_size) if kind == "vit" else _swin_config(backbone, img_size)
    return renamed, config


def _known(state: Mapping[str, Tensor], library: str, families: set[str]) -> str:
    kind = family(state)
    # Swin v2 has v1's names and other attention, so other libraries would load it into a v1.
    if kind == "swin" and any(key.endswith("attn.logit_scale") for key in state):
        kind = "Swin v2"
    if kind not in families:
        raise ValueError(
            f"{library} takes {', '.join(sorted(families))} here, not this backbone ({kind}); use "
            "--to timm"
        )
    if library not in _ANY_CHANNELS and (channels := _channels(state)) != 3:
        raise ValueError(
            f"{library} builds backbones for 3 channels, this one takes {channels}; use --to timm"
        )
    return kind


def _resnet(state: Mapping[str, Tensor], library: str) -> State:
    """Return a ResNet as it is, for libraries that have only its ImageNet stem."""
    _refuse_variants(state, library)
    kernel = state["conv1.weight"].shape[-1]
    # our stems for small images have a kernel of 3
    if kernel != 7:
        raise ValueError(
            f"{library}'s ResNets have a 7x7 stem, this one {kernel}x{kernel} "
            "(MODEL.BACKBONE.STEM); use --to timm"
        )
    return dict(state)


def _refuse_variants(state: Mapping[str, Tensor], library: str) -> None:
    """Refuse timm's relatives of the ResNet, with deeper stems or attention, by their tensors."""
    for key in state:
        if not _RESNET_KEY.match(key):
            raise ValueError(f"{library}'s ResNets have no {key}; use --to timm")
    if "bn1.running_mean" not in state:
        raise ValueError(f"{library}'s ResNets have batch norms, this one has none; use --to timm")


@torch.no_grad()
def check_plain_resnet(backbone: nn.Module, library: str) -> None:
    """Refuse a ResNet that computes something else than the plain one of the same tensors.

    timm has such relatives, e.g. with a blur before each stride (resnetaa50), and only their
    features tell. So is a ResNet of three stages refused, but by transformers, which can have any
    number. Other backbones pass.
    """
    state = {k: v for k, v in backbone.state_dict().items() if not k.startswith("fc.")}
    if family(state) != "resnet":
        return
    _refuse_variants(state, library)
    if "layer4.0.conv1.weight" not in state:
        if library == "transformers":
            return
        raise ValueError(f"{library}'s ResNets have four stages, this one three; use --to timm")
    ours, plain = copy.deepcopy(backbone).eval(), _plain_resnet(state).eval()
    # stems for small images are no other network
    plain.conv1, plain.maxpool = ours.conv1, ours.maxpool
    try:
        plain.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{library}'s ResNets have other widths; use --to timm") from error
    images = torch.rand(2, _channels(state), 64, 64, generator=torch.Generator().manual_seed(0))
    # in float64 no unusual weights overflow
    features, expected = (model.double()(images.double()) for model in (ours, plain))
    if not torch.allclose(features, expected, rtol=0, atol=1e-3 * float(expected.abs().max())):
        raise ValueError(
            f"{library} would load this ResNet as the plain one, which has other features; use "
            "--to timm"
        )


def _plain_resnet(state: Mapping[str, Tensor]) -> ResNet:
    """Build torchvision's ResNet whose tensors a state fits, without its class layer."""
    middle = state["layer1.0.conv2.weight"]
    groups, width = len(middle) // middle.shape[1], middle.shape[1]
    if block_type(state) == "bottleneck":
        model = ResNet(Bottleneck, stages_of(state)[0], groups=groups, width_per_group=width)
    else:
        model = ResNet(BasicBlock, stages_of(state)[0])
    model.fc = nn.Identity()
    return model


def _refuse_mixed_windows(state: Mapping[str, Tensor], library: str) -> None:
    """Refuse a Swin with windows of several sizes, which timm builds where a map is smaller."""
    sizes = {(math.isqrt(len(t)) + 1) // 2 for key, t in state.items() if key.endswith(_TABLE)}
    if len(sizes) > 1:
        raise ValueError(
            f"{library}'s Swin has one window size, this one {sorted(sizes)}, since its last "
            "stages are smaller than its window: use --to timm, or another DATA.IMG_SIZE"
        )


def _with_indices(state: State, flat: bool = False) -> State:
    """Add the buffers `relative_position_index` that follow from the windows' sizes."""
    result = {}
    for key, tensor in state.items():
        result[key] = tensor
        if key.endswith(_TABLE):
            # the table of a window of w has (2 w - 1)^2 rows
            index = relative_position_index((math.isqrt(len(tensor)) + 1) // 2)
            name = key.removesuffix(_TABLE) + "relative_position_index"
            # torchvision keeps it flat
            result[name] = index.flatten() if flat else index
    return result


def relative_position_index(window: int) -> Tensor:
    """Return which row of the table a pair of positions of a window has, (window**2, window**2)."""
    rows = torch.arange(window).repeat_interleave(window)
    cols = torch.arange(window).repeat(window)
    # offsets from -(window - 1) to window - 1, moved to start at 0
    down = rows[:, None] - rows[None] + window - 1
    right = cols[:, None] - cols[None] + window - 1
    return down * (2 * window - 1) + right


def _channels(state: Mapping[str, Tensor]) -> int:
    """Return the number of channels of the images that a backbone takes."""
    return next(tensor.shape[1] for tensor in state.values() if tensor.ndim == 4)


def _resnet_config(state: Mapping[str, Tensor]) -> dict[str, object]:
    depths, widths = stages_of(state)
    return {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "num_channels": _channels(state),
        "embedding_size": len(state["conv1.weight"]),
        "hidden_sizes": widths,
        "depths": depths,
        "layer_type": block_type(state),
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        # the stride is in the 3x3 convolution, as in torchvision and timm
        "downsample_in_bottleneck": False,
    }


def _vit_config(backbone: Any, img_size: int) -> dict[str, object]:
    block = backbone.blocks[0]
    two_tokens = getattr(backbone, "reg_token", None) is not None
    if two_tokens and backbone.num_prefix_tokens != 2:
        raise ValueError("transformers' ViTs have one or two class tokens; use --to timm")
    return {
        "model_type": "deit" if two_tokens else "vit",
        "architectures": ["DeiTModel" if two_tokens else "ViTModel"],
        "image_size": img_size,
        "patch_size": backbone.patch_embed.patch_size[0],
        "num_channels": _channels(backbone.state_dict()),
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": backbone.norm.eps,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _swin_config(backbone: Any, img_size: int) -> dict[str, object]:
    windows = {block.window_size for layer in backbone.layers for block in layer.blocks}
    # timm makes a window no larger than its map; transformers knows one size for all
    if len(windows) > 1:
        raise ValueError(
            "transformers' Swin has one window size; this model's last stages are smaller than its "
            "window: use --to timm, or another DATA.IMG_SIZE"
        )
    return {
        "model_type": "swin",
        "architectures": ["SwinModel"],
        "image_size": img_size,
        "patch_size": backbone.patch_embed.patch_size[0],
        "num_channels": _channels(backbone.state_dict()),
        "embed_dim": backbone.patch_embed.proj.out_channels,
        "depths": [len(layer.blocks) for layer in backbone.layers],
        "num_heads": [layer.blocks[0].attn.num_heads for layer in backbone.layers],
        "window_size": windows.pop()[0],
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": backbone.layers[0].blocks[0].norm2.eps,
        "use_absolute_embeddings": False,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
