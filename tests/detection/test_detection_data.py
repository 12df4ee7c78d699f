"""Readers say what is wrong with a data set; the loader moves boxes, masks and pixels together."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import shapes
import torch
from torch import nn
from yacs.config import CfgNode

from detection import augment
from detection import loader as loading
from detection.defaults import DATASETS, load_detection_config
from detection.evaluation import evaluate
from detection.sources.annotations import AnnotationError, DetectionData, Objects
from detection.sources.coco import read_coco
from detection.sources.datasets import read_split
from detection.sources.voc import VOC_CLASSES, read_voc
from utils import distributed

CPU = torch.device("cpu")
VOC = {"DATA__DATASET": "voc", "DETECTION__CLASSES": ",".join(shapes.CLASSES)}


def config(**changes: Any) -> Any:
    return load_detection_config([], shapes.opts(**changes), {})


# ---- readers -------------------------------------------------------------------------------------


def test_coco_labels_follow_the_category_ids(coco_root: Path) -> None:
    data = read_coco(coco_root, "train2017", masks=True)
    assert (len(data), data.classes, data.category_ids) == (8, shapes.CLASSES, (3, 5, 7))
    tree = json.loads((coco_root / "annotations" / "instances_train2017.json").read_text())
    for ident, objects in zip(data.ids, data.objects, strict=True):
        entries = [a for a in tree["annotations"] if a["image_id"] == ident]
        assert [3 + 2 * (label - 1) for label in objects.labels.tolist()] == [
            e["category_id"] for e in entries
        ]
        x, y, width, height = entries[0]["bbox"]
        assert objects.boxes[0].tolist() == [x, y, x + width, y + height]
        assert len(objects.polygons) == len(entries)


def test_coco_crowds_and_empty_images_are_left_out_of_training_only(
    coco_root: Path, tmp_path: Path
) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["annotations"][0]["iscrowd"] = 1
        tree["annotations"][0]["segmentation"] = {"size": [96, 80], "counts": [0, 96 * 80]}
        last = tree["images"][-1]["id"]
        tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != last]

    data = read_coco(edited(coco_root, tmp_path, change), "train2017", masks=True)
    train = data.for_training()
    # the first picture's one shape is now a crowd
    assert set(data.ids) - set(train.ids) == {100, 107}
    assert sum(int(o.ignored.sum()) for o in data.objects) == 1
    assert sum(len(o.labels) for o in train.objects) == sum(len(o.labels) for o in data.objects) - 1
    assert all(len(o.polygons) == len(o.labels) for o in train.objects)


def edited(root: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(root, target, dirs_exist_ok=True)
    file = target / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("categories"), ["has no categories"]),
        (lambda t: t["annotations"][0].update(bbox=[1, 2, 3]), ["annotations[0] (id 1)", "bbox"]),
        (
            lambda t: t["annotations"][0].update(bbox=[1, 2, 3, float("nan")]),
            ["annotations[0] (id 1)", "bbox"],
        ),
        (
            lambda t: t["annotations"][0].update(category_id=99),
            ["annotations[0] (id 1)", "category 99"],
        ),
        (lambda t: t["annotations"][0].update(image_id=1), ["annotations[0] (id 1)", "image_id 1"]),
        (
            lambda t: t["annotations"][0].update(segmentation=[[1, 2, 3]]),
            ["annotations[0] (id 1)", "polygon"],
        ),
        (lambda t: t["images"][0].update(file_name="lost.png"), ["absent", "lost.png"]),
        (lambda t: t["images"].append(dict(t["images"][0])), ["same id"]),
        (lambda t: t["images"][0].pop("width"), ["width"]),
    ],
)
def test_bad_coco_is_refused_with_the_entry(
    coco_root: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    with pytest.raises(AnnotationError) as error:
        read_coco(edited(coco_root, tmp_path, change), "train2017", masks=True)
    assert all(word in str(error.value) for word in ["instances_train2017.json", *words])


def test_missing_files_are_named(coco_root: Path, voc_root: Path, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"instances_test2017\.json.*DETECTION"):
        read_coco(coco_root, "test2017")
    with pytest.raises(AnnotationError, match=r"VOC2012.*2012_train"):
        read_voc(voc_root, "2012_train", shapes.CLASSES)
    with pytest.raises(AnnotationError, match=r"--data-path"):
        read_split("coco", str(tmp_path / "nowhere"), "train2017")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_x.json").write_text("{")
    with pytest.raises(AnnotationError, match="not valid JSON"):
        read_coco(tmp_path, "x")


def test_voc_boxes_become_half_open_from_zero(voc_root: Path) -> None:
    data = read_voc(voc_root, "2007_trainval+2007_test", shapes.CLASSES)
    assert (len(data), data.years, data.category_ids) == (12, ("2007", "2007"), (1, 2, 3))
    _, drawn = shapes.draw(np.random.default_rng(1), 96, 80)  # the first picture
    assert data.objects[0].boxes.tolist() == [list(item["box"]) for item in drawn]
    assert data.objects[0].labels.tolist() == [item["label"] + 1 for item in drawn]


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ([{"label": 0, "name": "cube", "box": (1, 1, 5, 5)}], ["'cube'", "DETECTION.CLASSES"]),
        ([{"label": 0, "box": (5, 1, 5, 9)}], ["empty bndbox"]),
    ],
)
def test_bad_voc_is_refused_with_the_file(
    voc_root: Path, tmp_path: Path, objects: list[dict[str, Any]], words: list[str]
) -> None:
    shutil.copytree(voc_root, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "VOCdevkit" / "VOC2007" / "Annotations" / "test0.xml"
    shapes.write_xml(file, objects)
    with pytest.raises(AnnotationError) as error:
        read_voc(tmp_path, "2007_test", shapes.CLASSES)
    assert all(word in str(error.value) for word in [str(file), "object 0", *words])
    file.write_text("<annotation>")
    with pytest.raises(AnnotationError, match="XML"):
        read_voc(tmp_path, "2007_test", shapes.CLASSES)


def test_voc_has_twenty_classes_unless_told_otherwise(voc_root: Path) -> None:
    assert len(VOC_CLASSES) == 20
    with pytest.raises(AnnotationError, match=r"aeroplane.*set DETECTION\.CLASSES"):
        read_split("voc", str(voc_root), "2007_test")
    assert (
        read_split("voc", str(voc_root), "2007_test", "square, disc,triangle").classes
        == shapes.CLASSES
    )


def test_the_fingerprint_changes_with_a_box(coco_root: Path, tmp_path: Path) -> None:
    before = read_coco(coco_root, "train2017").fingerprint()
    moved = edited(coco_root, tmp_path, lambda t: t["annotations"][0].update(bbox=[1, 1, 9, 9]))
    assert read_coco(coco_root, "train2017").fingerprint() == before
    assert read_coco(moved, "train2017").fingerprint() != before


def test_the_packs_hold_what_their_readme_says(packs: Path) -> None:
    coco = read_coco(packs / "coco_mini", "train2017")
    assert (len(coco), len(coco.classes), coco.category_ids[-1]) == (60, 80, 90)
    assert sum(len(o.labels) for o in coco.objects) == 641
    assert sum(int(o.ignored.sum()) for o in coco.objects) == 9
    cells = read_voc(packs, "2007_trainval+2007_test", ("RBC", "WBC", "Platelets"))
    counts = np.bincount(np.concatenate([o.labels for o in cells.objects]))
    assert (len(cells), counts.tolist()) == (120, [0, 1479, 124, 141])


def test_each_set_has_a_reader_and_a_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name without one is told, and is taken neither for COCO nor for VOC."""
    with pytest.raises(AnnotationError, match=r"DATA\.DATASET: 'third' has no reader; use coco or"):
        read_split("third", str(tmp_path), "train")
    monkeypatch.setattr("detection.evaluation.detections", lambda *args: iter(()))
    data = DetectionData((), (), (), (), ())

    def measured(dataset: str) -> str:
        cfg = SimpleNamespace(DATA=SimpleNamespace(DATASET=dataset))
        try:
            evaluate(nn.Identity(), data, cast(CfgNode, cfg), CPU)
        except (ValueError, AttributeError, AssertionError) as error:
            return str(error)
        return ""

    assert measured("third") == "DATA.DATASET: 'third' has no metric; use coco or voc"
    for dataset in DATASETS:
        assert "has no metric" not in measured(dataset)
        with pytest.raises(AnnotationError) as raised:
            read_split(dataset, str(tmp_path), "train")
        assert "has no reader" not in str(raised.value)


