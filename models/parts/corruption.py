"""Corrupt images for SiT: blocks become grey, blurred, noisy, or come from another image.

Atito, Awais and Kittler 2021, arXiv:2104.03602, section 3.1; GMML: Atito et al. 2022,
arXiv:2205.14986. The parameters, a few numbers an image, are drawn on the host. Then the pixels of
all images are changed at once on the device, without a loop over images and without waiting for the
device.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

MAX_BLOCKS = 64  # of about 2 % of the image each: in practice they always cover 30 %
MAX_KERNEL = 15
_SMALL = 64  # pixels


class Blocks(NamedTuple):
    """M rectangles for each of N images. Edges are (N, M) int64; bottom and right are exclusive."""

    top: Tensor
    left: Tensor
    bottom: Tensor
    right: Tensor

    def area(self) -> Tensor:
        """Return the number of pixels (N, M) of each."""
        return (self.bottom - self.top) * (self.right - self.left)

    def to(self, device: torch.device) -> "Blocks":
        """Copy the edges to a device."""
        return Blocks(*(send(edge, device) for edge in self))


class Corruption(NamedTuple):
    """The drawn corruption of N images. Blocks that are not used are empty."""

    grey: Blocks
    blur: Blocks
    kernel: Tensor  # (N,) odd, 3 to 15 pixels
    sigma: Tensor  # (N,) pixels
    noise: Blocks
    foreign: Blocks
    source: Tensor  # (N,) the image that foreign blocks come from; itself: there are none

    def to(self, device: torch.device) -> "Corruption":
        """Copy all to a device."""
        return Corruption(
            self.grey.to(device),
            self.blur.to(device),
            send(self.kernel, device),
            send(self.sigma, device),
            self.noise.to(device),
            self.foreign.to(device),
            send(self.source, device),
        )


def send(part: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor without waiting for the device."""
    return (
        part.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else part.to(device)
    )


# ---- drawing, on the host ------------------------------------------------------------------------


def draw_corruption(num: int, height: int, width: int) -> Corruption:
    """Draw SiT's corruption of `num` images, on the host."""
    tops = (_smallest(height), _smallest(width))
    large = [(tops[0], height), (tops[1], width)]
    small = [
        (low, max(int(0.25 * side), low + 1))
        for low, side in zip(tops, (height, width), strict=True)
    ]
    # the order of these draws is fixed: golden values and resumed runs depend on it
    grey = draw_blocks(num, 1, height, width, *large)
    kernel = torch.randint(3, 16, (num,)) // 2 * 2 + 1
    sigma = 5.0 * torch.rand(num) + 0.1
    blur = draw_blocks(num, 1, height, width, *large)
    noise, foreign = (
        _until_area(
            draw_blocks(num, MAX_BLOCKS, height, width, *small), _share(num, height * width)
        )
        for _ in range(2)
    )
    return Corruption(grey, blur, kernel, sigma, noise, foreign, torch.randint(0, num, (num,)))


def draw_blocks(
    num: int, count: int, height: int, width: int, heights: tuple[int, int], widths: tuple[int, int]
) -> Blocks:
    """Draw `count` blocks for each of `num` images: a corner, then sides in [low, high).

    Blocks are cut at the border of the image.
    """
    shape = (num, count)
    top = torch.randint(0, max(height - heights[0], 1), shape)
    left = torch.randint(0, max(width - widths[0], 1), shape)
    bottom = (top + torch.randint(*heights, shape)).clamp(max=height)
    right = (left + torch.randint(*widths, shape)).clamp(max=width)
    return Blocks(top, left, bottom, right)


def _smallest(side: int) -> int:
    return max(1, int(0.05 * side))


def _share(num: int, pixels: int) -> Tensor:
    return 0.3 * torch.rand(num, 1) * pixels


def _until_area(blocks: Blocks, wanted: Tensor) -> Blocks:
    """Empty the blocks after those whose areas add up to `wanted` (N, 1)."""
    area = blocks.area()
    return _keep(blocks, area.cumsum(1) - area < wanted)


def _keep(blocks: Blocks, kept: Tensor) -> Blocks:
    """Empty the blocks that are not `kept` (N, M)."""
    bottom = torch.where(kept, blocks.bottom, blocks.top)
    return Blocks(blocks.top, blocks.left, bottom, torch.where(kept, blocks.right, blocks.left))


# ---- pixels, on the device -----------------------------------------------------------------------


@torch.no_grad()
def corrupt(images: Tensor, drawn: Corruption, noise: Tensor) -> Tensor:
    """Return corrupted copies of images (N, 3, H, W); `noise` (N, 3, H, W) is standard normal.

    The order is the published one: grey, blur, noise, foreign blocks. Foreign blocks are copied
    image by image: sources of a lower index are corrupted already, those of a higher index are
    still clean.
    """
    with torch.autocast(images.device.type, enabled=False):
        # On a CPU large images are faster block by block: fewer pixels are touched.
        plain = images.device.type == "cpu" and images.shape[-1] > _SMALL
        return (corrupt_plain if plain else corrupt_at_once)(images, drawn, noise)


