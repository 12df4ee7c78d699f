"""The configuration: who wins, what is refused and how it is said."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from yacs.config import CfgNode

from models import framework_options
from utils.config.load import (
    ConfigError,
    compare_for_resume,
    leaves,
    load_config,
    to_yaml,
)
from utils.config.schema import declare
from utils.config.sections import section_options

SCHEMA = declare(framework_options())
DEFAULTS = SCHEMA.defaults()


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def from_text(tmp_path: Path, text: str) -> CfgNode:
    return load_config(SCHEMA, [write(tmp_path, text)])


# ---- precedence ----------------------------------------------------------------------------------


def test_later_sources_win_over_earlier_ones(tmp_path: Path) -> None:
    write(
        tmp_path, "TRAIN: {EPOCHS: 2, BATCH_SIZE: 2}\nSEED: 2\nOPTIM: {CLIP_GRAD: 2.0}", "base.yaml"
    )
    own = "_BASE_: base.yaml\nTRAIN: {BATCH_SIZE: 3}\nSEED: 3\nOPTIM: {CLIP_GRAD: 3.0}"
    opts = ["SEED", "4", "OPTIM.CLIP_GRAD", "4"]
    cfg = load_config(SCHEMA, [write(tmp_path, own)], opts, {"OPTIM.CLIP_GRAD": 5})
    assert cfg.KNN.TEMPERATURE == DEFAULTS.KNN.TEMPERATURE
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.BATCH_SIZE, cfg.SEED, cfg.OPTIM.CLIP_GRAD) == (2, 3, 4, 5.0)


def test_a_second_file_wins_and_the_first_one_names_the_run(tmp_path: Path) -> None:
    files = [
        write(tmp_path, "SEED: 1", "first.yaml"),
        None,
        write(tmp_path, "SEED: 2", "second.yaml"),
    ]
    cfg = load_config(SCHEMA, files)
    assert (cfg.SEED, cfg.NAME) == (2, "first")


def test_the_run_is_named_by_the_file_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert from_text(tmp_path, "SEED: 1").NAME == "run"
    assert from_text(tmp_path, "NAME: mine").NAME == "mine"
    assert load_config(SCHEMA).NAME == "moco_v2"


def test_bases_are_read_in_order_and_relative_to_their_file(tmp_path: Path) -> None:
    write(tmp_path, "SEED: 1\nTAG: a", "pieces/a.yaml")
    write(tmp_path, "_BASE_: a.yaml\nSEED: 2", "pieces/b.yaml")
    write(tmp_path, "TAG: c", "c.yml")
    cfg = load_config(
        SCHEMA, [write(tmp_path, "_BASE_: [../pieces/b.yaml, ../c.yml]", "sub/run.yaml")]
    )
    assert (cfg.SEED, cfg.TAG) == (2, "c")


def test_one_base_may_be_reached_by_two_ways(tmp_path: Path) -> None:
    write(tmp_path, "SEED: 7", "root.yaml")
    for name in ("a", "b"):
        write(tmp_path, "_BASE_: root.yaml", f"{name}.yaml")
    assert from_text(tmp_path, "_BASE_: [a.yaml, b.yaml]").SEED == 7


def test_the_tree_is_frozen_and_the_defaults_are_untouched(tmp_path: Path) -> None:
    before = to_yaml(DEFAULTS)
    cfg = from_text(tmp_path, "SEED: 5\nKNN: {K: [1]}")
    with pytest.raises(AttributeError):
        cfg.SEED = 6
    with pytest.raises(AttributeError):
        cfg.MODEL.BACKBONE.NAME = "resnet18"
    assert to_yaml(DEFAULTS) == before


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("OPTIM: {BASE_LR: 2e-4}", "OPTIM.BASE_LR", 2e-4),
        ("OPTIM: {BASE_LR: 1}", "OPTIM.BASE_LR", 1.0),
        ("OPTIM: {BASE_LR: .5}", "OPTIM.BASE_LR", 0.5),
        ("OPTIM: {BETAS: [0, 0.95]}", "OPTIM.BETAS", [0.0, 0.95]),
        ("TAG: 42", "TAG", "42"),
        ("TAG: 007", "TAG", "007"),
        ("TAG: no", "TAG", "no"),
        ("TAG: 2024-01-02", "TAG", "2024-01-02"),
        ("OPTIM.BASE_LR: 2", "OPTIM.BASE_LR", 2.0),
        ("TRAIN: {}", "TRAIN.EPOCHS", 200),
        ("", "SEED", 0),
    ],
)
def test_values_take_the_type_of_their_default(
    tmp_path: Path, text: str, key: str, value: Any
) -> None:
    found = dict(leaves(from_text(tmp_path, text)))[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("OPTIM: {BASE_LR: 1e999}", ["OPTIM.BASE_LR", "finite"]),
        ("OPTIM: {BASE_LR: .nan}", ["OPTIM.BASE_LR", ".nan"]),
        ("OPTIM: {BASE_LR: " + "9" * 400 + "}", ["OPTIM.BASE_LR", "finite"]),
        ("SEED: " + "9" * 30, ["SEED", "finite"]),
        ("SEED: 010", ["SEED", "'010'", "int"]),
        ("SEED: 1.0", ["SEED", "1.0", "int"]),
        ("SEED: true", ["SEED", "bool"]),
        ("SEED:", ["SEED", "None"]),
        ("OPTIM: {NESTEROV: yes}", ["OPTIM.NESTEROV", "'yes'", "bool"]),
        ("OPTIM: {NESTEROV: 1}", ["OPTIM.NESTEROV", "bool"]),
        ("OPTIM: {BASE_LR: fast}", ["OPTIM.BASE_LR", "'fast'", "float", "0.03"]),
        ("KNN: {K: 10}", ["KNN.K", "list"]),
        ("KNN: {K: [ten]}", ["KNN.K", "'ten'"]),
        ("KNN: {K: [[1]]}", ["KNN.K"]),
        ("SEED: 1\nSEED: 2", ["duplicate key 'SEED'", "line 2"]),
        ("TRAIN: {EPOCHS: 1, EPOCHS: 2}", ["duplicate key 'EPOCHS'"]),
        ("TRAIN: {EPOCHS: 1}\nTRAIN.EPOCHS: 2", ["duplicate key 'TRAIN.EPOCHS'"]),
        ("KNN: {K: &a [1]}\nTAG: *a", ["aliases"]),
        ("SEED: !!int '3'", ["tags"]),
        ("TAG: !!python/name:os.system ''", ["tags"]),
        ("SEED: [", ["run.yaml", "YAML"]),
        ("SEED: 1\n---\nSEED: 2", ["run.yaml", "YAML"]),
        ("[1, 2]", ["run.yaml", "list"]),
        ("TRAIN: 5", ["TRAIN is a section", "TRAIN.EPOCHS"]),
        ("TRAIN:", ["TRAIN is a section"]),
        ("SEED: {A: 1}", ["SEED.A"]),
        ("SEED: {}", ["SEED", "dict"]),
        ("NONSENSE: {}", ["NONSENSE"]),
        ("? [a, b]\n: 1", ["YAML"]),
    ],
)
def test_a_bad_value_is_refused_by_key_and_value(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        from_text(tmp_path, text)
    for word in [*words, "run.yaml"]:
        assert word in str(error.value)


def test_a_value_is_checked_against_the_default_and_not_against_an_emptied_list() -> None:
    with pytest.raises(ConfigError, match=r"KNN\.K.*'ten'"):
        load_config(SCHEMA, opts=["KNN.K", "[]", "KNN.K", "[ten]"])


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("TRAIN.EPOCHS", "0", ["at least 1"]),
        ("TRAIN.BATCH_SIZE", "-4", ["-4", "at least 1"]),
        ("LINEAR.EPOCHS", "0", ["at least 1"]),
        ("OPTIM.BASE_LR", "-0.1", ["-0.1"]),
        ("OPTIM.MOMENTUM", "1.5", ["between 0 and 1"]),
        ("OPTIM.BETAS", "[0.9, 1.0]", ["1.0"]),
        ("OPTIM.BETAS", "[0.9]", ["1 entries", "give 2"]),
        ("LINEAR.LRS", "[]", ["0 entries"]),
        ("LINEAR.LABEL_SMOOTHING", "1.1", ["between 0 and 1"]),
        ("MODEL.BACKBONE.DROP_PATH", "1.1", ["between 0 and 1"]),
        ("MODEL.MOCO_V2.TEMPERATURE", "0", ["out of range"]),
        ("MODEL.MOCO_V2.QUEUE_SIZE", "0", ["at least 1"]),
        ("MODEL.SYNCO.NUM_SYNTHETIC", "[1, 2]", ["2 entries", "give 6"]),
        ("MODEL.SYNCO.NUM_SYNTHETIC", "[1, 1, 1, 1, 1, -1]", ["-1"]),
        ("CHECKPOINT.KEEP_LAST", "1", ["at least 2"]),
        ("KNN.K", "[0]", ["at least 1"]),
        ("SCHEDULE.MILESTONES", "[-1]", ["-1"]),
        ("TRAIN.PRECISION", "tf32", ["'tf32'", "bf16"]),
        ("DATA.CACHE_MODE", "some", ["'some'", "part"]),
        ("LINEAR.HEAD_INIT", "zero", ["'zero'", "trunc"]),
        ("OPTIM.NAME", "adam", ["'adam'", "adamw"]),
        ("LINEAR.OPTIM.NAME", "adam", ["'adam'", "lars"]),
        ("SCHEDULE.NAME", "cosin", ["'cosin'", "milestones"]),
        ("LINEAR.SCHEDULE.NAME", "exp", ["'exp'"]),
        ("DEVICE", "tpu", ["'tpu'", "cuda"]),
        ("MODEL.NAME", "byoll", ["'byoll'", "byol", "moco_v2"]),
        ("MODEL.NAME", "backbone", ["'backbone'"]),
    ],
)
def test_a_value_out_of_range_is_refused(key: str, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(SCHEMA, opts=[key, text])
    for word in [key, *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "name", ["../other", "a/b", "..", ".", "", "/tmp/x", "a b", ".hidden", "x" * 200, "a\n"]
)
@pytest.mark.parametrize("key", ["TAG", "NAME"])
def test_a_name_that_leaves_the_output_folder_is_refused(
    tmp_path: Path, key: str, name: str
) -> None:
    if key == "NAME" and not name:
        return  # empty: the file names the run
    with pytest.raises(ConfigError, match=f"{key}.*no folder name"):
        load_config(SCHEMA, [write(tmp_path, "SEED: 1")], flags={key: name})


# ---- keys and files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("OPTIM.BASE_LRR", "OPTIM.BASE_LR"),
        ("optim.base_lr", "OPTIM.BASE_LR"),
        ("TRAIN.EPOCH", "TRAIN.EPOCHS"),
        ("TRAINING.PRECISION", "TRAIN.PRECISION"),
        ("TRAIN.WEIGHT_DECAY", "WEIGHT_DECAY"),
        ("MODEL.MOCO.TEMPERATURE", "MODEL.MOCO_V2.TEMPERATURE"),
        ("SEED.X", "SEED"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(
    tmp_path: Path, key: str, nearest: str
) -> None:
    for load in (
        lambda: load_config(SCHEMA, opts=[key, "1"]),
        lambda: load_config(SCHEMA, flags={key: 1}),
        lambda: from_text(tmp_path, f"{key}: 1"),
    ):
        with pytest.raises(ConfigError) as error:
            load()
        assert repr(key) in str(error.value)
        assert nearest in str(error.value).split("did you mean")[1]


def test_an_unknown_key_that_resembles_nothing_points_to_the_list() -> None:
    with pytest.raises(ConfigError, match=r"utils/config/schema\.py"):
        load_config(SCHEMA, opts=["QQQQ", "1"])


def test_opts_without_a_value_are_refused() -> None:
    with pytest.raises(ConfigError, match="KEY VALUE"):
        load_config(SCHEMA, opts=["SEED"])
    with pytest.raises(ConfigError, match="TAG: its value is missing"):
        load_config(SCHEMA, opts=["SEED=1", "TAG"])


def test_opts_may_be_joined_by_an_equals_sign() -> None:
    cfg = load_config(SCHEMA, opts=["SEED=3", "DATA.PATH", "a=b", "OUTPUT=x=y"])
    assert (cfg.SEED, cfg.DATA.PATH, cfg.OUTPUT) == (3, "a=b", "x=y")


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("run.yaml", ["cycle"]),
        ("other.yaml", ["cycle"]),
        ("evil.py", ["evil.py", "none is executed"]),
        ("absent.yaml", ["absent.yaml", "cannot be read"]),
        ("folder.yaml", ["folder.yaml", "cannot be read", "Is a directory"]),
        ("latin.yaml", ["latin.yaml", "cannot be read"]),
        ('"nul\\0.yaml"', ["cannot be read"]),
        ("3", ["path or a list of paths"]),
        ("{a: b}", ["path or a list of paths"]),
        ("[1]", ["path or a list of paths"]),
        ("", ["path or a list of paths"]),
    ],
)
def test_a_bad_base_is_refused(tmp_path: Path, base: str, words: list[str]) -> None:
    write(tmp_path, "_BASE_: run.yaml", "other.yaml")
    write(tmp_path, "raise SystemExit('executed')", "evil.py")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"TAG: \xe9")
    with pytest.raises(ConfigError) as error:
        from_text(tmp_path, f"_BASE_: {base}")
    for word in words:
        assert word in str(error.value)


def test_an_endless_chain_of_bases_is_refused(tmp_path: Path) -> None:
    for number in range(300):
        write(tmp_path, f"_BASE_: b{number + 1}.yaml", f"b{number}.yaml")
    with pytest.raises(ConfigError, match="more than 256"):
        load_config(SCHEMA, [tmp_path / "b0.yaml"])


def test_bases_that_fan_out_are_refused(tmp_path: Path) -> None:
    """Each file names the next one twice: the last would be read 2^30 times."""
    for number in range(30):
        write(tmp_path, f"_BASE_: [b{number + 1}.yaml, b{number + 1}.yaml]", f"b{number}.yaml")
    write(tmp_path, "SEED: 1", "b30.yaml")
    with pytest.raises(ConfigError, match="more than 256"):
        load_config(SCHEMA, [tmp_path / "b0.yaml"])


def test_only_small_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    write(tmp_path, f"TAG: {'a' * (1 << 20)}", "large.yaml")
    for name, reason in (
        ("pipe", "not a regular file"),
        ("zero", "not a regular file"),
        ("large", "more than 1048576"),
    ):
        with pytest.raises(ConfigError, match=f"{name}.yaml: .*{reason}"):
            load_config(SCHEMA, [tmp_path / f"{name}.yaml"])


# ---- text and back -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag", ["plain", "1e5", "007", "12", "true", "no", "1.5", "2024-01-02", "null", "1_0"]
)
def test_the_written_yaml_reads_back_unchanged(tmp_path: Path, tag: str) -> None:
    flags = {
        "TAG": tag,
        "OPTIM.EPS": 1e-17,
        "DATA.PATH": "a: b # c\udc80é\n",
        "SCHEDULE.MILESTONES": [],
    }
    cfg = load_config(SCHEMA, flags=flags)
    again = load_config(SCHEMA, [write(tmp_path, to_yaml(cfg))])
    assert dict(leaves(again)) == dict(leaves(cfg))
    assert dict(leaves(CfgNode(yaml.safe_load(to_yaml(cfg))))) == dict(leaves(cfg))
    assert compare_for_resume(to_yaml(cfg), cfg) == []


def test_a_section_becomes_keyword_arguments() -> None:
    declared = framework_options()["byol"]
    assert section_options(DEFAULTS.MODEL.BYOL) == {
        name: key.default for name, key in declared.items()
    }
