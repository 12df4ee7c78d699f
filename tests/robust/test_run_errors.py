"""Whatever goes wrong in a run: one clear line, the right exit code, no traceback, no hang, nothing lost."""

import multiprocessing
import re
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch
from figures import figure
from torch import Tensor

from utils.checkpoints import file as checkpoint


def assert_fails(
    code: int,
    argv: list[str],
    message: str,
    tmp_path: Path,
    *,
    main: str = "main_pretrain",
    ranks: int = 1,
    prepare: Callable[[int], None] | None = None,
    everywhere: bool = True,
) -> list[str]:
    """Run to its failure; return the error lines of all ranks, of which the first must match ``message``.

    With ``everywhere`` every rank has to leave with ``code``; else one, and the others with 5 (lost
    it).
    """
    jobs = forked.start(main, argv, tmp_path / "log", ranks=ranks, prepare=prepare)
    codes = [job.wait() for job in jobs]
    text = "\n".join(job.text() for job in jobs)
    if everywhere:
        assert codes == [code] * ranks, text
    else:
        assert code in codes, text
        assert set(codes) <= {code, 5}, text
    assert "Traceback" not in text
    lines = [line for job in jobs for line in job.text().splitlines() if line.startswith("error")]
    assert any(re.search(message, line) for line in lines), text
    for job in jobs:
        assert len(re.findall("^error", job.text(), re.MULTILINE)) <= 1, text
    return lines


def finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(finite(item) for item in value.values())
    return all(finite(item) for item in value) if isinstance(value, list) else True


# ---- input ---------------------------------------------------------------------------------------

BAD_INPUT: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "path": (
        ["--data-path", "/no/such"],
        {"DATA__DATASET": "imagefolder"},
        r"--data-path\).*'/no/such'",
    ),
    "no path": ([], {"DATA__DATASET": "imagefolder"}, r"--data-path\) is empty"),
    "data set": ([], {"DATA__DATASET": "digitz"}, r"DATA.DATASET.*digitz.*digits"),
    "key": ([], {"TRAIN__EPOCSH": 1}, r"TRAIN.EPOCSH.*TRAIN.EPOCHS"),
    "value": ([], {"TRAIN__EPOCHS": "many"}, r"TRAIN.EPOCHS.*many"),
    "method": ([], {"MODEL__NAME": "mocco"}, r"MODEL.NAME.*mocco.*moco_v2"),
    "backbone": (
        [],
        {"MODEL__BACKBONE__NAME": "resnet9"},
        r"MODEL.BACKBONE.NAME.*resnet9.*resnet8",
    ),
    "recipe": ([], {"AUG__RECIPE": "mocov2"}, r"AUG.RECIPE.*mocov2.*moco_v2"),
    "batch": ([], {"TRAIN__BATCH_SIZE": 5000}, r"1438 images.*TRAIN.BATCH_SIZE"),
    "queue": ([], {"MODEL__MOBY__QUEUE_SIZE": 500}, r"QUEUE_SIZE: 500.*512"),
    "graphs": (
        [],
        {"TRAIN__CUDA_GRAPHS": True, "TRAIN__ACCUMULATION_STEPS": 2},
        r"TRAIN.CUDA_GRAPHS.*TRAIN.ACCUMULATION_STEPS",
    ),
    "bf16": ([], {"TRAIN__PRECISION": "bf16"}, r"TRAIN.PRECISION: bf16 on a CPU.*--precision fp32"),
    "file": (["--cfg", "/no/such.yaml"], {}, r"/no/such.yaml: cannot be read.*--list recipes"),
    "python file": (["--cfg", __file__], {}, r"\.yaml file"),
    "flag": (["--epoch", "3"], {}, r"--epoch.*--epochs"),
    "device": (["--device", "tpu"], {}, r"DEVICE.*tpu"),
    "eval": (["--eval"], {}, r"--eval.*holds no checkpoint"),
    "resume": (["--resume", "/no/such.pt"], {}, r"/no/such.pt: no such file"),
    "tag": (["--tag", "../up"], {}, r"TAG.*\.\./up"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, tmp_path: Path) -> None:
    flags, keys, message = BAD_INPUT[case]
    argv = runs.arguments("moby", tmp_path, "t", *flags, **keys)
    (line,) = assert_fails(2, argv, message, tmp_path)
    assert line.startswith("error: ")


@pytest.mark.parametrize("case", ["path", "key", "queue", "eval", "resume"])
def test_bad_input_on_two_ranks(case: str, tmp_path: Path) -> None:
    flags, keys, message = BAD_INPUT[case]
    argv = runs.arguments("moby", tmp_path, "t", *flags, world=2, **keys)
    assert_fails(2, argv, message, tmp_path, ranks=2)


