"""Decoding: the pixels of PIL's `.convert("RGB")` for every mode, errors for every defect."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.decode
from data.decode import decode_rgb
from data.sources.folder_index import PackedStrings


@pytest.fixture(params=["simplejpeg", "torchvision", "PIL"], autouse=True)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run every test with simplejpeg, as if it were not installed, and with PIL alone."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    if request.param == "PIL":
        monkeypatch.setattr("data.decode._torchvision_jpeg", lambda: None)
    data.decode.fast_jpeg.cache_clear()
    yield request.param
    data.decode.fast_jpeg.cache_clear()


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return `image` as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_like_pil(data: bytes) -> None:
    """Assert that the decoded pixels are bit-identical to PIL's."""
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_rgb(data).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"quality": 90}),
        ("RGB", "JPEG", {"quality": 90, "subsampling": 0, "progressive": True}),
        ("RGB", "JPEG", {"quality": 70, "subsampling": 1}),
        ("RGB", "JPEG", {"quality": 70, "subsampling": 2, "progressive": True}),
        ("RGB", "JPEG", {"quality": 95, "keep_rgb": True}),
        ("L", "JPEG", {}),
        ("L", "JPEG", {"progressive": True}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("L", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
        ("I;16", "PNG", {}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {}),
        ("RGB", "PPM", {}),
        ("RGB", "WEBP", {}),
        ("P", "GIF", {}),
    ],
)
def test_every_mode_decodes_like_pil(
    photos: np.ndarray, mode: str, kind: str, options: dict[str, object]
) -> None:
    image = Image.fromarray(photos[0])
    image = (
        Image.fromarray(photos[0, :, :, 0].astype(np.uint16) * 200) if mode == "I;16" else image.convert(mode)
    )
    assert_like_pil(encode(image, kind, **options))


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (96, 1), (17, 128)])
def test_odd_sizes_decode_like_pil(photos: np.ndarray, shape: tuple[int, int]) -> None:
    image = Image.fromarray(photos[2, : shape[0], : shape[1]])
    assert_like_pil(encode(image, "JPEG"))
    assert decode_rgb(encode(image, "JPEG")).shape == (3, *shape)


def test_a_memoryview_decodes_like_bytes(photos: np.ndarray) -> None:
    for kind in ("JPEG", "PNG"):
        whole = encode(Image.fromarray(photos[0]), kind)
        view = memoryview(b"before" + whole + b"after")[6:-5]
        assert decode_rgb(view).equal(decode_rgb(whole))


def test_what_pil_reads_past_is_read(photos: np.ndarray) -> None:
    """Bytes after the end, and nonsense between segments, make libjpeg warn; PIL reads the image."""
    whole = encode(Image.fromarray(photos[0]), "JPEG")
    assert_like_pil(whole + b"\x00" * 100)
    start = whole.index(b"\xff\xdb")
    assert_like_pil(whole[:start] + b"\x00\x00\x00" + whole[start:])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_truncated_jpegs_are_refused(photos: np.ndarray, mode: str, options: dict[str, object]) -> None:
    whole = encode(Image.fromarray(photos[1]).convert(mode), "JPEG", **options)
    for share in (0.02, 0.3, 0.6, 0.95):
        with pytest.raises((OSError, RuntimeError, SyntaxError)):
            decode_rgb(whole[: int(share * len(whole))])


def test_decompression_bombs_are_refused(photos: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("JPEG", "PNG"):
        data = encode(Image.fromarray(photos[0]), kind)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 128 // 2 - 1)
        with pytest.raises(Image.DecompressionBombError):
            decode_rgb(data)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 128 - 1)
        with pytest.warns(Image.DecompressionBombWarning):
            decode_rgb(data)
        for limit in (96 * 128, None):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                assert_like_pil(data)


def test_the_absence_of_simplejpeg_is_logged_once_and_by_the_main_process(
    photos: np.ndarray,
    decoder: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encode(Image.fromarray(photos[0]), "JPEG")
    with caplog.at_level(logging.INFO, logger="synco"):
        for _ in range(3):
            decode_rgb(data)
    assert caplog.text.count("simplejpeg is not installed") == (decoder != "simplejpeg")
    caplog.clear()
    fast_jpeg = sys.modules["data.decode"].fast_jpeg
    fast_jpeg.cache_clear()
    monkeypatch.setattr("data.decode.multiprocessing.parent_process", lambda: "parent")
    with caplog.at_level(logging.INFO, logger="synco"):
        decode_rgb(data)
    assert not caplog.records


def test_exif_orientation_is_not_applied(photos: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    data = encode(Image.fromarray(photos[0]), "JPEG", exif=exif)
    assert decode_rgb(data).shape == (3, 96, 128)
    assert_like_pil(data)


def test_real_photos_decode_like_pil(real_photos: list[Path]) -> None:
    for path in real_photos:
        assert_like_pil(path.read_bytes())


def test_damaged_files_raise_or_decode_but_never_crash(photos: np.ndarray) -> None:
    rng, shapes = np.random.default_rng(0), set()
    for kind in ("JPEG", "PNG"):
        whole = encode(Image.fromarray(photos[1]), kind)
        for length in rng.integers(0, len(whole) - 2, size=40):
            with pytest.raises(Exception, match=r".*"):
                decode_rgb(whole[:length])
        for _ in range(150):
            data = np.frombuffer(whole, dtype=np.uint8).copy()
            data[rng.integers(0, len(data), size=3)] = rng.integers(0, 256, size=3)
            with contextlib.suppress(Exception):
                shapes.add(len(decode_rgb(data.tobytes())))
    assert shapes == {3}


def test_packed_strings_keep_any_path() -> None:
    names = ["a", "", "ünïcode/名前.jpg", "bad\udcff byte", "with space\tand tab"]
    packed = PackedStrings(names)
    assert [packed[i] for i in range(len(packed))] == names
