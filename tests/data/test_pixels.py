"""Images that are not 8-bit RGB: channels, ranges, what is refused, and every way that reads them."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import yaml
from photos import deep_png
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from data.augment.base import IMAGENET_MEAN, IMAGENET_STD
from data.augment.ops import ColorJitter, Grayscale
from data.augment.randaugment import RandAugment
from data.augment.recipes import build_recipe, for_pixels
from data.loader import GlobalLoader, evaluation_batches
from data.pixels import PLAIN, Pixels, decode, pixels_of
from data.sources import Source, build_source, folder_index, open_split
from models.parts.backbones import build_backbone
from models.weights.load import load_backbone
from tools import pack
from tools.prepare import channel_statistics
from utils.config.schema import declare

CPU = torch.device("cpu")
DEEP = Pixels(5, (0.0, 4095.0), (0.5,) * 5, (0.25,) * 5)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encoded(array: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def grey(span: str | tuple[float, float] | None) -> Pixels:
    return Pixels(1, span, (0.5,), (0.25,))


RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))


@pytest.mark.parametrize(
    ("dtype", "top", "kind", "span"),
    [
        ("uint16", 65535, "PNG", "type"),
        ("uint16", 4095, "PNG", (0.0, 4095.0)),
        ("uint16", 4095, "TIFF", (0.0, 4095.0)),
        ("int32", 65535, "TIFF", (0.0, 65535.0)),
        ("float32", 1, "TIFF", "type"),
        ("float32", 300, "TIFF", (0.0, 300.0)),
        ("uint8", 255, "PNG", None),
        ("uint8", 255, "PNG", "type"),
    ],
)
def test_single_channels_keep_all_their_levels(
    dtype: str, top: float, kind: str, span: str | tuple[float, float] | None
) -> None:
    stored = (RAMP * top).astype(dtype)
    image = decode(encoded(stored, kind), grey(span))
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image.numpy()[0], stored / top, atol=1e-6)
    assert len(image.unique()) == 64


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_have_their_channels_first_or_last(last: bool, order: str) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (5, 32, 40)).astype(">u2")
    array = stored.transpose(1, 2, 0) if last else stored
    image = decode(npy(np.asarray(array, order=order)), DEEP)
    np.testing.assert_allclose(image.numpy(), stored / 4095, atol=1e-6)


@pytest.mark.parametrize("alpha", [False, True])
def test_a_png_of_16_bit_colours_keeps_both_bytes(alpha: bool) -> None:
    levels = np.random.default_rng(0).integers(0, 1 << 16, (9, 11, 3 + alpha)).astype(np.uint16)
    data = deep_png(levels)
    colours = decode(data, Pixels(range="type")).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(colours, levels[..., :3] / 65535, atol=1e-7)
    if alpha:  # four channels are asked for, so that transparency is one of them
        whole = decode(data, Pixels(4, "type")).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(whole, levels / 65535, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "channels", "layout"),
    [
        ("uint16", 3, "contig"),
        ("uint8", 2, "contig"),
        ("uint16", 5, "contig"),
        ("uint16", 5, "separate"),
        ("uint16", 5, "pages"),
        ("float32", 7, "contig"),
        ("float64", 2, "pages"),
        ("uint8", 4, "separate"),
        ("int16", 1, "contig"),
        ("uint32", 1, "contig"),
    ],
)
def test_a_tiff_of_any_channels_and_type(dtype: str, channels: int, layout: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    kind = np.dtype(dtype)
    low, high = (0, 1) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    levels = np.random.default_rng(0).uniform(low, high, (16, 20, channels)).astype(kind)
    file, planes = io.BytesIO(), levels.transpose(2, 0, 1)
    if layout == "pages":
        tifffile.imwrite(file, planes, photometric="minisblack")
    elif channels == 1:
        tifffile.imwrite(file, levels[..., 0], photometric="minisblack")
    else:
        stored = levels if layout == "contig" else planes
        photometric = "rgb" if channels == 3 else "minisblack"
        tifffile.imwrite(file, stored, photometric=photometric, planarconfig=layout)
    image = decode(file.getvalue(), Pixels(channels, "type"))
    wide = (planes.astype(np.float64) - low) / (float(high) - low)
    np.testing.assert_allclose(image.numpy(), wide, atol=1e-6)


def test_a_tiff_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:  # a second page that is larger than the first
        for side in (8, 99):
            writer.write(np.zeros((side, side), np.uint16), photometric="minisblack")
    with pytest.raises(ValueError, match=r"has 2 pages of \[\(8, 8\), \(99, 99\)\]"):
        decode(file.getvalue(), Pixels(2, "type"))
    five = io.BytesIO()
    tifffile.imwrite(
        five, np.zeros((70, 80, 5), np.uint8), photometric="minisblack", planarconfig="contig"
    )
    with pytest.raises(ValueError, match=r"more than DATA.MAX_PIXELS"):
        decode(five.getvalue(), Pixels(5, "type"), max_pixels=5000)
    two = io.BytesIO()
    tifffile.imwrite(
        two, np.zeros((8, 8, 2), np.uint8), photometric="minisblack", planarconfig="contig"
    )
    for pixels in (grey("type"), Pixels(range="type")):  # PIL would read the first of the two
        with pytest.raises(ValueError, match=r"has 2 channels, DATA\.CHANNELS is"):
            decode(two.getvalue(), pixels)
    with pytest.raises(ValueError, match=r"has 5 channels, DATA.CHANNELS is 2"):
        decode(five.getvalue(), Pixels(2, "type"))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match="needs tifffile: pip install tifffile"):
        decode(five.getvalue(), Pixels(5, "type"))


def test_levels_beyond_the_range_are_its_ends() -> None:
    stored = np.array([[-5.0, 0.0, 1.0, 2.0, 9.0]], dtype=np.float32)
    image = decode(npy(stored), grey((0.0, 2.0)))
    assert image.flatten().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_grey_among_colours_is_grey_in_all_three() -> None:
    stored = (RAMP * 65535).astype(np.uint16)
    image = decode(encoded(stored, "PNG"), Pixels(range="type"))
    assert image.shape == (3, 48, 64)
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize(
    ("array", "pixels", "message"),
    [
        (np.zeros((8, 8, 4), np.uint16), DEEP, "has 4 channels, DATA.CHANNELS is 5"),
        (np.zeros((8, 8), np.uint16), grey(None), "uint16 pixels; set DATA.RANGE"),
        (np.full((8, 8), np.nan, np.float32), grey("type"), "not finite"),
        (np.zeros((8, 8), np.complex64), grey("type"), "an array of complex64 is no image"),
        (np.zeros((2, 8, 8, 3), np.uint8), grey("type"), r"of shape \(2, 8, 8, 3\) is no image"),
        (np.array([[None]]), grey("type"), "an array of objects|of objects is no image"),
        (np.zeros((70, 80), np.uint8), grey("type"), "more than DATA.MAX_PIXELS"),
    ],
)
def test_arrays_that_are_no_images_are_refused(
    array: np.ndarray, pixels: Pixels, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decode(npy(array), pixels, max_pixels=5000)


def test_a_cut_array_is_refused() -> None:
    whole = npy(np.zeros((8, 8), np.uint16))
    for data in (whole[:-1], whole + b"\0"):
        with pytest.raises(ValueError, match="cut or too long"):
            decode(data, grey("type"))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ({"CHANNELS": 5}, r"mean and deviation .* not known; tools/prepare/channel_statistics"),
        ({"CHANNELS": 2, "MEAN": [0.5], "STD": [0.2]}, "DATA.MEAN has 1 numbers"),
        ({"CHANNELS": 1, "MEAN": [0.5]}, "give both or none"),
        ({"CHANNELS": 1, "MEAN": [0.5], "STD": [0.0]}, "must be above 0"),
        ({"RANGE": "5,1"}, "two numbers such as 0,4095"),
        ({"RANGE": "all"}, "two numbers such as 0,4095"),
    ],
)
def test_keys_that_cannot_be_are_refused(opts: dict[str, object], message: str) -> None:
    node = declare({}).defaults().DATA
    node.update(opts)
    with pytest.raises(ValueError, match=message):
        pixels_of(node)


def test_the_defaults_are_8_bit_rgb() -> None:
    assert pixels_of(declare({}).defaults().DATA) == PLAIN


def test_operations_on_colours_are_left_out() -> None:
    for view in for_pixels(build_recipe("byol", 32), DEEP):
        assert len(view) >= 3
        assert not any(isinstance(op, (ColorJitter, Grayscale)) for op in view)
    deep_colours = Pixels(range="type")
    assert for_pixels(build_recipe("byol", 32), deep_colours) == build_recipe("byol", 32)


# ---- a data set of five channels -----------------------------------------------------------------


@pytest.fixture
def five(tmp_path: Path) -> Path:
    """Write 12-bit arrays of five channels in two classes."""
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for number in range(6):
            levels = rng.integers(0, 4096, (40, 48, 5)).astype(np.uint16)
            np.save(folder / f"{number}.npy", levels)
    return tmp_path


def data_keys(root: Path) -> CfgNode:
    node = declare({}).defaults().DATA
    node.PATH, node.INDEX_CACHE = str(root), "off"
    node.CHANNELS, node.RANGE, node.MEAN, node.STD = 5, "0,4095", [0.5] * 5, [0.25] * 5
    return node


def opened(root: Path) -> Source:
    return open_split(data_keys(root), "train")


def first_views(source: Source, recipe: str = "byol", workers: int = 0) -> list[Tensor]:
    loader = GlobalLoader(
        source,
        build_recipe(recipe, 16),
        global_batch=4,
        seed=3,
        device=CPU,
        num_workers=workers,
    )
    return [view for _, (batch,) in loader.from_step(1, 3) for view in batch.views]


def test_views_are_the_same_whatever_the_workers(five: Path) -> None:
    alone, together = (first_views(opened(five), workers=workers) for workers in (0, 2))
    assert len(alone) == 4
    for one, two in zip(alone, together, strict=True):
        assert one.shape == (4, 5, 16, 16)
        assert torch.equal(one, two)


def test_views_are_the_same_however_an_array_is_laid_out(five: Path) -> None:
    """Channels last are cropped into the batch, channels first go through a copy."""
    last = first_views(opened(five))
    for file in five.rglob("*.npy"):
        np.save(file, np.load(file).transpose(2, 0, 1))
    for one, two in zip(last, first_views(opened(five)), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_8_bit_colours_get_the_draws_of_the_usual_way(tmp_path: Path) -> None:
    """Float levels differ by rounding only: no crop, flip or colour is drawn anew."""
    runs.image_folder(tmp_path)
    node = declare({}).defaults().DATA
    node.PATH, node.INDEX_CACHE = str(tmp_path), "off"
    plain = first_views(open_split(node, "train"))
    node.RANGE = "type"
    for one, two in zip(plain, first_views(open_split(node, "train")), strict=True):
        assert (one - two).abs().mean() < 0.02


def test_mean_and_deviation_hold_for_8_bit_colours_too(tmp_path: Path) -> None:
    """The compiled kernels know ImageNet's only."""
    runs.image_folder(tmp_path)
    node = declare({}).defaults().DATA
    node.PATH, node.INDEX_CACHE = str(tmp_path), "off"
    usual = first_views(open_split(node, "train"))
    node.MEAN, node.STD = [0.5, 0.4, 0.3], [0.1, 0.2, 0.4]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (node.MEAN, node.STD))
    usual_mean, usual_std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    for one, two in zip(usual, first_views(open_split(node, "train")), strict=True):
        levels = one * usual_std + usual_mean
        torch.testing.assert_close((levels - mean) / std, two, rtol=0, atol=1e-3)