def corrupt_at_once(images: Tensor, drawn: Corruption, noise: Tensor) -> Tensor:
    """Compute `corrupt` for all images together."""
    height, width = images.shape[-2:]
    source = drawn.source  # a copy stays on the host: the order of work depends on it
    drawn = drawn.to(images.device)
    grey = images.mean(1, keepdim=True)
    out = torch.where(covered(drawn.grey, height, width), grey, images)
    out = torch.where(covered(drawn.blur, height, width), _blurred(out, drawn), out)
    out = torch.where(covered(drawn.noise, height, width), noise, out)
    return _replace(out, images, covered(drawn.foreign, height, width), source)


def corrupt_plain(images: Tensor, drawn: Corruption, noise: Tensor) -> Tensor:
    """Compute `corrupt` as the published code does: image by image, block by block."""
    out = images.clone()
    for i in range(len(images)):
        for top, left, bottom, right in _listed(drawn.grey, i):
            block = out[i, :, top:bottom, left:right]
            block.copy_(block.mean(0, keepdim=True).expand_as(block))
        for top, left, bottom, right in _listed(drawn.blur, i):
            kernel = [
                min(int(drawn.kernel[i]), 2 * side - 1) for side in (right - left, bottom - top)
            ]
            block = out[i, :, top:bottom, left:right]
            block.copy_(gaussian_blur(block.clone(), kernel, [float(drawn.sigma[i])]))
        for top, left, bottom, right in _listed(drawn.noise, i):
            out[i, :, top:bottom, left:right] = noise[i, :, top:bottom, left:right]
        source = int(drawn.source[i])
        for top, left, bottom, right in _listed(drawn.foreign, i) if source != i else []:
            out[i, :, top:bottom, left:right] = out[source, :, top:bottom, left:right]
    return out


def _listed(blocks: Blocks, image: int) -> list[tuple[int, ...]]:
    """Return an image's blocks that are not empty, as numbers."""
    edges = torch.stack(list(blocks), dim=-1)[image].tolist()
    return [tuple(edge) for edge in edges if edge[2] > edge[0] and edge[3] > edge[1]]


def covered(blocks: Blocks, height: int, width: int) -> Tensor:
    """Return the pixels (N, 1, H, W) bool inside any of an image's blocks.

    Each block adds +1 at two of its corners and -1 at the others; two running sums count the blocks
    over a pixel, however many there are.
    """
    num = len(blocks.top)
    # one row and one column more: an exclusive edge may lie at the border
    counts = torch.zeros(num, height + 1, width + 1, dtype=torch.int32, device=blocks.top.device)
    row = torch.arange(num, device=counts.device)[:, None].expand_as(blocks.top)
    one = torch.ones_like(blocks.top, dtype=torch.int32)
    for y, x, sign in (
        (blocks.top, blocks.left, one),
        (blocks.bottom, blocks.right, one),
        (blocks.top, blocks.right, -one),
        (blocks.bottom, blocks.left, -one),
    ):
        # corners of several blocks may coincide
        counts.index_put_((row, y, x), sign, accumulate=True)
    counts = counts.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    return counts[:, None, :height, :width] > 0


def _blurred(images: Tensor, drawn: Corruption) -> Tensor:
    """Blur each image inside its block, reflected at the block's border: rows, then columns."""
    kernel, sigma = drawn.kernel, drawn.sigma
    rows = _blur_matrix(drawn.blur.top, drawn.blur.bottom, kernel, sigma, images.shape[2])
    columns = _blur_matrix(drawn.blur.left, drawn.blur.right, kernel, sigma, images.shape[3])
    num, channels, height, width = images.shape
    out = torch.bmm(images.reshape(num, channels * height, width), columns.transpose(1, 2))
    out = (
        out.view(num, channels, height, width)
        .transpose(1, 2)
        .reshape(num, height, channels * width)
    )
    return torch.bmm(rows, out).view(num, height, channels, width).transpose(1, 2)


