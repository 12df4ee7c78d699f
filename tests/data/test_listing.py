"""The kept listing of a folder: the same as a scan, never stale, and worth no more than a scan if damaged."""

import logging
import os
import struct
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.sources import Source, build_source, subset
from data.sources import folder as files
from data.sources import folder_index as listing
from data.sources.binary import checksum, file_systems
from tests import forked


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder of indexes; folders that have just been written are trusted as if two seconds old."""
    monkeypatch.setattr(listing, "_RACY_NS", 0)
    return tmp_path_factory.mktemp("indexes")


def settle() -> None:
    """Let the file system's clock tick, as two seconds do in earnest."""
    time.sleep(0.03)


def opened(
    root: Path, cache: Path | str, dataset: str = "imagefolder", split: str = "train"
) -> Source:
    return build_source(dataset, str(root), split, index_cache=str(cache))


def described(source: Source) -> tuple[list[str], list[int], str]:
    return (
        [source.name(i) for i in range(len(source))],
        source.labels.tolist(),
        source.fingerprint(),
    )


@pytest.fixture
def no_scan(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Give a switch after which a scan is an error."""

    def scan(*args: object) -> None:
        raise AssertionError("scanned although there is an index")

    return lambda: monkeypatch.setattr(listing, "scan", scan)


def index_of(cache: Path) -> Path:
    (file,) = cache.glob("*.index")
    return file


# ---- the same as a scan --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "split"), [("imagefolder", "train"), ("imagefolder", "val"), ("folder", "train")]
)
def test_the_second_opening_needs_no_scan_and_says_the_same(
    image_folder: Path, cache: Path, no_scan: Callable[[], None], dataset: str, split: str
) -> None:
    strange = image_folder / "train" / "c1" / "b c"
    for folder in (strange, strange.parent / "b", strange.parent / "b" / "c"):
        folder.mkdir()
        (folder / "ünïcode.jpeg").write_bytes(b"x")
    (strange / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"y")
    settle()
    plain = opened(image_folder, "off", dataset, split)
    first = opened(image_folder, cache, dataset, split)
    no_scan()
    second = opened(image_folder, cache, dataset, split)
    assert described(plain) == described(first) == described(second)
    assert plain.classes == second.classes
    assert isinstance(second, files.FileSource)
    if not plain.name(0).endswith("jpeg"):
        assert torch.equal(plain.load(0), second.load(0))
    assert second.labels.dtype == torch.int64
    second.labels[0] = 77  # torch may write there: neither the file nor another process sees it
    assert described(opened(image_folder, cache, dataset, split)) == described(plain)


@pytest.mark.parametrize(
    ("dataset", "split", "digest"),
    [
        ("imagefolder", "train", "12:ec06cfcc2f131e6782b14a868487cc36"),
        ("imagefolder", "val", "5:f56599a19340399c337715806e53aa8c"),
        ("folder", "train", "12:104d375f890d4bc8c3b96d5a870ce723"),
    ],
)
def test_fingerprints_are_those_that_runs_have_saved(
    image_folder: Path, cache: Path, dataset: str, split: str, digest: str
) -> None:
    """Computed by the code before there was an index: another digest would refuse every run on resume."""
    settle()
    for place in ("off", cache, cache):
        assert opened(image_folder, place, dataset, split).fingerprint() == digest


def test_tinyimagenet_is_indexed_too(
    tmp_path: Path, cache: Path, no_scan: Callable[[], None]
) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for wnid in ("n02", "n01"):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / "images" / f"{wnid}_0.JPEG").write_bytes(b"x")
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "words.txt").write_text("n01\tcat, pet\n")
    settle()
    first = opened(tmp_path, cache, "tinyimagenet")
    assert first.labels.tolist() == [0, 1]
    no_scan()
    assert described(opened(tmp_path, cache, "tinyimagenet")) == described(first)


def test_an_indexed_source_reaches_a_spawned_worker(image_folder: Path, cache: Path) -> None:
    settle()
    opened(image_folder, cache)
    part = subset(opened(image_folder, cache), [7, 3])
    copy = ForkingPickler.loads(ForkingPickler.dumps(part))
    index_of(cache).unlink()
    assert described(copy) == described(part)
    assert torch.equal(copy.load(0), part.load(0))


# ---- never stale ---------------------------------------------------------------------------------


def add(root: Path) -> None:
    (root / "train" / "c1" / "new.jpg").write_bytes(b"x")


def remove(root: Path) -> None:
    next((root / "train" / "c1").iterdir()).unlink()


def rename(root: Path) -> None:
    next((root / "train" / "c1").iterdir()).rename(root / "train" / "c1" / "renamed.jpg")


def move(root: Path) -> None:
    file = next((root / "train" / "c1").iterdir())
    file.rename(root / "train" / "c2" / file.name)


def add_class(root: Path) -> None:
    (root / "train" / "a0").mkdir()
    (root / "train" / "a0" / "new.jpg").write_bytes(b"x")


def rename_class(root: Path) -> None:
    (root / "train" / "c1").rename(root / "train" / "z")


def exchange_classes(root: Path) -> None:
    train = root / "train"
    for old, new in (("c0", "x"), ("c1", "c0"), ("x", "c1")):
        (train / old).rename(train / new)


def add_nested(root: Path) -> None:
    (root / "train" / "c2" / "deep" / "er").mkdir()
    (root / "train" / "c2" / "deep" / "er" / "new.jpg").write_bytes(b"x")


def add_behind_link(root: Path) -> None:
    (root / "elsewhere" / "new.jpg").write_bytes(b"x")


def turn_link(root: Path) -> None:
    (root / "train" / "c0" / "link").unlink()
    (root / "train" / "c0" / "link").symlink_to(root / "val" / "c0")


def fill_dangling_link(root: Path) -> None:
    (root / "later").mkdir()
    (root / "later" / "new.jpg").write_bytes(b"x")


def add_and_set_the_time_back(root: Path) -> None:
    folder = root / "train" / "c1"
    before = folder.stat()
    (folder / "new.jpg").write_bytes(b"x")
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))  # as tar and rsync do


CHANGES = [
    *(
        add,
        remove,
        rename,
        move,
        add_class,
        rename_class,
        exchange_classes,
        add_nested,
        add_behind_link,
    ),
    *(turn_link, fill_dangling_link, add_and_set_the_time_back),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dataset", ["imagefolder", "folder"])
def test_every_change_of_the_listing_is_noticed(
    image_folder: Path, cache: Path, dataset: str, change: Callable[[Path], None]
) -> None:
    root = image_folder
    (root / "train" / "c2" / "deep").mkdir()
    (root / "train" / "c2" / "deep" / "one.jpg").write_bytes(b"x")
    (root / "elsewhere").mkdir()
    (root / "train" / "c0" / "link").symlink_to(root / "elsewhere")
    (root / "train" / "c0" / "dangling").symlink_to(root / "later")
    settle()
    before = described(opened(root, cache, dataset))
    settle()
    change(root)
    settle()
    truth = described(opened(root, "off", dataset))
    assert described(opened(root, cache, dataset)) == truth
    assert described(opened(root, cache, dataset)) == truth  # and the index has been renewed
    assert truth != before


def test_a_folder_that_has_just_changed_is_not_trusted(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A second change within one tick of the clock would leave no trace."""
    place = tmp_path_factory.mktemp("indexes")
    opened(image_folder, place)
    assert list(place.iterdir()) == []


def test_a_change_during_the_scan_is_noticed(
    image_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a folder was read and before it is stored; the time that counts was taken before reading."""
    settle()
    store = listing._store

    def late(*args: object) -> None:
        add(image_folder)
        store(*args)

    monkeypatch.setattr(listing, "_store", late)
    assert len(opened(image_folder, cache)) == 12
    monkeypatch.setattr(listing, "_store", store)
    assert len(opened(image_folder, cache)) == 13


def test_file_systems_without_honest_times_are_not_indexed(
    image_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle()
    device = image_folder.stat().st_dev
    monkeypatch.setattr(listing, "file_systems", lambda: {device: "fuse.s3fs"})
    opened(image_folder, cache)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(listing, "file_systems", lambda: {device: "ext4"})
    opened(image_folder, cache)
    assert len(list(cache.iterdir())) == 1


def test_another_folder_at_the_same_path_is_another_folder(image_folder: Path, cache: Path) -> None:
    """As where jobs unpack to one path, with the times that the archive says."""
    settle()
    opened(image_folder, cache)
    stamp = 1_600_000_000
    copy = image_folder / "copy"
    (image_folder / "train").rename(copy)
    for path in copy.rglob("*"):
        target = image_folder / "train" / path.relative_to(copy)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.with_name(target.name.replace("image", "photo")).write_bytes(b"x")
    for path in image_folder.rglob("*"):
        os.utime(path, (stamp, stamp))
    settle()
    assert "photo" in opened(image_folder, cache).name(0)


@pytest.mark.parametrize("change", [add, remove, rename, add_and_set_the_time_back])
def test_a_run_refuses_to_go_on_with_changed_data(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    import main_pretrain
    from utils.checkpoints.file import CheckpointError
    from utils.logger import close_logger

    for number in range(9):
        path = tmp_path / "train" / f"c{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 12, 3), 25 * number, dtype=np.uint8)).save(path)
    settle()
    keys = {"DATASET": "imagefolder", "IMG_SIZE": 8, "NUM_WORKERS": 0, "INDEX_CACHE": cache}
    opts = [text for key, value in keys.items() for text in (f"DATA.{key}", str(value))]
    opts += "MODEL.NAME byol MODEL.BYOL.HIDDEN_DIM 8 MODEL.BYOL.OUT_DIM 8".split()
    opts += "MODEL.BACKBONE.NAME resnet8 TRAIN.BATCH_SIZE 4 TRAIN.EPOCHS 1 LOG.TENSORBOARD False".split()
    places = ["--data-path", str(tmp_path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["main_pretrain.py", *places, "--opts", *opts])
    for _ in range(2):
        assert main_pretrain.main() == 0
        close_logger()
    assert index_of(cache)
    change(tmp_path)
    settle()
    with pytest.raises(CheckpointError, match="files were added, removed or renamed"):
        main_pretrain.main()
    close_logger()


# ---- damage --------------------------------------------------------------------------------------


def flip(offset: float) -> Callable[[bytes], bytes]:
    def spoil(content: bytes) -> bytes:
        place = int(offset * (len(content) - 1))
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    return spoil


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "head only": lambda content: content[:20],
    "cut in the header": lambda content: content[:200],
    "cut by a byte": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "another format": lambda content: b"PK\3\4" + content[4:],
    "a later version": lambda content: content[:8] + struct.pack("<I", 99) + content[12:],
    "endless header": lambda content: content[:16] + b"\xff" * 8 + content[24:],
    "zeroed end": lambda content: content[:-64] + bytes(64),
    "garbage": lambda content: bytes(range(256)) * 40,
    **{f"bit {share}": flip(share) for share in (0.0, 0.01, 0.3, 0.6, 0.8, 0.9, 1.0)},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_index_costs_a_scan_and_a_line(
    image_folder: Path, cache: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    settle()
    truth = described(opened(image_folder, cache))
    file = index_of(cache)
    content = file.read_bytes()
    file.write_bytes(DAMAGE[name](content))
    with caplog.at_level(logging.WARNING, logger="synco"):
        assert described(opened(image_folder, cache)) == truth
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(file) in line
    assert file.read_bytes() == content  # mended


def test_no_bit_of_an_index_may_be_wrong(image_folder: Path, cache: Path) -> None:
    settle()
    truth = opened(image_folder, cache).fingerprint()
    file = index_of(cache)
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(content), 300, replace=False):
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(spoilt)
        source = opened(image_folder, cache)
        assert source.fingerprint() == truth
        assert described(source)[2] == truth
        assert file.read_bytes() == content, place


def test_a_folder_that_cannot_be_written_costs_a_line(
    image_folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settle()
    taken = cache / "file"
    taken.write_text("in the way")
    for place in (taken, taken / "below"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="synco"):
            assert len(opened(image_folder, place)) == 12
        assert any("DATA.INDEX_CACHE" in record.getMessage() for record in caplog.records)


def test_a_full_disk_leaves_the_old_index(
    image_folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settle()
    opened(image_folder, cache)
    content = index_of(cache).read_bytes()
    add(image_folder)
    settle()

    def full(path: Path, fill: Callable[..., object]) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(listing, "write_synced", full)
    with caplog.at_level(logging.WARNING, logger="synco"):
        assert len(opened(image_folder, cache)) == 13
    assert "No space left" in caplog.text
    assert [path.read_bytes() for path in cache.iterdir()] == [content]


def test_only_the_last_used_indexes_are_kept(
    image_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_KEPT", 2)
    (cache / "killed.index.x.tmp").write_text("half")
    os.utime(cache / "killed.index.x.tmp", (0, 0))
    (cache / "busy.index.x.tmp").write_text("half")
    settle()
    names = []
    for number, dataset in enumerate(("imagefolder", "folder")):
        opened(image_folder, cache, dataset)
        names += [path.name for path in cache.glob("*.index") if path.name not in names]
        os.utime(cache / names[-1], (number + 1, number + 1))
    opened(image_folder, cache)  # the first is used again
    opened(image_folder, cache, split="val")
    left = {path.name for path in cache.glob("*.index")}
    assert names[0] in left
    assert names[1] not in left
    assert [path.name for path in cache.glob("*.tmp")] == ["busy.index.x.tmp"]


def test_the_default_folder_follows_the_specification(
    image_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "x"))
    opened(image_folder, "")
    assert len(list((cache / "x" / "synco").glob("*.index"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(cache / "home"))
    opened(image_folder, "")
    assert len(list((cache / "home" / ".cache" / "synco").glob("*.index"))) == 1


# ---- several processes ---------------------------------------------------------------------------


def scans_of_a_rank(root: str, place: str, scan_on: int) -> tuple[int, str]:
    """Open on both ranks; rank `scan_on` finds its folders other than the main process does."""
    from utils import distributed

    count = 0
    scan, changes, racy = listing.scan, listing._changes, listing._RACY_NS

    def counting(*args: object) -> object:
        nonlocal count
        count += 1
        return scan(*args)

    listing.scan, listing._RACY_NS = counting, 0
    if distributed.rank() == scan_on:
        listing._changes = lambda *args: iter(["seen from another machine"])
    try:
        fingerprint = opened(Path(root), place).fingerprint()
        return count, fingerprint
    finally:
        listing.scan, listing._changes, listing._RACY_NS = scan, changes, racy


def test_the_main_process_scans_for_all(image_folder: Path, cache: Path) -> None:
    settle()
    truth = opened(image_folder, "off").fingerprint()
    with forked.pool(2) as pool:
        for scan_on, expected in ((-1, [1, 0]), (-1, [0, 0]), (1, [0, 1])):
            answers = pool.run(scans_of_a_rank, str(image_folder), str(cache), scan_on)
            assert [fingerprint for _, fingerprint in answers] == [truth, truth]
            assert [count for count, _ in answers] == expected
    assert len(list(cache.iterdir())) == 1


# ---- helpers -------------------------------------------------------------------------------------


def test_the_checksum_tells_what_disks_do() -> None:
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, 3 * 4096 + 77, dtype=np.uint8).tobytes()
    damaged = [data[:-1], data + b"\0", b"", data[:4096] + bytes(4096) + data[8192:]]
    damaged.append(data[4096:8192] + data[:4096] + data[8192:])  # two pages exchanged
    for place in rng.choice(len(data), 200, replace=False):
        spoilt = bytearray(data)
        spoilt[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(spoilt))
    assert checksum(data) not in {checksum(each) for each in damaged}
    assert checksum(memoryview(b"x" + data)[1:]) == checksum(data)  # wherever it lies


def test_file_systems_are_known_by_device() -> None:
    systems = file_systems()
    if not systems:
        pytest.skip("no /proc/self/mountinfo")
    assert systems[os.stat("/proc").st_dev] == "proc"


def test_a_file_that_another_run_removes_does_not_end_the_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned = tmp_path / "old.tmp"
    abandoned.touch()
    os.utime(abandoned, (0, 0))
    monkeypatch.setattr(Path, "glob", lambda _, kind: [tmp_path / f"gone{kind[1:]}", abandoned])
    listing._prune(tmp_path)
    assert not abandoned.exists()
