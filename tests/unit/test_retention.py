"""The checkpoint that an evaluation liked best stays; which one it is follows from the folder alone."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
from yacs.config import CfgNode

import main_pretrain
from engine.state import TrainState
from evaluation.accuracy import held_out_names
from pretraining import evaluations
from utils.checkpoints.file import committed, save, step_of
from utils.checkpoints.folder import best, improves, prune
from utils.logger import close_logger
from utils.schedules import Progress

METRIC = "knn5_top1"


def make(folder: Path, step: int, **evaluated: float) -> Path:
    return save(folder, step, {"weight": torch.ones(3)}, meta={"evaluated": evaluated})


def steps(folder: Path) -> list[int]:
    return sorted(map(step_of, committed(folder)))


def test_the_best_is_the_highest_and_of_a_loss_the_lowest(tmp_path: Path) -> None:
    assert best(tmp_path, METRIC) is None
    for step, (top1, loss) in enumerate(
        [(10.0, 3.0), (30.0, 1.0), (30.0, 2.0), (20.0, 0.5)], start=1
    ):
        make(tmp_path, step, knn5_top1=top1, held_out_loss=loss)
    make(tmp_path, 5)  # between two evaluations
    assert best(tmp_path, METRIC) == tmp_path / "ckpt_00000002.pt"  # of equals the first
    assert best(tmp_path, "held_out_loss", lower_is_better=True) == tmp_path / "ckpt_00000004.pt"
    assert best(tmp_path, "other") is None


def test_damaged_records_and_values_that_are_no_number_are_passed_over(tmp_path: Path) -> None:
    make(tmp_path, 1, knn5_top1=10.0)
    make(tmp_path, 2, knn5_top1=float("nan"))
    path = make(tmp_path, 3, knn5_top1=90.0)
    path.with_suffix(".json").write_text(
        path.with_suffix(".json").read_text().replace("90.0", "99.0")
    )
    assert best(tmp_path, METRIC) == tmp_path / "ckpt_00000001.pt"


def test_the_best_is_kept_beside_the_last_and_a_worse_one_goes(tmp_path: Path) -> None:
    for step, top1 in enumerate([10.0, 30.0, 20.0, 25.0, 40.0, 5.0, 6.0], start=1):
        make(tmp_path, step, knn5_top1=top1)
        kept = best(tmp_path, METRIC)
        assert kept is not None
        prune(tmp_path, 2, protect=[kept])
        assert len(steps(tmp_path)) >= min(2, step)
    assert steps(tmp_path) == [5, 6, 7]


@pytest.mark.parametrize(
    ("lower_is_better", "value", "so_far", "expected"),
    [
        (False, 1.0, None, True),
        (False, 1.0, 1.0, False),
        (False, 2.0, 1.0, True),
        (True, 2.0, 1.0, False),
        (True, 0.5, 1.0, True),
        (False, float("nan"), 1.0, False),
        (False, float("nan"), None, False),
    ],
)
def test_what_is_better(
    lower_is_better: bool, value: float, so_far: float | None, expected: bool
) -> None:
    assert improves(value, so_far, lower_is_better) == expected


def test_the_direction_of_a_metric_is_declared_and_not_read_from_its_name() -> None:
    module = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    state = TrainState(module, optimizer, module, lower_is_better=held_out_names(("error",)))
    for error, loss_avoided in ((3.0, 1.0), (2.0, 5.0), (4.0, 2.0)):
        state.keep_best({"held_out_error": error, "held_out_loss_avoided": loss_avoided})
    assert state.best == {"held_out_error": 2.0, "held_out_loss_avoided": 5.0}


def train(
    monkeypatch: pytest.MonkeyPatch, output: Path, values: list[float], every: int = 4
) -> Path:
    """Run with evaluations that give ``values``, one an epoch; no checkpoint is due but by the evaluation."""
    given = iter(values)
    monkeypatch.setattr(evaluations, "features_knn", lambda *args, **keys: {METRIC: next(given)})
    keys = {
        "KNN__EVERY_EPOCHS": 1,
        "KNN__K": (5,),
        "CHECKPOINT__EVERY_STEPS": 0,
        "TRAIN__EPOCHS": 5,
    }
    keys |= {
        "CHECKPOINT__EVERY_EPOCHS": every,
        "CHECKPOINT__KEEP_BEST": METRIC,
        "TRAIN__BATCH_SIZE": 512,
    }
    monkeypatch.setattr(
        "sys.argv", ["main_pretrain.py", *runs.arguments("moco_v2", output, "t", **keys)]
    )
    try:
        main_pretrain.main()
    finally:
        close_logger()
    return output / "moco_v2" / "t"


def test_a_run_keeps_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(monkeypatch, tmp_path, [20.0, 30.0, 25.0, 10.0, 11.0], every=1)
    assert steps(folder) == [4, 8, 10]


def test_a_run_saves_and_keeps_its_best_across_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StopIteration):  # a fault in the evaluation of the third epoch
        train(monkeypatch, tmp_path, [30.0, 20.0])
    folder = tmp_path / "moco_v2" / "t"
    assert steps(folder) == [2]  # the first evaluation made one due, the second did not
    train(monkeypatch, tmp_path, [20.0, 25.0, 10.0, 11.0])
    assert steps(folder) == [2, 8, 10]
    assert best(folder, METRIC) == folder / "ckpt_00000002.pt"


def test_a_metric_that_nobody_measures_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"KNN__EVERY_EPOCHS": 1, "KNN__K": (5,), "CHECKPOINT__KEEP_BEST": "knn20_top1"}
    argv = runs.arguments("moco_v2", tmp_path, "t", TRAIN__BATCH_SIZE=512, **keys)
    monkeypatch.setattr("sys.argv", ["main_pretrain.py", *argv])
    try:
        with pytest.raises(ValueError, match=r"CHECKPOINT\.KEEP_BEST: 'knn20_top1'.*knn5_top1"):
            main_pretrain.main()
    finally:
        close_logger()


def test_held_out_losses_are_of_the_epoch_that_ends() -> None:
    """SynCo's next epoch may have synthetic negatives: its losses would be others."""
    seen: list[Progress] = []

    def framework(_: list[torch.Tensor], progress: Progress) -> dict[str, torch.Tensor]:
        seen.append(progress)
        return {"loss": torch.tensor(1.0)}

    measured = object.__new__(evaluations.Evaluations)
    batch = SimpleNamespace(views=[torch.zeros(2, 3, 4, 4)])
    measured.cfg = CfgNode({"SEED": 0})
    measured.held_out = SimpleNamespace(steps_per_epoch=1, from_step=lambda *_: [(0, [batch])])
    measured.run = SimpleNamespace(
        views=lambda view: view, evaluating=lambda _: nullcontext(framework)
    )
    measured.framework = None
    assert measured._losses(Progress(20, 10, 40))["held_out_loss"] == 1.0
    assert [progress.epoch for progress in seen] == [1]  # of 0, 1, 2, 3: the second
