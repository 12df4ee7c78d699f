"""Weights & Biases and MLflow get what TensorBoard gets, and none of them stops a run."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from utils.logger import Metrics


class Notes:
    """Stand in for both packages: note every call, and fail in one if told to."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.calls = failing, []
        self.info = SimpleNamespace(run_id="run-1")
        self.config = SimpleNamespace(update=self._noted("config"))

    def _noted(self, name: str):
        def call(*args: object, **options: object) -> "Notes":
            self.calls.append((name, args, options))
            if name == self.failing:
                raise RuntimeError(f"no network in {name}")
            return self

        return call

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._noted(name)

    def of(self, name: str) -> list[tuple]:
        return [(args, options) for found, args, options in self.calls if found == name]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Notes]:
    found = {"wandb": Notes(), "mlflow": Notes()}
    for name, notes in found.items():
        monkeypatch.setitem(sys.modules, name, notes)
    return found


def write_all(folder: Path, sinks: tuple[str, ...], steps: range = range(1, 3)) -> None:
    metrics = Metrics(folder, sinks)
    if steps.start > 1:
        metrics.truncate_after(steps.start - 1)
    metrics.text("config", "SEED: 0\n", 0)
    for step in steps:
        metrics.write(step, {"loss": torch.tensor(float(step)), "lr": 0.1, "note": "a text"})
    Image.new("RGB", (4, 2), "red").save(folder / "views.png")
    metrics.picture(folder / "views.png", steps[-1])
    metrics.embedding(torch.eye(3, 5), [4, 5, 6], steps[-1])
    metrics.close()


def lines(folder: Path) -> list[int]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_both_get_the_numbers_under_the_tags_of_tensorboard(
    tmp_path: Path, packages: dict[str, Notes]
) -> None:
    write_all(tmp_path, ("wandb", "mlflow"))
    wanted = [({"train/loss": float(step), "optim/lr": 0.1}, step) for step in (1, 2)]
    sent = [(args[0], options["step"]) for args, options in packages["wandb"].of("log")]
    assert sent[:2] == wanted
    assert list(sent[2][0]) == ["pictures/views"]
    assert packages["wandb"].of("Image")[0][0][0].shape == (2, 4, 3)
    sent = [(args[0], options["step"]) for args, options in packages["mlflow"].of("log_metrics")]
    assert sent == wanted
    assert packages["wandb"].of("config")[0][0] == ({"config": "SEED: 0\n"},)
    assert packages["mlflow"].of("log_text")[0][0] == ("SEED: 0\n", "config.txt")
    assert packages["wandb"].of("finish")
    assert packages["mlflow"].of("end_run")


def test_a_resumed_run_goes_on_in_the_same_place(
    tmp_path: Path, packages: dict[str, Notes]
) -> None:
    for steps in (range(1, 3), range(3, 5)):
        write_all(tmp_path, ("wandb", "mlflow"), steps)
    first, second = (options for _, options in packages["wandb"].of("init"))
    assert first["id"] == second["id"] == (tmp_path / "wandb_id.txt").read_text()
    assert second["resume"] == "allow"
    first, second = (options for _, options in packages["mlflow"].of("start_run"))
    assert (first["run_id"], second["run_id"]) == (None, "run-1")
    other = tmp_path / "other"
    other.mkdir()
    write_all(other, ("wandb",))
    assert (other / "wandb_id.txt").read_text() != (tmp_path / "wandb_id.txt").read_text()


@pytest.mark.parametrize(
    ("sink", "where"),
    [
        *[("wandb", name) for name in ("init", "log", "config", "Image", "finish")],
        *[("mlflow", name) for name in ("start_run", "log_metrics", "log_text", "end_run")],
    ],
)
def test_a_sink_that_fails_is_one_warning_and_off(
    tmp_path: Path,
    packages: dict[str, Notes],
    caplog: pytest.LogCaptureFixture,
    sink: str,
    where: str,
) -> None:
    packages[sink].failing = where
    with caplog.at_level(logging.WARNING, logger="synco"):
        write_all(tmp_path, ("wandb", "mlflow"))
    (message,) = caplog.messages
    assert message == f"cannot write {sink} (no network in {where}); training goes on"
    assert packages[sink].calls[-1][0] == where  # nothing after the failure
    other = packages["mlflow" if sink == "wandb" else "wandb"]
    assert other.calls[-1][0] in ("finish", "end_run")
    assert lines(tmp_path) == [1, 2]


@pytest.mark.parametrize("sink", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sink: str,
) -> None:
    monkeypatch.setitem(sys.modules, sink, None)
    with caplog.at_level(logging.WARNING, logger="synco"):
        write_all(tmp_path, (sink,))
    assert len(caplog.messages) == 1
    assert sink in caplog.messages[0]
    assert lines(tmp_path) == [1, 2]


def test_nothing_is_opened_without_a_folder(packages: dict[str, Notes]) -> None:
    metrics = Metrics(None, ("wandb", "mlflow"))
    metrics.write(1, {"loss": 1.0})
    metrics.text("config", "SEED: 0\n", 0)
    metrics.close()
    assert not packages["wandb"].calls + packages["mlflow"].calls


OFFLINE = """
import sys
from pathlib import Path
from utils.logger import Metrics
for first in (1, 3):
    metrics = Metrics(Path(sys.argv[1]), [sys.argv[2]])
    if first > 1:
        metrics.truncate_after(first - 1)
    metrics.text("config", "SEED: 0", 0)
    for step in (first, first + 1):
        metrics.write(step, {"loss": float(step)})
    metrics.close()
"""


@pytest.mark.parametrize("sink", ["wandb", "mlflow"])
def test_the_package_itself_offline(tmp_path: Path, sink: str) -> None:
    pytest.importorskip(sink)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_TRACKING_URI": uri}
    settings["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path), sink],
        env={**os.environ, **settings},
        cwd=tmp_path,  # MLflow puts the files of its runs below the working directory
        capture_output=True,
        text=True,
        timeout=600,  # MLflow builds its tables
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write" not in done.stderr
    assert lines(tmp_path) == [1, 2, 3, 4]
    if sink == "wandb":
        number = (tmp_path / "wandb_id.txt").read_text()
        assert len(list(tmp_path.glob(f"wandb/offline-run-*-{number}"))) >= 1
    else:
        mlflow = pytest.importorskip("mlflow")
        client = mlflow.MlflowClient(tracking_uri=uri)
        history = client.get_metric_history((tmp_path / "mlflow_id.txt").read_text(), "train/loss")
        assert [(entry.step, entry.value) for entry in history] == [
            (n, float(n)) for n in (1, 2, 3, 4)
        ]