def _blur_matrix(start: Tensor, stop: Tensor, kernel: Tensor, sigma: Tensor, side: int) -> Tensor:
    """Return (N, S, S): Gaussian weights inside [start, stop), the identity outside; edges (N, 1).

    Pixel i reads pixel j directly and as j's reflection at either border.
    """
    # Smaller where the kernel would reflect twice; the published code fails on such small blocks.
    radius = torch.minimum((kernel[:, None] - 1) // 2, stop - start - 1)
    reach = torch.arange(MAX_KERNEL, device=start.device)
    weights = torch.exp(-0.5 * (reach / sigma[:, None]) ** 2) * (reach <= radius)
    weights = weights / (2.0 * weights.sum(1, keepdim=True) - 1.0)  # of distances 0 to 14, (N, 15)
    weights[:, -1] = 0.0  # the weight of every distance beyond
    place = torch.arange(side, device=start.device)
    j, i = place[None, None, :], place[None, :, None]
    first, last = start[:, :, None], stop[:, :, None] - 1
    inside = (i >= first) & (i <= last) & (j >= first) & (j <= last)
    matrix = _at(weights, (i - j).expand_as(inside))
    matrix += _at(weights, 2 * first - i - j) * (j > first)
    matrix += _at(weights, 2 * last - i - j) * (j < last)
    return torch.where(inside, matrix, (i == j).to(matrix.dtype))


def _at(weights: Tensor, distance: Tensor) -> Tensor:
    distance = distance.abs().clamp(max=MAX_KERNEL - 1)
    return weights.gather(1, distance.flatten(1)).view(distance.shape)


def _replace(out: Tensor, clean: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Fill the masked pixels of each image from its source, the sources first."""
    chosen = source.tolist()
    level: list[int] = []
    for i, j in enumerate(chosen):
        level.append(level[j] + 1 if j < i else 0)
    for current in range(max(level) + 1):
        # a level reads images that the levels before it have finished
        images = torch.tensor([i for i, j in enumerate(chosen) if level[i] == current and j != i])
        if not len(images):
            continue
        sources = send(source[images], out.device)
        images = send(images, out.device)
        content = (out if current else clean)[sources]
        out[images] = torch.where(mask[images], content, out[images])
    return out


# ---- GMML ----------------------------------------------------------------------------------------


class GroupMask(NamedTuple):
    """Group masks of N images: random blocks until their union covers a share of the image."""

    blocks: Blocks
    pixels: Tensor  # (N, 1) int64: what the union must reach
    foreign: Tensor  # (N,) bool: filled from `source`; else dropped
    source: Tensor  # (N,) never the image itself


def draw_group_mask(
    num: int, height: int, width: int, drop: float, replace: float, align: int
) -> GroupMask:
    """Draw GMML's masks. Edges are multiples of `align` pixels.

    With probability 1/2 an image gets a share `replace` of its pixels from another image. Otherwise
    a share of its pixels is dropped, drawn uniformly from [min(0.5, drop), drop].
    """
    if min(height, width) // align < 4:
        raise ValueError(
            f"MODEL.SIT.DROP_ALIGN: blocks of {align} pixels cannot mask images of "
            f"{min(height, width)}; use "
            f"at most {min(height, width) // 4}"
        )
    sides = [(1, max(int(0.3 * side) // align, 2)) for side in (height, width)]
    blocks = draw_blocks(num, 4 * MAX_BLOCKS, height // align, width // align, *sides)
    foreign = (torch.rand(num) < 0.5) & (num > 1)
    least = min(0.5, drop)
    share = torch.where(foreign, torch.tensor(replace), least + (drop - least) * torch.rand(num))
    # a shift by 1 to num - 1 never ends at the image itself
    others = (torch.arange(num) + torch.randint(1, max(num, 2), (num,))) % num
    aligned = Blocks(*(edge * align for edge in blocks))
    return GroupMask(aligned, (share * height * width).long()[:, None], foreign, others)


@torch.no_grad()
def mask_groups(images: Tensor, drawn: GroupMask, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return masked copies of images (N, 3, H, W) and the masks (N, 1, H, W).

    Dropped pixels become `noise`, or 0 without it.
    """
    foreign, source = send(drawn.foreign, images.device), send(drawn.source, images.device)
    pixels = send(drawn.pixels, images.device)
    mask = _until_union(drawn.blocks.to(images.device), pixels, *images.shape[-2:])
    filling = torch.zeros_like(images) if noise is None else noise
    filling = torch.where(foreign[:, None, None, None], images[source], filling)
    return torch.where(mask, filling, images), mask


def _until_union(blocks: Blocks, pixels: Tensor, height: int, width: int) -> Tensor:
    """Return masks of the fewest first blocks whose union covers `pixels` (N, 1), by bisection."""
    number = torch.arange(blocks.top.shape[1], device=blocks.top.device)
    low, high = torch.zeros_like(pixels), torch.full_like(pixels, len(number))
    # all images at once, and the device is never waited for
    for _ in range(len(number).bit_length()):
        middle = (low + high) // 2
        union = covered(_keep(blocks, number < middle), height, width).sum((1, 2, 3))[:, None]
        enough = union >= pixels
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return covered(_keep(blocks, number < high.clamp(max=len(number))), height, width)
