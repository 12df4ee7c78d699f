"""Pets, Tiny-ImageNet and the flat folder cut in two: listings, labels, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as tv_datasets

from data.sources import build_source, is_labelled, open_split
from data.sources.named_sets import PET_BREEDS, _inside
from utils.config.schema import declare


def save(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, level, level)).save(path)


@pytest.fixture
def few_pets(tmp_path: Path) -> Path:
    """Give the folder that holds oxford-iiit-pet with 4 + 1 images."""
    root = tmp_path / "oxford-iiit-pet"
    (root / "annotations").mkdir(parents=True)
    rows = [
        ("yorkshire_terrier_2", 37),
        ("Abyssinian_1", 1),
        ("beagle_9", 5),
        ("Abyssinian_10", 1),
        ("boxer_3", 9),
    ]
    for number, (name, _) in enumerate(rows):
        save(root / "images" / f"{name}.jpg", number)
    lines = [f"{name} {label} 1 1\n" for name, label in rows]
    (root / "annotations" / "trainval.txt").write_text(
        "#Image CLASS-ID SPECIES BREED\n" + "".join(lines[:4])
    )
    (root / "annotations" / "test.txt").write_text(lines[4])
    return tmp_path


@pytest.mark.parametrize("inside", ["", "oxford-iiit-pet"])
def test_pets_follow_their_lists(few_pets: Path, inside: str) -> None:
    train, val = (build_source("pets", str(few_pets / inside), split) for split in ("train", "val"))
    assert (train.labels.tolist(), val.labels.tolist()) == ([36, 0, 4, 0], [8])
    assert [Path(train.name(i)).name for i in range(4)][:2] == [
        "yorkshire_terrier_2.jpg",
        "Abyssinian_1.jpg",
    ]
    assert (train.num_classes, train.classes[36], train.classes[0]) == (
        37,
        "yorkshire_terrier",
        "Abyssinian",
    )
    assert is_labelled(train)
    assert train.load(2).shape == (3, 8, 8)
    assert train.fingerprint() != val.fingerprint()


def test_pets_of_the_pack_are_torchvisions(pets: Path) -> None:
    assert list(PET_BREEDS) == sorted(set(PET_BREEDS), key=str.lower)
    assert len(PET_BREEDS) == 37
    for split, name, count in (("train", "trainval", 30), ("val", "test", 18)):
        ours = build_source("pets", str(pets), split)
        theirs = tv_datasets.OxfordIIITPet(str(pets), split=name)
        assert len(ours) == len(theirs) == count
        for i in range(count):
            image, label = theirs[i]
            assert int(ours.labels[i]) == label
            np.testing.assert_array_equal(
                ours.load(i).permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB"))
            )


def test_pets_download_goes_to_the_parent(few_pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        tv_datasets, "OxfordIIITPet", lambda root, download: calls.append((root, download))
    )
    for inside in ("", "oxford-iiit-pet"):
        node = declare({}).defaults().DATA
        choices = [
            "DATASET",
            "pets",
            "PATH",
            str(few_pets / inside),
            "DOWNLOAD",
            True,
            "INDEX_CACHE",
            "off",
        ]
        node.merge_from_list(choices)
        assert len(open_split(node, "train", labelled=True)) == 4
    assert calls == [(str(few_pets), True)] * 2


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Give a Tiny-ImageNet of three classes, unsorted as the original's list is."""
    root = tmp_path / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    for number, wnid in enumerate(wnids):
        for i in range(2):
            save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 10 * number + i)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
    for i in range(3):
        save(root / "val" / "images" / f"val_{i}.JPEG", 100 + i)
    (root / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n" for i, wnid in enumerate(wnids))
    )
    (root / "wnids.txt").write_text("\n".join(wnids))
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tcat\nn99\tunused\n")
    return tmp_path


