"""Text of other systems is read right or refused by name; nothing but a regular file is read."""

import os
from pathlib import Path

import numpy as np
import pytest

from data.labels import label_subset
from data.sources import build_source
from detection.sources.voc import _voc_list
from tools.propagate import read_list
from utils.reading import read_bytes, read_text

TEXT = "cats/é.jpg\t3\r\ndogs/二.jpg\t4\n"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


def with_mark(text: str, encoding: str) -> bytes:
    marks = {"utf-16-be": b"\xfe\xff", "utf-32-be": b"\0\0\xfe\xff"}
    return marks.get(encoding, b"") + text.encode(encoding)


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-16-be", "utf-32-be"])
def test_marks_tell_the_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "list.txt").write_bytes(with_mark(TEXT, encoding))
    for errors in ("strict", "surrogateescape"):
        assert read_text(tmp_path / "list.txt", errors) == TEXT.replace("\r\n", "\n")


@pytest.mark.parametrize(
    "data",
    [
        TEXT.replace("二", "").encode("latin-1"),
        TEXT.encode("utf-16-le"),
        "a.jpg\n".encode("utf-16-le"),  # zero bytes are valid UTF-8
        TEXT.encode("gb18030"),
        b"\xff\xfea\0b",
        b"\x89PNG\r\n\x1a\n\0\0",
    ],
)
def test_other_encodings_are_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"list\.txt is no text in UTF-.*: save it as UTF-8"):
        read_text(tmp_path / "list.txt")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            read_text(path)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="file has 5 bytes, more than 4"):
        read_bytes(tmp_path / "file", 4)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_list_is_read_in_every_encoding(image_list: Path, encoding: str) -> None:
    """Label lists, class lists, annotations, videos; zip maps are in test_archives."""
    root = image_list
    for path in root.rglob("*.txt"):
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    source = build_source("imagefolder", str(root), "train")
    assert label_subset(source, 1, 0, str(root / "subset.txt")).tolist() == [1]
    tiny = build_source("tinyimagenet", str(root), "val")
    assert (tiny.labels.tolist(), tiny.classes) == ([0], ["café"])
    assert build_source("pets", str(root), "train").labels.tolist() == [4]
    assert read_list(root / "videos.txt") == ["bear", "café"]
    assert _voc_list(root / "videos.txt", "2007_val") == ["bear", "café"]


@pytest.fixture
def image_list(tmp_path: Path) -> Path:
    """Give small data sets of every kind that lists its images, with empty images."""
    images = ("train/c0/a.jpg", "train/c0/é.jpg", "tiny-imagenet-200/val/images/é.jpg")
    for name in (*images, "oxford-iiit-pet/images/é.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    texts = {
        "subset.txt": "é.jpg\n",
        "videos.txt": "bear\r\ncafé\r\n",
        "tiny-imagenet-200/wnids.txt": "n1\n",
        "tiny-imagenet-200/words.txt": "n1\tcafé, shop\n",
        "tiny-imagenet-200/val/val_annotations.txt": "é.jpg\tn1\t0\n",
        "oxford-iiit-pet/annotations/trainval.txt": "é 5 1 1\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    return tmp_path


def test_a_subset_list_of_another_encoding_is_refused_with_the_reason(image_list: Path) -> None:
    source = build_source("imagefolder", str(image_list), "train")
    (image_list / "subset.txt").write_bytes("é.jpg\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"1 of its names are not in .*the list is no text in UTF-8: save"
    ):
        label_subset(source, 1, 0, str(image_list / "subset.txt"))
    # now it names this file
    (image_list / "train" / "c0" / os.fsdecode(b"\xe9.jpg")).write_bytes(b"x")
    source = build_source("imagefolder", str(image_list), "train")
    chosen = label_subset(source, 1, 0, str(image_list / "subset.txt"))
    assert np.array_equal(chosen, [2])
