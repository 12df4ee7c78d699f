"""Segmentation's training input and the way back from logits to labels, on one core.

The reference of the input is mmsegmentation's pipeline for ADE20K in PIL and torchvision: decode,
resize by a random ratio, crop by its classes, flip, photometric distortion, normalise, pad. That of
the way back is two resizes of all classes and argmax.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import functional as torchvision

from benchmarks.common import Side, measure, ratio, show
from benchmarks.input.decode import add_arguments as add_data_arguments
from benchmarks.input.decode import interleaved, load_photos, print_rates, rate
from data.augment.base import IMAGENET_MEAN, IMAGENET_STD
from data.decode import FORMATS
from data.sampler import Request
from segmentation.datasets import SegmentationData
from segmentation.defaults import load_segmentation_config
from segmentation.inference import Inference, predict
from segmentation.loader import build_train_loader
from segmentation.sources.labels import shifted_table

_CLASSES = 150
_SIZE = (512, 683)  # of most images of ADE20K
_CROP = 512
_VOID = 255
_EXAMINED = 10  # crops, of which the first with several classes is taken


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the images."""
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compare the training input on the same files; then resizing and argmax of one image."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = _training_input(args, Path(folder))
    for size in (_SIZE, (2 * _SIZE[0], 2 * _SIZE[1])):
        figures |= _way_back(size, args.rounds)
    return figures


# ---- training input ------------------------------------------------------------------------------


