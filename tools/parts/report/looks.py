"""Pictures of a run for its page: views, neighbours, a map of the features, attention."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from yacs.config import CfgNode

from data import build_views
from data.augment.base import IMAGENET_MEAN, IMAGENET_STD
from data.augment.preview import view_names
from data.loader import GlobalLoader
from data.sources.base import Source
from tools.parts.report.charts import Chart, cloud
from tools.parts.report.pictures import nearest
from utils.randomness import keyed_seed

_SIDE = 144  # pixels of the largest tile
_COLORS = 10  # in the style sheet
_MAPPED = 600  # points of a map


class Tile(NamedTuple):
    """A picture as a data URI, the text below it, and the kind of its frame."""

    uri: str
    caption: str
    kind: str = ""


class Strip(NamedTuple):
    """A row of tiles with a title."""

    title: str
    tiles: list[Tile]


def data_uri(image: Image.Image, fit: bool = True) -> str:
    """Return a picture as a data URI: small ones exactly, large ones as a JPEG thumbnail."""
    image = image.convert("RGB")
    if fit:
        side = min(*image.size, _SIDE)
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    small, buffer = max(image.size) <= 64, io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", quality=82)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tile(image: Tensor, caption: str, kind: str = "") -> Tile:
    """Return the tile of an image uint8 (3,H,W)."""
    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    return Tile(data_uri(Image.fromarray(pixels)), caption, kind)


def _levels(view: Tensor) -> Tensor:
    """Return a normalised view (3,S,S) as uint8."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((view.float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


def view_strips(cfg: CfgNode, source: Source, num: int) -> list[Strip]:
    """Return the original, the query and the key of a run's first images."""
    recipe = build_views(cfg)
    loader = GlobalLoader(
        source,
        recipe,
        global_batch=min(num, len(source)),
        seed=cfg.SEED,
        device=torch.device("cpu"),
        rank=0,
        world=1,
    )
    _, (batch,) = next(iter(loader.from_step(0, 1)))
    strips = []
    for row, index in enumerate(batch.indices.tolist()):
        tiles = [tile(source.load(index), "original", "query")]
        tiles += [
            tile(_levels(v[row]), n) for v, n in zip(batch.views, view_names(recipe), strict=True)
        ]
        strips.append(Strip("", tiles))
    return strips


def neighbour_strips(
    features: Sequence[tuple[str, Tensor, Tensor]],
    chosen: Tensor,
    queries: Source,
    bank: Source,
    num: int = 6,
) -> list[list[Strip]]:
    """Return for each query its nearest images under each of `features` (name, bank, queries)."""
    found = [nearest(rows, asked[chosen], num) for _, rows, asked in features]
    groups = []
    for row, index in enumerate(chosen.tolist()):
        label, strips = int(queries.labels[index]), []
        for (name, _, _), neighbours in zip(features, found, strict=True):
            tiles = [tile(queries.load(index), caption(queries, index), "query")]
            for other in neighbours[row].tolist():
                same = "same" if int(bank.labels[other]) == label else "other"
                kind = same if label >= 0 else ""
                tiles.append(tile(bank.load(other), caption(bank, other), kind))
            strips.append(Strip(name, tiles))
        groups.append(strips)
    return groups


def caption(source: Source, index: int) -> str:
    """Return the class of an image, or the name of its file, cut to what fits below a tile."""
    label = int(source.labels[index])
    known = 0 <= label < len(source.classes)
    return (source.classes[label] if known else Path(source.name(index)).stem)[:24]


def feature_map_chart(title: str, features: Tensor, labels: Tensor, seed: int) -> Chart:
    """Draw up to 600 features (N, F) along their two principal components, coloured by class."""
    generator = torch.Generator().manual_seed(keyed_seed("map", seed))
    chosen = torch.randperm(len(features), generator=generator)[:_MAPPED]
    # unit length: the distance on the map is then near the cosine that k-NN goes by
    rows = F.normalize(features[chosen].double(), dim=1)
    rows -= rows.mean(0)
    axes = torch.linalg.svd(rows, full_matrices=False).Vh[:2]
    places = rows @ axes.T
    # eigenvectors have no sign of their own: the same run gives the same map
    places *= places.sum(0).sign() + (places.sum(0) == 0)
    low, high = places.amin(0), places.amax(0)
    places = (places - low) / (high - low).clamp(min=1e-9)
    if places.shape[1] == 1:
        places = F.pad(places, (0, 1), value=0.5)
    points = [(float(x), float(y)) for x, y in places.tolist()]
    return cloud(title, points, [int(c) % _COLORS for c in labels[chosen].tolist()])


@torch.no_grad()
def attention_maps(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """Return the class token's attention of the last block to the patches, (N, h, w) in [0, 1].

    The mean over the heads. None for a network that is no plain ViT with a class token.
    """
    blocks = getattr(backbone, "blocks", None)
    prefix = getattr(backbone, "num_prefix_tokens", 0)
    attention = getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential) else None
    if not prefix or not hasattr(attention, "qkv") or not isinstance(attention, nn.Module):
        return None
    seen: list[Tensor] = []
    # the fused attention does not give its weights away, so they are computed from its input
    handle = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        backbone(images)
    finally:
        handle.remove()
    # the names of timm's Attention
    heads, tokens = int(vars(attention)["num_heads"]), seen[0]
    qkv = attention.get_submodule("qkv")(tokens).unflatten(2, (3, heads, -1))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    query = attention.get_submodule("q_norm")(query)
    key = attention.get_submodule("k_norm")(key)
    weights = (query[:, :, :1] @ key.transpose(2, 3) * key.shape[-1] ** -0.5).softmax(-1)
    maps = weights.float().mean(1)[:, 0, prefix:]
    side = round(maps.shape[1] ** 0.5)
    if side * side != maps.shape[1]:
        return None
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return ((maps - low) / (high - low).clamp(min=1e-9)).unflatten(1, (side, side)).cpu()


def attention_strips(images: Tensor, maps: Tensor) -> list[Strip]:
    """Show normalised images (N,3,S,S) beside themselves, bright where the network looks."""
    large = F.interpolate(maps[:, None], images.shape[-2:], mode="bilinear", align_corners=False)
    strips = []
    for image, heat in zip(images, large, strict=True):
        levels = _levels(image)
        bright = (levels * (0.15 + 0.85 * heat)).to(torch.uint8)
        strips.append(Strip("", [tile(levels, "image"), tile(bright, "attention")]))
    return strips


def reconstruction_tiles(folder: Path) -> list[Tile]:
    """Return the first and the last reconstruction that the run drew."""
    paths = sorted(folder.glob("reconstruction_*.png"))
    tiles = []
    for path in paths if len(paths) < 2 else (paths[0], paths[-1]):
        with Image.open(path, formats=["PNG"]) as image:
            image.thumbnail((600, 1200))
            tiles.append(Tile(data_uri(image, fit=False), f"step {int(path.stem[-7:])}"))
    return tiles