# ---- the loader ----------------------------------------------------------------------------------


def make_loader(root: Path, batch: int = 4, **changes: Any) -> loading.DetectionLoader:
    cfg = config(**changes)
    dataset = cfg.DATA.DATASET
    split = "train2017" if dataset == "coco" else "2007_trainval"
    data = read_split(dataset, str(root), split, cfg.DETECTION.CLASSES, cfg.MODEL.RCNN.MASKS)
    data = data.for_training()
    return loading.DetectionLoader(data, cfg, global_batch=batch, device=CPU)


def drawn(
    loader: loading.DetectionLoader, first: int = 0, last: int = 6
) -> dict[tuple[int, int], Any]:
    return {
        (step, int(index)): (image, target)
        for step, batches in loader.from_step(first, last)
        for batch in batches
        for image, target, index in zip(batch.views, batch.targets, batch.indices, strict=True)
    }


def test_boxes_masks_and_pixels_move_together(coco_root: Path) -> None:
    loader = make_loader(coco_root, MODEL__RCNN__MASKS=True)
    widths = set()
    for image, target in drawn(loader).values():
        widths.add(tuple(image.shape))
        assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
        for box, mask, label in zip(
            target["boxes"], target["masks"], target["labels"], strict=True
        ):
            rows, columns = mask.nonzero().unbind(1)
            around = torch.stack(
                [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            ).float()
            assert (around - box).abs().max() <= 1.5
            colour = image[:, mask.bool()].mean(1)
            assert int(colour.argmax()) == int(label) - 1
    assert len(widths) > 2, "sizes are drawn"


@pytest.mark.parametrize("flipped", [False, True])
def test_an_image_without_objects_has_no_boxes_and_no_masks(flipped: bool) -> None:
    nothing = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    target = augment.resized_target(nothing, (40, 60), (20, 30), flipped, masks=True)
    assert {name: tuple(tensor.shape) for name, tensor in target.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 20, 30),
    }
    assert target["masks"].dtype == torch.uint8