def test_the_index_of_a_folder_lists_arrays(
    five: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_index, "_RACY_NS", 0)
    cache = str(tmp_path_factory.mktemp("indexes"))
    for label in ("a", "b"):
        photo = encoded(np.zeros((8, 8, 3), np.uint8), "PNG")
        (five / "train" / label / "photo.png").write_bytes(photo)
    found = []
    for _ in range(2):
        source = build_source("imagefolder", str(five), "train", index_cache=cache, arrays_too=True)
        found.append([source.name(index) for index in range(len(source))])
        # from now on the index answers
        monkeypatch.setattr(folder_index, "scan", lambda *args: pytest.fail("scanned again"))
    assert found[0] == found[1]
    assert sum(name.endswith(".npy") for name in found[0]) == 12
    monkeypatch.undo()
    # the index of the usual extensions is another one
    only = build_source("imagefolder", str(five), "train", index_cache=cache)
    assert [Path(only.name(index)).name for index in range(len(only))] == ["photo.png"] * 2


def test_a_pack_holds_the_exact_levels(five: Path) -> None:
    argv = ["--data-path", str(five), "--output", str(five / "train.pack"), "--workers", "0"]
    keys = ["--channels", "5", "--range", "0,4095"]
    assert pack.main([*argv, *keys]) == 0
    node = data_keys(five)
    node.DATASET = "packed"
    packed, folder = open_split(node, "train"), opened(five)
    assert len(packed) == len(folder) == 12
    for index in range(12):
        assert torch.equal(packed.load(index), folder.load(index))
    for one, two in zip(first_views(packed), first_views(folder), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("flag", [["--raw"], ["--short-side", "32"]])
def test_packing_does_nothing_else_to_them(
    five: Path, flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data-path", str(five), "--output", str(five / "train.pack"), "--workers", "0"]
    assert pack.main([*argv, "--channels", "5", "--range", "0,4095", *flag]) == 2
    assert "--raw and --short-side are for 8-bit RGB" in capsys.readouterr().err
    assert pack.main([*argv, "--channels", "4", "--range", "0,4095"]) == 2
    assert "has 5 channels, DATA.CHANNELS is 4" in capsys.readouterr().err


def test_ways_that_read_8_bit_rgb_are_refused(five: Path) -> None:
    source, common = opened(five), {"global_batch": 4, "seed": 3, "device": CPU}
    with pytest.raises(ValueError, match="decodes 8-bit RGB only; use 'worker'"):
        GlobalLoader(source, build_recipe("linear", 16), decode="device", **common)
    with pytest.raises(ValueError, match=r"AUG.BACKEND 'fused' is for 8-bit RGB"):
        GlobalLoader(source, build_recipe("linear", 16), backend="fused", **common)
    crop, *rest = build_recipe("linear", 16)[0]
    with pytest.raises(ValueError, match="RandAugment works on 8-bit RGB; turn it off"):
        GlobalLoader(source, ((crop, *rest, RandAugment("rand-m9-mstd0.5-inc1")),), **common)


def test_an_evaluation_normalises_by_the_given_numbers(five: Path) -> None:
    source = opened(five)
    (batch,) = evaluation_batches(source, 40, batch_size=12, device=CPU)
    stored = np.load(source.name(0))[:, 4:44].transpose(2, 0, 1) / 4095  # the central window
    np.testing.assert_allclose(batch.views[0][0].numpy(), (stored - 0.5) / 0.25, atol=1e-4)


def test_colours_of_8_bits_are_the_same_as_float() -> None:
    """The plain way and the other one agree where both can go."""
    stored = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    plain = decode(encoded(stored, "PNG"), PLAIN)
    other = decode(encoded(stored, "PNG"), Pixels(range="type"))
    assert plain.dtype == torch.uint8
    torch.testing.assert_close(plain / 255, other)
    assert Pixels(range="type").mean == IMAGENET_MEAN
    assert Pixels(range="type").std == IMAGENET_STD


def test_without_the_keys_arrays_are_left_out(five: Path) -> None:
    node = declare({}).defaults().DATA
    node.merge_from_list(["PATH", str(five), "INDEX_CACHE", "off"])
    with pytest.raises(ValueError, match="no images"):
        open_split(node, "train")


def test_pixels_in_memory_are_8_bit_rgb() -> None:
    node = declare({}).defaults().DATA
    node.merge_from_list(["DATASET", "digits", "RANGE", "type"])
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="'digits' holds 8-bit RGB pixels; remove the keys"):
        open_split(node, "train")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_statistics_are_those_of_all_pixels(
    five: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    output = five / "pixels.yaml"
    argv = ["channel_statistics.py", "--data-path", str(five), "--output", str(output)]
    keys = ["DATA.CHANNELS", "5", "DATA.RANGE", "0,4095", "DATA.INDEX_CACHE", "off"]
    monkeypatch.setattr("sys.argv", [*argv, "--workers", workers, "--opts", *keys])
    assert channel_statistics.main() == 0
    found = yaml.safe_load(output.read_text())["DATA"]
    files = sorted((five / "train").rglob("*.npy"))
    pixels = np.concatenate([np.load(file).reshape(-1, 5) for file in files]) / 4095
    np.testing.assert_allclose(found["MEAN"], pixels.mean(0), atol=2e-6)
    np.testing.assert_allclose(found["STD"], pixels.std(0), atol=2e-6)
    assert (found["CHANNELS"], found["RANGE"]) == (5, "0,4095")


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny", "vit_small", "timm/convnext_atto"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_weights_of_three_channels_start_a_network_of_others(name: str, channels: int) -> None:
    """A grey image gives the response that its three equal channels gave."""
    theirs = build_backbone(name, img_size=32).state_dict()
    backbone = build_backbone(name, img_size=32, channels=channels)
    report = load_backbone(backbone, theirs, "file")
    (noted,) = report.resized
    key = noted.split(" ")[0]
    assert noted == f"{key} (3 to {channels} channels)"
    weight = backbone.state_dict()[key]
    assert weight.shape[1] == channels
    if channels == 1:
        torch.testing.assert_close(weight[:, 0], theirs[key].sum(1))
    else:
        torch.testing.assert_close(weight[:, 0], theirs[key][:, 0] * 3 / channels)


def test_weights_of_other_channels_do_not_become_colours() -> None:
    theirs = build_backbone("resnet8", channels=5).state_dict()
    with pytest.raises(ValueError, match=r"takes images of 5 channels, .* set DATA.CHANNELS 5"):
        load_backbone(build_backbone("resnet8"), theirs, "file")
