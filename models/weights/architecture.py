"""Tell the architecture of weights by the names and shapes of their tensors."""

import math
from collections.abc import Mapping

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.mocov3_vit import sincos_positions

# MODEL.BACKBONE.NAME by what `describe` says of the blocks and the width
_RESNETS = {
    "basic 1/1/1": "resnet8",
    "basic 2/2/2/2": "resnet18",
    "basic 3/4/6/3": "resnet34",
    "bottleneck 3/4/6/3": "resnet50",
    "bottleneck 3/4/23/3": "resnet101",
}
_SWINS = {
    (96, "2/2/6/2"): "swin_tiny",
    (96, "2/2/18/2"): "swin_small",
    (128, "2/2/18/2"): "swin_base",
}
# by width and whether the positions are MoCo v3's fixed ones
_VITS = {
    (192, False): "deit_tiny",
    (384, False): "deit_small",
    (768, False): "deit_base",
    (384, True): "vit_small",
    (768, True): "vit_base",
}


def family(state: Mapping[str, Tensor]) -> str:
    """Return `resnet`, `vit`, `swin` or `other` by the keys of a state dict in our names."""
    if "layer1.0.conv1.weight" in state:
        return "resnet"
    if "layers.0.blocks.0.attn.qkv.weight" in state:
        return "swin"
    return "vit" if "cls_token" in state and "blocks.0.attn.qkv.weight" in state else "other"


def describe(state: Mapping[str, Tensor]) -> str:
    """Say in a few words which architecture a state dict in our names is of."""
    kind = family(state)
    if kind == "resnet":
        blocks, widths = stages_of(state)
        depths = "/".join(map(str, blocks))
        return f"ResNet, {block_type(state)} blocks {depths}, width {widths[-1]}"
    if kind == "vit":
        depth = sum(key.endswith("attn.qkv.weight") for key in state)
        tokens, width = state["pos_embed"].shape[1:]
        positions = "fixed sin-cos" if is_sincos(state["pos_embed"]) else "learned"
        # MoCo v3's ViT-S has 12 heads, DeiT's 6. No shape tells them apart, but the positions do.
        heads = {"fixed sin-cos": 12, "learned": 6}[positions] if width == 384 else width // 64
        size = f"width {width}, {depth} blocks, {heads} heads"
        return f"ViT, {size} by its {positions} positions ({tokens})"
    if kind == "swin":
        width = len(state["patch_embed.proj.weight"])
        return f"Swin, width {width}, blocks {_swin_depths(state)}"
    return "another"


def name_of(state: Mapping[str, Tensor]) -> str:
    """Return the name that MODEL.BACKBONE.NAME has for a network in our names; "" if it has none.

    Options such as the patch size or the stem are not looked at.
    """
    try:
        return _name_of(state)
    except (KeyError, IndexError, ValueError, RuntimeError):  # half a network, or odd shapes
        return ""


def _name_of(state: Mapping[str, Tensor]) -> str:
    kind = family(state)
    if kind == "resnet":
        return _RESNETS.get(f"{block_type(state)} {'/'.join(map(str, stages_of(state)[0]))}", "")
    if kind == "swin":
        return _SWINS.get((len(state["patch_embed.proj.weight"]), _swin_depths(state)), "")
    if kind == "other":
        return ""
    name = _VITS.get((state["pos_embed"].shape[2], is_sincos(state["pos_embed"])), "")
    depth = sum(key.endswith("attn.qkv.weight") for key in state)
    # the convolutional stem takes the place of a block (MoCo v3, arXiv:2104.02057)
    stem = "patch_embed.proj.weight" not in state
    name = name.replace("vit_", "vit_conv_") if stem else name
    return name if depth == 12 - stem else ""


def of_another(state: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> str:
    """Return what to do about weights of another network than the backbone; "" if they are not."""
    name = name_of(state)
    if not name or (own and name == name_of(own)):
        return ""
    ours = f", the backbone {describe(own)}" if own and name_of(own) else ""
    return f"is a {name} ({describe(state)}){ours}; set MODEL.BACKBONE.NAME (--backbone) to {name}"


def block_type(state: Mapping[str, Tensor]) -> str:
    """Return the kind of a ResNet's blocks, as transformers names it."""
    return "bottleneck" if "layer1.0.conv3.weight" in state else "basic"


def stages_of(state: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Return the number of blocks and the width of each stage of a ResNet."""
    last = "conv3" if block_type(state) == "bottleneck" else "conv2"
    stages = [i for i in range(1, 5) if f"layer{i}.0.conv1.weight" in state]
    blocks = [sum(f"layer{i}.{j}.conv1.weight" in state for j in range(64)) for i in stages]
    return blocks, [len(state[f"layer{i}.0.{last}.weight"]) for i in stages]


def _swin_depths(state: Mapping[str, Tensor]) -> str:
    stages = [key.split(".")[1] for key in state if key.endswith("attn.qkv.weight")]
    return "/".join(str(stages.count(str(number))) for number in range(4))


def is_sincos(positions: Tensor) -> bool:
    """Tell whether positions (1, tokens + h*h, F) are MoCo v3's fixed ones, even fine-tuned."""
    side = math.isqrt(positions.shape[1])
    patches = positions[0, -side * side :].float().flatten()
    # [0, 1:]: without the class token
    fixed = sincos_positions(side, side, positions.shape[-1])[0, 1:].flatten()
    return bool(F.cosine_similarity(patches, fixed, dim=0) > 0.9)


def takes_img_size(timm_name: str) -> bool:
    """Tell whether a model of timm is built for one image size, as transformers are."""
    known = timm.get_pretrained_cfg(timm_name)
    try:
        with torch.device("meta"):  # without memory for its weights
            timm.create_model(timm_name, img_size=known.input_size[-1] if known else 224)
    except TypeError:
        return False
    return True
