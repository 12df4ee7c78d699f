"""Unreadable files: replaced by a fixed rule, reported once, and too many stop the run."""

import logging
import multiprocessing
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import worker_pool
from data.augment.recipes import build_recipe
from data.loader import BadImagesError, Batch, GlobalLoader, evaluation_batches
from data.sources import Source, build_source, open_split, subset
from data.worker import BadImages
from data.worker_pool import LoaderError
from utils.config.schema import declare

CPU = torch.device("cpu")
BAD = {
    "empty.jpg": b"",
    "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
    "noise.png": bytes(range(256)) * 4,
}


@pytest.fixture
def broken_folder(image_folder: Path) -> Path:
    """Give the image folder with four unreadable files in its first class."""
    target = image_folder / "train" / "c0"
    for name, content in BAD.items():
        (target / name).write_bytes(content)
    whole = next(target.glob("*.JPEG")).read_bytes()
    (target / "truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    return image_folder


def epoch(source: Source, num_workers: int = 0, **options: float) -> list[Batch]:
    """Return two epochs of batches of all images."""
    recipe = build_recipe("moco_v2", 16)
    loader = GlobalLoader(
        source,
        recipe,
        global_batch=len(source),
        seed=1,
        device=CPU,
        num_workers=num_workers,
        **options,
    )
    return [batches[0] for _, batches in loader.from_step(0, 2)]


def test_bad_images_are_replaced_by_a_fixed_rule(broken_folder: Path) -> None:
    source = build_source("imagefolder", str(broken_folder), "train")
    first, again, workers = epoch(source), epoch(source), epoch(source, num_workers=2)
    bad = {i for i in range(len(source)) if Path(source.name(i)).suffix != ".JPEG"}
    assert len(bad) == 4
    for a, b, c in zip(first, again, workers, strict=True):
        assert not bad & set(a.indices.tolist())
        assert torch.equal(a.labels, source.labels[a.indices])
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.indices, c.indices)
        assert torch.equal(a.views[0], b.views[0])
        assert torch.equal(a.views[1], c.views[1])
    assert not torch.equal(
        first[0].indices.sort()[0], first[1].indices.sort()[0]
    )  # other replacements each epoch


def test_each_bad_image_is_reported_once_with_its_path(
    broken_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="synco"):
        epoch(build_source("imagefolder", str(broken_folder), "train"), num_workers=1)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    for name in [*BAD, "truncated.jpg"]:
        assert sum(name in message for message in messages) == 1


def test_a_file_that_vanishes_is_replaced(image_folder: Path) -> None:
    source = build_source("imagefolder", str(image_folder), "train")
    Path(source.name(3)).unlink()
    assert 3 not in epoch(source)[0].indices


def test_past_the_budget_the_run_stops(image_folder: Path) -> None:
    for number in range(11):
        (image_folder / "train" / "c0" / f"bad{number}.jpg").write_bytes(b"")
    source = build_source("imagefolder", str(image_folder), "train")
    with pytest.raises(
        BadImagesError, match=r"11 unreadable images .* at most 10 .* DATA.MAX_BAD_FRACTION"
    ):
        epoch(source)
    assert len(epoch(source, max_bad_fraction=0.5)) == 2


def test_budget_is_a_fraction_of_the_epoch_and_starts_anew_each_epoch() -> None:
    bad = BadImages(1e-2, seen=2000)

    def count(number: int, epoch: int) -> None:
        bad.count(epoch, [(f"file{number}", "reason")])

    for number in range(20):
        count(number, 0)
        count(number, 0)  # the same file again is no further bad image
    count(20, 1)
    for number in range(19):
        count(number, 1)
    with pytest.raises(BadImagesError, match="21 unreadable"):
        count(19, 1)


