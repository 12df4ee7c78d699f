"""A new method is one class, one line in the dictionary, one yaml: this adds one through those steps."""

from pathlib import Path

import pytest
from torch import Tensor, nn

import main_pretrain
import models
from models.parts.heads import Encoder, mlp
from models.parts.losses import cosine_regression, unit
from models.parts.momentum import MomentumFramework
from utils.config.key import Count
from utils.config.load import ConfigError, load_config
from utils.config.schema import declare
from utils.logger import close_logger
from utils.schedules import Progress


class Mean(MomentumFramework):
    """A toy: one view regresses on the target of the other, without a predictor."""

    def __init__(
        self, backbone: nn.Module, target_backbone: nn.Module | None = None, *, width: Count = 8
    ) -> None:
        super().__init__(
            Encoder(backbone, mlp(backbone.num_features, width, width)), target_backbone
        )

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        target = unit(self.target(views[1]))
        return {"loss": cosine_regression(self.online(views[0]), target), "embedding": target}

    def after_step(self, progress: Progress) -> None:
        self.update_target(0.9)


def test_toy_method_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.FRAMEWORKS, "mean", Mean)
    config = tmp_path / "mean_resnet8.yaml"
    config.write_text(
        "MODEL: {NAME: mean, BACKBONE: {NAME: resnet8, STEM: cifar_stride2}, MEAN: {WIDTH: 12}}\n"
        "DATA: {DATASET: digits, IMG_SIZE: 16, NUM_WORKERS: 0}\nAUG: {RECIPE: digits}\n"
        "TRAIN: {EPOCHS: 1, BATCH_SIZE: 512}\nLOG: {TENSORBOARD: False}\n"
    )
    argv = [
        "main_pretrain.py",
        "--cfg",
        str(config),
        "--output",
        str(tmp_path / "out"),
        "--tag",
        "t",
    ]
    monkeypatch.setattr("sys.argv", argv)
    try:
        assert main_pretrain.main() == 0
    finally:
        close_logger()
    folder = tmp_path / "out" / "mean_resnet8" / "t"
    assert list(folder.glob("ckpt_*.pt"))
    assert "WIDTH: 12" in (folder / "config.yaml").read_text()


def test_the_limits_of_an_option_are_declared_in_the_signature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(models.FRAMEWORKS, "mean", Mean)
    schema = declare(models.framework_options())
    assert load_config(schema, flags={"MODEL.MEAN.WIDTH": 1}).MODEL.MEAN.WIDTH == 1
    with pytest.raises(
        ConfigError, match=r"MODEL\.MEAN\.WIDTH: 0 is out of range; use a value of at least 1"
    ):
        load_config(schema, flags={"MODEL.MEAN.WIDTH": 0})
