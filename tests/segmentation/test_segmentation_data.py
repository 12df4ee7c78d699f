"""Readers of label maps: the layouts round-trip, values become classes, faults name their file."""

import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scenes
from PIL import Image

from segmentation.datasets import SegmentationData, open_dataset
from segmentation.sources import names
from segmentation.sources.labels import LabelError, parse_label_map


def opened(root: Path, dataset: str, split: str, **changes: object) -> SegmentationData:
    return open_dataset(scenes.config(root, dataset, **changes), split)


def agree(data: SegmentationData, index: int, number: int) -> None:
    """Check that a sample is scene `number`."""
    image, label = scenes.scene(number)
    pixels, classes = data.sample(index)
    assert np.array_equal(classes, label)
    assert np.array_equal(data.label(index), label)
    assert np.array_equal(np.asarray(data.image(index)), pixels.permute(1, 2, 0).numpy())
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - image).mean() < 12


# ---- layouts -------------------------------------------------------------------------------------


def test_folder_pairs(pairs_root: Path) -> None:
    data = opened(pairs_root, "folders", "train")
    assert (len(data), data.classes) == (8, list(scenes.CLASSES))
    assert data.name(3).endswith("images/train/scene3.jpg")
    agree(data, 3, 3)


def test_folder_pairs_below_folders(tmp_path: Path) -> None:
    for city, number in (("b", 1), ("a", 2)):
        scenes.write(
            tmp_path / "images" / "train" / city / "x.v1.jpg",
            tmp_path / "labels" / "train" / city / "x.v1.png",
            number,
        )
    (tmp_path / "labels" / "train" / "._x.png").write_bytes(b"")
    data = opened(tmp_path, "folders", "train", SEGMENTATION__CLASSES="a, b, c")
    assert data.classes == ["a", "b", "c"]
    agree(data, 0, 2)
    agree(data, 1, 1)


@pytest.mark.parametrize("below", ["", "ADEChallengeData2016"])
def test_ade20k_counts_from_one_and_zero_is_no_class(tmp_path: Path, below: str) -> None:
    home = tmp_path / below
    scenes.write(
        home / "images" / "training" / "ADE_train_1.jpg",
        home / "annotations" / "training" / "ADE_train_1.png",
        5,
        {0: 0, 1: 1, 2: 150},
    )
    data = opened(tmp_path, "ade20k", "training")
    assert (len(data.classes), data.classes[0], data.classes[-1]) == (150, "wall", "flag")
    scene = scenes.scene(5)[1]
    classes = data.label(0)
    assert set(classes[scene == 0]) == {255}
    assert set(classes[scene == 1]) == {0}
    assert set(classes[scene == 2]) == {149}


def test_the_names_of_ade20k_are_those_of_its_table(tmp_path: Path) -> None:
    assert len(set(names.ADE20K)) == 150
    scenes.write(tmp_path / "images" / "t" / "a.jpg", tmp_path / "annotations" / "t" / "a.png", 1)
    head = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    table = tmp_path / "objectInfo150.txt"
    table.write_text(head + "1\t0.1\t5\t1\t1\twall\n2\t0.1\t5\t1\t0\tdoor, double door\n")
    assert opened(tmp_path, "ade20k", "t").classes == ["wall", "door"]


def test_255_of_a_shifted_map_stays_255(tmp_path: Path) -> None:
    scenes.write(
        tmp_path / "images" / "t" / "a.jpg",
        tmp_path / "annotations" / "t" / "a.png",
        1,
        {0: 255, 1: 1, 2: 2},
    )
    data = opened(tmp_path, "ade20k", "t", SEGMENTATION__CLASSES="x,y")
    assert set(data.label(0)[scenes.scene(1)[1] == 0]) == {255}


