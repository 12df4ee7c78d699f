"""Application of the draws: equal to torchvision and PIL given the same parameters."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import functional as tv

from data.augment.base import IMAGENET_MEAN, IMAGENET_STD, Draws, View, sample_keys
from data.augment.crops import (
    CenterCrop,
    RandomCropPad,
    RandomResizedCrop,
    Resize,
    crop_batch,
    crop_one,
    draw_boxes,
    resize_one,
)
from data.augment.ops import (
    JITTER_OPS,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Solarize,
    adjust_hue,
    color_jitter,
)
from data.augment.pipeline import draw_photometric, normalise_, photometric
from data.augment.recipes import build_recipe
from data.augment.resample import crop_resize, gaussian_blur


def to_tensor(images: np.ndarray) -> Tensor:
    """Turn uint8 (N,H,W,3) into uint8 (N,3,H,W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_levels(normalised: Tensor) -> Tensor:
    """Undo the normalisation: float levels 0..255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (normalised * std + mean) * 255


def pil_oracle(image: Image.Image, view: View, box: np.ndarray, draws: Draws, i: int) -> np.ndarray:
    """Run `view` step by step on a PIL image with the parameters of sample `i`, slow and obvious."""
    for op in view:
        match op:
            case RandomResizedCrop():
                modes = {
                    "bilinear": tv.InterpolationMode.BILINEAR,
                    "bicubic": tv.InterpolationMode.BICUBIC,
                }
                image = tv.resized_crop(
                    image, *(int(v) for v in box), [op.size] * 2, modes[op.interpolation]
                )
            case HorizontalFlip() if draws["flip"][i]:
                image = tv.hflip(image)
            case ColorJitter() if draws["jitter"][i]:
                for kind in draws["order"][i]:
                    name = JITTER_OPS[kind]
                    image = getattr(tv, f"adjust_{name}")(image, float(draws[name][i]))
            case Grayscale() if draws["gray"][i]:
                image = tv.to_grayscale(image, 3)
            case GaussianBlur() if draws["blur"][i]:
                image = image.filter(ImageFilter.GaussianBlur(float(draws["sigma"][i])))
            case Solarize() if draws["solarize"][i]:
                image = tv.solarize(image, op.threshold)
    return np.asarray(image)


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of levels 0..255."""
    return float(
        10 * np.log10(255**2 / np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 64, 150])
def test_batched_crop_is_within_a_level_of_the_worker_crop_and_of_pil(
    photos: np.ndarray, interpolation: str, size: int
) -> None:
    view = (RandomResizedCrop(size, (0.05, 1.0), interpolation=interpolation),)
    boxes = view[0].draw(sample_keys(0, 0, np.arange(6), 0), np.full(6, 96), np.full(6, 128))
    batched = crop_resize(to_tensor(photos), boxes, size, interpolation).to(torch.int16)
    for i, image in enumerate(photos):
        worker = crop_one(to_tensor(photos[[i]])[0], view, boxes[i]).to(torch.int16)
        pil = torch.from_numpy(
            pil_oracle(Image.fromarray(image), view, boxes[i], {}, i).copy()
        ).permute(2, 0, 1)
        pairs = [(batched[i], worker), (batched[i], pil), (worker, pil)]
        # PIL's cubic filter has rare outliers where it overshoots; torchvision's weights are
        # fixed-point.
        allowed = 0.0 if interpolation == "bilinear" else 2e-4
        assert all(((a - b).abs() > 1).float().mean() <= allowed for a, b in pairs)


def test_crop_reads_nothing_outside_its_box(photos: np.ndarray) -> None:
    box = np.array([[20, 30, 40, 50]])
    framed = np.full_like(photos[[0]], 255)
    framed[:, 20:60, 30:80] = photos[[0], 20:60, 30:80]
    for size in (16, 100):
        torch.testing.assert_close(
            crop_resize(to_tensor(framed), box, size, "bicubic"),
            crop_resize(to_tensor(photos[[0]]), box, size, "bicubic"),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (61, 97), (45, 45)])
