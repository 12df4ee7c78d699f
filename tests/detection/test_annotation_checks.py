"""Odd annotation files are read right, or refused before training with file, entry and remedy."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import shapes
from PIL import Image

from detection.evaluation import _coco, coco_api
from detection.sources import annotations
from detection.sources.annotations import AnnotationError
from detection.sources.coco import read_coco, uncompressed
from detection.sources.voc import read_voc

Tree = dict[str, Any]
Change = Callable[[Tree], object]
FILE = "instances_val2017.json"
WIDTH, HEIGHT = 80, 96  # of the first picture


@pytest.fixture
def coco(tmp_path: Path) -> Callable[[Change], Path]:
    def make(change: Change) -> Path:
        shapes.coco(tmp_path, train=0, val=4)
        file = tmp_path / "annotations" / FILE
        tree = json.loads(file.read_text())
        change(tree)
        file.write_text(json.dumps(tree))
        return tmp_path

    return make


def each(**fields: Callable[[Tree, int], Any]) -> Change:
    """Set fields of every annotation to what a function of it and its number returns."""

    def change(tree: Tree) -> None:
        for number, entry in enumerate(tree["annotations"]):
            entry |= {key: value(entry, number) for key, value in fields.items()}

    return change


def without(key: str) -> Change:
    return lambda tree: [entry.pop(key) for entry in tree["annotations"]]


def as_text(tree: Tree) -> None:
    """Write every number of the annotations, and every id, as text."""
    for entry in tree["images"] + tree["categories"]:
        entry["id"] = str(entry["id"])
    for entry in tree["annotations"]:
        for key in ("id", "image_id", "category_id", "area", "iscrowd"):
            entry[key] = str(entry[key])
        entry["bbox"] = [str(value) for value in entry["bbox"]]
        entry["segmentation"] = [[str(v) for v in polygon] for polygon in entry["segmentation"]]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda tree: None,
        each(id=lambda entry, number: number),
        each(id=lambda entry, number: 1 + number % 2),
        without("id"),
        without("area"),
        without("iscrowd"),
        as_text,
    ],
    ids=["plain", "ids_from_0", "ids_repeat", "no_id", "no_area", "no_iscrowd", "text"],
)
def test_a_perfect_detector_gets_full_marks(
    coco: Callable[[Change], Path], change: Change, masks: bool
) -> None:
    pytest.importorskip("faster_coco_eval")
    root = coco(lambda tree: None)
    plain = read_coco(root, "val2017", masks)
    data = read_coco(coco(change), "val2017", masks)
    assert data.ids == plain.ids
    for objects, expected in zip(data.objects, plain.objects, strict=True):
        assert objects.boxes.tolist() == expected.boxes.tolist()
        assert objects.labels.tolist() == expected.labels.tolist()
        for parts, others in zip(objects.polygons, expected.polygons, strict=True):
            assert [part.tolist() for part in parts] == [part.tolist() for part in others]
        assert not objects.ignored.any()
    found = []
    mask = coco_api()[2]
    for index, objects in enumerate(data.objects):
        for number, (box, label) in enumerate(zip(objects.boxes, objects.labels, strict=True)):
            item = {"index": index, "label": int(label), "score": 0.9, "box": box.tolist()}
            if masks:
                size = data.load(index).shape[1:]
                item["rle"] = mask.merge(
                    mask.frPyObjects([p.tolist() for p in objects.polygons[number]], *size)
                )
            found.append(item)
    metrics = _coco(found, data, masks)
    names = ["AP", "mask/AP"] if masks else ["AP"]
    assert [metrics[name] for name in names] == pytest.approx([100.0] * len(names))


def first(**fields: Any) -> Change:
    return lambda tree: tree["annotations"][0].update(fields)


def size_of_images(width: int, height: int) -> Change:
    return lambda tree: [image.update(width=width, height=height) for image in tree["images"]]


ENTRY = r"annotations\[0\] \(id 1\)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (first(bbox=["a", 1, 2, 3]), ENTRY + r".*bbox \['a', 1, 2, 3\].*four numbers"),
        (first(image_id="x"), ENTRY + ".*image_id 'x'.*whole number"),
        (first(image_id=1.5), ENTRY + ".*image_id 1.5"),
        (first(category_id=True), ENTRY + ".*category_id True"),
        (first(iscrowd="2"), ENTRY + ".*iscrowd 2"),
        (first(area="large"), ENTRY + ".*area 'large'.*remove"),
        (first(area=float("inf")), ENTRY + ".*area inf"),
        (lambda t: t["annotations"].insert(0, 5), r"annotations\[0\]: is 5"),
        (lambda t: t["images"][1].pop("id"), r"images\[1\].*id None"),
        (lambda t: t["images"][1].update(id="100"), r"images\[1\].*same id"),
        (lambda t: t["images"][1].update(file_name=7), r"images\[1\].*file_name 7"),
        (lambda t: t["categories"][1].update(id=3), r"categories\[1\] \(id 3\).*same id"),
        (lambda t: t.update(images={}), "images is not a list"),
    ],
)
def test_a_bad_entry_is_refused_with_its_value(
    coco: Callable[[Change], Path], change: Change, words: str
) -> None:
    with pytest.raises(AnnotationError, match=f"{FILE}: {words}"):
        read_coco(coco(change), "val2017")


@pytest.mark.parametrize(
    "outline",
    [
        None,
        [],
        "polygon",
        [[1, 1, 9, 9]],
        [[1, 1, 9, 1, 9, 9, "x", 9]],
        {"size": [HEIGHT, WIDTH], "counts": [0, 5]},
        {"size": [WIDTH, HEIGHT], "counts": [0, WIDTH * HEIGHT]},
        {"size": [HEIGHT, WIDTH], "counts": "not ~ run lengths"},
        {"counts": [0, WIDTH * HEIGHT]},
    ],
)
def test_a_segmentation_without_a_mask_is_refused_where_masks_are_trained(
    coco: Callable[[Change], Path], outline: object
) -> None:
    root = coco(first(segmentation=outline))
    # boxes alone do not need it: polygons of two corners are harmless then
    assert read_coco(root, "val2017").objects[0].polygons == ()
    with pytest.raises(
        AnnotationError, match=rf"{FILE}: {ENTRY}: segmentation.*MODEL\.RCNN\.MASKS"
    ):
        read_coco(root, "val2017", masks=True)


def test_run_lengths_are_for_crowds_and_tests_only(coco: Callable[[Change], Path]) -> None:
    whole = {"size": [HEIGHT, WIDTH], "counts": [0, WIDTH * HEIGHT]}
    data = read_coco(coco(first(segmentation=whole)), "val2017", masks=True)
    with pytest.raises(AnnotationError, match=rf"{FILE}: 0+\.png.*run-length.*polygons"):
        data.for_training()
    crowd = read_coco(coco(first(segmentation=whole, iscrowd=1)), "val2017", masks=True)
    assert len(crowd.for_training()) >= 3


def test_compressed_run_lengths_are_checked_as_the_evaluator_reads_them() -> None:
    encoder = pytest.importorskip("faster_coco_eval").mask
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.3
    mask[:, 20:50] = False
    text = encoder.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
    runs = uncompressed(text if isinstance(text, str) else text.decode())
    colours = np.arange(len(runs)) % 2
    assert np.repeat(colours, runs).reshape(WIDTH, HEIGHT).T.tolist() == mask.tolist()
    assert uncompressed("5P") == []  # its last number has no end


@pytest.mark.parametrize(
    "change", [size_of_images(1000, 1001), size_of_images(40, 48), size_of_images(0, 0)]
)
def test_another_size_than_the_images_is_refused(
    coco: Callable[[Change], Path], change: Change
) -> None:
    with pytest.raises(AnnotationError, match=rf"{FILE}: 4 of 4 images.*0\.png has 80 x 96 pixels"):
        read_coco(coco(change), "val2017")


def test_an_image_turned_by_its_exif_mark_is_refused(coco: Callable[[Change], Path]) -> None:
    root = coco(lambda tree: tree["images"][0].update(width=HEIGHT, height=WIDTH))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = root / "val2017" / f"{0:012d}.png"
    Image.open(file).save(file, exif=exif)
    with pytest.raises(AnnotationError, match=r"1 of 4.*80 x 96.*says 96 x 80.*EXIF orientation"):
        read_coco(root, "val2017")


def test_boxes_of_no_size_are_counted(
    coco: Callable[[Change], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "synco"):
        read_coco(coco(lambda tree: None), "val2017")
        assert not caplog.messages
        data = read_coco(coco(first(bbox=[50, 6, -5, 20])), "val2017")
    total = 1 + sum(len(o.labels) for o in data.objects)
    (message,) = caplog.messages
    assert f"{FILE}: 1 of {total} boxes" in message
    assert "annotations[0] (id 1), bbox [50.0, 6.0, -5.0, 20.0]" in message


# ---- Pascal VOC ----------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    shapes.voc(tmp_path, train=1, test=2)
    return tmp_path / "VOCdevkit" / "VOC2007"


def read(home: Path) -> Any:
    return read_voc(home.parents[1], "2007_test", shapes.CLASSES)


def rewrite(home: Path, change: Callable[[ElementTree.Element], object]) -> None:
    file = home / "Annotations" / "test0.xml"
    tree = ElementTree.parse(file)
    change(tree.getroot())
    tree.write(file)


def set_text(path: str, text: str) -> Callable[[ElementTree.Element], None]:
    def change(root: ElementTree.Element) -> None:
        element = root.find(path)
        if element is None:
            element = ElementTree.SubElement(root, path)
        element.text = text

    return change


@pytest.mark.parametrize("value", ["nan", "inf", "ten", "", "1,5"])
def test_a_voc_box_that_is_no_numbers_is_refused(voc: Path, value: str) -> None:
    rewrite(voc, set_text("object/bndbox/xmin", value))
    with pytest.raises(AnnotationError, match=rf"test0\.xml: object 0.*{value}.*four numbers"):
        read(voc)


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".png"])
def test_voc_images_may_have_other_endings(voc: Path, ending: str) -> None:
    image = voc / "JPEGImages" / "test0.jpg"
    image.rename(image.with_suffix(ending))
    data = read(voc)
    assert [file.name for file in data.files] == [f"test0{ending}", "test1.jpg"]
    assert data.load(0).shape == (3, 80, 96)


def test_the_image_may_have_the_name_of_filename(voc: Path) -> None:
    (voc / "JPEGImages" / "test0.jpg").rename(voc / "JPEGImages" / "photo.png")
    rewrite(voc, set_text("filename", r"C:\pictures\photo.png"))
    assert read(voc).files[0].name == "photo.png"


def test_a_filename_of_another_image_is_refused(voc: Path) -> None:
    rewrite(voc, set_text("filename", "test1.jpg"))
    with pytest.raises(AnnotationError, match=r"test0\.xml: <filename> is 'test1\.jpg'.*correct"):
        read(voc)
    # a name of nothing that is there misleads nobody
    rewrite(voc, set_text("filename", "elsewhere.jpg"))
    assert read(voc).files[0].name == "test0.jpg"


def test_voc_names_may_hold_spaces_and_lists_labels(voc: Path) -> None:
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (voc / folder / f"test0.{ending}").rename(voc / folder / f"my photo 1.{ending}")
    (voc / "ImageSets" / "Main" / "test.txt").write_text("my photo 1  -1\nmy photo 1\ntest1 -1\n")
    assert read(voc).ids == ("2007/my photo 1", "2007/my photo 1", "2007/test1")


def test_byte_order_marks_are_read_over(voc: Path, coco: Callable[[Change], Path]) -> None:
    expected = read(voc)
    for file in (voc / "ImageSets" / "Main" / "test.txt", voc / "Annotations" / "test0.xml"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    data = read(voc)
    assert data.ids == expected.ids
    assert data.fingerprint() == expected.fingerprint()
    file = coco(lambda tree: None) / "annotations" / FILE
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_coco(file.parents[1], "val2017")) == 4


def test_voc_boxes_of_turned_images_are_refused_and_a_few_are_reported(
    voc: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read(voc)
    assert not caplog.text
    image = voc / "JPEGImages" / "test0.jpg"
    Image.open(image).resize((60, 96)).save(image)
    read(voc)
    assert "boxes of 1 of 2 images end outside" in caplog.text
    monkeypatch.setattr(annotations, "_FEW", 0)
    with pytest.raises(AnnotationError, match=r"1 of 2 .*test0\.jpg has 60 x 96 .*EXIF"):
        read(voc)
