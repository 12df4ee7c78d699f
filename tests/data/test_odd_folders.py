"""Folders as they are found: unreadable parts, links, pipes, what systems leave, extensions."""

import errno
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.decode import FORMATS
from data.sources import Source, build_source
from data.sources import folder as files
from data.sources import folder_index as listing
from data.sources.scan import IMG_EXTENSIONS, is_folder, left_behind
from tools import pack


def names(source: Source, root: Path) -> list[str]:
    return [str(Path(source.name(i)).relative_to(root)) for i in range(len(source))]


def opened(
    root: Path, dataset: str = "imagefolder", split: str = "train", cache: object = "off"
) -> Source:
    return build_source(dataset, str(root), split, index_cache=str(cache))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines on what was left out, and forget them."""
    lines = [record.getMessage() for record in caplog.records if "left out:" in record.getMessage()]
    caplog.clear()
    return lines


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="synco")


# ---- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize(
    ("closed", "dataset", "split"),
    [
        ("train/c1", "imagefolder", "train"),
        ("train/c1/deep", "imagefolder", "train"),
        ("train", "imagefolder", "val"),  # the classes of val are those of train
        ("val/c0", "imagefolder", "val"),
        ("train/c2", "folder", "train"),
        ("train", "folder_split", "train"),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error(
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    closed: str,
    dataset: str,
    split: str,
) -> None:
    (image_folder / "train" / "c1" / "deep").mkdir()
    scandir = os.scandir

    def refuse(path: object) -> object:
        if str(path) == str(image_folder / closed):
            raise OSError(code, os.strerror(code), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    root = image_folder / "train" if dataset == "folder_split" else image_folder
    with pytest.raises(
        ValueError, match=rf"DATA\.PATH.*{closed} cannot be read \(.*\): mend its perm"
    ):
        opened(root, dataset, split)


def test_a_link_that_may_lead_to_a_closed_folder_is_an_error(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = image_folder / "train" / "c1" / "more"
    link.symlink_to(image_folder / "val")
    real = os.stat

    class Closed:
        """A DirEntry whose target may not be looked at."""

        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.path = entry.name, entry.path
            self.is_file, self.is_dir, self.is_symlink = (
                entry.is_file,
                entry.is_dir,
                entry.is_symlink,
            )

        def stat(self) -> os.stat_result:
            if self.path == str(link):
                raise PermissionError(errno.EACCES, "Permission denied", self.path)
            return real(self.path)

    scandir = os.scandir

    class Entries:
        def __init__(self, path: str) -> None:
            self.inner = scandir(path)

        def __enter__(self) -> object:
            return (Closed(entry) for entry in self.inner)

        def __exit__(self, *_: object) -> None:
            self.inner.close()

    monkeypatch.setattr(os, "scandir", Entries)
    with pytest.raises(ValueError, match=r"c1/more cannot be read \(Permission denied\)"):
        opened(image_folder)


def test_a_folder_that_may_not_be_looked_at_is_not_taken_for_a_missing_one(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [is_folder(image_folder / name) for name in ("train", "absent")] == [True, False]
    real = os.stat

    def refuse(path: object, **options: bool) -> os.stat_result:
        if str(path) == str(image_folder / "train"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(ValueError, match=r"DATA\.PATH.*train cannot be read"):
        opened(image_folder, split="val")


def test_a_class_that_val_lacks_is_said(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(opened(image_folder, split="val")) == 5
    assert caplog.text.count("val has no image of 1 of train's 3 classes, such as ['c2']") == 1
    for image in (image_folder / "val" / "c1").iterdir():
        image.unlink()
    caplog.clear()
    opened(image_folder, split="val")
    assert "no image of 2 of train's 3 classes, such as ['c1', 'c2']" in caplog.text


# ---- each real folder once -----------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["imagefolder", "folder"])
@pytest.mark.parametrize(
    "links",
    [
        {"c0/up": ".."},
        {"c0/up": "..", "c0/me": "."},
        {"c0/l1": ".", "c0/l2": "."},
        {"c0/far": "../../.."},
        {"c0/root": "/"},
        {"c0/other": "../c1"},
        {"c1/a": "../c2", "c2/a": "../c1", "c2/b": "../c2/a"},
        {"c0/in": "../../pool", "../pool/back": "../train/c0"},
        {"c0/in": "../../pool", "../pool/back": "../pool"},
    ],
)
def test_links_list_no_image_twice(
    image_folder: Path, dataset: str, links: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    (image_folder / "pool").mkdir()
    train = image_folder / "train"
    expected = opened(image_folder, dataset).fingerprint()
    for name, target in links.items():
        (train / name).symlink_to(target)
    assert opened(image_folder, dataset).fingerprint() == expected
    (line,) = said(caplog)
    assert "links to folders that are listed anyway: " in line


def test_a_folder_outside_is_listed_once_under_the_first_link(image_folder: Path) -> None:
    pool = image_folder / "pool"
    (pool / "deep").mkdir(parents=True)
    (pool / "one.jpg").write_bytes(b"x")
    (pool / "deep" / "two.jpg").write_bytes(b"x")
    for name, target in (("z", pool), ("y", pool), ("x", pool / "deep")):
        (image_folder / "train" / "c1" / name).symlink_to(target)
    found = [
        name for name in names(opened(image_folder), image_folder / "train") if "image" not in name
    ]
    assert found == ["c1/x/two.jpg", "c1/y/one.jpg"]


def test_class_folders_may_be_links_but_not_to_one_folder(image_folder: Path) -> None:
    train = image_folder / "train"
    expected = opened(image_folder).fingerprint()
    (train / "c1").rename(image_folder / "elsewhere")
    (train / "c1").symlink_to(image_folder / "elsewhere")
    assert opened(image_folder).fingerprint() == expected
    (train / "c3").symlink_to("c0")
    with pytest.raises(
        ValueError, match=r"c0 and .*c3 are the same folder, .*: remove one of them"
    ):
        opened(image_folder)
    (train / "c3").unlink()
    (train / "c3").symlink_to("..")
    with pytest.raises(ValueError, match=r"c3 is a link to a folder around it: remove the link"):
        opened(image_folder)


def test_a_skipped_link_that_leads_elsewhere_later_is_noticed(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_RACY_NS", 0)
    cache = tmp_path_factory.mktemp("indexes")
    current = image_folder / "current"
    current.symlink_to(image_folder / "train" / "c0")
    (image_folder / "train" / "c1" / "link").symlink_to(current)
    assert len(opened(image_folder, cache=cache)) == 12
    current.unlink()
    current.symlink_to(image_folder / "val" / "c0")
    assert len(opened(image_folder, cache=cache)) == 15


# ---- what is no image ----------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe"))


def listening(path: Path) -> None:
    place = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(place)


@pytest.mark.parametrize(
    "make", [pipe, device, link_to_pipe, listening], ids=lambda make: make.__name__
)
def test_what_is_no_file_is_no_image(
    image_folder: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = opened(image_folder).fingerprint()
    make(image_folder / "train" / "c1" / "odd.jpg")
    assert opened(image_folder).fingerprint() == expected
    (line,) = said(caplog)
    assert "pipes, sockets and devices: " in line
    (flat,) = [build_source("folder_split", str(image_folder / "train" / "c1"), "train")]
    assert "odd" not in " ".join(names(flat, image_folder))
    source = files.FileSource(image_folder / "train" / "c1", ["odd.jpg"], [0], ["c"])
    with pytest.raises(OSError, match=r"not a regular file|No such device"):
        source.load(0)  # it has come in the place of an image


def test_a_file_much_larger_than_its_pixels_may_be_is_unreadable(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with (tmp_path / "b.jpg").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    source = files.FileSource(tmp_path, ["a.png", "b.jpg"], [0, 0], ["c"])
    assert source.load(0).shape == (3, 4, 4)
    with pytest.raises(OSError, match=r"b\.jpg has 1099511627776 bytes, more than 1090519040"):
        source.load(1)


# ---- what systems leave behind -------------------------------------------------------------------

LEFT = (
    "._a.jpg", ".DS_Store", ".hidden.png", "Thumbs.db", "__MACOSX/c0/a.jpg", "@eaDir/a.jpg/SYNOPHOTO_M.jpg",
    ".ipynb_checkpoints/a-checkpoint.jpg", "lost+found/a.jpg", "$RECYCLE.BIN/a.jpg", ".thumbnails/a.png",
    "System Volume Information/a.jpg", "PaxHeaders.77/a.jpg", "#recycle/a.jpg", ".Trash-1000/files/a.jpg",
)  # fmt: skip


def litter(root: Path) -> None:
    for name in LEFT:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0\5\26\7")


@pytest.mark.parametrize(
    "name", ["n01440764", "a.b", "..", ".", "lost", "tmp", "_x", "#1", "@home", "$5"]
)
def test_plain_names_are_not_left_out(name: str) -> None:
    assert not left_behind(name)


@pytest.mark.parametrize("extension", IMG_EXTENSIONS)
def test_only_hidden_names_of_images_are_left_out(extension: str) -> None:
    """`read_folder` does not look further at an image's name that does not start with a dot."""
    heads = {name.split("/")[0] for name in LEFT}
    names = [f"{head.removesuffix(Path(head).suffix)}{extension}" for head in heads | {"x"}]
    assert {name[0] == "." for name in names} == {True, False}
    assert all(left_behind(name) == (name[0] == ".") for name in names)


