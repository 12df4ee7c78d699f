"""Packs: read as what was packed, in place, in any process; cut or damaged ones are refused."""

import json
import os
import struct
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.augment.recipes import build_recipe
from data.labels import read_subset, write_subset
from data.loader import Batch, GlobalLoader, evaluation_batches
from data.sources import Source, build_source, subset
from data.sources.binary import checksum
from data.sources.packed import PackedSource
from data.worker import BadImagesError
from tests import forked
from tools import pack

CPU = torch.device("cpu")


def packed(
    root: Path, *flags: str, split: str = "train", dataset: str = "imagefolder"
) -> PackedSource:
    """Pack a split in this process and open it."""
    output = root / "packs" / f"{split}.pack"
    places = [
        "--data-path",
        str(root),
        "--dataset",
        dataset,
        "--split",
        split,
        "--output",
        str(output),
    ]
    assert pack.main([*places, "--workers", "0", *flags]) == 0
    source = build_source("packed", str(output.parent), split)
    assert isinstance(source, PackedSource)
    return source


def batches(source: Source, steps: int = 4, num_workers: int = 0, **options: float) -> list[Batch]:
    recipe = build_recipe("moco_v2", 16)
    loader = GlobalLoader(
        source, recipe, global_batch=4, seed=3, device=CPU, num_workers=num_workers, **options
    )
    return [batch for _, (batch,) in loader.from_step(0, steps)]


def assert_same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