def test_a_probe_without_weights(tmp_path: Path) -> None:
    argv = runs.arguments("moby", tmp_path, "t")
    assert_fails(2, argv, "holds no checkpoint.*--pretrained", tmp_path, main="main_linear")
    text = tmp_path / "weights.pth"
    text.write_text("not weights")
    argv = runs.arguments("moby", tmp_path, "t", "--pretrained", str(text))
    assert_fails(2, argv, "weights.pth is no file of weights", tmp_path, main="main_linear")


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    argv = runs.arguments("moby", tmp_path / "file", "t")
    for ranks in (1, 2):
        (line,) = assert_fails(2, argv, "--output: .* cannot be written", tmp_path, ranks=ranks)
        assert line.startswith("error: ")


# ---- images --------------------------------------------------------------------------------------


def folder_arguments(tmp_path: Path, bad: int, **options: Any) -> list[str]:
    """Return the command line of a run on 48 images of which ``bad`` cannot be decoded."""
    data = runs.image_folder(tmp_path / "images")
    for path in sorted((data / "train").rglob("*.png"))[:bad]:
        path.write_bytes(b"<html>not an image</html>")
    keys = {"DATA__DATASET": "imagefolder", "DATA__PATH": str(data), "AUG__RECIPE": "moco_v2"}
    return runs.arguments("byol", tmp_path, "t", **keys, **{"TRAIN__BATCH_SIZE": 8, **options})


