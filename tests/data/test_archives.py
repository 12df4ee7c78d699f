"""Zip archives: every cache mode gives the folder's images; mistakes are named."""

import multiprocessing
import os
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from data.augment.recipes import build_recipe
from data.loader import GlobalLoader
from data.sources import Source, build_source
from data.sources.zip import ZipSource, zipped


@pytest.fixture(params=[zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def zip_root(image_folder: Path, request: pytest.FixtureRequest) -> Path:
    """Give the image folder's train split as train.zip and train_map.txt, beside the folder itself."""
    folder = build_source("imagefolder", str(image_folder), "train")
    lines = []
    with zipfile.ZipFile(image_folder / "train.zip", "w", request.param) as archive:
        for i in range(len(folder)):
            inner = str(Path(folder.name(i)).relative_to(image_folder / "train"))
            archive.write(folder.name(i), inner)
            lines.append(f"{inner}\t{int(folder.labels[i])}")
    (image_folder / "train_map.txt").write_text("\n".join(lines) + "\n")
    return image_folder


@pytest.mark.parametrize("mode", ["no", "part", "full"])
def test_every_mode_equals_the_folder(zip_root: Path, mode: str) -> None:
    folder, archive = (
        build_source(name, str(zip_root), "train", cache_mode=mode)
        for name in ("imagefolder", "zip")
    )
    assert archive.labels.tolist() == folder.labels.tolist()
    assert archive.num_classes == 3
    for i in range(len(folder)):
        assert torch.equal(archive.load(i), folder.load(i))
    assert archive.name(0).endswith("train.zip@/c0/image 00.JPEG")


@pytest.mark.parametrize(
    ("mode", "held"), [("no", []), ("part", [1, 4, 7, 10]), ("full", list(range(12)))]
)
def test_modes_hold_the_promised_images(zip_root: Path, mode: str, held: list[int]) -> None:
    source = zipped(str(zip_root), "train", mode, rank=1, world=3)
    assert [i for i in range(12) if source.cached(i) is not None] == held


def _send_image(source: Source, index: int, queue: "multiprocessing.Queue[torch.Tensor]") -> None:
    queue.put(source.load(index).numpy())


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_open_the_archive_for_themselves(zip_root: Path, start: str) -> None:
    source = build_source("zip", str(zip_root), "train", cache_mode="no")
    expected = source.load(5)
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    process = context.Process(target=_send_image, args=(source, 5, queue))
    process.start()
    assert torch.equal(torch.from_numpy(queue.get(timeout=60)), expected)
    process.join()


def test_batches_equal_the_folders(zip_root: Path) -> None:
    batches = []
    for name, workers in (("imagefolder", 0), ("zip", 2)):
        source = build_source(name, str(zip_root), "train", cache_mode="part")
        recipe = build_recipe("byol", 16)
        loader = GlobalLoader(
            source, recipe, global_batch=6, seed=0, device=torch.device("cpu"), num_workers=workers
        )
        batches.append([batch.views[1] for _, (batch,) in loader.from_step(0, 4)])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_damage_is_noticed(zip_root: Path) -> None:
    source = build_source("zip", str(zip_root), "train", cache_mode="no")
    assert isinstance(source, ZipSource)
    path = zip_root / "train.zip"
    content = bytearray(path.read_bytes())
    offset, size = (int(v) for v in source._entries[3][:2])
    content[offset + 60 + size // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises((OSError, zlib.error), match=r"damaged zip entry|decompressing"):
        source.read(3)
    assert source.read(2)


@pytest.mark.parametrize("mode", ["no", "part", "full"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_entry_is_one_unreadable_image_in_every_mode(
    zip_root: Path, mode: str, world: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = zipped(str(zip_root), "train", "no", 0, 1)
    content = bytearray(whole.path.read_bytes())
    for index in (2, 3):
        start, size = (int(v) for v in whole._entries[index][:2])
        content[start + 60 + size // 2] ^= 0xFF
    content[int(whole._entries[8, 0])] ^= 0xFF  # the local header
    whole.path.write_bytes(content)
    for rank in range(world):
        caplog.clear()
        source = zipped(str(zip_root), "train", mode, rank, world)
        loader = GlobalLoader(
            source, build_recipe("byol", 16), global_batch=12, seed=0, device=torch.device("cpu"),
            max_bad_fraction=0.5, rank=0, world=1,
        )  # fmt: skip
        for _, (batch,) in loader.from_step(0, 2):
            assert not {2, 3, 8} & set(batch.indices.tolist())
        for index in (2, 3, 8):
            assert caplog.text.count(f"replaced: {source.name(index)} (") == 1


@pytest.mark.parametrize("mode", ["no", "part"])
def test_a_directory_that_points_past_the_end_is_refused(zip_root: Path, mode: str) -> None:
    content = bytearray((zip_root / "train.zip").read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    # where its local header stands
    content[entry + 42 : entry + 46] = (1 << 30).to_bytes(4, "little")
    (zip_root / "train.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"DATA\.PATH.*train\.zip.*lies past its end: it was cut"):
        zipped(str(zip_root), "train", mode, 0, 1)


def test_an_archive_that_is_cut_while_in_use_gives_unreadable_images(zip_root: Path) -> None:
    source = zipped(str(zip_root), "train", "no", 0, 1)
    os.truncate(source.path, int(source._entries[5, 0]) + 10)
    assert source.read(4)
    for index in (5, 6, 11):
        with pytest.raises(OSError, match="damaged zip entry"):
            source.read(index)


def archive_of(root: Path, entries: dict[str, bytes], lines: list[str] | None = None) -> None:
    with zipfile.ZipFile(root / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    (root / "train_map.txt").write_text("\n".join(lines or [f"{name}\t0" for name in entries]))


def test_an_entry_unpacks_to_no_more_than_it_declares_and_may(tmp_path: Path) -> None:
    archive_of(tmp_path, {"a.jpg": bytes(1 << 20), "b.jpg": bytes((1 << 28) + 1)})
    source = zipped(str(tmp_path), "train", "full", 0, 1)
    # they pack too well to be held
    assert [source.cached(index) for index in (0, 1)] == [None, None]
    with pytest.raises(OSError, match="would unpack to 268435457 bytes: store it instead"):
        source.read(1)
    assert len(source.read(0)) == 1 << 20
    source._sizes[0] = 1000  # the directory lies
    tracemalloc.start()
    with pytest.raises(OSError, match="damaged zip entry"):
        source.read(0)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_images_in_memory_are_no_more_than_the_archive_warrants(tmp_path: Path) -> None:
    noise = os.urandom(10_000)
    archive_of(tmp_path, {"a.jpg": noise}, ["a.jpg\t0"] * 100)  # 100 names of one entry
    source = zipped(str(tmp_path), "train", "full", 0, 1)
    assert [source.cached(index) == noise for index in range(100)] == [True] * 4 + [False] * 96
    assert source.encoded(99) == noise


def test_the_classes_of_val_are_those_of_train(
    zip_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (zip_root / "val.zip").write_bytes((zip_root / "train.zip").read_bytes())
    lines = (zip_root / "train_map.txt").read_text().splitlines()
    (zip_root / "val_map.txt").write_text("\n".join(lines[:4]))
    assert build_source("zip", str(zip_root), "val").num_classes == 3
    assert (
        caplog.text.count("val_map.txt has no image of 2 of train's 3 classes, such as ['1', '2']")
        == 1
    )
    (zip_root / "val_map.txt").write_text("\n".join([*lines[1:], "c0/image 00.JPEG\t999"]))
    with pytest.raises(ValueError, match=r"val_map\.txt has 1 classes that train lacks: \['999'\]"):
        build_source("zip", str(zip_root), "val")
    (zip_root / "train_map.txt").unlink()
    assert build_source("zip", str(zip_root), "val").num_classes == 1000


def test_a_map_with_a_byte_order_mark_is_read(zip_root: Path) -> None:
    listing = zip_root / "train_map.txt"
    expected = build_source("zip", str(zip_root), "train").fingerprint()
    listing.write_bytes(b"\xef\xbb\xbf" + listing.read_bytes())
    assert build_source("zip", str(zip_root), "train").fingerprint() == expected
    text = listing.read_text(encoding="utf-8-sig")
    listing.write_bytes(text.encode("utf-16"))
    assert build_source("zip", str(zip_root), "train").fingerprint() == expected
    listing.write_bytes(f"é{text}".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"train_map\.txt is no text in UTF-8 .*: save it as UTF-8"
    ):
        build_source("zip", str(zip_root), "train")


def test_fingerprint_tells_changed_content(zip_root: Path) -> None:
    first = build_source("zip", str(zip_root), "train").fingerprint()
    lines = (zip_root / "train_map.txt").read_text().splitlines()
    (zip_root / "train_map.txt").write_text("\n".join(lines[:-1]))
    assert first != build_source("zip", str(zip_root), "train").fingerprint()


@pytest.mark.parametrize(
    ("listing", "mode", "message"),
    [
        (
            "c0/image 00.JPEG\t0",
            "partly",
            "DATA.CACHE_MODE .* 'partly' is unknown: use one of no, part, full",
        ),
        (
            "c0/image 00.JPEG 0",
            "no",
            "train_map.txt line 1: .* is not <path in the zip> TAB <label>",
        ),
        ("c0/image 00.JPEG\tcat", "no", "train_map.txt line 1"),
        (
            "c0/image 00.JPEG\t300000000",
            "no",
            "line 1: label 300000000 is too large: a map of 1 lines",
        ),
        (
            "c0/image 00.JPEG\t1" + "0" * 5000,
            "no",
            "line 1: label 10000000000000000000 is too large",
        ),
        ("c0/image 00.JPEG\t0\nc0/image 00.txt\t0", "no", "train_map.txt line 2"),
        ("c0/absent.jpg\t0", "no", "has no entry 'c0/absent.jpg'"),
        ("", "no", "lists no images"),
    ],
)
def test_errors_name_the_file_and_the_remedy(
    zip_root: Path, listing: str, mode: str, message: str
) -> None:
    (zip_root / "train_map.txt").write_text(listing)
    with pytest.raises(ValueError, match=message):
        build_source("zip", str(zip_root), "train", cache_mode=mode)


def test_a_file_that_is_no_zip_is_refused(zip_root: Path) -> None:
    (zip_root / "train.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="is not a valid zip"):
        build_source("zip", str(zip_root), "train")


def test_what_systems_leave_in_an_archive_is_left_out(
    zip_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="synco")
    expected = build_source("zip", str(zip_root), "train").fingerprint()
    assert "left out" not in caplog.text
    left = ("__MACOSX/c0/._image 00.JPEG\t3", "c1/.DS_Store\t1", "c1/._x.jpg\t1", "@eaDir/x.jpg\t9")
    with (zip_root / "train_map.txt").open("a") as listing:
        listing.write("\n".join(left) + "\n")
    source = build_source("zip", str(zip_root), "train")
    assert (source.fingerprint(), source.num_classes) == (expected, 3)
    assert caplog.text.count("hidden files and what systems leave behind: 4 (such as ") == 1
    text = (zip_root / "train_map.txt").read_text()
    (zip_root / "train_map.txt").write_text(text + "./c0/image 00.JPEG\t0\n")
    with pytest.raises(ValueError, match=r"has no entry '\./c0/image 00\.JPEG'"):
        build_source("zip", str(zip_root), "train")  # "." is no hidden folder