def test_about_half_of_the_images_are_flipped_and_none_without_flips(voc_root: Path) -> None:
    plain = drawn(make_loader(voc_root, DETECTION__FLIP=0.0, **VOC), 0, 12)
    mirrored = drawn(make_loader(voc_root, DETECTION__FLIP=1.0, **VOC), 0, 12)
    half = drawn(make_loader(voc_root, **VOC), 0, 12)
    for key, (image, target) in plain.items():
        assert torch.equal(image, mirrored[key][0].flip(2))
        assert torch.allclose(
            target["boxes"][:, 0], image.shape[2] - mirrored[key][1]["boxes"][:, 2]
        )
    flipped = sum(not torch.equal(half[key][0], image) for key, (image, _) in plain.items())
    assert 0.2 * len(plain) < flipped < 0.8 * len(plain)


def test_a_step_depends_neither_on_the_start_nor_on_the_ranks(
    voc_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(make_loader(voc_root, **VOC))
    late = drawn(make_loader(voc_root, **VOC), 4, 6)
    assert all(torch.equal(image, whole[key][0]) for key, (image, _) in late.items())
    shares: dict[tuple[int, int], Any] = {}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "on_main", lambda action: action())
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares |= drawn(make_loader(voc_root, **VOC))
    assert shares.keys() == whole.keys()
    assert all(torch.equal(image, whole[key][0]) for key, (image, _) in shares.items())


def test_workers_give_the_same_batches(voc_root: Path) -> None:
    whole = drawn(make_loader(voc_root, **VOC), 0, 3)
    workers = drawn(make_loader(voc_root, DATA__NUM_WORKERS=1, **VOC), 0, 3)
    assert all(torch.equal(image, whole[key][0]) for key, (image, _) in workers.items())


def test_an_unreadable_image_is_replaced_in_training_and_an_error_in_a_test(
    voc_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(voc_root, tmp_path, dirs_exist_ok=True)
    for split in ("trainval", "test"):
        (tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages" / f"{split}0.jpg").write_bytes(
            b"no image"
        )
    loaded = drawn(make_loader(tmp_path, **VOC))
    assert all(index != 0 for _, index in loaded)
    cfg = config(**VOC)
    with pytest.raises(ValueError, match=r"test0\.jpg"):
        list(loading.batches_of_test(read_voc(tmp_path, "2007_test", shapes.CLASSES), cfg, CPU))


def test_images_above_max_pixels_are_refused(coco_root: Path) -> None:
    limit = config(DATA__MAX_PIXELS=96 * 80 - 1).DATA.MAX_PIXELS
    data = replace(read_split("coco", str(coco_root), "train2017"), max_pixels=limit)
    for split in (data, data.for_training()):
        with pytest.raises(ValueError, match=r"more than DATA\.MAX_PIXELS \(7679\)"):
            split.load(0)


def inside(corners: list[tuple[float, float]], x: float, y: float) -> bool:
    """Tell by the number of edges to the right whether a point is in a polygon."""
    crossings = 0
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            crossings += 1
    return crossings % 2 == 1


@pytest.mark.parametrize("label", range(3))
def test_a_pixel_is_in_the_mask_if_its_centre_is_in_the_polygon(label: int) -> None:
    rng = np.random.default_rng(label)
    for _ in range(5):
        x, y, side = rng.uniform(0, 20, 3) + np.array([-6, -6, 10])  # some reach out of the image
        corners = shapes.outline(label, x, y, side)
        ours = augment.rasterise((np.array(corners).flatten(),), np.array([2.0, 1.5]), (48, 60))
        scaled = [(2.0 * a, 1.5 * b) for a, b in corners]
        exact = np.array([[inside(scaled, c + 0.5, r + 0.5) for c in range(60)] for r in range(48)])
        assert (ours & exact).sum() / (ours | exact).sum() > 0.93


def test_polygons_are_filled_about_as_the_evaluator_fills_them() -> None:
    evaluator = pytest.importorskip("faster_coco_eval").mask
    corners = shapes.outline(1, 11.3, 7.8, 40.2)
    polygon = np.array(corners).flatten()
    ours = augment.rasterise((polygon,), np.ones(2), (60, 70)).astype(bool)
    theirs = evaluator.decode(evaluator.frPyObjects([polygon.tolist()], 60, 70))[..., 0].astype(
        bool
    )
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.95