def test_a_few_corrupt_images_are_replaced_and_named(tmp_path: Path) -> None:
    (job,) = forked.start("main_pretrain", folder_arguments(tmp_path, 2), tmp_path / "log")
    assert job.wait() == 0
    named = {
        Path(name).name for name in re.findall(r"unreadable image replaced: (\S+) ", job.text())
    }
    assert named == {"000.png", "002.png"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_corrupt_images_stop_the_run(tmp_path: Path, ranks: int) -> None:
    argv = folder_arguments(tmp_path, 40, TRAIN__BATCH_SIZE=8 if ranks == 1 else 24)
    message = "unreadable images in epoch 0.*DATA.MAX_BAD_FRACTION"
    assert_fails(2, argv, message, tmp_path, ranks=ranks, everywhere=False)
    assert runs.status(tmp_path / "byol" / "t")["state"] != "done"


def kill_a_worker(rank: int) -> None:
    def kill() -> None:
        for child in multiprocessing.active_children():
            child.kill()

    runs.at_step(1, kill)


def test_a_dead_loader_worker(tmp_path: Path) -> None:
    argv = folder_arguments(tmp_path, 0, DATA__NUM_WORKERS=1, TRAIN__EPOCHS=20)
    assert_fails(
        5, argv, "a data loader worker failed.*NUM_WORKERS", tmp_path, prepare=kill_a_worker
    )


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the output root of a finished run moby/t."""
    output = tmp_path_factory.mktemp("trained")
    assert forked.run("main_pretrain", runs.arguments("moby", output, "t"), output / "log") == [0]
    return output


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"OPTIM__BASE_LR": 0.5}, r"OPTIM.BASE_LR: 0.03 -> 0.5.*--tag"),
        ({"SEED": 1}, r"SEED: 0 -> 1"),
        ({"TRAIN__BATCH_SIZE": 256}, r"global batch of 128.*--batch-size"),
        ({"DATA__DATASET": "mnist5k"}, r"DATA.DATASET: 'digits' -> 'mnist5k'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    trained: Path, tmp_path: Path, keys: dict[str, Any], message: str, ranks: int
) -> None:
    before = runs.digest(trained / "moby" / "t")
    argv = runs.arguments("moby", trained, "t", world=ranks, **keys)
    (line,) = assert_fails(2, argv, message, tmp_path, ranks=ranks)
    assert line.startswith("error: ")
    assert runs.digest(trained / "moby" / "t") == before


def test_a_changed_data_set_is_refused(tmp_path: Path) -> None:
    argv = folder_arguments(tmp_path, 0)
    assert forked.run("main_pretrain", argv, tmp_path / "log") == [0]
    image, *_ = sorted((tmp_path / "images" / "train").rglob("*.png"))
    other, content = image.with_name("zzz.png"), image.read_bytes()
    changes: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "renamed": (lambda: image.rename(other), lambda: other.rename(image)),
        "added": (lambda: other.write_bytes(content), other.unlink),
        "removed": (image.unlink, lambda: image.write_bytes(content)),
    }
    for change, (do, undo) in changes.items():
        do()
        (line,) = assert_fails(
            2, argv, "was trained on other data.*added, removed or renamed", tmp_path
        )
        assert line.startswith("error: ")
        undo()
        figure(f"data set with a file {change}", "refused")
    assert forked.run("main_pretrain", argv, tmp_path / "log") == [0]


def test_a_text_file_is_no_checkpoint(trained: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("loss went down")
    argv = runs.arguments("moby", tmp_path, "t", "--resume", str(text))
    assert_fails(2, argv, "notes.txt is no file of weights", tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    argv = runs.arguments("moby", tmp_path, "t", "--resume", str(tmp_path / "other.pth"))
    assert_fails(2, argv, "other.pth is no checkpoint of such a run", tmp_path)


def test_only_damaged_checkpoints_stop_the_run(tmp_path: Path) -> None:
    argv = runs.arguments("moby", tmp_path, "t")
    fault = partial(runs.kill_at, step=4)
    assert forked.run("main_pretrain", argv, tmp_path / "log", prepare=fault) == [-signal.SIGKILL]
    path = tmp_path / "moby" / "t" / "ckpt_00000003.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert_fails(2, argv, "none valid; not starting afresh silently", tmp_path)


def load_fails_on_rank_1(rank: int) -> None:
    def refuse(path: Path) -> dict[str, Any]:
        raise checkpoint.CheckpointError(f"{path}: no such file; check the path of the checkpoint")

    if rank == 1:
        checkpoint.load = refuse


def test_a_rank_that_cannot_see_the_checkpoint_stops_all_and_is_named(
    trained: Path, tmp_path: Path
) -> None:
    argv = runs.arguments("moby", trained, "t", world=2)
    (line,) = assert_fails(2, argv, "no such file", tmp_path, ranks=2, prepare=load_fails_on_rank_1)
    assert line.startswith("error (rank 1): ")


# ---- the folder ----------------------------------------------------------------------------------


def wait_for_file(rank: int, *, path: Path) -> None:
    def wait() -> None:
        end = time.monotonic() + forked.LIMIT
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.01)

    runs.at_step(4, wait)


def test_one_folder_one_run(tmp_path: Path) -> None:
    argv, gate = runs.arguments("moby", tmp_path, "t"), tmp_path / "gate"
    fault = partial(wait_for_file, path=gate)
    (first,) = forked.start("main_pretrain", argv, tmp_path / "first", prepare=fault)
    first.wait_for("step 4/11")
    (line,) = assert_fails(2, argv, "another run is using .*/moby/t.*--tag", tmp_path)
    assert line.startswith("error: ")
    assert runs.status(tmp_path / "moby" / "t")["state"] == "running"
    first.send(signal.SIGKILL)  # the kernel gives the lock back
    assert first.wait() == -signal.SIGKILL
    (third,) = forked.start("main_pretrain", argv, tmp_path / "third")
    assert third.wait() == 0
    assert runs.resumed_at(third.text()) == 3
    figure("second job in the folder", "refused")
    figure("third job, after a SIGKILL of the first", "resumed")


# ---- numbers -------------------------------------------------------------------------------------


def poison_loss(
    rank: int, *, step: int, ranks: tuple[int, ...] = (0, 1), value: float = float("nan")
) -> None:
    """Multiply the loss by ``value`` from ``step`` on."""
    from engine import loop as engine

    original = engine.forward_and_backward

    def wrapper(state: Any, batches: Any, function: Any, progress: Any) -> Any:
        def poisoned(batch: Any, where: Any) -> Any:
            out = function(batch, where)
            return {**out, "loss": out["loss"] * value} if where.step >= step else out

        return original(state, batches, poisoned, progress)

    if rank in ranks:
        engine.forward_and_backward = wrapper


def poison_the_last_step_as_on_a_gpu(rank: int, *, step: int) -> None:
    """Let the loss of ``step`` be NaN, and the guard read the norm of a step one step late."""
    from engine.guards import FiniteGuard

    poison_loss(rank, step=step)

    def check(self: Any, norm: Any, *about: Any) -> None:
        self.flush()
        self._pending = (norm, *about)

    FiniteGuard.check = check  # type: ignore[method-assign]


def test_a_spoilt_network_is_not_evaluated(tmp_path: Path) -> None:
    keys = {"CHECKPOINT__EVERY_STEPS": 0, "CHECKPOINT__EVERY_EPOCHS": 2, "KNN__EVERY_EPOCHS": 1}
    argv = runs.arguments("moco_v2", tmp_path, "t", TRAIN__EPOCHS=2, **keys)
    fault = partial(poison_the_last_step_as_on_a_gpu, step=runs.STEPS - 1)
    said = f"step {runs.STEPS - 1}: the gradient norm is"
    assert_fails(3, argv, said, tmp_path, prepare=fault)
    assert "knn" not in (tmp_path / "moco_v2" / "t" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, ranks: int, value: float
) -> None:
    argv, folder = runs.arguments("moby", tmp_path, "t", world=ranks), tmp_path / "moby" / "t"
    fault = partial(poison_loss, step=5, ranks=(ranks - 1,), value=value)
    lines = assert_fails(
        3, argv, "step 5: the gradient norm is", tmp_path, ranks=ranks, prepare=fault
    )
    assert all("OPTIM.BASE_LR" in line for line in lines)
    assert runs.status(folder)["state"] == "failed"
    assert runs.status(folder)["step"] == 5
    state = runs.final_state(folder)
    assert state["step"] == 3
    assert finite(state)


def test_a_loss_scale_that_never_recovers_stops_the_run(tmp_path: Path) -> None:
    argv = runs.arguments("moco_v2", tmp_path, "t", TRAIN__PRECISION="fp16", TRAIN__EPOCHS=4)
    fault = partial(poison_loss, step=4)
    assert_fails(3, argv, "step 24: .* for the 21th step in a row", tmp_path, prepare=fault)
    state = runs.final_state(tmp_path / "moco_v2" / "t")
    assert finite(state)
    assert state["scaler"]["scale"] < 1


# ---- resources -----------------------------------------------------------------------------------


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def disk_full_between(rank: int, *, first: int, last: int) -> None:
    """Let no file grow beyond some bytes from step ``first`` to step ``last``."""
    runs.at_step(first, partial(limit_files, 20_000))
    runs.at_step(last, partial(limit_files, resource.RLIM_INFINITY))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_at_a_checkpoint_is_an_error_line_and_the_run_goes_on(
    trained: Path, tmp_path: Path, ranks: int
) -> None:
    argv = runs.arguments("moby", tmp_path, "t", world=ranks)
    fault = partial(disk_full_between, first=5, last=8)
    jobs = forked.start("main_pretrain", argv, tmp_path / "log", ranks=ranks, prepare=fault)
    assert [job.wait() for job in jobs] == [0] * ranks
    assert jobs[0].text().count("checkpoint of step 6 failed") == 1
    assert runs.steps_saved(tmp_path / "moby" / "t") == [9, 11]
    if ranks == 1:
        assert runs.digest(tmp_path / "moby" / "t") == runs.digest(trained / "moby" / "t")


def disk_always_full(rank: int) -> None:
    limit_files(20_000)


def test_a_disk_that_stays_full_is_no_success(tmp_path: Path) -> None:
    argv = runs.arguments("moby", tmp_path, "t", world=2)
    (line,) = assert_fails(
        2, argv, "not saved; .*free space", tmp_path, ranks=2, prepare=disk_always_full
    )
    assert line.startswith("error: ")
    assert runs.status(tmp_path / "moby" / "t")["state"] == "failed"


def out_of_memory(rank: int) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    runs.at_step(4, fail)


def test_out_of_memory_names_the_remedy(tmp_path: Path) -> None:
    argv = runs.arguments("moby", tmp_path, "t")
    assert_fails(4, argv, "out of memory; lower --batch-size", tmp_path, prepare=out_of_memory)


def test_one_image_and_batch_norm_names_the_flag(tmp_path: Path) -> None:
    argv = runs.arguments("byol", tmp_path, "t", TRAIN__BATCH_SIZE=1)
    assert_fails(2, argv, "--batch-size 1: batch norm needs at least 2", tmp_path)
    assert runs.steps_saved(tmp_path / "byol" / "t") == []


def test_a_tensor_too_large_for_the_memory_of_a_cpu_is_out_of_memory(tmp_path: Path) -> None:
    argv = runs.arguments("moco_v2", tmp_path, "t", MODEL__MOCO_V2__QUEUE_SIZE=1 << 50)
    assert_fails(4, argv, "out of memory; lower --batch-size.*allocate", tmp_path)


def fault_of_ours(rank: int) -> None:
    def fail() -> None:
        raise AssertionError("cannot be")

    runs.at_step(4, fail)


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    (job,) = forked.start(
        "main_pretrain",
        runs.arguments("moby", tmp_path, "t"),
        tmp_path / "log",
        prepare=fault_of_ours,
    )
    assert job.wait() == 1
    assert "Traceback" in job.text()
    assert runs.status(tmp_path / "moby" / "t")["reason"] == "AssertionError: cannot be"
