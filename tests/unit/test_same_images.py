"""Detection and segmentation compare what their processes see of both splits."""

from types import SimpleNamespace

import pytest
import yacs.config

from detection import main_detection
from segmentation import main_segmentation


@pytest.mark.parametrize(
    ("program", "opens", "section"),
    [
        (main_detection, "read", "DETECTION"),
        (main_segmentation, "open_dataset", "SEGMENTATION"),
    ],
)
def test_both_splits_are_compared(
    program: object, opens: str, section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(_: object, split: str) -> SimpleNamespace:
        data = SimpleNamespace(classes=["a"], fingerprint=lambda: split)
        data.for_training = lambda: data
        return data

    compared: list[str] = []
    monkeypatch.setattr(program, opens, opened)
    monkeypatch.setattr(
        program, "refuse_different", lambda digest, what: compared.append(f"{digest()} {what}")
    )
    splits = {"TRAIN_SPLIT": "some", "TEST_SPLIT": "others"}
    cfg = yacs.config.CfgNode({section: splits, "DATA": {"PATH": "/d"}})
    program.open_splits(cfg)  # type: ignore[attr-defined]
    assert compared == [f"{name} DATA.PATH (--data-path) '/d'" for name in ("some", "others")]
