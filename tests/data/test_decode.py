"""Decoding: the pixels of PIL's `.convert("RGB")` for every mode, errors for every defect."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.files import PackedStrings, decode_rgb


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
        ("L", "JPEG", {}),
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


def test_exif_orientation_is_not_applied(photos: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    data = encode(Image.fromarray(photos[0]), "JPEG", exif=exif)
    assert decode_rgb(data).shape == (3, 96, 128)
    assert_like_pil(data)


def test_real_photos_decode_like_pil(real_photos: list[Path]) -> None:
    for path in real_photos[:16]:
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