@pytest.mark.parametrize(
    ("dataset", "root", "split", "places"),
    [
        ("imagefolder", "", "train", ["train", "train/c0"]),
        ("imagefolder", "", "val", ["val", "val/c0", "train"]),
        ("folder", "", "train", ["train", "train/c1"]),
        ("folder", "train/c0", "train", ["train/c0"]),
        ("folder_split", "train/c0", "train", ["train/c0"]),
    ],
)
def test_what_systems_leave_behind_is_left_out_and_counted_once(
    image_folder: Path,
    dataset: str,
    root: str,
    split: str,
    places: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = opened(image_folder / root, dataset, split)
    assert said(caplog) == []
    for place in places:
        litter(image_folder / place)
    after = opened(image_folder / root, dataset, split)
    assert (after.fingerprint(), after.classes) == (before.fingerprint(), before.classes)
    (line,) = said(caplog)
    counted = len(LEFT) * (len(places) - (split == "val"))
    assert f"hidden files and what systems leave behind: {counted} (such as " in line


def test_the_index_remembers_what_was_left_out(
    image_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(listing, "_RACY_NS", 0)
    cache = tmp_path_factory.mktemp("indexes")
    litter(image_folder / "train" / "c0")
    litter(image_folder / "train")
    (image_folder / "train" / "c1" / "notes.txt").write_text("x")
    opened(image_folder, cache=cache)
    first = said(caplog)
    assert list(cache.iterdir())
    monkeypatch.setattr(listing, "scan", None)
    opened(image_folder, cache=cache)
    assert said(caplog) == first
    assert len(first) == 1


def test_pets_and_tinyimagenet_count_it_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pets, tiny = tmp_path / "oxford-iiit-pet", tmp_path / "tiny-imagenet-200"
    for folder in (pets / "images", tiny / "train" / "n1" / "images", tiny / "val" / "images"):
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(b"x")
        litter(folder)
    (pets / "annotations").mkdir()
    (pets / "annotations" / "trainval.txt").write_text("a 1 1 1\n")
    (tiny / "wnids.txt").write_text("n1\nn2\n")
    (tiny / "words.txt").write_text("n1\tcat\nn2\tdog\n")
    (tiny / "val" / "val_annotations.txt").write_text("a.jpg\tn1\n")
    for dataset, split in (("pets", "train"), ("tinyimagenet", "val")):
        assert len(opened(tmp_path, dataset, split)) == 1
        (line,) = said(caplog)
        assert f"leave behind: {len(LEFT)} (" in line
    (tiny / "wnids.txt").write_text("n1\n")
    assert len(opened(tmp_path, "tinyimagenet")) == 1
    assert len(said(caplog)) == 1


def test_a_class_that_tinyimagenets_val_lacks_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = tmp_path / "tiny-imagenet-200"
    (tiny / "val" / "images").mkdir(parents=True)
    (tiny / "val" / "images" / "a.jpg").write_bytes(b"x")
    (tiny / "wnids.txt").write_text("n1\nn2\n")
    (tiny / "words.txt").write_text("n1\tcat\nn2\tdog\n")
    (tiny / "val" / "val_annotations.txt").write_text("a.jpg\tn1\n")
    opened(tmp_path, "tinyimagenet", "val")
    assert "val has no image of 1 of train's 2 classes, such as ['dog']" in caplog.text


def test_pack_leaves_the_same_out_and_says_so(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, littered = image_folder / "plain.pack", image_folder / "littered.pack"
    flags = ["--data-path", str(image_folder), "--workers", "0", "--no-verify"]
    assert pack.main([*flags, "--output", str(plain)]) == 0
    caplog.clear()
    litter(image_folder / "train")
    litter(image_folder / "train" / "c2")
    logging.getLogger("synco").setLevel(logging.WARNING)  # as where no main has set it
    assert pack.main([*flags, "--output", str(littered)]) == 0
    assert littered.read_bytes() == plain.read_bytes()
    assert len(said(caplog)) == 1


# ---- extensions ----------------------------------------------------------------------------------


def test_every_extension_of_the_formats_is_listed() -> None:
    Image.init()
    known = {name for name, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert known - {".pfm"} == set(IMG_EXTENSIONS)  # its pixels are floats


def test_files_of_other_extensions_are_counted_by_extension(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    folder = image_folder / "train" / "c0"
    pixels.save(folder / "x.JFIF", "JPEG")
    pixels.save(folder / "y.gif")
    for name in ("a.heic", "b.HEIC", "c.txt", "d", "e.\x1b[31m", "f.1", "../stray.jpg"):
        (folder / name).write_bytes(b"x")
    source = opened(image_folder)
    assert len(source) == 14
    listed = names(source, folder.parent)
    for name in ("c0/x.JFIF", "c0/y.gif"):
        assert source.load(listed.index(name)).shape == (3, 8, 8)
    (line,) = said(caplog)
    assert line.endswith("files of other extensions: others 3, heic 2, txt 1")
    assert "images outside of the class folders: 1 (such as " in line


def test_what_lies_beside_the_split_that_is_read_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place in ("train/a", "val2017", "beach", ".hidden", "__MACOSX"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place / "0.png")
    (tmp_path / "beach").rename(tmp_path / ".away")
    assert len(build_source("folder", str(tmp_path), "train")) == 1
    assert not caplog.messages
    (tmp_path / ".away").rename(tmp_path / "beach")
    Image.new("RGB", (4, 4)).save(tmp_path / "cover.png")
    assert len(build_source("folder", str(tmp_path), "train")) == 1
    assert caplog.messages == [
        f"DATA.PATH (--data-path): only {tmp_path / 'train'} is read; beside it are beach, "
        "cover.png. To read all, rename train"
    ]


def test_a_root_that_cannot_be_listed_ends_no_run_on_its_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "0.png")

    def closed(*_: object) -> None:
        raise ValueError("cannot be read")

    monkeypatch.setattr(files, "read_folder", closed)
    assert len(build_source("folder", str(tmp_path), "train")) == 1
