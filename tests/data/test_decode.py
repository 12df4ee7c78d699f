"""Decoding: the pixels of PIL's `.convert("RGB")` for every mode, errors for every defect."""

import contextlib
import io
import logging
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from photos import deep_png
from PIL import Image

import data.decode
from data.decode import MAX_PIXELS, decode_rgb, hide_orientation
from data.sources.base import PackedStrings
from utils.config.schema import declare


@pytest.fixture(params=["simplejpeg", "torchcodec", "torchvision", "PIL"], autouse=True)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run every test with each decoder, as if no other was installed."""
    package = {"torchcodec": "torchcodec.decoders", "torchvision": "torchvision.io"}
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
        if request.param in package:
            pytest.importorskip(package[request.param])
        packages = (package[request.param],) if request.param in package else ()
        monkeypatch.setattr("data.decode._TORCH_DECODERS", packages)
    data.decode.fast_jpeg.cache_clear()
    data.decode.torch_jpegs.cache_clear()
    yield request.param
    data.decode.fast_jpeg.cache_clear()
    data.decode.torch_jpegs.cache_clear()


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
    assert_like_pil(encode(Image.fromarray(photos[0]).convert(mode), kind, **options))


@pytest.mark.parametrize(
    ("dtype", "kind", "message"),
    [
        ("uint16", "PNG", r"16-bit image \(mode I;16\) is not supported; convert to 8 bit"),
        ("uint16", "TIFF", r"16-bit image \(mode I;16\)"),
        (">u2", "TIFF", r"16-bit image \(mode I;16B\)"),
        ("uint16", "PPM", r"bit image \(mode I\)"),
        ("int32", "TIFF", r"32-bit image \(mode I\)"),
        ("float32", "TIFF", r"float image \(mode F\)"),
    ],
)
def test_deep_images_are_refused_not_clipped(dtype: str, kind: str, message: str) -> None:
    ramp = np.tile(np.linspace(0, 1, 64), (64, 1))
    scale = 1 if dtype == "float32" else 65535
    data = encode(Image.fromarray((ramp * scale).astype(dtype)), kind)
    with pytest.raises(ValueError, match=message):
        decode_rgb(data)


def tiff(pixels: np.ndarray, colours: int = 0, planar: bool = False) -> bytes:
    """Write (H,W,C) of any type as a plain TIFF; `colours` 1 for grey, 2 for RGB, 0 by C."""
    height, width, channels = pixels.shape
    colours = colours or (2 if channels >= 3 else 1)
    beside = channels - (3 if colours == 2 else 1)
    planes = pixels.transpose(2, 0, 1) if planar else pixels
    data = planes.tobytes()
    strips = channels if planar else 1
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    short, long = 3, 4
    tags = [
        (256, long, [width]),
        (257, long, [height]),
        (258, short, [pixels.dtype.itemsize * 8] * channels),
        (259, short, [1]),  # not compressed
        (262, short, [colours]),
        (273, long, [0] * strips),  # where the strips start: known below
        (277, short, [channels]),
        (278, long, [height]),
        (279, long, [len(data) // strips] * strips),
        (284, short, [2 if planar else 1]),
        (338, short, [0] * beside),  # of no stated meaning
        (339, short, [kind] * channels),
    ]
    tags = [tag for tag in tags if tag[2]]
    behind = 8 + 2 + 12 * len(tags) + 4
    sizes = [len(values) * (2 if kind == short else 4) for _, kind, values in tags]
    start = behind + sum(size for size in sizes if size > 4)
    rows, values_behind = b"", b""
    for tag, kind, values in tags:
        if tag == 273:
            values = [start + number * (len(data) // strips) for number in range(strips)]
        packed = struct.pack(f"<{len(values)}{'H' if kind == short else 'I'}", *values)
        if len(packed) > 4:
            place = behind + len(values_behind)
            values_behind += packed
            packed = struct.pack("<I", place)
        rows += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + rows + struct.pack("<I", 0) + values_behind + data


def test_deep_colour_keeps_its_upper_byte() -> None:
    levels = np.arange(16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3) * 80
    decoded = decode_rgb(deep_png(levels)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(decoded, levels >> 8)


@pytest.mark.parametrize("bits", [12, 13, 14])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_colour_that_would_be_dark_is_refused(kind: str, bits: int) -> None:
    """12 to 14 bits in 16, as cameras and scanners write them."""
    ramp = np.tile(np.linspace(0, 2**bits - 1, 64)[:, None], (64, 1, 3)).astype(np.uint16)
    encoder = deep_png if kind == "PNG" else tiff
    with pytest.raises(ValueError, match=f"set DATA.RANGE .* such as 0,{2**bits - 1},"):
        decode_rgb(encoder(ramp))
    assert decode_rgb(encoder(ramp << 16 - bits)).max() == 255
    assert decode_rgb(encoder(ramp * 0)).max() == 0  # black is not a matter of range


@pytest.mark.parametrize(
    ("dtype", "channels", "options", "message"),
    [
        ("uint8", 2, {}, "a TIFF of 2 channels is not supported; convert to 8-bit RGB"),
        ("uint8", 5, {"colours": 1}, "a TIFF that is damaged, or of more or other channels"),
        ("uint8", 8, {}, "a TIFF that is damaged, or of more or other channels"),
        ("uint16", 5, {}, "a TIFF that is damaged, or of more or other channels"),
        ("float32", 3, {}, "a TIFF that is damaged, or of more or other channels"),
        ("float16", 1, {}, "a TIFF that is damaged, or of more or other channels"),
        ("uint16", 3, {"planar": True}, "a 16-bit TIFF of separate planes is not supported"),
        ("int8", 1, {}, "a TIFF of signed pixels is not supported"),
        ("int16", 1, {}, "is not supported; convert to 8 bit"),
    ],
)
def test_other_pixels_in_a_tiff_are_refused(
    dtype: str, channels: int, options: dict[str, int], message: str
) -> None:
    ramp = np.tile(np.linspace(0, 1, 64)[:, None], (64, 1, channels))
    top = np.iinfo(dtype).max if np.dtype(dtype).kind in "ui" else 1
    with pytest.raises((ValueError, OSError), match=message):
        decode_rgb(tiff((ramp * top).astype(dtype), **options))


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_channels_beside_rgb_are_dropped_as_alpha_is(extra: int) -> None:
    """Editors keep selections there."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3 + extra), dtype=np.uint8)
    decoded = decode_rgb(tiff(pixels)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(decoded, pixels[..., :3])


def test_an_array_file_is_named_as_one() -> None:
    file = io.BytesIO()
    np.save(file, np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(OSError, match="a NumPy array, not an image; convert to one of JPEG"):
        decode_rgb(file.getvalue())


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
def test_truncated_jpegs_are_refused(
    photos: np.ndarray, mode: str, options: dict[str, object]
) -> None:
    whole = encode(Image.fromarray(photos[1]).convert(mode), "JPEG", **options)
    for share in (0.02, 0.3, 0.6, 0.95):
        with pytest.raises((OSError, RuntimeError, SyntaxError)):
            decode_rgb(whole[: int(share * len(whole))])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_images_of_too_many_pixels_are_refused_from_their_header(
    photos: np.ndarray, kind: str
) -> None:
    data = encode(Image.fromarray(photos[0]), kind)
    assert decode_rgb(data, 96 * 128).shape == (3, 96, 128)
    header = data if kind == "WEBP" else data[: -len(data) // 3]  # WebP is checked as a whole
    for part in (header, data):
        with pytest.raises(
            ValueError, match=r"128 x 96 pixels are more than DATA\.MAX_PIXELS \(12287\)"
        ):
            decode_rgb(part, 96 * 128 - 1)


def test_the_limit_of_pixels_is_data_max_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert declare({}).defaults().DATA.MAX_PIXELS == MAX_PIXELS
    assert Image.MAX_IMAGE_PIXELS is None  # else PIL would refuse what DATA.MAX_PIXELS allows


def test_an_eps_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(OSError, match="not an image of JPEG, PNG"):
        decode_rgb(program)
    assert not started.exists()


@pytest.mark.parametrize("kind", ["TGA", "ICO", "PCX", "SGI", "PDF"])
def test_other_formats_are_refused(photos: np.ndarray, kind: str) -> None:
    with pytest.raises(OSError, match="not an image of JPEG, PNG"):
        decode_rgb(encode(Image.fromarray(photos[0]), kind))


def with_scans(photo: np.ndarray, scans: int) -> bytes:
    """Return a progressive JPEG whose last scan stands there so often that there are `scans` of them."""
    whole = encode(Image.fromarray(photo), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * (scans - whole.count(b"\xff\xda")) + whole[-2:]


def test_jpegs_of_more_than_100_scans_are_refused(photos: np.ndarray) -> None:
    assert decode_rgb(with_scans(photos[0], 100)).shape == (3, 96, 128)
    with pytest.raises(ValueError, match="a JPEG of 101 scans; more than 100"):
        decode_rgb(with_scans(photos[0], 101))
    with pytest.raises(ValueError, match="a JPEG of 3000 scans"):
        decode_rgb(memoryview(with_scans(photos[0], 3000)))


def test_a_large_jpeg_may_have_fewer_scans(photos: np.ndarray) -> None:
    pixels = 96 * 128
    assert decode_rgb(with_scans(photos[0], 16), pixels).shape == (3, 96, 128)
    with pytest.raises(ValueError, match="a JPEG of 17 scans; more than 16 would take too long"):
        decode_rgb(with_scans(photos[0], 17), pixels)


def test_a_small_tiff_of_a_huge_tile_is_refused() -> None:
    packed = zlib.compress(bytes(100))
    tags = ((256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1))
    tags = (*tags, (322, 30_000), (323, 30_000), (324, 8), (325, len(packed)))
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + len(packed) + len(packed) % 2
    head = (b"II*\0" + struct.pack("<I", start) + packed).ljust(start, b"\0")
    with pytest.raises(ValueError, match="30000 x 30000 pixels are more than"):
        decode_rgb(head + struct.pack("<H", len(tags)) + body + bytes(4))


def test_scans_cannot_be_hidden_from_the_count(photos: np.ndarray) -> None:
    """Bytes that libjpeg skips before a marker, and a start of another frame, do not stop the counting."""
    # black: small enough for the place of the fakes
    many = with_scans(np.zeros_like(photos[0]), 200)
    frame = many.index(b"\xff\xc2")
    baseline = encode(Image.fromarray(photos[0]), "JPEG")
    start, scan = baseline.index(b"\xff\xc0"), baseline.index(b"\xff\xda")
    fakes = baseline[start:scan] + baseline[scan : scan + 14]
    place = frame + 2 + 0xC200  # where somebody looks next who takes "ff ff c2 00" for a segment
    padded = (many[:frame] + b"\xff" + many[frame:]).ljust(place, b"\0")
    assert len(padded) == place
    for hidden in (
        padded + fakes,
        many[:frame] + b"\xff" * 9 + many[frame:],
        many[:frame] + b"\0\0" + many[frame:],
        many[:frame] + b"\xff\x01" + many[frame:],
        many[:2] + b"\xff\xff\xfe" + struct.pack(">H", 2) + many[2:],
    ):
        with pytest.raises((ValueError, OSError), match=r"a JPEG of 20[01] scans|not an image of"):
            decode_rgb(hidden)
    with pytest.raises((ValueError, OSError, RuntimeError)):
        decode_rgb(many[:frame] + fakes + many[frame:])  # two frames: libjpeg refuses it


def test_the_marker_in_metadata_is_no_scan(photos: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 100
    whole = encode(Image.fromarray(photos[0]), "JPEG", exif=exif, comment=b"\xff\xda" * 500)
    assert_like_pil(whole)


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


def turned(photo: np.ndarray, orientation: int, **options: object) -> bytes:
    """Write a JPEG whose EXIF data tells viewers to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(photo), "JPEG", exif=exif, **options)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"\xff\xe1 of words"}])
@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_is_not_applied(
    photos: np.ndarray, orientation: int, options: dict[str, object]
) -> None:
    whole = turned(photos[0], orientation, **options)
    assert decode_rgb(whole).shape == (3, 96, 128)
    assert_like_pil(whole)
    # behind a byte of padding, and as the last segment before the first scan
    start, end, scan = (whole.index(marker) for marker in (b"\xff\xe1", b"\xff\xdb", b"\xff\xda"))
    assert_like_pil(whole[:start] + b"\xff" + whole[start:])
    assert_like_pil(whole[:start] + whole[end:scan] + whole[start:end] + whole[scan:])
    if "progressive" in options:  # between scans
        second = whole.index(b"\xff\xda", scan + 1)
        tables = whole.rindex(b"\xff\xc4", 0, second)
        assert_like_pil(whole[:start] + whole[end:tables] + whole[start:end] + whole[tables:])


def test_every_exif_segment_is_hidden(photos: np.ndarray) -> None:
    whole = turned(photos[0], 6)
    start, frame = whole.index(b"\xff\xe1"), whole.index(b"\xff\xdb")
    twice = bytearray(whole[:frame] + whole[start:])
    assert hide_orientation(twice)
    assert b"\xff\xe1" not in twice
    assert len(twice) == len(whole) + frame - start
    # libjpeg would find the segment behind a marker of no length, `_segments` would not
    assert not hide_orientation(bytearray(whole[:2] + b"\xff\x01" + whole[2:]))
    assert not hide_orientation(bytearray(whole[: frame + 4]))
    # a second image behind the first, as telephones write it
    assert hide_orientation(bytearray(whole + whole))


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