@pytest.mark.parametrize("home", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_voc_reads_indices_and_its_lists_join(tmp_path: Path, home: str) -> None:
    root = tmp_path / home
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for number, folder in ((1, "SegmentationClass"), (2, "SegmentationClassAug")):
        image, label = scenes.scene(number)
        (root / "JPEGImages").mkdir(exist_ok=True)
        Image.fromarray(image).save(root / "JPEGImages" / f"20{number}.jpg")
        label[0] = 255
        scenes.paletted(root / folder / f"20{number}.png", label)
    (lists / "train.txt").write_text("201\n")
    (lists / "aug.txt").write_bytes(b"\xef\xbb\xbf202\r\n")
    data = opened(tmp_path, "voc", "train+aug")
    assert (len(data), len(data.classes), data.classes[20]) == (2, 21, "tvmonitor")
    first = data.label(0)
    assert data.label(1)[0].tolist() == [255] * 48
    assert np.array_equal(data.label(1)[1:], scenes.scene(2)[1][1:])
    (lists / "trainaug.txt").write_text("/JPEGImages/202.jpg /SegmentationClassAug/202.png\n")
    assert opened(tmp_path, "voc", "trainaug").files == data.files[1:]
    (root / "JPEGImages" / "201.jpg").rename(root / "JPEGImages" / "my photo.v2.JPG")
    label = root / "SegmentationClass" / "201.png"
    shutil.copy(label, label.with_name("my photo.v2.png"))
    (lists / "own.txt").write_text("my photo.v2\n")
    assert np.array_equal(opened(tmp_path, "voc", "own").label(0), first)
    with pytest.raises(LabelError, match=r"1 of 1 images.*201\.jpg"):
        opened(tmp_path, "voc", "train")
    (lists / "other.txt").write_text("201\n")
    with pytest.raises(LabelError, match=r"'train\+other' lists 201 twice"):
        opened(tmp_path, "voc", "train+other")


@pytest.mark.parametrize(("ending", "stored"), [("labelTrainIds", 13), ("labelIds", 26)])
def test_cityscapes_reads_training_ids_or_ids(tmp_path: Path, ending: str, stored: int) -> None:
    void = 255 if ending == "labelTrainIds" else 4
    scenes.write(
        tmp_path / "leftImg8bit" / "train" / "aachen" / "aachen_0_leftImg8bit.png",
        tmp_path / "gtFine" / "train" / "aachen" / f"aachen_0_gtFine_{ending}.png",
        3,
        {0: void, 1: stored, 2: {"labelTrainIds": 0, "labelIds": 7}[ending]},
    )
    data = opened(tmp_path, "cityscapes", "train")
    assert (len(data.classes), data.classes[13]) == (19, "car")
    scene, classes = scenes.scene(3)[1], data.label(0)
    assert [set(classes[scene == k]) for k in range(3)] == [{255}, {13}, {0}]


@pytest.mark.parametrize("kind", ["binary", "species"])
def test_pets_are_one_class_or_cats_and_dogs(tmp_path: Path, kind: str) -> None:
    home = tmp_path / "oxford-iiit-pet"
    for number, name in ((1, "Bengal_1"), (2, "pug_2")):
        trimap = home / "annotations" / "trimaps" / f"{name}.png"
        scenes.write(home / "images" / f"{name}.jpg", trimap, number, {0: 2, 1: 1, 2: 3})
    (home / "annotations" / "test.txt").write_text("#Image CLASS\nBengal_1 6 1 2\npug_2 9 2 7\n")
    data = opened(tmp_path, "pets", "test", SEGMENTATION__CLASSES_OF=kind)
    assert data.classes == (
        ["background", "pet"] if kind == "binary" else ["background", "cat", "dog"]
    )
    for index, animal in ((0, 1), (1, 1 if kind == "binary" else 2)):
        scene, classes = scenes.scene(index + 1)[1], data.label(index)
        assert [set(classes[scene == k]) for k in range(3)] == [{0}, {animal}, {255}]


def test_a_label_map_and_zero_labels(pairs_root: Path) -> None:
    mapped = opened(pairs_root, "folders", "val", SEGMENTATION__LABEL_MAP="0:255, 1:2,2:0")
    shifted = opened(pairs_root, "folders", "val", SEGMENTATION__REDUCE_ZERO_LABEL="shift")
    scene = scenes.scene(100)[1]
    assert [set(mapped.label(0)[scene == k]) for k in range(3)] == [{255}, {2}, {0}]
    assert [set(shifted.label(0)[scene == k]) for k in range(3)] == [{255}, {0}, {1}]
    assert mapped.fingerprint() != shifted.fingerprint()


# ---- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0:255,1", ["'1'", "VALUE:CLASS"]),
        ("0:3", ["0:3", "0 to 2"]),
        ("300:1", ["300:1", "0 to 255"]),
        ("1:0,1:1", ["duplicate value 1"]),
    ],
)
def test_a_bad_label_map_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(LabelError) as error:
        parse_label_map(text, 3)
    assert all(word in str(error.value) for word in ["SEGMENTATION.LABEL_MAP", *words])


