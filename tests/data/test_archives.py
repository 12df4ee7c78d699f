"""Zip archives: every cache mode gives the folder's images; mistakes are named."""

import multiprocessing
import zipfile
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
        build_source(name, str(zip_root), "train", cache_mode=mode) for name in ("imagefolder", "zip")
    )
    assert archive.labels.tolist() == folder.labels.tolist()
    assert archive.num_classes == 3
    for i in range(len(folder)):
        assert torch.equal(archive.load(i), folder.load(i))
    assert archive.name(0).endswith("train.zip@/c0/image 00.JPEG")


@pytest.mark.parametrize(("mode", "held"), [("no", []), ("part", [1, 4, 7, 10]), ("full", list(range(12)))])
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
    with pytest.raises((OSError, ValueError, Exception), match=r"damaged zip entry|invalid|Error"):
        source.read(3)
    assert source.read(2)


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
        ("c0/image 00.JPEG 0", "no", "train_map.txt line 1: .* is not <path in the zip> TAB <label>"),
        ("c0/image 00.JPEG\tcat", "no", "train_map.txt line 1"),
        ("c0/image 00.JPEG\t0\nc0/image 00.txt\t0", "no", "train_map.txt line 2"),
        ("c0/absent.jpg\t0", "no", "has no entry 'c0/absent.jpg'"),
        ("", "no", "lists no images"),
    ],
)
def test_errors_name_the_file_and_the_remedy(zip_root: Path, listing: str, mode: str, message: str) -> None:
    (zip_root / "train_map.txt").write_text(listing)
    with pytest.raises(ValueError, match=message):
        build_source("zip", str(zip_root), "train", cache_mode=mode)


def test_a_file_that_is_no_zip_is_refused(zip_root: Path) -> None:
    (zip_root / "train.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="is not a valid zip"):
        build_source("zip", str(zip_root), "train")