def test_evaluation_resize_is_within_a_level_of_torchvision(
    photos: np.ndarray, shape: tuple[int, int]
) -> None:
    view = (Resize(40), CenterCrop(32))
    image = np.ascontiguousarray(photos[0][: shape[0], : shape[1]])
    expected = np.asarray(tv.center_crop(tv.resize(Image.fromarray(image), 40), [32, 32])).astype(
        np.int16
    )
    for ours in (
        crop_batch(to_tensor(image[None]), view, None)[0],
        crop_one(to_tensor(image[None])[0], view, None),
    ):
        difference = np.abs(ours.permute(1, 2, 0).numpy() - expected)
        assert (
            difference.max() <= 2
        )  # 45 -> 40 gives many exact halves, which fixed-point weights round their own way
        assert (difference > 1).mean() < 1e-3


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 2)])
def test_of_a_very_thin_image_only_the_middle_is_resized(shape: tuple[int, int]) -> None:
    """The whole of 1 x 3000 pixels at 256 pixels would be 600 MB; one of 1:32 is resized whole."""
    image = torch.arange(3 * shape[0] * shape[1]).view(3, *shape).remainder(251).to(torch.uint8)
    thin = Resize(40).on_image(image, None)
    assert sorted(thin.shape) == [3, 40, 32 * 40]
    assert torch.equal(Resize(40).on_batch(image[None], None)[0], thin)
    part = 32 * min(shape)
    start = (max(shape) - part) // 2
    cut = image.narrow(1 + shape.index(max(shape)), start, part)
    assert torch.equal(resize_one(cut, tuple(thin.shape[1:]), "bilinear"), thin)
    assert torch.equal(Resize(40).on_image(cut, None), thin)
    # a random window after it lies in what is left
    view = (Resize(8), RandomCropPad(8))
    keys = sample_keys(0, 0, np.arange(64), 0)
    boxes = draw_boxes(view, keys, shape)
    assert boxes is not None
    views = crop_batch(image.expand(64, *image.shape), view, boxes)
    assert views.shape == (64, 3, 8, 8)
    for box, expected in zip(boxes.tolist(), views, strict=True):
        assert torch.equal(crop_one(image, view, tuple(box)), expected)


def test_small_evaluation_view_of_a_square_is_a_straight_resize(photos: np.ndarray) -> None:
    (view,) = build_recipe("eval", 32)
    side = min(photos.shape[1:3])
    square = np.ascontiguousarray(photos[:1, :side, :side])
    resized = Image.fromarray(square[0]).resize((32, 32), Image.Resampling.BILINEAR)
    expected = np.asarray(resized).astype(np.int16)
    ours = crop_batch(to_tensor(square), view, None)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() <= 1
    same = to_tensor(photos[:, :32, :32].copy())
    assert torch.equal(crop_batch(same, view, None), same)


def test_jitter_in_every_order_equals_torchvision(photos: np.ndarray) -> None:
    images = to_tensor(photos).float().div(255)[:, :, ::4, ::4].repeat(20, 1, 1, 1)
    draws = draw_photometric(
        (ColorJitter(0.8, 0.8, 0.8, 0.5, p=1.0),), sample_keys(0, 0, np.arange(120), 0)
    )
    assert len(np.unique(draws["order"], axis=0)) == 24
    ours = color_jitter(images, draws)
    for i, image in enumerate(images):
        for kind in draws["order"][i]:
            name = JITTER_OPS[kind]
            image = getattr(tv, f"adjust_{name}")(image, float(np.float32(draws[name][i])))
        torch.testing.assert_close(ours[i], image, rtol=0, atol=2e-5)