def _training_input(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    photos = load_photos(args.data, args.images)
    data = _made_dataset(photos.files, folder)
    cfg = load_segmentation_config([], [], {})
    cpu = torch.device("cpu")
    loader = build_train_loader(cfg, data, global_batch=cfg.TRAIN.BATCH_SIZE, device=cpu)

    def reference(_pass: int, place: slice, _files: list[bytes]) -> None:
        samples = [
            plain_sample(image, label)
            for image, label in zip(data.files[place], data.labels[place], strict=True)
        ]
        torch.stack([pixels for pixels, _ in samples])
        torch.stack([classes for _, classes in samples])

    def ours(number: int, place: slice, _files: list[bytes]) -> None:
        request = Request(number, number, np.arange(len(data))[place])
        loader.finish(*loader.samples[request])

    files = [file.read_bytes() for file in data.files]
    times = interleaved([("reference", reference), ("ours", ours)], files, args.rounds)
    print(f"{photos.describe()}, as {_SIZE[1]} x {_SIZE[0]} with made up labels; one core")
    print_rates(times, photos, "reference")
    return {
        "dense_input_speedup": ratio(times, "reference", "ours"),
        "dense_input_per_s": rate(times["ours"], photos),
        "dense_input_reference_per_s": rate(times["reference"], photos),
    }


def _made_dataset(files: list[bytes], folder: Path) -> SegmentationData:
    """Write the photos at ADE20K's size and label maps of thirty regions each."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    rows, columns = np.mgrid[: _SIZE[0], : _SIZE[1]]
    for number, file in enumerate(files):
        photo = Image.open(io.BytesIO(file), formats=FORMATS).convert("RGB")
        images.append(folder / f"{number}.jpg")
        photo.resize(_SIZE[::-1], Image.Resampling.BICUBIC).save(images[-1], quality=90)
        centres = rng.uniform((0, 0), _SIZE, size=(30, 2))
        distances = np.stack([(rows - y) ** 2 + (columns - x) ** 2 for y, x in centres])
        stored = rng.integers(0, _CLASSES + 1, size=30, dtype=np.uint8)
        labels.append(folder / f"{number}.png")
        Image.fromarray(stored[distances.argmin(0)]).save(labels[-1])
    return SegmentationData(
        tuple(images),
        tuple(labels),
        [str(number) for number in range(_CLASSES)],
        (shifted_table(_CLASSES),),
        np.zeros(len(images), dtype=np.int64),
    )


def plain_sample(image_file: Path, label_file: Path) -> tuple[Tensor, Tensor]:
    """Return a crop (3,512,512), normalised, and its classes (512,512) by PIL and torchvision."""
    image = Image.open(image_file, formats=FORMATS).convert("RGB")
    label = _reduced(np.array(Image.open(label_file, formats=FORMATS)))
    scale = np.random.uniform(0.5, 2.0)
    longest, shortest = int(2048 * scale), int(512 * scale)
    factor = min(longest / max(image.size), shortest / min(image.size))
    size = [int(side * factor + 0.5) for side in image.size[::-1]]
    modes = torchvision.InterpolationMode
    image = torchvision.resize(image, size, modes.BILINEAR)
    classes = np.array(torchvision.resize(Image.fromarray(label), size, modes.NEAREST))
    top, left = _plain_crop(classes)
    classes = classes[top : top + _CROP, left : left + _CROP]
    image = torchvision.crop(image, top, left, *classes.shape)
    if np.random.rand() < 0.5:
        image, classes = torchvision.hflip(image), np.ascontiguousarray(classes[:, ::-1])
    pixels = torchvision.to_tensor(plain_distortion(np.array(image)))
    pixels = torchvision.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)
    padding = [0, 0, _CROP - classes.shape[1], _CROP - classes.shape[0]]
    padded = torchvision.pad(torch.from_numpy(classes)[None], padding, fill=_VOID)
    return torchvision.pad(pixels, padding), padded[0].long()


def _reduced(label: np.ndarray) -> np.ndarray:
    """Make 0 void and 1 the first class."""
    label[label == 0] = _VOID
    label -= 1
    label[label == _VOID - 1] = _VOID
    return label


def _plain_crop(classes: np.ndarray) -> tuple[int, int]:
    top = left = 0
    for _ in range(_EXAMINED + 1):
        top = np.random.randint(0, max(classes.shape[0] - _CROP, 0) + 1)
        left = np.random.randint(0, max(classes.shape[1] - _CROP, 0) + 1)
        cut = classes[top : top + _CROP, left : left + _CROP]
        present, counts = np.unique(cut, return_counts=True)
        counts = counts[present != _VOID]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    return top, left


def plain_distortion(image: np.ndarray) -> np.ndarray:
    """Distort uint8 (h,w,3) as mmsegmentation does, in whole levels; HSV by PIL."""
    if np.random.randint(2):
        image = _linear(image, offset=np.random.uniform(-32, 32))
    early = np.random.randint(2)
    if early and np.random.randint(2):
        image = _linear(image, factor=np.random.uniform(0.5, 1.5))
    if np.random.randint(2):
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 1] = _linear(hsv[..., 1], factor=np.random.uniform(0.5, 1.5))
        image = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    if np.random.randint(2):
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        # PIL's hue has 256 levels, which wrap around as uint8 does; OpenCV's has 180
        hsv[..., 0] += np.uint8(round(np.random.randint(-18, 18) * 256 / 180) % 256)
        image = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    if not early and np.random.randint(2):
        image = _linear(image, factor=np.random.uniform(0.5, 1.5))
    return image


def _linear(levels: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    return np.clip(levels.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


# ---- from logits to labels -----------------------------------------------------------------------


def _way_back(size: tuple[int, int], rounds: int) -> dict[str, float]:
    """Compare the labels at `size` of an image that the network saw at 512 x 683."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, _CLASSES, 16, 22, generator=generator)
    stride = (_SIZE[0] // 4, -(-_SIZE[1] // 4))
    logits = interpolate(coarse, stride, mode="bilinear") * 4  # regions, as a network gives
    image = torch.zeros(3, *_SIZE)
    how = Inference((_CROP, _CROP), (341, 341))

    def reference() -> Tensor:
        return plain_labels(logits, _SIZE, size)

    def ours() -> Tensor:
        return predict(lambda _: logits, image, size, how)

    equal = float((reference() == ours()).float().mean())
    sides = [Side("reference", reference), Side("ours", ours)]
    times = measure(sides, rounds, torch.device("cpu"))
    print(f"logits of {_CLASSES} classes to labels of {size[1]} x {size[0]}, equal: {equal:.6%}")
    show(times)
    name = f"labels_{size[0]}"
    return {f"{name}_speedup": ratio(times, "reference", "ours"), f"{name}_equal": equal}


def plain_labels(logits: Tensor, seen: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return labels (N,H,W): mmsegmentation's two resizes, without its softmax."""
    for shape in (seen, size):
        logits = interpolate(logits, shape, mode="bilinear", align_corners=False)
    return logits.argmax(dim=1)
