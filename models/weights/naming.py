"""How libraries name the tensors of the same networks: tables of renamings, for both directions.

"Ours" is timm's naming. In a pattern `#` stands for a number and `*` for the rest, and both stand
for the same on either side. The first rule that fits a key counts. A tuple of three patterns holds
the query, key and value parts of one of our tensors.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = dict[str, Tensor]
Rule = tuple[str, str | tuple[str, str, str]]


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _filled(pattern: str, groups: tuple[str, ...]) -> str:
    parts = iter(groups)
    return re.sub(r"[#*]", lambda _: next(parts), pattern)


@dataclass(frozen=True)
class Naming:
    """Translate a backbone's state dict between a library's names and ours.

    `signature` is a key that only such files have. `reorder` maps the end of our key to a pair
    of functions (to theirs, to ours) for tensors whose values are in another order.
    """

    name: str
    signature: str
    rules: tuple[Rule, ...]
    reorder: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = field(
        default_factory=dict
    )

    def to_ours(self, state: Mapping[str, Tensor]) -> State:
        """Return the state in our names; keys that the table does not know (heads) keep theirs."""
        result: State = {}
        thirds: dict[str, dict[int, Tensor]] = {}
        rules = [
            (_compiled(pattern), ours, part)
            for ours, theirs in self.rules
            for part, pattern in enumerate(theirs if isinstance(theirs, tuple) else (theirs,))
        ]
        joined = {ours for ours, theirs in self.rules if isinstance(theirs, tuple)}
        for key, tensor in state.items():
            for pattern, ours, part in rules:
                if match := pattern.fullmatch(key):
                    name = _filled(ours, match.groups())
                    if ours in joined:
                        thirds.setdefault(name, {})[part] = tensor
                    else:
                        result[name] = self._reordered(name, tensor, direction=1)
                    break
            else:
                result[key] = tensor
        # our qkv is query, key and value in one tensor
        for name, parts in thirds.items():
            result[name] = torch.cat([parts[part] for part in sorted(parts)])
        return result

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Return the state in the library's names; ValueError for a key without a name there."""
        result: State = {}
        rules = [(_compiled(ours), theirs) for ours, theirs in self.rules]
        for key, tensor in state.items():
            matches = ((pattern.fullmatch(key), theirs) for pattern, theirs in rules)
            found = next(((match, theirs) for match, theirs in matches if match), None)
            if found is None:
                raise ValueError(
                    f"{self.name} has no name for {key}; export with --to timm instead"
                )
            match, theirs = found
            # the parts of a chunk are views; safetensors takes none, so they are copied below
            values = tensor.chunk(3) if isinstance(theirs, tuple) else (tensor,)
            names = theirs if isinstance(theirs, tuple) else (theirs,)
            for name, value in zip(names, values, strict=True):
                result[_filled(name, match.groups())] = self._reordered(
                    key, value, direction=0
                ).contiguous()
        return result

    def _reordered(self, ours: str, tensor: Tensor, direction: int) -> Tensor:
        for suffix, functions in self.reorder.items():
            if ours.endswith(suffix):
                return functions[direction](tensor)
        return tensor


# Swin's merging stacks the four pixels of a 2x2 cell as (row, column) = 00, 10, 01, 11, block by
# block. MMDetection's uses nn.Unfold: the channel varies slowest and the pixels go 00, 01, 10, 11.
def _to_unfold(tensor: Tensor) -> Tensor:
    cells = tensor.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return cells.transpose(-1, -2).flatten(-2).contiguous()


def _from_unfold(tensor: Tensor) -> Tensor:
    cells = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return cells[..., [0, 2, 1, 3], :].flatten(-2).contiguous()


def _swap_token_rows(positions: Tensor) -> Tensor:
    """Exchange the rows of the first two tokens of positions (1, 2 + h*w, F)."""
    return torch.cat([positions[:, 1:2], positions[:, 0:1], positions[:, 2:]], dim=1)


TORCHVISION_VIT = Naming(
    "torchvision ViT",
    "conv_proj.weight",
    (
        ("cls_token", "class_token"),
        ("pos_embed", "encoder.pos_embedding"),
        ("patch_embed.proj.*", "conv_proj.*"),
        ("norm.*", "encoder.ln.*"),
        *(
            (f"blocks.#.{ours}", f"encoder.layers.encoder_layer_#.{theirs}")
            for ours, theirs in (
                ("norm1.*", "ln_1.*"),
                ("norm2.*", "ln_2.*"),
                ("attn.qkv.weight", "self_attention.in_proj_weight"),
                ("attn.qkv.bias", "self_attention.in_proj_bias"),
                ("attn.proj.*", "self_attention.out_proj.*"),
                ("mlp.fc1.*", "mlp.0.*"),
                ("mlp.fc2.*", "mlp.3.*"),
                ("mlp.fc1.*", "mlp.linear_1.*"),  # before torchvision 0.14; read only
                ("mlp.fc2.*", "mlp.linear_2.*"),
            )
        ),
    ),
)

