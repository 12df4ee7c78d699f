"""Crops of training images: their sizes, the objects in them, and what an empty one leaves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
import torch
from test_detection_data import config, drawn, make_loader

from data.augment.base import sample_keys
from detection.augment import Augmentation, Cropping, Resizing, cropped, rasterise, resized_target
from detection.defaults import load_detection_config
from detection.sources.annotations import Objects

RECIPES = Path(__file__).parents[2] / "detection" / "configs"


def keys(count: int) -> list[np.ndarray]:
    return [sample_keys(0, 0, np.array([index]), 0) for index in range(count)]


def objects(*boxes: tuple[float, float, float, float]) -> Objects:
    polygons = tuple((np.array([x1, y1, x2, y1, x2, y2, x1, y2]),) for x1, y1, x2, y2 in boxes)
    labels = np.arange(1, len(boxes) + 1)
    return Objects(np.array(boxes, np.float32), labels, np.zeros(len(boxes), bool), polygons)


def test_boxes_and_polygons_are_cut_and_what_lies_outside_is_dropped() -> None:
    inside, over, beside, touching = (
        (20, 30, 40, 50),
        (0, 0, 30, 35),
        (90, 0, 99, 9),
        (10, 5, 60, 25),
    )
    left = cropped(objects(inside, over, beside, touching), top=25, left=10, height=40, width=60)
    assert left.boxes.tolist() == [[10, 5, 30, 25], [0, 0, 20, 10]]
    assert left.labels.tolist() == [1, 2]
    assert [[part.tolist() for part in parts] for parts in left.polygons] == [
        [[10, 5, 30, 5, 30, 25, 10, 25]],
        [[-10, -25, 20, -25, 20, 10, -10, 10]],
    ]


@pytest.mark.parametrize("label", range(3))
def test_the_mask_of_a_crop_is_the_crop_of_the_mask(label: int) -> None:
    corners = shapes.outline(label, 12.3, 7.8, 40.2)
    polygons = (np.array(corners).flatten(),)
    box = np.array([[12.3, 7.8, 52.5, 48.0]], np.float32)
    whole = Objects(box, np.array([1]), np.zeros(1, bool), (polygons,))
    part = cropped(whole, top=20, left=25, height=25, width=40)
    full = rasterise(polygons, np.ones(2), (60, 70))
    assert np.array_equal(rasterise(part.polygons[0], np.ones(2), (25, 40)), full[20:45, 25:65])


def test_sides_are_drawn_from_the_range_in_pixels_of_the_first_resize() -> None:
    """A 480 x 640 image whose shorter side is made 480: no resize, so pixels are its own."""
    cropping = Cropping(1.0, Resizing((480,), 1333), 384, 600)
    boxes = np.array([cropping.draw(key, 480, 640) for key in keys(3000)])
    top, left, height, width = boxes.T
    assert (height.min(), height.max()) == (384, 480)  # no crop is higher than the image
    assert (width.min(), width.max()) == (384, 600)
    assert (top.min(), left.min()) == (0, 0)
    assert ((top + height).max(), (left + width).max()) == (480, 640)
    assert width.mean() == pytest.approx(492, abs=5)
    middle = (left / (640 - width)).mean()
    assert middle == pytest.approx(0.5, abs=0.02)
    assert abs(np.corrcoef(width, height)[0, 1]) < 0.05
    assert abs(np.corrcoef(left / (640 - width), width)[0, 1]) < 0.05


def test_a_crop_is_drawn_at_the_drawn_size() -> None:
    """Twice as large an image has crops of twice as many pixels; a small image is not cropped."""
    small, large = (Cropping(1.0, Resizing((400, 500, 600), 1333), 384, 600),) * 2
    for key in keys(50):
        a, b = small.draw(key, 300, 400), large.draw(key, 600, 800)
        assert np.abs(2 * np.array(a) - np.array(b)).max() <= 3
    tiny = Cropping(1.0, Resizing((80,), 96), 384, 600)
    assert {tiny.draw(key, 64, 48) for key in keys(50)} == {(0, 0, 64, 48)}


def test_a_crop_without_objects_has_no_boxes_and_no_masks() -> None:
    cropping = Cropping(1.0, Resizing((100,), 200), 20, 20)
    augment = Augmentation(Resizing((60,), 200), cropping, masks=True)
    image = torch.randint(0, 255, (3, 100, 100), dtype=torch.uint8)
    counts = []
    for key in keys(20):
        pixels, target = augment(image, objects((0, 0, 30, 30)), key)
        counts.append(len(target["boxes"]))
        assert pixels.shape == (3, 60, 60)
        assert target["boxes"].shape == (counts[-1], 4)
        assert target["masks"].shape == (counts[-1], 60, 60)
        assert target["labels"].shape == (counts[-1],)
    assert set(counts) == {0, 1}


def test_an_object_that_a_resize_makes_too_thin_is_left_out() -> None:
    """torchvision ends a run at a box without height."""
    shown = objects((0, 0, 400, 0.1), (100, 0, 300, 40))
    target = resized_target(shown, (400, 400), (20, 20), True, masks=True)
    assert target["boxes"].tolist() == [[5, 0, 15, 2]]
    assert target["labels"].tolist() == [2]
    assert target["masks"].shape == (1, 20, 20)
    assert target["masks"].sum() == 20


def test_pixels_and_objects_of_a_crop_move_together(coco_root: Path) -> None:
    crop = {
        "DETECTION__CROP": 1.0,
        "DETECTION__CROP_SIZES": [64],
        "DETECTION__CROP_RANGE": [30, 50],
    }
    seen = 0
    for image, target in drawn(make_loader(coco_root, MODEL__RCNN__MASKS=True, **crop)).values():
        parts = (target[name] for name in ("boxes", "masks", "labels"))
        for box, mask, label in zip(*parts, strict=True):
            if mask.sum() < 50:
                continue  # a corner of a shape
            seen += 1
            rows, columns = mask.nonzero().unbind(1)
            assert columns.min() >= box[0] - 1.5
            assert columns.max() + 1 <= box[2] + 1.5
            assert rows.min() >= box[1] - 1.5
            assert rows.max() + 1 <= box[3] + 1.5
            assert int(image[:, mask.bool()].mean(1).argmax()) == int(label) - 1
    assert seen > 10


def test_half_of_the_images_are_cropped_whatever_the_start(coco_root: Path) -> None:
    crop = {
        "DETECTION__CROP_SIZES": [64],
        "DETECTION__CROP_RANGE": [20, 30],
        "DETECTION__FLIP": 0.0,
    }
    plain = drawn(make_loader(coco_root, **crop), 0, 10)
    half = drawn(make_loader(coco_root, DETECTION__CROP=0.5, **crop), 0, 10)
    late = drawn(make_loader(coco_root, DETECTION__CROP=0.5, **crop), 6, 10)
    assert all(torch.equal(image, half[key][0]) for key, (image, _) in late.items())
    same = sum(torch.equal(image, half[key][0]) for key, (image, _) in plain.items())
    assert 0.25 * len(plain) < same < 0.75 * len(plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"CROP": 1.5}, ["CROP", "between 0 and 1"]),
        ({"CROP_RANGE": [600, 384]}, ["CROP_RANGE", "[600, 384]", "[384, 600]"]),
        ({"CROP_RANGE": [384]}, ["CROP_RANGE", "give 2"]),
        ({"CROP": 0.5}, ["MAX_SIZE", "96", "600"]),
    ],
)
def test_crops_that_cannot_be_are_refused_by_key(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^DETECTION\.") as error:
        config(**{f"DETECTION__{key}": value for key, value in changes.items()})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("name", "backbone", "drop_path"),
    [
        ("coco_swin_tiny_mask_1x", "swin_tiny", 0.1),
        ("coco_swin_tiny_mask_3x", "swin_tiny", 0.2),
        ("coco_swin_small_mask_1x", "swin_small", 0.2),
        ("coco_swin_small_mask_3x", "swin_small", 0.2),
    ],
)
def test_the_mask_recipes_of_swin_are_the_published_ones(
    name: str, backbone: str, drop_path: float
) -> None:
    cfg = load_detection_config([str(RECIPES / f"{name}.yaml")], [], {})
    rcnn, detection, optim = cfg.MODEL.RCNN, cfg.DETECTION, cfg.OPTIM
    assert (cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.DROP_PATH) == (backbone, drop_path)
    assert (rcnn.RPN_LOSS, rcnn.BOX_LOSS, rcnn.BOX_HEAD) == ("l1", "l1", "2fc")
    assert (rcnn.ALIGNED, rcnn.RPN_PRE_NMS[0], rcnn.RPN_POST_NMS[0]) == (True, 2000, 1000)
    plan = (87960, [58640, 80630]) if name.endswith("1x") else (263880, [197910, 241890])
    assert (detection.MAX_ITER, detection.STEPS, detection.WARMUP_ITERS) == (*plan, 500)
    assert detection.MIN_SIZES == list(range(480, 801, 32))
    assert (detection.CROP, detection.CROP_SIZES) == (0.5, [400, 500, 600])
    assert (detection.CROP_RANGE, detection.MAX_SIZE) == ([384, 600], 1333)
    assert (optim.NAME, optim.BASE_LR, optim.WEIGHT_DECAY) == ("adamw", 1e-4, 0.05)
    assert (optim.EXCLUDE_RULE, optim.LR_BATCH, optim.CLIP_GRAD) == ("norms", 16, 0.0)
    assert optim.WARMUP_LR == pytest.approx(optim.BASE_LR * 0.001)
