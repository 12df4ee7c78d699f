"""Label subsets: balanced, nested, written and read back, and one clear error for each mistake."""

import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.labels import hold_out, label_subset, write_subset
from data.sources import ArraySource, Source, build_source, subset


def toy(labels: list[int]) -> ArraySource:
    """Return 1x1 images with these labels."""
    images = torch.zeros((len(labels), 3, 1, 1), dtype=torch.uint8)
    return ArraySource(
        "toy", images, torch.tensor(labels), [str(c) for c in range(max(labels) + 1)]
    )


SIZES = (7, 150, 33, 1, 800, 60)
UNEVEN = toy([c for c, size in enumerate(SIZES) for _ in range(size)] + [-1] * 40)


def counts(source: Source, indices: np.ndarray) -> list[int]:
    return np.bincount(source.labels.numpy()[indices], minlength=source.num_classes).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_larger_draw_contains_every_smaller_one(seed: int) -> None:
    draws = [
        set(label_subset(UNEVEN, p, seed)) for p in (0.1, 1, 1.4, 2, 5, 9.9, 10, 33, 50, 99.9, 100)
    ]
    assert all(small <= large for small, large in itertools.pairwise(draws))
    assert draws[-1] == set(range(sum(SIZES)))  # all labelled images, none of the others


@pytest.mark.parametrize("percent", [1, 5, 10, 37.5])
def test_every_class_gives_its_share_and_at_least_one(percent: float) -> None:
    drawn = label_subset(UNEVEN, percent, 3)
    assert (np.diff(drawn) > 0).all()
    assert len(drawn) == max(round(percent / 100 * sum(SIZES)), len(SIZES))
    shares = [percent / 100 * size for size in SIZES]
    # what the large classes give to the small ones
    lent = sum(1 - share for share in shares if share < 1)
    for count, share in zip(counts(UNEVEN, drawn), shares, strict=True):
        assert count == 1 if share < 1 else share - lent - 1 < count < share + 1


def test_equal_classes_differ_by_at_most_one_and_the_odd_ones_are_drawn() -> None:
    source = toy([i % 10 for i in range(1000)])
    drawn = counts(source, label_subset(source, 1.5, 0))
    assert sorted(drawn) == [1] * 5 + [2] * 5
    assert drawn != counts(source, label_subset(source, 1.5, 1))


def test_a_draw_is_a_pure_function_of_seed_and_percent() -> None:
    first = label_subset(UNEVEN, 10, 5)
    assert np.array_equal(first, label_subset(UNEVEN, 10, 5))
    assert not np.array_equal(first, label_subset(UNEVEN, 10, 6))
    source = toy([i % 4 for i in range(40)])
    assert label_subset(source, 10, 0).tolist() == [10, 11, 17, 32]  # stored results depend on it


def test_hold_out_is_a_balanced_partition() -> None:
    drawn = label_subset(UNEVEN, 20, 0)
    train, val = hold_out(UNEVEN, drawn[::-1], 0.25, 7)
    assert sorted([*train, *val]) == drawn.tolist()
    assert len(val) == round(0.25 * len(drawn))
    for total, held in zip(counts(UNEVEN, drawn), counts(UNEVEN, val), strict=True):
        assert held < total
        assert abs(held - 0.25 * total) <= 1
    assert not np.array_equal(val, hold_out(UNEVEN, drawn, 0.25, 8)[1])


def test_hold_out_leaves_each_class_an_image_to_train_on() -> None:
    source = toy([0, 0, 1, 2])
    train, val = hold_out(source, np.arange(4), 0.9, 0)
    assert (counts(source, train), counts(source, val)) == ([1, 1, 1], [1, 0, 0])
    with pytest.raises(ValueError, match="3 labels of 3 classes cannot be split"):
        hold_out(source, np.array([0, 2, 3]), 0.5, 0)
    with pytest.raises(ValueError, match=r"1.0, must be in \(0, 1\)"):
        hold_out(source, np.arange(4), 1.0, 0)


@pytest.fixture
def zip_root(image_folder: Path) -> Path:
    """Give the train images as MoBY's zip with its map."""
    train = image_folder / "train"
    names = sorted(str(path.relative_to(train)) for path in train.rglob("*.JPEG"))
    with zipfile.ZipFile(image_folder / "train.zip", "w") as archive:
        for name in names:
            archive.write(train / name, name)
    lines = "".join(f"{name}\t{name[1]}\n" for name in names)
    (image_folder / "train_map.txt").write_text(lines)
    return image_folder


@pytest.mark.parametrize("kind", ["imagefolder", "zip", "digits"])
def test_a_written_list_is_read_back(kind: str, zip_root: Path) -> None:
    source = build_source(kind, str(zip_root), "train")
    indices = label_subset(source, 50, 0)
    write_subset(zip_root / "list.txt", source, indices)
    lines = (zip_root / "list.txt").read_text().splitlines()
    first = source.name(int(indices[0]))
    assert lines[0] == (first if kind == "digits" else Path(first).name)
    assert np.array_equal(label_subset(source, 1, 9, str(zip_root / "list.txt")), indices)
    assert not list(zip_root.glob("*.tmp"))


def test_names_that_repeat_keep_their_folder(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "train" / name)
    source = build_source("imagefolder", str(tmp_path), "train")
    write_subset(tmp_path / "list.txt", source, np.array([2, 1]))
    assert (tmp_path / "list.txt").read_text() == "dog/1.png\ncat/2.png\n"
    assert label_subset(source, 1, 0, str(tmp_path / "list.txt")).tolist() == [1, 2]
    (tmp_path / "list.txt").write_text("2.png\n1.png\n")
    with pytest.raises(ValueError, match=r"list.txt: 1 of its names name several images; .* 1.png"):
        label_subset(source, 1, 0, str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image 00.JPEG\nx.JPEG\ny.JPEG\nz.JPEG\nw.JPEG\n",
            r"4 of its names are not in .*: x.JPEG, y.JPEG, z.JPEG, ...",
        ),
        ("image 00.JPEG\nimage 00.JPEG\n", "1 of its names stand in it twice: image 00.JPEG"),
        ("\n \n", "is empty"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_list_is_one_clear_error(image_folder: Path, text: str | None, message: str) -> None:
    source = build_source("imagefolder", str(image_folder), "train")
    path = image_folder / "list.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"list.txt: {message}"):
        label_subset(source, 1, 0, str(path))


def test_impossible_requests_are_refused(image_folder: Path) -> None:
    for percent in (0, -1, 100.5, float("nan")):
        with pytest.raises(ValueError, match=r"--train-percent\) .* must be in \(0, 100\]"):
            label_subset(UNEVEN, percent, 0)
    unlabelled = build_source("folder", str(image_folder), "train")
    with pytest.raises(ValueError, match="no image has a label"):
        label_subset(unlabelled, 10, 0)


def test_the_lists_of_the_imagenette_pack_are_read(imagenette: Path) -> None:
    source = build_source("imagefolder", str(imagenette), "train")
    one, ten = (
        label_subset(source, 0, 0, str(imagenette / "splits" / f"{p}percent.txt")) for p in (1, 10)
    )
    assert (counts(source, one), counts(source, ten)) == ([3] * 10, [25] * 10)
    assert set(one) < set(ten)
    names = {Path(subset(source, one).name(i)).name for i in range(30)}
    assert names == set((imagenette / "splits" / "1percent.txt").read_text().split())
    train, val = hold_out(source, one, 1 / 3, 0)
    assert (counts(source, train), counts(source, val)) == ([2] * 10, [1] * 10)