TORCHVISION_SWIN = Naming(
    "torchvision Swin",
    "features.1.0.attn.qkv.weight",
    (
        ("patch_embed.proj.*", "features.0.0.*"),
        ("patch_embed.norm.*", "features.0.2.*"),
        ("norm.*", "norm.*"),
        *((f"layers.{i}.downsample.*", f"features.{2 * i}.*") for i in (1, 2, 3)),
        *(
            (f"layers.{i}.blocks.#.{ours}", f"features.{2 * i + 1}.#.{theirs}")
            for i in range(4)
            for ours, theirs in (("mlp.fc1.*", "mlp.0.*"), ("mlp.fc2.*", "mlp.3.*"), ("*", "*"))
        ),
    ),
)

# MoBY's, SynCo-v2's and Swin's own code, and timm before 0.9: merging closes a stage, ours opens
# the next.
ORIGINAL_SWIN = Naming(
    "merging at the end of stages",
    "layers.0.downsample.reduction.weight",
    (
        *((f"layers.{i + 1}.downsample.*", f"layers.{i}.downsample.*") for i in range(3)),
        ("norm.*", "norm.*"),
        ("norm.*", "norm3.*"),  # of detectors and segmenters, which have four; read only
        ("*", "*"),
    ),
)

MMDET_SWIN = Naming(
    "MMDetection Swin",
    "patch_embed.projection.weight",
    (
        ("patch_embed.proj.*", "patch_embed.projection.*"),
        ("patch_embed.norm.*", "patch_embed.norm.*"),
        ("norm.*", "norm.*"),  # MMDetection has four output norms instead, which start fresh
        ("norm.*", "norm3.*"),  # the fourth of a trained one; read only
        *((f"layers.{i + 1}.downsample.*", f"stages.{i}.downsample.*") for i in range(3)),
        ("layers.#.blocks.#.mlp.fc1.*", "stages.#.blocks.#.ffn.layers.0.0.*"),
        ("layers.#.blocks.#.mlp.fc2.*", "stages.#.blocks.#.ffn.layers.1.*"),
        ("layers.#.blocks.#.attn.*", "stages.#.blocks.#.attn.w_msa.*"),
        ("layers.#.blocks.#.*", "stages.#.blocks.#.*"),
    ),
    {
        "downsample.reduction.weight": (_to_unfold, _from_unfold),
        "downsample.norm.weight": (_to_unfold, _from_unfold),
        "downsample.norm.bias": (_to_unfold, _from_unfold),
    },
)

MMSEG_VIT = Naming(
    "MMSegmentation ViT",
    "layers.0.attn.attn.in_proj_weight",
    (
        ("cls_token", "cls_token"),
        ("pos_embed", "pos_embed"),
        ("patch_embed.proj.*", "patch_embed.projection.*"),
        ("norm.*", "ln1.*"),
        ("blocks.#.norm#.*", "layers.#.ln#.*"),
        ("blocks.#.attn.qkv.weight", "layers.#.attn.attn.in_proj_weight"),
        ("blocks.#.attn.qkv.bias", "layers.#.attn.attn.in_proj_bias"),
        ("blocks.#.attn.proj.*", "layers.#.attn.attn.out_proj.*"),
        ("blocks.#.mlp.fc1.*", "layers.#.ffn.layers.0.0.*"),
        ("blocks.#.mlp.fc2.*", "layers.#.ffn.layers.1.*"),
    ),
)

DETECTRON2_RESNET = Naming(
    "Detectron2 ResNet",
    "res2.0.conv1.weight",  # NFNets have a `stem.conv1` too
    (
        *(
            (f"layer{i}.#.{ours}", f"res{i + 1}.#.{theirs}")
            for i in range(1, 5)
            for ours, theirs in (
                ("downsample.1.*", "shortcut.norm.*"),
                ("downsample.0.*", "shortcut.*"),
                ("bn#.*", "conv#.norm.*"),
                ("*", "*"),
            )
        ),
        ("bn1.*", "stem.conv1.norm.*"),
        ("*", "stem.*"),
    ),
)

_HF_VIT_RULES: tuple[Rule, ...] = (
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("norm.*", "layernorm.*"),
    (
        "blocks.#.attn.qkv.*",
        (
            "encoder.layer.#.attention.attention.query.*",
            "encoder.layer.#.attention.attention.key.*",
            "encoder.layer.#.attention.attention.value.*",
        ),
    ),
    ("blocks.#.attn.proj.*", "encoder.layer.#.attention.output.dense.*"),
    ("blocks.#.norm1.*", "encoder.layer.#.layernorm_before.*"),
    ("blocks.#.norm2.*", "encoder.layer.#.layernorm_after.*"),
    ("blocks.#.mlp.fc1.*", "encoder.layer.#.intermediate.dense.*"),
    ("blocks.#.mlp.fc2.*", "encoder.layer.#.output.dense.*"),
)
HF_VIT = Naming(
    "Hugging Face ViT", "encoder.layer.0.attention.attention.query.weight", _HF_VIT_RULES
)

