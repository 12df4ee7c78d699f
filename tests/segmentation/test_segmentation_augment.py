"""Training augmentation of segmentation against plain twins: crops, the crop rule, colours."""

import colorsys
from collections import Counter

import numpy as np
import pytest
import scenes
import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment.base import sample_keys
from data.augment.fused.opcodes import can_run
from data.augment.pipeline import draw_photometric, photometric
from segmentation.augment import (
    CropAugmentation,
    PhotometricDistortion,
    Size,
    nearest,
    resize_region,
    scaled_size,
    varied,
)
from utils.randomness import uniform

KEYS = sample_keys(5, 0, np.arange(200), 0)


def augmentation(**changes: object) -> CropAugmentation:
    options = {
        "scale": (128, 32),
        "ratios": (0.5, 2.0),
        "crop": (32, 32),
        "cat_max_ratio": 0.75,
        "flip": 0.5,
    }
    return CropAugmentation(**{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((512, 683), 1.0, (512, 683)),
        ((683, 512), 0.5, (342, 256)),
        ((300, 400), 2.0, (1024, 1365)),
        ((100, 1000), 1.0, (205, 2048)),  # the long side binds
        ((2, 5000), 0.5, (1, 1024)),
    ],
)
def test_sizes_keep_the_ratio_inside_the_box(size: Size, ratio: float, expected: Size) -> None:
    assert scaled_size(size, (2048, 512), ratio) == expected


@pytest.mark.parametrize("size", [(25, 33), (40, 61), (53, 70), (111, 139), (53, 71)])
def test_a_region_is_cut_from_the_resized_image(size: Size) -> None:
    """The twin resizes the whole image and crops it."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (53, 71, 3), dtype=torch.uint8, generator=generator)
    image = image.permute(2, 0, 1)  # as decoded
    label = torch.randint(0, 256, (53, 71), dtype=torch.uint8, generator=generator)
    whole = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    classes = exact_nearest(label.numpy(), size)
    for top, left, height, width in ((0, 0, *size), (3, 7, 20, 21), (size[0] - 9, 0, 9, 30)):
        region = resize_region(image, size, top, left, (height, width))
        expected = whole[:, top : top + height, left : left + width]
        assert region.shape == expected.shape
        assert (region.int() - expected.int()).abs().max() <= 1
        planar = resize_region(image.contiguous(), size, top, left, (height, width))
        assert (planar.int() - expected.int()).abs().max() <= 1
        cut = nearest(label.numpy(), size, top, left, (height, width))
        assert np.array_equal(cut, classes[top : top + height, left : left + width])


def exact_nearest(label: np.ndarray, size: Size) -> np.ndarray:
    """Take the stored pixel in which each new pixel's centre lies, by whole numbers."""
    out = np.empty(size, dtype=label.dtype)
    for row in range(size[0]):
        for column in range(size[1]):
            y = (2 * row + 1) * label.shape[0] // (2 * size[0])
            x = (2 * column + 1) * label.shape[1] // (2 * size[1])
            out[row, column] = label[y, x]
    return out


def test_labels_are_nearest_exact() -> None:
    label = torch.arange(255, dtype=torch.uint8).view(15, 17)
    ours = nearest(label.numpy(), (31, 23), 0, 0, (31, 23))
    theirs = F.interpolate(label[None, None].float(), size=(31, 23), mode="nearest-exact")
    assert np.array_equal(ours, theirs[0, 0].numpy())


def test_image_and_label_move_together() -> None:
    image, label = scenes.scene(1, 60, 80)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    sizes, agreeing, things = set(), [], 0
    for place in range(40):
        crop = augmentation()(pixels, label, KEYS[place : place + 1])
        assert tuple(crop.image.shape[1:]) == crop.label.shape
        sizes.add(crop.label.shape)
        distance = crop.image.permute(1, 2, 0).numpy()[:, :, None].astype(int) - scenes.COLOURS
        seen = np.abs(distance).sum(-1).argmin(-1)
        agreeing.append(float((seen == crop.label).mean()))
        things += int((crop.label > 0).sum())
    assert things > 1000
    assert min(agreeing) > 0.85, "only pixels at borders differ"
    assert np.mean(agreeing) > 0.95
    assert len(sizes) > 3, "small images give small crops"


def oracle(label: np.ndarray, most: float) -> bool:
    found = Counter(int(value) for value in label.ravel() if value != 255)
    return len(found) > 1 and max(found.values()) / sum(found.values()) < most


def test_the_crop_rule_equals_its_oracle() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        values = rng.choice([0, 1, 7, 254, 255], size=rng.integers(1, 5))
        label = rng.choice(values, size=(4, 5)).astype(np.uint8)
        assert varied(label, 0.75) == oracle(label, 0.75)
        seen.add(oracle(label, 0.75))
    assert seen == {True, False}
    assert not varied(np.repeat(np.uint8([0, 1]), [3, 1])[None], 0.75), "0.75 itself is too much"


def corner(label: np.ndarray, cat_max_ratio: float, key: np.ndarray) -> tuple[int, int]:
    """Return where a crop of 32 x 32 was cut from an image whose pixels tell their place."""
    rows, columns = np.mgrid[: label.shape[0], : label.shape[1]]
    image = torch.from_numpy(np.stack([rows, columns, rows], axis=2).astype(np.uint8))
    augment = augmentation(
        scale=(200, 100), ratios=(1.0, 1.0), flip=0.0, cat_max_ratio=cat_max_ratio
    )
    crop = augment(image.permute(2, 0, 1), label, key).image
    return int(crop[0, 0, 0]), int(crop[1, 0, 0])


