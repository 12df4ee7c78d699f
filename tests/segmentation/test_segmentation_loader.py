"""Batches of crops: keyed, resumable, the same for any workers and ranks; test images once each."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from torch import Tensor

from data.augment.base import IMAGENET_MEAN, IMAGENET_STD, sample_keys
from segmentation import loader as loading
from segmentation.augment import CropAugmentation, PhotometricDistortion, Sample
from segmentation.datasets import open_dataset
from segmentation.loader import Collate, SegmentationLoader, build_train_loader
from utils import distributed

CPU = torch.device("cpu")
MEAN = torch.tensor(IMAGENET_MEAN)[:, None, None]
STD = torch.tensor(IMAGENET_STD)[:, None, None]


def make_loader(root: Path, batch: int = 4, **changes: object) -> SegmentationLoader:
    cfg = scenes.config(root, "folders", **changes)
    source = open_dataset(cfg, "train")
    return build_train_loader(cfg, source, global_batch=batch, device=CPU)


def drawn(
    loader: SegmentationLoader, first: int = 0, last: int = 4
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    return {
        (step, int(index)): (image, label)
        for step, batches in loader.from_step(first, last)
        for batch in batches
        for image, label, index in zip(batch.views[0], batch.labels, batch.indices, strict=True)
    }


def equal(one: dict[tuple[int, int], object], other: dict[tuple[int, int], object]) -> bool:
    same = all(torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True))
    return one.keys() == other.keys() and same


def test_batches_are_normalised_crops_with_classes(pairs_root: Path) -> None:
    ((_, (batch,)),) = make_loader(pairs_root).from_step(0, 1)
    assert (batch.views[0].shape, batch.views[0].dtype) == ((4, 3, 32, 32), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((4, 32, 32), torch.int64)
    assert set(batch.labels.unique().tolist()) <= {0, 1, 2, 255}
    levels = batch.views[0] * STD + MEAN
    inside = (batch.labels != 255)[:, None].expand_as(levels)
    assert -1e-5 < levels[inside].min()
    assert levels[inside].max() < 1 + 1e-5


def test_a_batch_equals_its_samples_one_by_one(pairs_root: Path) -> None:
    """The plain twin: one image after the other, crop, colours, normalise, pad."""
    loader = make_loader(pairs_root)
    cfg = scenes.config(pairs_root, "folders")
    source = open_dataset(cfg, "train")
    augment, colours = CropAugmentation.of(cfg.SEGMENTATION), PhotometricDistortion()
    padded = 0
    for (step, index), (image, label) in drawn(loader).items():
        key = sample_keys(cfg.SEED, step // 2, np.array([index]), 0)  # two steps are an epoch
        crop = augment(*source.sample(index), key)
        levels = crop.image[None].float() / 255
        draws = colours.draw(key, 0)
        if draws["distort"][0]:
            levels = colours.apply(levels, draws)
        height, width = crop.label.shape
        expected = torch.zeros(3, 32, 32)
        expected[:, :height, :width] = (levels[0] - MEAN) / STD
        assert (image - expected).abs().max() < 1e-5
        classes = np.full((32, 32), 255)
        classes[:height, :width] = crop.label
        assert np.array_equal(label.numpy(), classes)
        padded += (height, width) != (32, 32)
    assert padded > 2


def test_padding_is_zero_and_ignored() -> None:
    small = Sample(torch.full((3, 5, 7), 200, dtype=torch.uint8), np.ones((5, 7), np.uint8))
    large = Sample(torch.full((3, 8, 8), 100, dtype=torch.uint8), np.zeros((8, 8), np.uint8))
    images, labels, sizes = Collate((8, 8))([small, large])
    assert sizes == [(5, 7), (8, 8)]
    assert (images[0, :, :5, :7] == 200).all()
    assert (labels[0, :5, :7] == 1).all()
    assert images[0].sum() == 3 * 35 * 200
    assert (labels[0] == 255).sum() == 64 - 35
    assert (images[1] == 100).all()


def test_a_step_depends_neither_on_the_start_nor_on_workers_nor_on_ranks(
    pairs_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(make_loader(pairs_root))
    late = drawn(make_loader(pairs_root), 3, 4)
    assert equal(late, {key: value for key, value in whole.items() if key[0] == 3})
    assert equal(drawn(make_loader(pairs_root, DATA__NUM_WORKERS=2)), whole)
    assert equal(drawn(make_loader(pairs_root, TRAIN__ACCUMULATION_STEPS=2)), whole)
    shares: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares |= drawn(make_loader(pairs_root))
    assert equal(shares, whole)
    monkeypatch.undo()
    loader = make_loader(pairs_root)
    loader.samples.seed = 4  # type: ignore[attr-defined]
    assert not equal(drawn(loader), whole)


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_an_unreadable_file_is_replaced_in_training_and_an_error_in_a_test(
    pairs_root: Path, tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(pairs_root, tmp_path, dirs_exist_ok=True)
    ending = {"images": "jpg", "labels": "png"}[folder]
    for split, number in (("train", 0), ("val", 103)):
        file = tmp_path / folder / split / f"scene{number}.{ending}"
        file.write_bytes(file.read_bytes()[:60])
    loader = make_loader(tmp_path)
    found = drawn(loader)
    assert len([index for _, index in found if index == 0]) == 0
    assert len(loader.bad.reasons) == 1
    assert "scene0.jpg" in caplog.text
    strict = make_loader(tmp_path, DATA__MAX_BAD_FRACTION=0.0)
    with pytest.raises(ValueError, match=r"1 unreadable images.*scene0\.jpg"):
        drawn(strict)
    cfg = scenes.config(tmp_path, "folders")
    with pytest.raises(ValueError, match=r"cannot read .*scene103\.jpg"):
        list(loading.test_images(open_dataset(cfg, "val"), cfg, CPU, (1.0,), 0))


def test_a_wrong_label_is_counted_in_training_and_an_error_in_a_test(
    pairs_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(pairs_root, tmp_path, dirs_exist_ok=True)
    cfg = scenes.config(tmp_path, "folders")
    loader, source = make_loader(tmp_path), open_dataset(cfg, "val")
    for split, number in (("train", 2), ("val", 104)):  # as if it changed after the start
        pixels = scenes.scene(number)[1]
        pixels[5, 6] = 77
        scenes.paletted(tmp_path / "labels" / split / f"scene{number}.png", pixels)
    assert all(index != 2 for _, index in drawn(loader))
    (reason,) = loader.bad.reasons.values()
    assert "scene2.png: value 77 has no class" in reason
    with pytest.raises(ValueError, match=r"scene104\.png: value 77 has no class"):
        list(loading.test_images(source, cfg, CPU, (1.0,), 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_test_image_is_on_one_rank_once(
    pairs_root: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = scenes.config(pairs_root, "folders", DATA__NUM_WORKERS=workers)
    source = open_dataset(cfg, "val")
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        for index, (image,), label in loading.test_images(source, cfg, CPU, (1.0,), 0):
            seen.append(index)
            assert np.array_equal(label, source.label(index))
            assert tuple(image.shape) == (3, 32, 43)  # 36 x 48 into (128, 32)
            levels = 255 * (image * STD + MEAN)
            small = source.image(index).resize((43, 32), resample=2)
            difference = levels - torch.from_numpy(np.array(small)).permute(2, 0, 1)
            assert difference.abs().max() < 1.01
    assert seen == [0, 3, 6, 1, 4, 7, 2, 5]
    assert [index for index, *_ in loading.test_images(source, cfg, CPU, (1.0,), 2)] == [0, 1]


def test_scales_of_a_test_image(pairs_root: Path) -> None:
    cfg = scenes.config(pairs_root, "folders")
    source = open_dataset(cfg, "val")
    _, images, label = next(loading.test_images(source, cfg, CPU, (0.5, 1.0, 1.75), 1))
    assert [tuple(image.shape[1:]) for image in images] == [(16, 21), (32, 43), (56, 75)]
    assert label.shape == (36, 48)
    _, (single,), _ = next(loading.test_images(source, cfg, CPU, (1.0,), 1))
    assert torch.equal(images[1], single)