_HF_SWIN_BLOCK = "encoder.layers.#.blocks.#"
HF_SWIN = Naming(
    "Hugging Face Swin",
    "encoder.layers.0.blocks.0.attention.self.query.weight",
    (
        ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
        ("patch_embed.norm.*", "embeddings.norm.*"),
        ("norm.*", "layernorm.*"),
        *((f"layers.{i + 1}.downsample.*", f"encoder.layers.{i}.downsample.*") for i in range(3)),
        (
            "layers.#.blocks.#.attn.qkv.*",
            (
                f"{_HF_SWIN_BLOCK}.attention.self.query.*",
                f"{_HF_SWIN_BLOCK}.attention.self.key.*",
                f"{_HF_SWIN_BLOCK}.attention.self.value.*",
            ),
        ),
        (
            "layers.#.blocks.#.attn.relative_position_bias_table",
            f"{_HF_SWIN_BLOCK}.attention.self.relative_position_bias_table",
        ),
        ("layers.#.blocks.#.attn.proj.*", f"{_HF_SWIN_BLOCK}.attention.output.dense.*"),
        ("layers.#.blocks.#.norm1.*", f"{_HF_SWIN_BLOCK}.layernorm_before.*"),
        ("layers.#.blocks.#.norm2.*", f"{_HF_SWIN_BLOCK}.layernorm_after.*"),
        ("layers.#.blocks.#.mlp.fc1.*", f"{_HF_SWIN_BLOCK}.intermediate.dense.*"),
        ("layers.#.blocks.#.mlp.fc2.*", f"{_HF_SWIN_BLOCK}.output.dense.*"),
    ),
)

HF_RESNET = Naming(
    "Hugging Face ResNet",
    "embedder.embedder.convolution.weight",
    (
        ("conv1.*", "embedder.embedder.convolution.*"),
        ("bn1.*", "embedder.embedder.normalization.*"),
        *(
            (f"layer{i + 1}.#.{ours}", f"encoder.stages.{i}.layers.#.{theirs}")
            for i in range(4)
            for ours, theirs in (
                ("downsample.0.*", "shortcut.convolution.*"),
                ("downsample.1.*", "shortcut.normalization.*"),
                *((f"conv{j + 1}.*", f"layer.{j}.convolution.*") for j in range(3)),
                *((f"bn{j + 1}.*", f"layer.{j}.normalization.*") for j in range(3)),
            )
        ),
    ),
)

# SiT's two-token model: our class token is its contrastive one, and the first row of positions.
SIT_TWO_TOKENS = Naming(
    "SiT with rotation token",
    "rot_token",
    (("cls_token", "contrastive_token"), ("reg_token", "rot_token"), ("*", "*")),
    {"pos_embed": (_swap_token_rows, _swap_token_rows)},
)

MOCOV3_CONV_STEM = Naming(
    "MoCo v3 convolutional stem",
    "patch_embed.proj.0.weight",
    (("patch_embed.stem.*", "patch_embed.proj.*"), ("*", "*")),
)

NAMINGS = (
    SIT_TWO_TOKENS,
    TORCHVISION_VIT,
    TORCHVISION_SWIN,
    DETECTRON2_RESNET,
    MMSEG_VIT,  # before MMDetection's Swin, whose signature it has too
    MMDET_SWIN,
    HF_VIT,
    HF_SWIN,
    HF_RESNET,
    ORIGINAL_SWIN,
    MOCOV3_CONV_STEM,
)


def to_our_names(state: Mapping[str, Tensor]) -> tuple[State, dict[str, str]]:
    """Return the state in our names, and each place that was renamed with its naming.

    A naming is found wherever its signature stands, behind any prefix. The prefix stays.
    """
    found: dict[str, Naming] = {}
    for naming in NAMINGS:
        for key in state:
            place = key.removesuffix(naming.signature)
            # Hugging Face's Swin has a Swin of the original's names behind `encoder.`: the first
            # naming wins, for all that lies inside its place.
            inside = any(place.startswith(outer) for outer in found)
            if place != key and (not place or place.endswith(".")) and not inside:
                found[place] = naming
    result = {key: tensor for key, tensor in state.items() if not key.startswith(tuple(found))}
    for place, naming in found.items():
        theirs = {k.removeprefix(place): t for k, t in state.items() if k.startswith(place)}
        result.update({place + key: tensor for key, tensor in naming.to_ours(theirs).items()})
    return result, {place: naming.name for place, naming in found.items()}