@pytest.mark.parametrize("flags", [[], ["--raw"]], ids=["as is", "raw"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_pack_holds_the_same_images(image_folder: Path, flags: list[str], split: str) -> None:
    folder = build_source("imagefolder", str(image_folder), split)
    source = packed(image_folder, *flags, split=split)
    assert (len(source), source.classes, source.images) == (len(folder), folder.classes, None)
    assert source.labels.tolist() == folder.labels.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that it may not write to
        for i in range(len(source)):
            assert torch.equal(source.load(i), folder.load(i))
            assert source.name(i).endswith(folder.name(i).split(f"/{split}/")[1])
            assert (source.encoded(i) == folder.encoded(i)) == (not flags)


@pytest.mark.parametrize("flags", [[], ["--raw"]], ids=["as is", "raw"])
def test_training_sees_the_same_batches(image_folder: Path, flags: list[str]) -> None:
    folder = build_source("imagefolder", str(image_folder), "train")
    source = packed(image_folder, *flags)
    theirs = batches(folder)
    assert_same_batches(batches(source), theirs)
    assert_same_batches(batches(source, num_workers=2), theirs)
    chosen = [7, 1, 5, 2, 11, 0]
    assert_same_batches(batches(subset(source, chosen), 1), batches(subset(folder, chosen), 1))


def test_writing_to_a_raw_image_changes_no_pack(image_folder: Path) -> None:
    source = packed(image_folder, "--raw")
    image = source.load(3)
    before = source.path.read_bytes()
    image.zero_()
    assert source.path.read_bytes() == before
    assert PackedSource(source.path).load(3).any()


def test_arrays_are_packed_as_pixels(tmp_path: Path) -> None:
    digits = build_source("digits", "", "val")
    source = packed(tmp_path, "--raw", dataset="digits", split="val")
    assert digits.images is not None
    assert all(torch.equal(source.load(i), digits.images[i]) for i in range(0, len(digits), 37))
    assert (source.labels.tolist(), source.classes) == (digits.labels.tolist(), digits.classes)
    assert source.name(5).endswith("@/digits[5]")


def test_a_spawned_worker_maps_the_pack_again(image_folder: Path) -> None:
    source = packed(image_folder, "--raw")
    message = ForkingPickler.dumps(subset(source, [7, 3]))
    assert len(bytes(message)) < 5000  # the path, not the arrays
    copy = ForkingPickler.loads(message)
    assert torch.equal(copy.load(1), source.load(3))
    assert copy.fingerprint() == subset(source, [7, 3]).fingerprint()
    message = ForkingPickler.dumps(source)
    source.path.unlink()
    packed(image_folder)
    with pytest.raises(ValueError, match="was replaced by another pack"):
        ForkingPickler.loads(message)


def test_the_path_may_be_the_file_itself(image_folder: Path) -> None:
    train, val = packed(image_folder), packed(image_folder, split="val")
    for place in (train.path.parent, train.path, val.path):
        assert build_source("packed", str(place), "train").fingerprint() == train.fingerprint()
        assert build_source("packed", str(place), "val").fingerprint() == val.fingerprint()
    val.path.unlink()
    with pytest.raises(
        ValueError, match=r"val\.pack does not exist; .* tools/pack\.py --split val"
    ):
        build_source("packed", str(train.path), "val")
    with pytest.raises(ValueError, match="is not a folder"):
        build_source("packed", str(image_folder / "nowhere"), "train")


def test_label_lists_name_packed_images(image_folder: Path) -> None:
    source, folder = packed(image_folder), build_source("imagefolder", str(image_folder), "train")
    listed = image_folder / "list.txt"
    write_subset(listed, source, np.array([1, 4, 9]))
    assert read_subset(source, str(listed)).tolist() == [1, 4, 9]
    assert read_subset(folder, str(listed)).tolist() == [1, 4, 9]


def test_the_fingerprint_is_of_the_content(image_folder: Path) -> None:
    first = packed(image_folder)
    digest = first.fingerprint()
    assert digest.startswith("12:")
    first.path.unlink()
    assert packed(image_folder).fingerprint() == digest
    others = []
    for flags in (["--raw"], ["--short-side", "32"]):
        first.path.unlink()
        others.append(packed(image_folder, *flags).fingerprint())
    victim = next((image_folder / "train" / "c1").iterdir())
    # the same names
    victim.write_bytes(next((image_folder / "train" / "c0").iterdir()).read_bytes())
    first.path.unlink()
    others.append(packed(image_folder).fingerprint())
    assert len({digest, *others}) == 4


# ---- damage --------------------------------------------------------------------------------------

CUTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "head": lambda content: content[:64],
    "half": lambda content: content[: len(content) // 2],
    "one byte less": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "one byte lost": lambda content: content[:500] + content[501:],
    "another file": lambda content: b"\xff\xd8" + content[2:],
    "a later version": lambda content: content[:8] + struct.pack("<I", 9) + content[12:],
    "zeroed end": lambda content: content[:-512] + bytes(512),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_is_no_whole_pack_is_refused(image_folder: Path, name: str) -> None:
    file = packed(image_folder).path
    file.write_bytes(CUTS[name](file.read_bytes()))
    with pytest.raises(
        ValueError, match=r"DATA\.PATH.*train\.pack is no pack, or was cut or damaged"
    ):
        build_source("packed", str(file.parent), "train")


def test_no_flipped_bit_goes_unnoticed(image_folder: Path) -> None:
    source = packed(image_folder, "--raw")
    file, content = source.path, source.path.read_bytes()
    truth = [source.load(i).clone() for i in range(len(source))]
    padding = range(int(source.index.offsets[-1]), source.header["start"])
    rng = np.random.default_rng(0)
    behind = range(source.header["start"], len(content), 7)  # the index, the header and the tail
    for place in [*rng.choice(len(content), 100, replace=False), *behind]:
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(spoilt)
        try:
            damaged = PackedSource(file)
        except ValueError:
            assert not 64 <= place < padding.start  # one image is one image's loss
            continue
        wrong = []
        for i, image in enumerate(truth):
            try:
                assert torch.equal(damaged.load(i), image)
            except OSError:
                wrong.append(i)
        unused = (
            place < 64 or place in padding or place in range(len(content) - 12, len(content) - 8)
        )
        assert len(wrong) == (0 if unused else 1), place


def test_a_damaged_record_is_one_bad_image(image_folder: Path) -> None:
    source = packed(image_folder)
    content = bytearray(source.path.read_bytes())
    content[int(source.index.offsets[5]) + 300] ^= 1
    source.path.write_bytes(content)
    damaged = build_source("packed", str(source.path), "train")
    seen = [index for batch in batches(damaged, 6) for index in batch.indices.tolist()]
    assert len(seen) == 24
    assert 5 not in seen  # replaced
    with pytest.raises(BadImagesError, match="MAX_BAD_FRACTION"):
        batches(damaged, 6, max_bad_fraction=0.0)
    with pytest.raises(BadImagesError, match="evaluations replace nothing"):
        list(evaluation_batches(damaged, 16, batch_size=4, device=CPU))


def resealed(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a pack whose header has been changed by somebody who knows the format."""
    tail = struct.Struct("<QQI4x8s")
    start, length, _, magic = tail.unpack(content[-tail.size :])
    header = json.loads(content[start : start + length])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    return content[:start] + text + tail.pack(start, len(text), checksum(text), magic)


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no object": lambda header: [1, 2],
    "nothing in it": lambda header: {"count": 12},
    "no split": lambda header: header.pop("split") and None,
    "no digest": lambda header: header.pop("digest") and None,
    "no names": lambda header: header["lengths"].pop("names") and None,
    "another digest": lambda header: header.update(digest="12:00"),
    "more images": lambda header: header.update(count=13),
    "a negative count": lambda header: header.update(count=-1),
    "a huge start": lambda header: header.update(start=1 << 70),
    "a negative start": lambda header: header.update(start=-64),
    "a huge length": lambda header: header["lengths"].update(offsets=1 << 70),
    "more labels": lambda header: header["lengths"].update(labels=24),
    "a length of another type": lambda header: header["lengths"].update(offsets="13"),
    "fewer classes": lambda header: header.update(classes=["c0"]),
    "classes that are no names": lambda header: header.update(classes=[1, None, {}]),
    "raw or not": lambda header: header.update(raw=not header["raw"]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_an_odd_header_is_one_clear_error(image_folder: Path, name: str) -> None:
    file = packed(image_folder).path
    file.write_bytes(resealed(file.read_bytes(), HEADERS[name]))
    with pytest.raises(
        ValueError, match=r"DATA\.PATH.*train\.pack is no pack, or was cut or damaged"
    ):
        build_source("packed", str(file.parent), "train")


def test_a_header_of_nested_lists_is_one_clear_error(image_folder: Path) -> None:
    file = packed(image_folder).path
    content, tail = file.read_bytes(), struct.Struct("<QQI4x8s")
    start, _, _, magic = tail.unpack(content[-tail.size :])
    text = b"[" * 200_000
    file.write_bytes(content[:start] + text + tail.pack(start, len(text), checksum(text), magic))
    with pytest.raises(ValueError, match="is no pack, or was cut or damaged"):
        build_source("packed", str(file.parent), "train")


@pytest.mark.parametrize(
    ("array", "place", "value", "message"),
    [
        ("offsets", 3, 1 << 60, "points outside"),
        ("offsets", 5, -8, "points outside of the file, or backwards"),
        ("offsets", -1, 1 << 60, "points outside"),
        ("names_at", -1, 1 << 60, "points outside"),
        ("labels", 2, 99, "label without a class"),
        ("labels", 2, -2, "label without a class"),
        ("checksums", 2, 7, "digest is that of another content"),
    ],
)
def test_an_odd_index_is_one_clear_error(
    image_folder: Path, array: str, place: int, value: int, message: str
) -> None:
    source = packed(image_folder)
    content, index = source.path.read_bytes(), source.index
    changed = {name: getattr(index, name).copy() for name in index._fields}
    changed[array][place] = value
    body = b"".join(part.tobytes() for part in changed.values())
    start = source.header["start"]
    content = content[:start] + body + content[start + len(body) :]
    source.path.write_bytes(
        resealed(content, lambda header: header.update(checksum=checksum(body)))
    )
    with pytest.raises(ValueError, match=message):
        build_source("packed", str(source.path), "train")


def load_after_a_cut(path: str) -> str:
    source = build_source("packed", path, "train")
    source.load(0)
    os.truncate(path, 5000)
    names = [source.name(index) for index in range(len(source))]
    try:
        source.load(11)
    except OSError as error:
        return f"{len(names)} {len(set(names))} {int(source.labels.max())} {error}"
    return "read"


@pytest.mark.parametrize("flags", [[], ["--raw"]], ids=["as is", "raw"])
def test_a_pack_that_is_cut_while_in_use_ends_no_process(
    image_folder: Path, flags: list[str]
) -> None:
    source = packed(image_folder, *flags)
    with forked.pool(1) as pool:
        (answer,) = pool.run(load_after_a_cut, str(source.path))
    assert answer == f"12 12 2 the pack was cut while it was in use: copy {source.path} again"


def test_both_packs_have_the_same_classes(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed(image_folder)
    for image in (image_folder / "val" / "c1").iterdir():
        image.unlink()
    val = packed(image_folder, split="val")
    assert (
        caplog.text.count("val.pack has no image of 2 of train's 3 classes, such as ['c1', 'c2']")
        == 1
    )
    val.path.write_bytes(
        resealed(
            val.path.read_bytes(),
            lambda header: header.update(with_classes(val, ["c0", "c2", "c9"])),
        )
    )
    with pytest.raises(ValueError, match=r"different classes \(\['c1', 'c9'\]\): pack both splits"):
        build_source("packed", str(val.path.parent), "val")


def with_classes(source: PackedSource, classes: list[str]) -> dict[str, Any]:
    return {"classes": classes, "digest": source.index.content(classes, source.header["raw"])}


# ---- several processes ---------------------------------------------------------------------------


def indices_of_a_rank(path: str) -> tuple[str, list[int], float]:
    source = build_source("packed", path, "train")
    seen = batches(source, 3)
    return (
        source.fingerprint(),
        [i for b in seen for i in b.indices.tolist()],
        float(seen[0].views[0].sum()),
    )


def test_two_ranks_share_a_pack(image_folder: Path) -> None:
    source = packed(image_folder)
    whole = [batch.indices.tolist() for batch in batches(source, 3)]
    with forked.pool(2) as pool:
        answers = pool.run(indices_of_a_rank, str(source.path))
    assert {fingerprint for fingerprint, _, _ in answers} == {source.fingerprint()}
    joint = [sorted(answers[0][1][i : i + 2] + answers[1][1][i : i + 2]) for i in (0, 2, 4)]
    assert joint == [sorted(each) for each in whole]