def test_hue_equals_torchvision_on_all_corners_and_greys() -> None:
    levels = torch.linspace(0, 1, 6)
    cube = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 12, 18)
    for shift in (-0.5, -0.3, -0.1, 0.0, 0.05, 0.25, 0.5):
        torch.testing.assert_close(
            adjust_hue(cube, torch.tensor([shift])), tv.adjust_hue(cube, shift), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("op", [HorizontalFlip(), Grayscale(), Solarize()])
def test_simple_operations_equal_torchvision_and_touch_only_their_samples(
    photos: np.ndarray, op: HorizontalFlip | Grayscale | Solarize
) -> None:
    name, function = {
        HorizontalFlip: ("flip", tv.hflip),
        Grayscale: ("gray", lambda x: tv.rgb_to_grayscale(x, 3)),
        Solarize: ("solarize", lambda x: tv.solarize(x, 128 / 255)),
    }[type(op)]
    images, mask = to_tensor(photos), np.array([True, False, True, True, False, False])
    expected = images.float() / 255
    expected[mask] = function(expected[mask])
    ours = photometric(images, (op,), {name: mask}, "torch")
    torch.testing.assert_close(to_levels(ours) / 255, expected, rtol=0, atol=2e-6)


def test_nothing_drawn_is_plain_normalisation(photos: np.ndarray) -> None:
    images = to_tensor(photos)
    expected = tv.normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(photometric(images, (), {}), expected)
    torch.testing.assert_close(normalise_(images.float() / 255), expected)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_near_pil_and_equals_a_wide_reference(photos: np.ndarray, sigma: float) -> None:
    images = to_tensor(photos[:, :96, :96].copy()).float()
    ours = gaussian_blur(images, torch.full((6,), sigma), 2.0)
    radius = 10
    taps = torch.exp(-(torch.arange(-radius, radius + 1).double() ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).float()
    padded = torch.nn.functional.pad(images, [radius] * 4, mode="replicate")
    kernel = (taps[:, None] * taps).expand(3, 1, -1, -1)
    torch.testing.assert_close(
        ours, torch.nn.functional.conv2d(padded, kernel, groups=3), rtol=0, atol=0.03
    )
    pil = np.stack(
        [
            np.asarray(
                Image.fromarray(p[:, :96]).filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float32
            )
            for p in photos
        ]
    )
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - pil).mean() < 0.8


def test_every_sample_is_blurred_by_its_own_sigma(photos: np.ndarray) -> None:
    images, sigma = to_tensor(photos[:, :64, :64].copy()).float(), torch.linspace(0.1, 2.0, 6)
    one_by_one = torch.cat([gaussian_blur(images[[i]], sigma[[i]], 2.0) for i in range(6)])
    torch.testing.assert_close(gaussian_blur(images, sigma, 2.0), one_by_one, rtol=0, atol=1e-3)


def test_values_are_clamped_between_operations() -> None:
    white = torch.full((1, 3, 4, 4), 0.9)
    draws = {"brightness": 2.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    arrays = {name: np.array([value]) for name, value in draws.items()} | {
        "order": np.array([[0, 1, 2, 3]])
    }
    twice = color_jitter(color_jitter(white, arrays), arrays | {"brightness": np.array([0.5])})
    torch.testing.assert_close(twice, torch.full_like(white, 0.5))


def test_a_sample_does_not_depend_on_its_batch(
    photos: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = build_recipe("byol", 48)[1]
    images = to_tensor(photos[:, :48, :48].copy()).repeat(8, 1, 1, 1)
    draws = draw_photometric(view, sample_keys(3, 0, np.arange(48), 1))
    whole = photometric(images, view, draws, "torch")
    monkeypatch.setattr("data.augment.resample._CHUNK_BYTES", 5 * 4 * 3 * 48 * 48)
    torch.testing.assert_close(photometric(images, view, draws, "torch"), whole, rtol=0, atol=1e-5)


def check_chain(images: list[Image.Image], name: str, size: int, backend: str) -> None:
    """Assert that the whole chain is within 44 dB of the PIL pipeline given the same parameters."""
    ours, theirs = [], []
    for number, view in enumerate(build_recipe(name, size)):
        keys = sample_keys(5, 1, np.arange(len(images)), number)
        widths, heights = (np.array([image.size[axis] for image in images]) for axis in (0, 1))
        boxes, draws = view[0].draw(keys, heights, widths), draw_photometric(view, keys)
        arrays = [to_tensor(np.array(image)[None])[0] for image in images]
        crops = torch.stack(
            [crop_one(image, view, box) for image, box in zip(arrays, boxes, strict=True)]
        )
        ours += list(
            to_levels(photometric(crops, view, draws, backend)).permute(0, 2, 3, 1).numpy()
        )
        theirs += [pil_oracle(image, view, boxes[i], draws, i) for i, image in enumerate(images)]
    assert psnr(np.stack(ours), np.stack(theirs)) >= 44.0


needs_numba = pytest.mark.skipif(not find_spec("numba"), reason="the fused path needs numba")
BACKENDS = ["torch", pytest.param("fused", marks=needs_numba)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["moco_v1", "moco_v2", "simclr", "byol", "mocov3", "sit", "cifar", "digits", "linear"]
)
def test_whole_chain_is_near_the_pil_reference(photos: np.ndarray, name: str, backend: str) -> None:
    check_chain([Image.fromarray(photo) for photo in photos] * 5, name, 64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["moco_v2", "byol"])
def test_whole_chain_is_near_the_pil_reference_on_real_photos(
    real_photos: list[Path], name: str, backend: str
) -> None:
    check_chain([Image.open(path).convert("RGB") for path in real_photos[::2]], name, 224, backend)
