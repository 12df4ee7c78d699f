"""Ten thousand spoilt JPEG and PNG files: decoded or refused, never a crash, and the same again."""

import hashlib
import io
import json
import os
import random
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from figures import figure
from photos import draw_photo
from PIL import Image

SUFFIXES = ("jpg", "png")


def originals() -> list[tuple[str, bytes]]:
    """Return small images in the forms that data sets hold."""
    photo = Image.fromarray(draw_photo(40, 48, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("jpg", photo, {"quality": 90}),
        ("jpg", photo, {"quality": 60, "progressive": True}),
        ("jpg", photo, {"quality": 90, "subsampling": 0, "exif": exif}),
        ("jpg", photo.convert("L"), {}),
        ("jpg", photo.convert("CMYK"), {}),
        ("png", photo, {}),
        ("png", photo.convert("RGBA"), {}),
        ("png", photo.convert("P"), {"transparency": 3}),
        ("png", photo.convert("LA"), {}),
        ("png", photo.convert("1"), {}),
        # refused
        ("png", Image.fromarray(np.arange(1920, dtype=np.uint16).reshape(40, 48) * 34), {}),
    ]
    made = []
    for suffix, image, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix], **options)
        made.append((suffix, buffer.getvalue()))
    return made


def spoilt(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, zero or insert; often in the header, where sizes and tables are."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        end = rng.choice([40, 700, len(changed)])
        at = rng.randrange(max(1, min(end, len(changed))))
        match rng.randrange(6):
            case 0 | 1:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                changed[at : at + 1] = (
                    bytes([changed[at] ^ 1 << rng.randrange(8)]) if changed else b""
                )
            case 3:
                changed[at : at + rng.randrange(1, 30)] = b"\xff" * rng.randrange(20)
            case 4:
                changed[at:at] = changed[at : at + rng.randrange(60)]
            case 5 if rng.random() < 0.4:
                del changed[at:]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def decode_many(count: int, path: str) -> None:
    """Decode ``count`` spoilt files in this process; write the tally and a digest of all outcomes."""
    from data.decode import decode_rgb

    rng, kinds = random.Random(count), originals()
    sha, tally, slowest, odd = hashlib.sha256(), Counter(), 0.0, []
    for number in range(count):
        _, whole = kinds[number % len(kinds)]
        data = spoilt(rng, whole)
        start = time.perf_counter()
        try:
            image = decode_rgb(data)
        except Exception as error:  # as the loader does
            outcome = type(error).__name__
        else:
            good = image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
            outcome = "decoded" if good else f"odd {tuple(image.shape)} {image.dtype}"
            sha.update(image.contiguous().numpy().tobytes())
        slowest = max(slowest, time.perf_counter() - start)
        sha.update(outcome.encode())
        tally[outcome] += 1
        odd += [outcome] if outcome.startswith("odd") else []
    result = {"tally": tally, "digest": sha.hexdigest(), "slowest": slowest, "odd": odd}
    Path(path).write_text(json.dumps(result))


def in_process(function: Callable[..., None], *args: Any) -> int:
    """Run in a process of its own and return its exit code: negative if a decoder crashed it."""
    process = forked.context().Process(target=function, args=args)
    process.start()
    process.join(forked.LIMIT * 4)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("a decoder hangs")
    return process.exitcode


def fuzz(tmp_path: Path, count: int) -> None:
    crashes, results = 0, []
    for number in range(2):
        crashes += in_process(decode_many, count, str(tmp_path / f"{number}.json")) != 0
        assert crashes == 0
        results.append(json.loads((tmp_path / f"{number}.json").read_text()))
    first, again = results
    kinds = ", ".join(f"{name} {n}" for name, n in sorted(first["tally"].items()))
    figure(f"{count:,} mutated JPEG and PNG files: crashes", crashes)
    figure(f"{count:,} mutated files: outcomes", kinds)
    figure(
        f"{count:,} mutated files, longest",
        f"{1000 * max(first['slowest'], again['slowest']):.0f}",
        "ms",
    )
    figure(
        f"{count:,} mutated files: the same outcomes and pixels again",
        str(first["digest"] == again["digest"]),
    )
    assert first["odd"] == []
    assert first["digest"] == again["digest"]
    assert first["tally"]["decoded"] > count / 20
    assert sum(first["tally"].values()) - first["tally"]["decoded"] > count / 5


def test_spoilt_images_are_decoded_or_refused(tmp_path: Path) -> None:
    fuzz(tmp_path, 500)


@pytest.mark.slow
def test_ten_thousand_spoilt_images_are_decoded_or_refused(tmp_path: Path) -> None:
    fuzz(tmp_path, 10_000)


# ---- through the loader --------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def jpeg_bomb(whole: bytes) -> bytes:
    """Return a JPEG whose header claims 400 million pixels."""
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + (20_000).to_bytes(2, "big") * 2 + whole[at + 4 :]


def unreadable(path: Path) -> None:
    """Leave a file that cannot be opened, even by root: a name with a folder behind it."""
    path.unlink()
    path.mkdir()


def special_folder(root: Path) -> tuple[Path, set[str]]:
    """Write good images of odd kinds and bad files; return the folder and the names of the bad ones."""
    folder = root / "train" / "a"
    folder.mkdir(parents=True)
    *good, (_, deep) = originals()
    for number, (suffix, data) in enumerate(good * 3):
        (folder / f"good{number:02d}.{suffix}").write_bytes(data)
    bad = {
        "bomb.png": bomb(20_000, 20_000),
        "bomb.jpg": jpeg_bomb(good[0][1]),
        "deep.png": deep,
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n",
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "half.jpg": good[0][1][: len(good[0][1]) // 2],
        "half.png": good[5][1][: len(good[5][1]) // 2],
        "text.png": "Übung".encode("utf-16"),
        "folder.png": b"x",
        "vanished.jpg": good[0][1],
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    return root, set(bad)


def batches_of(folder: Path, workers: int, prepare: Callable[[Path], None]) -> list[Any]:
    from data.augment.recipes import build_recipe
    from data.loader import GlobalLoader
    from data.sources import build_source

    source = build_source("imagefolder", str(folder), "train")
    prepare(folder / "train" / "a")
    loader = GlobalLoader(
        source, build_recipe("moco_v2", 16), global_batch=len(source), seed=1,
        device=torch.device("cpu"), num_workers=workers, max_bad_fraction=0.5,
    )  # fmt: skip
    return [(batches[0], source) for _, batches in loader.from_step(0, 2)]


def test_special_files_are_read_or_replaced_alike_with_workers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, bad = special_folder(tmp_path)

    def spoil(images: Path) -> None:
        if (images / "vanished.jpg").exists():
            (images / "vanished.jpg").unlink()
            unreadable(images / "folder.png")

    first = batches_of(folder, 0, spoil)
    reported = {
        Path(word).name
        for text in caplog.messages
        for word in text.split()
        if Path(word).name in bad
    }
    assert reported == bad
    loaded = {Path(source.name(i)).name for batch, source in first for i in batch.indices.tolist()}
    assert not loaded & bad
    assert len(loaded) == 3 * (len(originals()) - 1)
    (folder / "train" / "a" / "vanished.jpg").touch()  # the same listing again
    (folder / "train" / "a" / "folder.png").rmdir()
    (folder / "train" / "a" / "folder.png").touch()
    again = batches_of(folder, 2, spoil)
    for (one, _), (two, _) in zip(first, again, strict=True):
        assert torch.equal(one.indices, two.indices)
        assert all(torch.equal(a, b) for a, b in zip(one.views, two.views, strict=True))
    figure(
        "bombs, empty, HTML, PostScript, 16-bit, cut, vanished, unreadable files: replaced and named",
        f"{len(bad)}/{len(bad)}",
    )
    figure(
        "grey, CMYK, palette, alpha and 1-bit files read",
        f"{len(originals()) - 1}/{len(originals()) - 1}",
    )


def read_as_nobody(folder: str, result: str) -> None:
    os.setgid(65534)
    os.setuid(65534)
    from data.sources.folder import FileSource

    source = FileSource(Path(folder), ["locked.png"], [0], ["a"])
    try:
        source.load(0)
    except Exception as error:
        Path(result).write_text(type(error).__name__)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user who may not read")
def test_a_file_that_may_not_be_read_is_an_error_of_that_file() -> None:
    # not in tmp_path: each start of pytest closes the parent of all of them for other users
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        locked, result = Path(folder) / "locked.png", Path(folder) / "result"
        locked.write_bytes(originals()[5][1])
        locked.chmod(0)
        result.touch()
        result.chmod(0o666)
        assert in_process(read_as_nobody, folder, str(result)) == 0
        assert result.read_text() == "PermissionError"