def test_nothing_but_bad_images_stops_at_once(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(BadImagesError, match="20 images in a row"):
        epoch(build_source("folder", str(tmp_path), "train"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_never_replaces(broken_folder: Path, num_workers: int) -> None:
    source = build_source("imagefolder", str(broken_folder), "train")
    bad = next(i for i in range(len(source)) if source.name(i).endswith("page.jpg"))
    with pytest.raises(BadImagesError, match=r"page\.jpg"):
        list(
            evaluation_batches(
                subset(source, [len(source) - 1, bad]),
                128,
                batch_size=2,
                device=CPU,
                num_workers=num_workers,
            )
        )


def _full(tensor: torch.Tensor) -> object:
    raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


class _Faulty(Source):
    """A source whose first image does something terrible to its worker."""

    def __init__(self, fault: str) -> None:
        super().__init__(torch.zeros(8, dtype=torch.int64), ["0"])
        self.fault = fault

    def load(self, index: int) -> torch.Tensor:
        """Die or hang."""
        import os
        import signal
        import time

        if index == 0 and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 0 and self.fault == "hung":
            time.sleep(60)
        if self.fault == "signalled":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.fault == "unsendable":
            ForkingPickler.register(torch.Tensor, _full)
        return torch.zeros((3, 8, 8), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", "lower DATA.NUM_WORKERS"),
        ("hung", "within DATA.TIMEOUT, 3 s: the storage is slow"),
        ("unsendable", "/dev/shm is full: enlarge it"),
    ],
)
def test_dead_and_hung_workers_give_a_clear_error(
    fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.worker_pool._PATIENCE", 0.5)
    recipe = build_recipe("linear", 8)
    loader = GlobalLoader(
        _Faulty(fault), recipe, global_batch=8, seed=0, device=CPU, num_workers=1, timeout=3
    )
    with pytest.raises(LoaderError, match=message):
        list(loader.from_step(0, 1))
    assert not multiprocessing.active_children()


def test_a_batch_that_cannot_be_sent_is_noticed_before_the_time_is_out() -> None:
    recipe = build_recipe("linear", 8)
    loader = GlobalLoader(
        _Faulty("unsendable"),
        recipe,
        global_batch=8,
        seed=0,
        device=CPU,
        num_workers=2,
        timeout=3600,
    )
    with pytest.raises(LoaderError, match="/dev/shm is full"):
        list(loader.from_step(0, 1))


def test_shared_memory_too_small_for_the_workers_is_refused_before_they_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data.worker_pool._SHM", "/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4 * 3 * 8 * 8 * 8))
    recipe = build_recipe("linear", 8)
    for workers, steps, fits in ((2, 9, True), (3, 9, False), (3, 4, True), (0, 9, True)):
        loader = GlobalLoader(
            _Faulty("none"), recipe, global_batch=8, seed=0, device=CPU, num_workers=workers
        )
        if fits:
            assert len(list(loader.from_step(0, steps))) == steps
        else:
            with pytest.raises(ValueError, match=r"^/ has .* MiB free.*DATA.NUM_WORKERS"):
                list(loader.from_step(0, steps))
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_is_one_line(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    source = build_source("folder", str(tmp_path), "train")
    loader = GlobalLoader(
        source, build_recipe("linear", 8), global_batch=5, seed=0, device=CPU, num_workers=1
    )
    with pytest.raises(BadImagesError, match=r"^20 images in a row cannot be read[^\n]*\Z"):
        list(loader.from_step(0, 1))


def test_workers_leave_termination_to_the_main_process() -> None:
    loader = GlobalLoader(
        _Faulty("signalled"),
        build_recipe("linear", 8),
        global_batch=8,
        seed=0,
        device=CPU,
        num_workers=2,
    )
    assert len(list(loader.from_step(0, 3))) == 3


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "bomb.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "bomb.png")
    source = build_source("folder", str(tmp_path), "train")
    source.max_pixels = 1000
    for index in range(2):
        with pytest.raises(ValueError, match=r"DATA\.MAX_PIXELS"):
            source.load(index)


def test_a_bank_leaves_unreadable_images_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(5):
        Image.new("RGB", (20, 20), (40 * index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    source = build_source("folder", str(tmp_path), "train")
    options = {"batch_size": 2, "device": torch.device("cpu")}
    batches = list(evaluation_batches(source, 16, skip_unreadable=True, **options))
    assert torch.cat([batch.indices for batch in batches]).tolist() == [0, 1, 3, 4]
    assert [len(batch.views[0]) for batch in batches] == [2, 1, 1]
    assert "2.png" in caplog.text
    with pytest.raises(BadImagesError, match=r"2\.png"):
        list(evaluation_batches(source, 16, **options))


def test_no_batch_is_empty(image_folder: Path) -> None:
    """Swin takes no empty batch, and the last batch of a bank may hold nothing that can be read."""
    source = build_source("imagefolder", str(image_folder), "train")
    for index in (4, 5, 11):
        Path(source.name(index)).write_bytes(b"no image")
    batches = list(evaluation_batches(source, 16, skip_unreadable=True, batch_size=2, device=CPU))
    assert [len(batch.views[0]) for batch in batches] == [2, 2, 2, 2, 1]


def test_deep_images_are_named_and_replaced(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    deep = image_folder / "train" / "c0" / "deep.png"
    Image.fromarray(levels).save(deep)
    source = build_source("imagefolder", str(image_folder), "train")
    number = [source.name(index) for index in range(len(source))].index(str(deep))
    assert all(number not in batch.indices for batch in epoch(source))
    reason = (
        "16-bit image (mode I;16) is not supported; convert to 8 bit or, where the program has "
        "the key, set DATA.RANGE"
    )
    assert f"unreadable image replaced: {deep} (ValueError: {reason})" in caplog.messages
    with pytest.raises(BadImagesError, match=r"deep\.png: ValueError: 16-bit image"):
        list(evaluation_batches(source, 16, batch_size=2, device=CPU))


def test_images_above_max_pixels_are_named_and_replaced(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = image_folder / "train" / "c0" / "large.jpg"
    Image.new("RGB", (400, 300)).save(large)
    defaults = declare({}).defaults().DATA
    defaults.merge_from_list(["PATH", str(image_folder), "INDEX_CACHE", "off"])
    number = [p.name for p in sorted(large.parent.iterdir())].index("large.jpg")
    for limit, refused in ((400 * 300, False), (400 * 300 - 1, True)):
        defaults.MAX_PIXELS = limit
        source = open_split(defaults, "train")
        seen = torch.cat([batch.indices for batch in epoch(subset(source, range(len(source))))])
        assert (number not in seen) == refused
    assert caplog.text.count("400 x 300 pixels are more than DATA.MAX_PIXELS (119999)") == 1


def test_more_workers_than_cores_are_named_once_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = []
    worker_pool._warn_of_few_cores.cache_clear()
    for workers in (1, 2, 2):
        loader = GlobalLoader(
            _Faulty("none"), build_recipe("linear", 8), global_batch=8, seed=0, device=CPU,
            num_workers=workers,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as torchs:
            warnings.simplefilter("always")
            assert len(list(loader.from_step(0, 1))) == 1
        said.append([record.getMessage() for record in caplog.records])
        assert not [found for found in torchs if "DataLoader" in str(found.message)]
    assert said[0] == []
    assert said[1] == said[2] == ["4 loader workers share 2 cores; --workers 1 starts one for each"]
