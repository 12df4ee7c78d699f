"""Packing: the same bytes however often it is killed, and nothing that looks finished before it is."""

import errno
import functools
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.sources import build_source
from data.sources.packed import PackedSource
from tests import forked
from tools import pack
from tools.parts import packing

COUNT = 13


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Give 13 noisy JPEGs in two classes, one of them small, and a PNG."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = (
            tmp_path
            / "train"
            / f"c{number % 2}"
            / f"{number:02d}.{'png' if number == 4 else 'jpg'}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (20, 24, 3) if number == 7 else (48 + number, 70 - number, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)
    return tmp_path


def arguments(root: Path, output: Path, *flags: str) -> list[str]:
    return ["--data-path", str(root), "--output", str(output), "--workers", "0", *flags]


def packed(root: Path, *flags: str) -> bytes:
    output = root / "whole" / "train.pack"
    assert pack.main(arguments(root, output, *flags)) == 0
    content = output.read_bytes()
    assert os.listdir(output.parent) == ["train.pack"]
    output.unlink()
    return content


# ---- what is stored ------------------------------------------------------------------------------


def resized(width: int, height: int) -> tuple[int, int]:
    return (32, int(32 * height / width)) if width < height else (int(32 * width / height), 32)


def test_larger_images_are_resized_as_pil_does_and_smaller_ones_kept(images: Path) -> None:
    output = images / "p" / "train.pack"
    assert pack.main(arguments(images, output, "--short-side", "32", "--quality", "90")) == 0
    source, folder = PackedSource(output), build_source("imagefolder", str(images), "train")
    kept = 0
    for i in range(COUNT):
        original = Image.open(folder.name(i)).convert("RGB")
        if min(original.size) <= 32:
            kept += 1
            assert source.encoded(i) == folder.encoded(i)
            continue
        width, height = original.size
        expected = original.resize(resized(width, height), Image.Resampling.BICUBIC)
        assert source.load(i).shape == (3, expected.height, expected.width)
        assert source.index.sizes[i].tolist() == [expected.height, expected.width]
        stored = images / "stored.jpg"
        expected.save(stored, quality=90)
        assert source.encoded(i) == stored.read_bytes()
    assert kept == 1


def test_raw_packs_hold_the_resized_pixels(images: Path) -> None:
    output = images / "p" / "train.pack"
    assert pack.main(arguments(images, output, "--short-side", "32", "--raw")) == 0
    source, folder = PackedSource(output), build_source("imagefolder", str(images), "train")
    for i in range(COUNT):
        original = Image.open(folder.name(i)).convert("RGB")
        width, height = original.size
        if min(width, height) > 32:
            original = original.resize(resized(width, height), Image.Resampling.BICUBIC)
        assert torch.equal(source.load(i).permute(1, 2, 0), torch.from_numpy(np.array(original)))


def test_workers_change_nothing(images: Path) -> None:
    whole = packed(images, "--short-side", "32")
    assert packed(images, "--short-side", "32", "--workers", "2") == whole


def test_pixels_are_not_stored_as_jpegs_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "digits.pack"
    assert (
        pack.main(
            ["--dataset", "digits", "--split", "val", "--output", str(output), "--workers", "0"]
        )
        == 2
    )
    assert "add --raw" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
    digits = ["--dataset", "digits", "--split", "val", "--output", str(output), "--workers", "0"]
    assert pack.main([*digits, "--raw"]) == 0
    again = ["--dataset", "packed", "--data-path", str(output), "--split", "val", "--workers", "0"]
    assert pack.main([*again, "--output", str(tmp_path / "again.pack")]) == 2
    assert "add --raw" in capsys.readouterr().err


# ---- unreadable images ---------------------------------------------------------------------------


