"""When one process fails, torchrun sends SIGTERM to the others: the reason must survive that."""

import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch


def not_finite(rank: int) -> None:
    """Make the gradient of step 4 NaN; to keep the batch takes longer than an exit."""
    import engine.loop
    from engine import replay

    update, write_file = engine.loop.update, replay.write_file

    def spoilt(state: Any, *args: Any) -> Any:
        if state.step == 4:
            for parameter in state.model.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan)
        return update(state, *args)

    def slowly(*args: Any) -> Any:
        time.sleep(2.0)
        return write_file(*args)

    engine.loop.update, replay.write_file = spoilt, slowly


def slow_to_stop(rank: int) -> None:
    """Signal all ranks at step 5; the save and the status of rank 0 take longer than an exit."""
    from engine import run
    from utils.checkpoints import file as checkpoint

    runs.at_step(5, lambda: runs.send_self(signal.SIGTERM))
    save, write_text = checkpoint.save, run.write_text

    def slow_save(folder: Path, step: int, *args: Any, **keys: Any) -> Any:
        time.sleep(3.5 * (step == 6))
        return save(folder, step, *args, **keys)

    def slow_write(path: Path, text: str) -> None:
        time.sleep(1.5 * ('"preempted"' in text))
        write_text(path, text)

    checkpoint.save, run.write_text = slow_save, slow_write


def other_images(rank: int, root: Path, more: int) -> None:
    """Let rank 1 list the images after `more` have been copied."""
    import main_pretrain

    opened = main_pretrain.open_split

    def late(*args: Any, **keys: Any) -> Any:
        if rank == 1:
            time.sleep(2.0)
            image = next((root / "train" / "blue").iterdir())
            for number in range(more):
                shutil.copy(image, image.parent / f"a{number}.png")
        return opened(*args, **keys)

    main_pretrain.open_split = late


def no_data(rank: int) -> None:
    """Rank 1 cannot open its data while rank 0 is busy with its own."""
    import main_pretrain

    opened = main_pretrain.open_split

    def fails(*args: Any, **keys: Any) -> Any:
        if rank == 1:
            raise ValueError("DATA.PATH: not on this machine")
        for _ in range(100):  # one sleep would be over before the signal's handler is called
            time.sleep(0.1)
        return opened(*args, **keys)

    main_pretrain.open_split = fails


def signalled_when_running(rank: int) -> None:
    """Send SIGTERM as soon as the status is `running`, before the first step."""
    from engine.run import Run

    finish = Run.finish

    def signalled(self: Run, state: str, *args: Any) -> None:
        finish(self, state, *args)
        if state == "running":
            runs.send_self(signal.SIGTERM)

    Run.finish = signalled  # type: ignore[method-assign]


def signalled_worker(rank: int) -> None:
    """Send SIGTERM to the process and to its worker while that starts."""
    from data import worker_pool

    prepare = worker_pool._init_worker

    def signalled(worker: int) -> None:
        if worker == 1:
            os.kill(os.getppid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        prepare(worker)

    worker_pool._init_worker = signalled


def start(tmp_path: Path, prepare: Any, ranks: int = 2, **keys: Any) -> tuple[list[int], list[str]]:
    """Run under the stand-in for torchrun; return the exit codes and what each rank printed."""
    argv = runs.arguments("moco_v2", tmp_path, "t", world=ranks, **keys)
    log = tmp_path / "log"
    jobs = forked.start("main_pretrain", argv, log, ranks=ranks, prepare=prepare)
    return forked.as_torchrun(jobs), [job.text() for job in jobs]


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "moco_v2" / "t"


def images(root: Path, **keys: Any) -> dict[str, Any]:
    return {"DATA__DATASET": "folder", "DATA__PATH": str(root), "DATA__IMG_SIZE": 16, **keys}


def test_a_gradient_that_is_not_finite_is_kept_and_told(tmp_path: Path) -> None:
    codes, texts = start(tmp_path, not_finite)
    assert codes == [3, 3], texts
    assert "--replay" in texts[0]
    assert (folder_of(tmp_path) / "nonfinite_00000004.pt").is_file()
    assert runs.outcome(folder_of(tmp_path))[0] == "failed"


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    codes, texts = start(tmp_path, partial(runs.kill_at, step=5, ranks=(1,)))
    assert codes == [5, -signal.SIGKILL], texts
    assert "no answer from rank 1, which began step 5" in texts[0]
    assert runs.outcome(folder_of(tmp_path))[0] == "failed"


def test_a_slow_disk_does_not_turn_a_preemption_into_a_failure(tmp_path: Path) -> None:
    codes, texts = start(tmp_path, slow_to_stop)
    assert codes == [75, 75], texts
    assert runs.outcome(folder_of(tmp_path))[:2] == ("preempted", 6)


def test_an_error_of_another_rank_before_training_is_no_preemption(tmp_path: Path) -> None:
    codes, texts = start(tmp_path, no_data)
    assert codes == [5, 2], texts
    assert "error (rank 1): DATA.PATH: not on this machine" in texts[1]
    state, _, reason = runs.outcome(folder_of(tmp_path))
    assert (state, reason) == ("failed", "DATA.PATH: not on this machine")


@pytest.mark.parametrize("more", [2, 16])
def test_processes_that_see_different_images_are_refused(more: int, tmp_path: Path) -> None:
    root = runs.image_folder(tmp_path / "images")
    keys = images(root / "train", DATA__INDEX_CACHE="off", TRAIN__BATCH_SIZE=4)
    codes, texts = start(tmp_path, partial(other_images, root=root, more=more), **keys)
    assert codes[0] == 2, texts
    assert "rank 0 sees 48:" in texts[0]
    assert f"rank 1 sees {48 + more}:" in texts[0]
    assert "error" not in texts[1]


@pytest.mark.parametrize("prepare", [signalled_when_running, signalled_worker])
def test_a_signal_at_the_start_of_training_saves(prepare: Any, tmp_path: Path) -> None:
    root = runs.image_folder(tmp_path / "images")
    keys = images(root, DATA__NUM_WORKERS=2, TRAIN__BATCH_SIZE=8)
    codes, texts = start(tmp_path, prepare, ranks=1, **keys)
    assert codes == [75], texts
    assert runs.outcome(folder_of(tmp_path))[0] == "preempted"
    assert runs.steps_saved(folder_of(tmp_path))
