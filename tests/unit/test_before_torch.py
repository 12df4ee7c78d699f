"""Answers that come before torch is imported: checks of the configuration, lists, --show-config."""

import argparse
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from utils.cli.lists import listing
from utils.config import programs
from utils.config.datasets import DATASETS
from utils.config.key import Key, Limits, Program, Value
from utils.config.load import ConfigError, load_config, load_with_origins
from utils.config.methods import backbone_names, method_options, method_titles
from utils.config.schema import declare

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")
CIFAR = str(ROOT / "configs" / "demo_cifar10.yaml")
NO_TORCH = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numpy", "timm"):
            raise SystemError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def answered(
    folder: Path, *words: str, main: str = "main_pretrain.py"
) -> subprocess.CompletedProcess[str]:
    """Run a program where torch cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", NO_TORCH, str(ROOT / main), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


PROBE = ("PROBE.ONLINE", "True", "KNN.EVERY_EPOCHS")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--cfg", "absent.yaml"], "absent.yaml: cannot be read"),
        (
            ["--cfg", DEMO, "--epochs", "3", "--opts", "TRAIN.STEPS", "90"],
            "--epochs 3: has no effect, since TRAIN.STEPS is 90",
        ),
        (["--cfg", CIFAR.replace("cifar10", "cifra10")], "did you mean"),
        (["--cfg", DEMO, "--opts", "OPTIM.BASE_LRR", "1"], "did you mean OPTIM.BASE_LR"),
        (["--cfg", DEMO, "--epochs", "0"], "TRAIN.EPOCHS (--epochs): 0 is out of range"),
        (["--cfg", DEMO, "--opts", "MODEL.NAME=simclr"], "'simclr' is not one of moco_v2"),
        (["--cfg", CIFAR, "--data-path", "absent"], "DATA.PATH (--data-path) 'absent' is not a"),
        (["--cfg", CIFAR], "DATA.PATH (--data-path) is empty"),
        (["--cfg", DEMO, "--batch-size", "60"], "use --batch-size 64, or --opts MODEL.SYNCO.QUEUE"),
        (["--cfg", DEMO, "--dataset", "folder", "--data-path", "."], "--opts KNN.EVERY_EPOCHS 0"),
        (
            ["--cfg", DEMO, "--dataset", "folder", "--data-path", ".", "--opts", *PROBE, "-1"],
            "PROBE.ONLINE: DATA.DATASET 'folder' has no labels",
        ),
        (["--cfg", DEMO, "--opts", *PROBE, "0"], "PROBE.ONLINE: its accuracy is measured with the"),
    ],
)
def test_a_mistake_is_answered_without_torch_and_leaves_no_folder(
    words: list[str], text: str, tmp_path: Path
) -> None:
    ran = answered(tmp_path, *words)
    assert (ran.returncode, text in ran.stderr) == (2, True), ran.stderr
    assert ran.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_measures_one_process_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = answered(tmp_path, "--cfg", DEMO, "--dry-run")
    assert (ran.returncode, "start it without torchrun" in ran.stderr) == (2, True), ran.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--list", "methods"], "arXiv:2003.04297"),
        (["--show-config", "--cfg", DEMO, "--lr", "3"], "OPTIM.BASE_LR"),
    ],
)
def test_lists_and_the_configuration_are_shown_without_torch(
    words: list[str], text: str, tmp_path: Path
) -> None:
    ran = answered(tmp_path, *words)
    assert (ran.returncode, text in ran.stdout) == (0, True), ran.stderr
    assert not list(tmp_path.iterdir())


def test_the_text_of_the_signatures_declares_what_the_classes_have() -> None:
    from models import FRAMEWORKS, framework_options
    from models.parts.batchformer import BatchFormer

    read = method_options()
    asked = {name: signature_options(found) for name, found in FRAMEWORKS.items()}
    asked["batchformer"] = {"enabled": Key(False), **signature_options(BatchFormer)}
    assert read == framework_options() == asked
    assert [list(options) for options in read.values()] == [list(o) for o in asked.values()]


def signature_options(found: type) -> dict[str, Key]:
    """Ask Python for what `utils.config.methods` reads from the text."""
    parameters = inspect.signature(found).parameters.values()
    types = get_type_hints(found.__init__, include_extras=True)
    inherits = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    options = signature_options(found.__mro__[1]) if inherits else {}
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY:
            extras = getattr(types[parameter.name], "__metadata__", ())
            limits = next((extra for extra in extras if isinstance(extra, Limits)), Limits())
            default = parameter.default
            default = list(default) if isinstance(default, tuple) else default  # as yaml has it
            options[parameter.name] = Key(default, programs=("pretrain",), **vars(limits))
    return options


def test_the_lists_are_those_of_the_registries() -> None:
    from data import sources
    from models import FRAMEWORKS
    from models.parts.backbones import BACKBONES

    assert list(DATASETS) == list(sources.SOURCES)
    assert tuple(backbone_names()) == BACKBONES
    assert list(method_titles()) == list(FRAMEWORKS)
    assert all(method_titles().values())


@pytest.mark.parametrize("kind", ["methods", "backbones", "recipes", "datasets"])
def test_a_list_names_what_there_is(kind: str) -> None:
    expected = {
        "methods": "synco_v2",
        "backbones": "timm/",
        "recipes": "moby_swin_tiny.yaml",
        "datasets": "pets",
    }
    lines = listing(kind).splitlines()
    assert any(expected[kind] in line for line in lines)
    assert len({line.split()[0] for line in lines}) == len(lines)


def configured(path: str, **flags: Value) -> None:
    """Check the configuration of a pretraining."""
    args = argparse.Namespace(cfg=path, opts=[], eval=False, throughput=False, show_config=False)
    given = {key.replace("__", "."): value for key, value in flags.items()}
    assert programs.answer_from_config("pretrain", args, given) == ""


@pytest.mark.parametrize(
    ("flags", "world", "fits"),
    [
        ({}, 1, True),
        ({"TRAIN__BATCH_SIZE": 96}, 1, False),
        ({"TRAIN__BATCH_SIZE": 512, "TRAIN__ACCUMULATION_STEPS": 2}, 1, True),
        ({"TRAIN__BATCH_SIZE": 512, "TRAIN__ACCUMULATION_STEPS": 2}, 2, False),
        ({"TRAIN__BATCH_SIZE": 1024, "MODEL__SYNCO__SYMMETRIC": True}, 1, False),
        ({"TRAIN__BATCH_SIZE": 1024, "MODEL__BATCHFORMER__ENABLED": True}, 1, False),
        ({"TRAIN__BATCH_SIZE": 96, "MODEL__NAME": "byol"}, 1, True),
    ],
)
def test_the_queue_holds_whole_steps(
    flags: dict[str, Value], world: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    if fits:
        configured(DEMO, **flags)
        return
    with pytest.raises(ConfigError, match=r"MODEL\.SYNCO\.QUEUE_SIZE: 1024 is not a multiple"):
        configured(DEMO, **flags)


def test_images_without_a_val_split_are_no_start_with_k_nn(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    flags: dict[str, Value] = {"DATA__DATASET": "imagefolder", "DATA__PATH": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"val does not exist; make it, or add --opts KNN\.EVERY"):
        configured(DEMO, **flags)
    configured(DEMO, KNN__EVERY_EPOCHS=0, **flags)
    (tmp_path / "val").mkdir()
    configured(DEMO, **flags)


def test_graphs_and_accumulation_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"--accumulation-steps\) to 1"):
        configured(DEMO, TRAIN__CUDA_GRAPHS=True, TRAIN__ACCUMULATION_STEPS=2)


def test_a_key_of_detection_names_its_program(tmp_path: Path) -> None:
    file = tmp_path / "boxes.yaml"
    file.write_text("MODEL: {RCNN: {NECK: fpn}}\n")
    with pytest.raises(ConfigError, match=r"use detection/main_detection\.py"):
        load_config(declare(method_options()), [file])


def test_each_value_has_an_origin(tmp_path: Path) -> None:
    base, file = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("TRAIN: {EPOCHS: 7}\nOPTIM: {BASE_LR: 1.0}\n")
    file.write_text("_BASE_: base.yaml\nOPTIM: {BASE_LR: 2.0}\n")
    schema = declare(method_options())
    given: dict[str, Value] = {"TAG": "t", "LINEAR.EPOCHS": 3, "HELD_OUT.EVERY_EPOCHS": 1}
    cfg, origins = load_with_origins(schema, [file], ["SEED", "4"], given)
    expected = {
        "LINEAR.EPOCHS": "--epochs",
        "TRAIN.EPOCHS": str(base),
        "OPTIM.BASE_LR": str(file),
        "SEED": "--opts",
    }
    expected |= {"TAG": "--tag", "HELD_OUT.EVERY_EPOCHS": "command line", "DEVICE": "default"}
    assert {key: origins[key] for key in expected} == expected
    shown = programs.show_config(cfg, origins, schema, "pretrain").splitlines()
    assert any(line.split()[:3] == ["OPTIM.BASE_LR", "2.0", str(file)] for line in shown)
    assert not any(line.startswith(("LINEAR.", "MODEL.MOBY.")) for line in shown)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MODEL: {NAME: moco_v2\nTAG: x\n", ["line 2, column 4", "TAG: x\n     ^"]),
        ("TRAIN:\n\tEPOCHS: 3\n", ["line 2, column 1", "a tab: indent with spaces", "EPOCHS: 3"]),
    ],
)
def test_an_error_of_yaml_points_at_its_place(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(declare(method_options()), [file])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("program", "name", "file"),
    [("linear", "moby", "linear_moby.yaml"), ("semisup", "deit", "finetune_deit.yaml")],
)
def test_a_protocol_comes_after_the_configuration(program: Program, name: str, file: str) -> None:
    found = programs.config_files(program, argparse.Namespace(cfg="c.yaml", protocol=name))
    assert found[0] == "c.yaml"
    assert isinstance(found[1], Path)
    assert found[1].name == file
    assert found[1].is_file()
    assert programs.config_files(program, argparse.Namespace(cfg="c.yaml", protocol=None)) == [
        "c.yaml"
    ]


@pytest.mark.parametrize(
    ("room", "method", "other"),
    [("detection", "RCNN", "SIT"), ("segmentation", "SEGMENTER", "SIT")],
)
def test_a_transfer_shows_its_configuration_and_starts_nothing(
    tmp_path: Path, room: str, method: str, other: str
) -> None:
    main = f"{room}/main_{room}.py"
    words = ("--show-config", "--output", str(tmp_path / "o"), "--opts", "TRAIN.BATCH_SIZE", "3")
    done = answered(tmp_path, *words, main=main)
    assert (done.returncode, done.stderr) == (0, "")
    shown = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert shown["TRAIN.BATCH_SIZE"] == ["3", "--opts"]
    assert shown[f"{room.upper()}.MAX_ITER"][1] == "default"
    assert any(key.startswith(f"MODEL.{method}.") for key in shown)
    assert not any(key.startswith((f"MODEL.{other}.", "PROBE.", "KNN.")) for key in shown)
    assert not (tmp_path / "o").exists()
    wrong = answered(tmp_path, "--output", "o", "--opts", "PROBE.ONLINE", "True", main=main)
    assert wrong.returncode == 2
    assert "there is no key 'PROBE.ONLINE'" in wrong.stderr


def test_what_torch_reads_when_it_loads_is_set_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.cli import Parser, answer_at_once

    for name in ("OMP_WAIT_POLICY", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    parser = Parser()
    parser.add_argument("--size")
    answer_at_once(parser, ["--size", "3"])
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