def test_an_unreadable_image_is_refused_or_left_out_by_name(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = images / "train" / "c0" / "04.png"
    good = bad.read_bytes()
    whole = packed(images)
    bad.write_bytes(b"<html>404</html>")
    output = images / "p" / "train.pack"
    capsys.readouterr()
    assert pack.main(arguments(images, output)) == 2
    error = capsys.readouterr().err
    assert f"cannot read {bad}: OSError: not an image" in error
    assert "--skip-unreadable" in error
    assert not output.exists()
    assert pack.main(arguments(images, output, "--skip-unreadable")) == 0
    assert f"left out, unreadable: {bad}" in capsys.readouterr().out
    source = PackedSource(output)
    folder = build_source("imagefolder", str(images), "train")
    kept = [i for i in range(COUNT) if folder.name(i) != str(bad)]
    assert [source.encoded(i) for i in range(COUNT - 1)] == [folder.encoded(i) for i in kept]
    assert source.labels.tolist() == folder.labels[kept].tolist()
    assert source.header["skipped"] == [str(bad)]
    assert pack.main(arguments(images, output, "--skip-unreadable")) == 0
    assert f"is complete\nleft out, unreadable: {bad}" in capsys.readouterr().out
    assert pack.main(arguments(images, output)) == 2
    assert "lacks 1 unreadable images" in capsys.readouterr().err
    bad.write_bytes(good)  # mended: the pack without it is not made the whole one
    assert pack.main(arguments(images, output, "--skip-unreadable")) == 2
    assert "was packed otherwise (content" in capsys.readouterr().err
    output.unlink()
    assert packed(images) == whole


def test_after_a_repair_the_stopped_command_goes_on(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = images / "train" / "c0" / "04.png"
    good, whole = bad.read_bytes(), packed(images)
    bad.write_bytes(good[:200])
    output = images / "p" / "train.pack"
    assert pack.main(arguments(images, output)) == 2
    bad.write_bytes(good)
    assert pack.main(arguments(images, output)) == 0, capsys.readouterr().err
    assert output.read_bytes() == whole


def test_what_was_begun_leaving_images_out_is_not_finished_as_if_whole(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = images / "p" / "train.pack"
    (images / "train" / "c0" / "00.jpg").write_bytes(b"")
    monkeypatch.setattr(packing.Partial, "close_file", stop)
    assert pack.main(arguments(images, output, "--skip-unreadable")) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert pack.main(arguments(images, output)) == 2
    assert "was begun with --skip-unreadable" in capsys.readouterr().err
    assert pack.main(arguments(images, output, "--skip-unreadable")) == 0


def stop(*args: object) -> None:
    raise KeyboardInterrupt


# ---- killed at any instant -----------------------------------------------------------------------


def commit_often(_rank: int = 0) -> None:
    packing._COMMIT_BYTES = 6000


def kill_at(rank: int, *, call: int, after: bool) -> None:
    """Arrange for a SIGKILL before or after a numbered step that reaches the disk."""
    commit_often()
    count = 0

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            mine = count  # steps contain steps
            if mine == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            value = original(*args, **kwargs)
            if mine == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        setattr(owner, name, wrapper)

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (packing.Partial, "add")):
        wrap(owner, name)


def kill_and_go_on(images: Path, whole: bytes, call: int, after: bool) -> tuple[bool, bool]:
    """Kill at a step and give the command again; tell whether it was killed, and whether it had finished."""
    output = images / f"p{call}{after}" / "train.pack"
    argv = arguments(images, output, "--short-side", "40")
    prepare = functools.partial(kill_at, call=call, after=after)
    (code,) = forked.run("tools.pack", argv, images / f"log{call}{after}", prepare=prepare)
    if code == 0:
        return False, True
    assert code == -signal.SIGKILL
    finished = output.exists()
    if finished:
        assert output.read_bytes() == whole
    assert pack.main(argv) == 0
    assert output.read_bytes() == whole
    assert os.listdir(output.parent) == ["train.pack"]
    return True, finished


def test_killed_at_some_steps_it_ends_with_the_same_bytes(images: Path) -> None:
    whole = packed(images, "--short-side", "40")
    assert all(
        kill_and_go_on(images, whole, call, call % 2 == 0)[0] for call in (1, 4, 9, 12, 17, 22, 25)
    )


@pytest.mark.slow
def test_killed_at_every_step_it_ends_with_the_same_bytes(images: Path) -> None:
    whole = packed(images, "--short-side", "40")
    for after in (False, True):
        seen = []
        for call in range(1, 200):
            killed, finished = kill_and_go_on(images, whole, call, after)
            if not killed:
                break
            seen.append(finished)
        assert len(seen) > 25
        assert sum(seen) >= 2  # between the rename and the end


def test_killed_again_and_again_with_workers(images: Path) -> None:
    whole = packed(images, "--short-side", "40")
    output = images / "p" / "train.pack"
    argv = arguments(images, output, "--short-side", "40", "--workers", "2")
    for call in (5, 9, 14):
        prepare = functools.partial(kill_at, call=call, after=True)
        assert forked.run("tools.pack", argv, images / f"log{call}", prepare=prepare) == [
            -signal.SIGKILL
        ]
        assert not output.exists()
    assert forked.run("tools.pack", argv, images / "log") == [0]
    assert "going on after" in (images / "log.0").read_text()
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    "spoil", [lambda c: c[:-5], lambda c: c + bytes(64), lambda c: c + b"\1" * 20]
)
def test_a_torn_journal_costs_only_its_end(
    images: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
) -> None:
    whole = packed(images)
    output = images / "p" / "train.pack"
    monkeypatch.setattr(packing, "_COMMIT_BYTES", 6000)
    monkeypatch.setattr(packing.Partial, "close_file", stop)
    assert pack.main(arguments(images, output)) == 130
    journal = packing.Partial.journal_of(output)
    journal.write_bytes(spoil(journal.read_bytes()))
    with output.with_name("train.pack.partial").open("ab") as file:
        file.write(b"more than the journal knows")
    monkeypatch.undo()
    assert pack.main(arguments(images, output)) == 0
    assert output.read_bytes() == whole


def test_records_that_the_disk_lost_are_packed_again(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packed(images)
    output = images / "p" / "train.pack"
    monkeypatch.setattr(packing.Partial, "close_file", stop)
    assert pack.main(arguments(images, output)) == 130
    monkeypatch.undo()
    os.truncate(output.with_name("train.pack.partial"), len(whole) // 2)
    assert pack.main(arguments(images, output)) == 0
    assert output.read_bytes() == whole


def test_other_settings_do_not_go_on(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = images / "p" / "train.pack"
    monkeypatch.setattr(packing.Partial, "close_file", stop)
    assert pack.main(arguments(images, output, "--short-side", "40")) == 130
    monkeypatch.undo()
    for flags, reason in (
        (["--short-side", "32"], "short_side: 40, now 32"),
        (["--short-side", "40", "--quality", "80"], "quality: 95, now 80"),
        (["--short-side", "40", "--raw"], "raw: False, now True"),
    ):
        assert pack.main(arguments(images, output, *flags)) == 2
        assert f"was begun otherwise ({reason}" in capsys.readouterr().err
    (images / "train" / "c0" / "zz.jpg").write_bytes(
        (images / "train" / "c0" / "00.jpg").read_bytes()
    )
    assert pack.main(arguments(images, output, "--short-side", "40")) == 2
    assert "source: '13:" in capsys.readouterr().err
    (images / "train" / "c0" / "zz.jpg").unlink()
    assert pack.main(arguments(images, output, "--short-side", "40")) == 0
    assert pack.main(arguments(images, output, "--short-side", "40")) == 0  # complete
    assert pack.main(arguments(images, output)) == 2
    assert "exists and was packed otherwise (short_side: 40, now 0" in capsys.readouterr().err


def open_and_wait(rank: int, *, output: Path) -> None:
    """Hold a pack in the making, and say so."""
    held = packing.Partial.open(output, {}, 3, skip=False)
    print("holding", flush=True)
    signal.pause()
    held.close()


def test_two_processes_do_not_write_one_pack(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = images / "p" / "train.pack"
    output.parent.mkdir()
    prepare = functools.partial(open_and_wait, output=output)
    (job,) = forked.start("tools.pack", ["--output", str(output)], images / "log", prepare=prepare)
    job.wait_for("holding")
    assert pack.main(arguments(images, output)) == 2
    assert "is being written by another process" in capsys.readouterr().err
    job.send(signal.SIGKILL)
    job.wait()
    assert pack.main(arguments(images, output)) == 0


# ---- the disk ------------------------------------------------------------------------------------


def small_files(_rank: int, *, size: int) -> None:
    """Let no file grow past ``size`` bytes, as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_full_disk_is_an_error_and_the_command_goes_on(images: Path, share: float) -> None:
    whole = packed(images)
    output = images / "p" / "train.pack"
    prepare = functools.partial(small_files, size=int(share * len(whole)))
    assert forked.run("tools.pack", arguments(images, output), images / "log", prepare=prepare) == [
        2
    ]
    text = (images / "log.0").read_text()
    assert f"[Errno {errno.EFBIG}]" in text
    assert "the same command goes on" in text
    assert "Traceback" not in text
    assert not output.exists()
    assert pack.main(arguments(images, output)) == 0
    assert output.read_bytes() == whole


def test_a_pack_that_reads_back_otherwise_is_not_committed(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = images / "p" / "train.pack"
    close_file = packing.Partial.close_file

    def rot(partial: packing.Partial, *args: Any) -> None:
        close_file(partial, *args)
        partial.data.seek(5000)
        partial.data.write(b"rot")
        partial.data.flush()

    monkeypatch.setattr(packing.Partial, "close_file", rot)
    assert pack.main(arguments(images, output)) == 2
    assert "damaged record" in capsys.readouterr().err
    assert not output.exists()


def test_verify_reads_everything(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = images / "p" / "train.pack"
    assert pack.main(arguments(images, output)) == 0
    assert pack.main(["--verify", "--output", str(output)]) == 0
    content = bytearray(output.read_bytes())
    content[int(PackedSource(output).index.offsets[COUNT]) - 1] ^= 128
    output.write_bytes(content)
    assert pack.main(["--verify", "--output", str(output)]) == 2
    assert "damaged record" in capsys.readouterr().err
    output.write_bytes(content[:-1])
    assert pack.main(["--verify", "--output", str(output)]) == 2
    assert "was cut or damaged" in capsys.readouterr().err
