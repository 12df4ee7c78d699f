"""Yaml files of MoBY and SynCo-v2, rebuilt from their description, mean what our recipes mean."""

from pathlib import Path

import pytest

from models import framework_options
from utils.config import published
from utils.config.load import ConfigError, leaves, load_config
from utils.config.schema import declare

SCHEMA = declare(framework_options())
CONFIGS = Path(__file__).parents[2] / "configs"

MOBY = """
MODEL:
  TYPE: moby
  NAME: moby__odpr02_tdpr0_cm099_ct02_queue4096_proj2_pred2
  MOBY:
    ENCODER: BACKBONE_
    ONLINE_DROP_PATH_RATE: 0.2
    TARGET_DROP_PATH_RATE: 0.0
    CONTRAST_MOMENTUM: 0.99
    CONTRAST_TEMPERATURE: 0.2
    CONTRAST_NUM_NEGATIVE: 4096
    PROJ_NUM_LAYERS: 2
    PRED_NUM_LAYERS: 2
  SWIN: {EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], NUM_HEADS: [3, 6, 12, 24], WINDOW_SIZE: 7}
TRAIN:
  EPOCHS: 300
  WARMUP_EPOCHS: 5
  BASE_LR: 1e-3
  WEIGHT_DECAY: 0.05
  OPTIMIZER: {NAME: adamw}
AUG: {SSL_AUG: True, SSL_AUG_TYPE: byol}
"""
V2 = """
MODEL:
  TYPE: TYPE_
  NAME: NAME_
  ENCODER: BACKBONE_
  CONTRAST_MOMENTUM: MOMENTUM_
  PROJ_NUM_LAYERS: 2
  PRED_NUM_LAYERS: 2
  EXTRA_
TRAIN: {WARMUP_EPOCHS: 5, EPOCHS: 300, BASE_LR: LR_, WEIGHT_DECAY: WD_, OPTIMIZER: {NAME: adamw}}
AUG: {SSL_AUG: True, SSL_AUG_TYPE: byol}
"""
CONTRAST = """CONTRAST_TEMPERATURE: 0.2
  CONTRAST_NUM_NEGATIVE: 4096
  ONLINE_DROP_PATH_RATE: 0.2
  TARGET_DROP_PATH_RATE: 0.0"""
SYNCO = f"""{CONTRAST}
  N_HARD: 256
  N1: 128
  N4: 128
  WARMUP_EPOCHS: 30
  COOLDOWN_EPOCHS: 100"""


def v2(kind: str, encoder: str, extra: str = "STOP_GRAD_CONV1: False") -> str:
    byol = kind == "byol"
    text = V2.replace("TYPE_", kind, 1).replace("NAME_", f"{kind}__{encoder}__proj2_pred2")
    text = text.replace("BACKBONE_", encoder).replace("EXTRA_", extra)
    text = text.replace("MOMENTUM_", "0.996" if byol else "0.99")
    return (
        text.replace("LR_:", "LR:")
        .replace("LR_", "2e-4" if byol else "1e-3")
        .replace("WD_", "0.03" if byol else "0.05")
    )


CASES = {
    "moby_swin_tiny": MOBY.replace("ENCODER: BACKBONE_", "ENCODER: swin"),
    "moby_deit_small": MOBY.replace("ENCODER: BACKBONE_", "ENCODER: deit_small"),
    "moby_vit_base": v2("moby", "vit_base", CONTRAST),
    "synco_v2_swin_tiny": v2("synco", "swin_tiny", SYNCO),
    "synco_v2_vit_small": v2("synco", "vit_small", SYNCO),
    "byol_swin_small": v2("byol", "swin_small"),
    "byol_vit_small": v2("byol", "vit_small"),
}


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "published.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", CASES)
def test_a_published_yaml_is_our_recipe(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    theirs = dict(leaves(load_config(SCHEMA, [write(tmp_path, CASES[name])])))
    ours = dict(leaves(load_config(SCHEMA, [CONFIGS / f"{name}.yaml"])))
    differing = {key for key in ours if ours[key] != theirs[key]}
    # The run's folder is called as there, and 64 images a process are that code's default.
    assert differing <= {"NAME", "TRAIN.BATCH_SIZE"}
    table = capsys.readouterr().err
    assert f"TRAIN.BASE_LR -> OPTIM.BASE_LR {theirs['OPTIM.BASE_LR']}" in table
    assert "AUG.SSL_AUG -> dropped" in table
    assert "DATA.BATCH_SIZE -> TRAIN.BATCH_SIZE 64 (the default there)" in table


def test_the_table_is_said_once_and_by_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, CASES["moby_swin_tiny"])
    monkeypatch.setenv("RANK", "1")
    load_config(SCHEMA, [file])
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    load_config(SCHEMA, [file])
    load_config(SCHEMA, [file])
    assert capsys.readouterr().err.count("was translated") == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("EPOCHS: 300", "EPOCHZ: 300", "TRAIN.EPOCHZ"),
        ("EMBED_DIM: 96", "EMBED_DIM: 97", "no Swin-T, -S or -B"),
        ("TYPE: moby", "TYPE: mocov9", "MODEL.TYPE"),
        ("AUG: {", "BASE: [other.yaml]\nAUG: {", "BASE"),
        ("ENCODER: swin", "ENCODER: swin\n    HEADS: 3", "MODEL.HEADS"),
    ],
)
def test_what_is_not_known_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = CASES["moby_swin_tiny"]
    assert old in text
    with pytest.raises(ConfigError, match=message):
        load_config(SCHEMA, [write(tmp_path, text.replace(old, new, 1))])


def test_every_renamed_key_is_declared() -> None:
    sections = ("MOBY", "BYOL", "SYNCO_V2")
    for target in published._RENAMED.values():
        assert any(target.format(section) in SCHEMA for section in sections), target


def test_our_own_files_are_left_alone(capsys: pytest.CaptureFixture) -> None:
    load_config(SCHEMA, [CONFIGS / "moby_swin_tiny.yaml"])
    assert capsys.readouterr().err == ""