def test_crops_of_one_class_are_drawn_again_ten_times_and_the_last_counts() -> None:
    """The label is one class but for a corner: the first draw that sees the corner is taken."""
    label = np.zeros((100, 200), dtype=np.uint8)
    label[:50, :60] = np.arange(60) % 3
    counts = Counter()
    for place in range(60):
        key = KEYS[place : place + 1]
        draws = [
            (
                int(uniform(key, 820 + attempt)[0] * 69),
                int(uniform(key, 840 + attempt)[0] * 169),
            )
            for attempt in range(11)
        ]
        expected = next(
            (
                number
                for number, (top, left) in enumerate(draws[:10])
                if oracle(label[top : top + 32, left : left + 32], 0.75)
            ),
            10,
        )
        assert corner(label, 0.75, key) == draws[expected]
        assert corner(label, 1.0, key) == draws[0], "no rule: the first draw"
        counts[expected] += 1
    assert counts[0] > 3
    assert counts[10] > 3
    assert len(counts) > 4


def test_draws_are_keyed_and_cover_their_ranges() -> None:
    op = PhotometricDistortion()
    draws = op.draw(KEYS, 0)
    for name, low, high, neutral in (
        ("offset", -32 / 255, 32 / 255, 0.0),
        ("saturation", 0.5, 1.5, 1.0),
        ("hue", -18 / 180, 17 / 180, 0.0),
    ):
        values = draws[name]
        changed = values[values != neutral]
        assert 0.35 * len(values) < len(changed) < 0.65 * len(values)
        assert low <= changed.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < changed.max() <= high
    assert not ((draws["early"] != 1) & (draws["late"] != 1)).any()
    assert 20 < (draws["early"] != 1).sum() < 80
    assert 20 < (draws["late"] != 1).sum() < 80
    assert np.array_equal(np.rint(draws["hue"] * 180) / 180, draws["hue"])
    alone = op.draw(KEYS[7:8], 0)
    assert all(alone[name][0] == values[7] for name, values in draws.items())


def distorted(levels: np.ndarray, draws: dict[str, np.ndarray], whole: bool) -> np.ndarray:
    """Change one pixel's levels (3,) of 0..255 step by step; `whole` cuts to integers after each."""

    def cut(values: np.ndarray) -> np.ndarray:
        clipped = np.clip(values, 0, 255)
        # a hair above: colorsys does not give whole numbers back exactly
        return np.floor(clipped + 1e-6) if whole else clipped

    offset, early, late, factor, turns = (
        float(draws[name][0]) for name in ("offset", "early", "late", "saturation", "hue")
    )
    if offset:
        levels = cut(levels + 255 * offset)
    if early != 1:
        levels = cut(levels * early)
    if factor != 1:
        hue, saturation, value = colorsys.rgb_to_hsv(*(levels / 255))
        levels = cut(255 * np.array(colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value)))
    if turns:
        hue, saturation, value = colorsys.rgb_to_hsv(*(levels / 255))
        levels = cut(255 * np.array(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)))
    return cut(levels * late) if late != 1 else levels


def test_colours_equal_the_plain_steps_and_nearly_those_cut_to_whole_levels() -> None:
    op, rng = PhotometricDistortion(), np.random.default_rng(2)
    images = rng.integers(0, 256, (len(KEYS), 3, 4, 4))
    images[:, :, 0, 0] = images[:, :1, 0, 0]  # grey
    images[:, :, 0, 1] = 0
    chosen = {name: values for name, values in op.draw(KEYS, 0).items() if name != "distort"}
    ours = 255 * op.apply(torch.from_numpy(images).float() / 255, chosen)
    far = []
    for number, image in enumerate(images):
        draws = {name: values[number : number + 1] for name, values in chosen.items()}
        alone = 255 * op.apply(torch.from_numpy(image[None]).float() / 255, draws)
        for pixel, result, single in zip(
            flat(image), flat(ours[number]), flat(alone[0]), strict=True
        ):
            assert np.abs(distorted(pixel, draws, whole=False) - result).max() < 2e-3
            assert np.abs(single - result).max() < 1e-3, "steps that are left out change nothing"
            far.append(np.abs(distorted(pixel, draws, whole=True) - result).max())
    # each cut loses less than one level, and contrast and saturation stretch what was lost
    assert np.mean(far) < 1
    assert np.quantile(far, 0.9) < 2
    assert max(far) < 4


def flat(image: Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(image).reshape(3, -1).T


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_fused_kernel_equals_torch(interleaved: bool) -> None:
    pytest.importorskip("numba")
    view = (PhotometricDistortion(),)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (60, 3, 9, 11), dtype=torch.uint8, generator=generator)
    if interleaved:
        images = images.contiguous(memory_format=torch.channels_last)
    draws = draw_photometric(view, KEYS[:60])
    assert can_run(view)
    assert not can_run(view, "cuda")
    plain = photometric(images, view, draws, "torch")
    fused = photometric(images, view, draws, "fused")
    assert (plain - fused).abs().max() < 1e-4
    assert (plain - photometric(images, (), {}, "torch")).abs().max() > 0.1


def test_the_operation_leaves_its_input_alone() -> None:
    op = PhotometricDistortion()
    x = torch.rand(4, 3, 5, 6)
    before = x.clone()
    draws = {name: values[:4] for name, values in op.draw(KEYS, 0).items()}
    op.apply(x, draws)
    assert torch.equal(x, before)