def stored(change: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        with Image.open(file) as image:
            changed = change(image.copy())
        changed.save(file)

    return write


def with_value(value: int) -> Callable[[Image.Image], Image.Image]:
    return lambda image: Image.fromarray(np.full_like(np.array(image), value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (stored(lambda i: i.resize((47, 36))), ["47 x 36 pixels", "48 x 36"]),
        (stored(with_value(3)), ["value 3 has no class", "3 classes", "LABEL_MAP"]),
        (stored(with_value(254)), ["value 254 has no class"]),
        (stored(lambda i: i.convert("RGB")), ["mode RGB", "colours"]),
        (stored(lambda i: i.convert("RGBA")), ["mode RGBA", "colours"]),
        (stored(lambda i: Image.fromarray(np.array(i).astype(np.uint16))), ["16 bit"]),
        (lambda file: Image.new("L", (48, 36)).save(file, format="JPEG"), ["is JPEG"]),
        (lambda file: file.unlink(), ["1 of 8 label maps", "absent"]),
    ],
)
def test_a_bad_label_map_names_its_file(
    pairs_root: Path, tmp_path: Path, change: Callable[[Path], None], words: list[str]
) -> None:
    shutil.copytree(pairs_root, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "labels" / "train" / "scene0.png")
    with pytest.raises(LabelError) as error:
        opened(tmp_path, "folders", "train")
    assert all(word in str(error.value) for word in ["labels/train/scene0.png", *words])


def test_a_damaged_file_is_left_to_the_loader(pairs_root: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs_root, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "labels" / "train" / "scene0.png"
    file.write_bytes(file.read_bytes()[:40])
    data = opened(tmp_path, "folders", "train")
    with pytest.raises(OSError, match=r"truncated|broken|not an image"):
        data.sample(0)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_levels_of_few_bits_are_classes(pairs_root: Path, tmp_path: Path, depth: int) -> None:
    shutil.copytree(pairs_root, tmp_path, dirs_exist_ok=True)
    scene = scenes.scene(0)[1]
    classes = np.minimum(scene, (1 << depth) - 1)
    bits = (classes[:, :, None] >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(len(classes), -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", 48, 36, depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    (tmp_path / "labels" / "train" / "scene0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert np.array_equal(opened(tmp_path, "folders", "train").label(0), classes)


def test_missing_images_folders_and_lists_are_named(pairs_root: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="--data-path"):
        opened(tmp_path / "nowhere", "folders", "train")
    with pytest.raises(LabelError, match=r"images/test: is no folder"):
        opened(pairs_root, "folders", "test")
    with pytest.raises(LabelError, match=r"JPEGImages"):
        opened(pairs_root, "voc", "train")
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(LabelError, match=r"Segmentation/val\.txt.*TRAIN_SPLIT"):
        opened(tmp_path, "voc", "val")
    shutil.copytree(pairs_root, tmp_path / "pairs")
    (tmp_path / "pairs" / "images" / "train" / "scene2.jpg").unlink()
    with pytest.raises(LabelError, match=r"1 label maps have no image.*scene2\.png"):
        opened(tmp_path / "pairs", "folders", "train")
    (tmp_path / "pairs" / "images" / "train" / "scene3.png").write_bytes(b"")
    with pytest.raises(LabelError, match=r"scene3\.png.*scene3\.jpg have one label map"):
        opened(tmp_path / "pairs", "folders", "train")


@pytest.mark.parametrize(
    ("dataset", "changes", "words"),
    [
        ("folders", {"CLASSES": "a,a,b"}, ["SEGMENTATION.CLASSES", "duplicate class 'a'"]),
        ("folders", {"CLASSES": "a"}, ["1 classes", "2 to 254"]),
        ("folders", {"LABEL_MAP": "0:0", "REDUCE_ZERO_LABEL": "keep"}, ["both given"]),
    ],
)
def test_keys_that_cannot_be_are_refused(
    pairs_root: Path, dataset: str, changes: dict[str, str], words: list[str]
) -> None:
    changes = {f"SEGMENTATION__{key}": value for key, value in changes.items()}
    with pytest.raises(LabelError) as error:
        opened(pairs_root, dataset, "train", **changes)
    assert all(word in str(error.value) for word in words)


# ---- the packs -----------------------------------------------------------------------------------


def counts(data: SegmentationData) -> np.ndarray:
    return sum(np.bincount(data.label(i).ravel(), minlength=256) for i in range(len(data)))


def test_the_pack_holds_what_its_readme_says(pack: Path) -> None:
    train, val = (opened(pack / "ade", "ade20k", split) for split in ("training", "validation"))
    assert (len(train), len(val), len(train.classes)) == (60, 20, 12)
    for data in (train, val):
        pixels = counts(data)
        assert (pixels[:12] > 0).all()
        assert pixels[12:255].sum() == 0
    assert 0.70 < counts(train)[255] / counts(train).sum() < 0.73
    cut, whole = opened(pack, "voc", "train"), opened(pack, "voc", "val")
    assert (len(cut), len(whole)) == (46, 18)
    assert np.flatnonzero(counts(cut)[:21] == 0).tolist() == [10, 17, 18, 19]
    assert counts(whole)[18] > 0
    pets = opened(pack / "pets", "folders", "val")
    assert (len(pets), pets.classes) == (18, ["background", "cat", "dog"])


def test_the_pack_of_pets_reads_as_pets(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "oxford-pets-mini.tar"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path, filter="data")
    data = opened(tmp_path, "pets", "trainval", SEGMENTATION__CLASSES_OF="species")
    assert len(data) == 30
    assert set(np.flatnonzero(counts(data))) == {0, 1, 2, 255}