@pytest.mark.parametrize("inside", ["", "tiny-imagenet-200"])
def test_tinyimagenet_labels_by_the_order_of_wnids(tiny: Path, inside: str) -> None:
    train, val = (
        build_source("tinyimagenet", str(tiny / inside), split) for split in ("train", "val")
    )
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert Path(train.name(4)).name == "n03_0.JPEG"
    assert val.labels.tolist() == [2, 0, 1]
    assert train.classes == val.classes == ["goldfish", "cat", "n03"]
    assert [int(source.load(1)[0, 0, 0]) for source in (train, val)] == [11, 101]
    as_folder = tv_datasets.ImageFolder(str(tiny / "tiny-imagenet-200" / "train"))
    assert train.labels.tolist() == as_folder.targets


def test_the_flat_folder_is_cut_by_reversed_names(tmp_path: Path) -> None:
    names = [
        "a_9.jpg",
        "b_1.jpg",
        "c_5.JPG",
        "d_0.jpeg",
        "e_3.png",
        "f_7.jpg",
        "g_2.jpg",
        "h_8.jpg",
        "i_4.jpg",
    ]
    names += ["j_6.jpg", "k_x.webp", "aa_y.jpg"]
    for number, name in enumerate(names):
        save(tmp_path / name, number)
    save(tmp_path / "deeper" / "z.jpg", 0)
    (tmp_path / "notes.txt").write_text("no image")
    order = sorted(names, key=lambda name: "".join(reversed(name)))
    train, val = (build_source("folder_split", str(tmp_path), split) for split in ("train", "val"))
    # int(0.9 * 12)
    assert [Path(train.name(i)).name for i in range(len(train))] == sorted(order[:10])
    assert [Path(val.name(i)).name for i in range(len(val))] == sorted(order[10:])
    assert (train.labels.tolist(), train.num_classes) == ([-1] * 10, 0)
    assert torch.equal(val.load(0), val.load(0))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            "pets",
            r"DATA.PATH .*needs oxford-iiit-pet/ there, with annotations in it, or add --download",
        ),
        ("tinyimagenet", r"DATA.PATH .*needs tiny-imagenet-200/ there, with wnids.txt in it"),
        (
            "folder_split",
            r"no images in .*: DATA.DATASET 'folder_split' needs at least 2 of them, not 0",
        ),
    ],
)
def test_a_wrong_folder_is_named_with_what_it_should_hold(
    tmp_path: Path, dataset: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_source(dataset, str(tmp_path), "train")


def test_incomplete_copies_are_refused(few_pets: Path, tiny: Path, tmp_path: Path) -> None:
    pets_root, tiny_root = tmp_path / "oxford-iiit-pet", tmp_path / "tiny-imagenet-200"
    next((pets_root / "images").glob("boxer*")).unlink()
    with pytest.raises(
        ValueError, match=r"test.txt lists 1 images that are not .*, such as boxer_3.jpg"
    ):
        build_source("pets", str(tmp_path), "val")
    (pets_root / "annotations" / "trainval.txt").write_text("Abyssinian_1 38 1 1\n")
    with pytest.raises(
        ValueError, match=r"trainval.txt: 'Abyssinian_1 38 1 1' is not <image> <class id"
    ):
        build_source("pets", str(tmp_path), "train")
    (tiny_root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn07\n")
    with pytest.raises(ValueError, match=r"val has classes that wnids.txt lacks: n07"):
        build_source("tinyimagenet", str(tmp_path), "val")
    (tiny_root / "words.txt").unlink()
    with pytest.raises(
        ValueError, match=r"words.txt cannot be read; DATA.DATASET 'tinyimagenet' needs it"
    ):
        build_source("tinyimagenet", str(tmp_path), "train")
    save(tmp_path / "flat" / "only.jpg", 1)
    with pytest.raises(ValueError, match="needs at least 2 of them, not 1"):
        build_source("folder_split", str(tmp_path / "flat"), "train")


def test_a_set_without_its_marker_is_told_whatever_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'birds' needs cub/ there, with images.txt in it"):
        _inside(str(tmp_path), "cub", "images.txt", "birds")
    (tmp_path / "cub").mkdir()
    (tmp_path / "cub" / "images.txt").touch()
    for place in (tmp_path, tmp_path / "cub"):
        assert _inside(str(place), "cub", "images.txt", "birds") == tmp_path / "cub"
