"""Every configuration key reaches something: in the originals six keys of a yaml never reached the model.

The mains run as they are on a few images while the tree records which leaves are read; then each
option of a method and of a backbone is changed, and the module that is built must differ.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from yacs.config import CfgNode

import engine.checkpointing
import engine.run
import main_linear
import main_pretrain
import main_semisup
import utils.config.load
from models import FRAMEWORKS, assemble_framework, framework_options
from models.parts.negatives import SyntheticConfig
from models.parts.norm import SplitBatchNorm2d
from utils.config.load import leaves
from utils.config.schema import declare
from utils.config.sections import method_section, section_options
from utils.logger import close_logger

SCHEMA = declare(framework_options())
DEFAULTS = SCHEMA.defaults()
ALL_KEYS = {key for key, _ in leaves(DEFAULTS)}

# What belongs to the other main; together they leave out nothing.
NOT_PRETRAINING = {key for key in ALL_KEYS if key.startswith(("LINEAR.", "FINETUNE."))}
_PRETRAINING_ONLY = (
    *("OPTIM.", "SCHEDULE.", "AUG.RECIPE", "AUG.CROP_MIN"),
    # VIEW_SIZE and NUMBER say how a Swin was trained
    *("AUG.LOCAL_CROPS.SIZE", "AUG.LOCAL_CROPS.SCALE"),
    *(f"MODEL.{name.upper()}." for name in FRAMEWORKS),
)
NOT_PROBING = {key for key in ALL_KEYS if key.startswith((*_PRETRAINING_ONLY, "FINETUNE."))} | {
    *(
        "MODEL.NAME",
        "MODEL.STACK_VIEWS",
        *("TRAIN.EPOCHS", "TRAIN.STEPS"),
        "TRAIN.BATCH_SIZE",
        "TRAIN.USE_CHECKPOINT",
    ),
    *("TRAIN.COMPILE", "TRAIN.CUDA_GRAPHS", "KNN.EVERY_EPOCHS", "DATA.DECODE"),
    *("DATA.REPEATED_AUG", "HELD_OUT.EVERY_EPOCHS", "PROBE.ONLINE", "PROBE.LR"),
}
NOT_FINETUNING = {
    key for key in ALL_KEYS if key.startswith((*_PRETRAINING_ONLY, "LINEAR.", "KNN.", "HELD_OUT."))
} | {
    "MODEL.NAME",
    "MODEL.STACK_VIEWS",
    "TRAIN.EPOCHS",
    "TRAIN.STEPS",
    "TRAIN.BATCH_SIZE",
    "TRAIN.COMPILE",
    "TRAIN.CUDA_GRAPHS",
    "DATA.DECODE",
    "DATA.REPEATED_AUG",
    "PROBE.ONLINE",
    "PROBE.LR",
}
assert not NOT_PRETRAINING & NOT_PROBING & NOT_FINETUNING


class Recorder(CfgNode):
    """A configuration that notes the dotted key of each leaf that is read from it."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if not isinstance(value, CfgNode):
            dict.__getattribute__(self, "__dict__")["seen"].add(self.__dict__["path"] + key)
        return value

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default


def recording(node: CfgNode, seen: set[str], path: str = "") -> Recorder:
    copied = {
        key: recording(value, seen, f"{path}{key}.") if isinstance(value, CfgNode) else value
        for key, value in dict.items(node)
    }
    recorder = Recorder()
    dict.update(recorder, copied)
    recorder.__dict__.update(seen=seen, path=path)
    return recorder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Yield the keys that mains read from now on; loading, writing and comparing the tree do not count."""
    seen: set[str] = set()
    load, to_yaml, compare = (
        utils.config.load.load_config,
        utils.config.load.to_yaml,
        utils.config.load.compare_for_resume,
    )
    plain: dict[int, CfgNode] = {}

    def load_recording(*args: Any, **kwargs: Any) -> CfgNode:
        cfg = load(*args, **kwargs)
        recorder = recording(cfg, seen)
        plain[id(recorder)] = cfg
        return recorder

    def load_with_origins(*args: Any, **kwargs: Any) -> tuple[CfgNode, dict[str, str]]:
        return load_recording(*args, **kwargs), {}

    monkeypatch.setattr(main_pretrain, "load_with_origins", load_with_origins)
    for module in (main_linear, main_semisup):
        monkeypatch.setattr(module, "load_config", load_recording)
    for module in (engine.run, engine.checkpointing):
        monkeypatch.setattr(module, "to_yaml", lambda cfg: to_yaml(plain[id(cfg)]))
    monkeypatch.setattr(
        engine.checkpointing,
        "compare_for_resume",
        lambda saved, cfg, task: compare(saved, plain[id(cfg)], task),
    )
    yield seen
    close_logger()


def start(monkeypatch: pytest.MonkeyPatch, main: Callable[[], int], *argv: str) -> None:
    monkeypatch.setattr("sys.argv", ["main.py", *argv])
    assert main() == 0
    close_logger()


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(8):
        path = root / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)
    return root


DIGITS = "DATA.DATASET digits DATA.IMG_SIZE 8 DATA.NUM_WORKERS 0 AUG.RECIPE digits TRAIN.BATCH_SIZE 512".split()
TINY = "MODEL.BACKBONE.NAME resnet8 MODEL.BACKBONE.STEM cifar_stride2 TRAIN.EPOCHS 1 LOG.PRINT_FREQ 1".split()
SMALL = {
    "moco_v2": "QUEUE_SIZE 512 OUT_DIM 8".split(),
    "synco": "QUEUE_SIZE 512 OUT_DIM 8 NUM_HARD 8 NUM_SYNTHETIC [2,2,2,2,2,2]".split(),
    "byol": "HIDDEN_DIM 8 OUT_DIM 8".split(),
    "moby": "QUEUE_SIZE 512 HIDDEN_DIM 8 OUT_DIM 8".split(),
    "synco_v2": "QUEUE_SIZE 512 HIDDEN_DIM 8 OUT_DIM 8 NUM_HARD 8 NUM_SYNTHETIC [2,2,2,2,2,2]".split(),
    "mocov3": "HIDDEN_DIM 8 OUT_DIM 8".split(),
    "batchformer": "HIDDEN_DIM 8 OUT_DIM 8".split(),
    "sit": "OUT_DIM 8".split(),
}


def method_opts(name: str) -> list[str]:
    words = SMALL.get(name, [])
    prefixed = [
        f"MODEL.{method_section(name)}.{word}" if i % 2 == 0 else word
        for i, word in enumerate(words)
    ]
    return ["MODEL.NAME", name, *prefixed]


def test_every_key_is_read_by_some_run(
    read: set[str], tmp_path: Path, folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--output", str(tmp_path), "--device", "cpu"]
    optimisers = {
        "moco_v2": "sgd",
        "synco": "lars",
        "byol": "adamw",
        "moby": "adamw",
        "synco_v2": "sgd",
    }
    for name in FRAMEWORKS:
        opts = [
            *TINY,
            *DIGITS,
            *method_opts(name),
            "OPTIM.NAME",
            optimisers.get(name, "sgd"),
            "NAME",
            name,
        ]
        opts += ["OPTIM.EXCLUDE_TOKENS", "True", "KNN.EVERY_EPOCHS", "1" if name == "byol" else "0"]
        opts += ["PROBE.ONLINE", str(name == "byol")]
        start(monkeypatch, main_pretrain.main, *out, "--opts", *opts)
    # once more: resumed, nothing left to do
    start(monkeypatch, main_pretrain.main, *out, "--opts", *opts)
    files = ["--dataset", "imagefolder", "--data-path", str(folder_of_images), "--batch-size", "4"]
    opts = [
        *TINY,
        "DATA.IMG_SIZE",
        "8",
        "DATA.NUM_WORKERS",
        "0",
        *method_opts("byol"),
        "NAME",
        "files",
    ]
    start(monkeypatch, main_pretrain.main, *out, *files, "--opts", *opts)
    unread = ALL_KEYS - read - NOT_PRETRAINING
    assert not unread, f"main_pretrain.py leaves unread: {sorted(unread)}"
    assert not NOT_PRETRAINING & read, "needs no exception"
    read.clear()
    for optimiser in ("sgd", "adamw", "lars"):
        opts = [
            *TINY,
            *DIGITS,
            "NAME",
            "byol",
            *method_opts("byol"),
            "LINEAR.OPTIM.NAME",
            optimiser,
        ]
        opts += ["TAG", "default", "LINEAR.BATCH_SIZE", "512", "LINEAR.EPOCHS", "1"]
        probe = ["--pretrained", str(tmp_path / "byol" / "default")]
        start(
            monkeypatch,
            main_linear.main,
            *out,
            *probe,
            "--opts",
            *opts,
            "NAME",
            f"probe_{optimiser}",
        )
    unread = ALL_KEYS - read - NOT_PROBING
    assert not unread, f"main_linear.py leaves unread: {sorted(unread)}"
    assert not NOT_PROBING & read, "needs no exception"


def test_every_key_of_fine_tuning_is_read_by_some_run(
    read: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--output", str(tmp_path), "--device", "cpu", "--pretrained", "none"]
    for optimiser, weights in {"sgd": "freeze", "adamw": "finetune", "lars": "finetune"}.items():
        opts = [
            *TINY,
            *DIGITS,
            "NAME",
            "x",
            "FINETUNE.OPTIM.NAME",
            optimiser,
            "FINETUNE.WEIGHTS",
            weights,
        ]
        opts += ["FINETUNE.LR_BACKBONE", "0.01", "FINETUNE.EPOCHS", "1", "FINETUNE.HOLD_OUT", "0.2"]
        flags = ["--run-name", optimiser, "--batch-size", "512"]  # names are made of all keys
        start(monkeypatch, main_semisup.main, *out, *flags, "--opts", *opts)
    start(monkeypatch, main_semisup.main, *out, *flags, "--opts", *opts)
    unread = ALL_KEYS - read - NOT_FINETUNING
    assert not unread, f"main_semisup.py leaves unread: {sorted(unread)}"
    assert not NOT_FINETUNING & read, "needs no exception"


def test_the_recorder_notices_reads_and_only_reads() -> None:
    seen: set[str] = set()
    node = recording(DEFAULTS, seen)
    assert isinstance(node.OPTIM, CfgNode)
    assert "SEED" in node
    assert seen == set()
    assert node.SEED == node["SEED"] == 0
    assert node.OPTIM.BASE_LR == 0.03
    assert section_options(node.MODEL.BYOL) == section_options(DEFAULTS.MODEL.BYOL)
    assert seen == {"SEED", "OPTIM.BASE_LR", *(f"MODEL.BYOL.{key}" for key in DEFAULTS.MODEL.BYOL)}


# ---- options arrive as values --------------------------------------------------------------------


def other(value: Any, name: str) -> Any:
    if name == "momentum_schedule":
        return "cosine" if value == "constant" else "constant"
    words = {
        "variant": "gmml",
        "drop_type": "noise",
        "batch_norm": "sync",
        "stem": "cifar",
        "name": "resnet18",
    }
    if name in words:
        return words[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (list, tuple)):
        return [entry + 1 for entry in value]
    return value / 2 if isinstance(value, float) else value + 1


def described(module: nn.Module) -> dict[str, Any]:
    """Return what distinguishes a module: its structure and every plain attribute of every part."""
    found: dict[str, Any] = {"structure": str(module)}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, (bool, int, float, str, tuple, SyntheticConfig)):
                found[f"{path}.{name}"] = value
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        found[name] = (tuple(tensor.shape), tensor.requires_grad)
    return found


def build(
    method: str, options: dict[str, Any], backbone: dict[str, Any] | None = None, **more: Any
) -> nn.Module:
    with torch.device("meta"):
        return assemble_framework(
            method, options, backbone or {"name": "resnet8", "stem": "cifar"}, **more
        )


OPTIONS = [
    (method, name)
    for method, options in framework_options().items()
    for name in options
    if method != "batchformer"  # a module, not a method: see below
]


@pytest.mark.parametrize(("method", "name"), OPTIONS)
def test_each_option_of_a_method_changes_what_is_built(method: str, name: str) -> None:
    section = DEFAULTS.MODEL[method.upper()].clone()
    if (method, name) == ("sit", "hidden_dim"):  # of the later variant's heads
        section.VARIANT = "gmml"
    before = section_options(section)
    section[name.upper()] = other(section[name.upper()], name)
    after = section_options(section)
    assert [key for key in before if before[key] != after[key]] == [name]
    old, new = described(build(method, before)), described(build(method, after))
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    assert changed, f"MODEL.{method.upper()}.{name.upper()} reaches nothing"
    holders = [key for key in changed if key.endswith((f".{name}", ".synthetic_config"))]
    for key in holders:  # where an attribute carries the option's name, it carries its value
        assert after[name] in (new[key], getattr(new[key], name, after[name]))


@pytest.mark.parametrize("name", framework_options()["batchformer"])
def test_each_option_of_batchformer_changes_what_is_built(name: str) -> None:
    before = {**section_options(DEFAULTS.MODEL.BATCHFORMER), "enabled": name != "enabled"}
    changes = {"loss": "joint", "num_heads": 8, "dropout": 0.1, "num_layers": 2}
    after = {**before, name: changes.get(name, not before[name])}
    old, new = (described(build("moco_v2", {}, batchformer=options)) for options in (before, after))
    assert old != new, f"MODEL.BATCHFORMER.{name.upper()} reaches nothing"


@pytest.mark.parametrize("method", ["synco", "synco_v2"])
def test_the_synthetic_options_arrive_each_in_its_place(method: str) -> None:
    options = {
        **section_options(DEFAULTS.MODEL[method.upper()]),
        **{
            "num_hard": 30,
            "num_synthetic": [1, 2, 3, 4, 5, 6],
            "sigma": 0.1,
            "delta": 0.2,
            "eta": 0.3,
        },
        "legacy_gradients": True,
    }
    assert build(method, options).synthetic_config == SyntheticConfig(
        30, (1, 2, 3, 4, 5, 6), 0.1, 0.2, 0.3, True
    )


@pytest.mark.parametrize("method", ["moco_v2", "synco"])
def test_the_batch_norm_modes_of_moco_arrive(method: str) -> None:
    modes = {}
    for mode in ("shuffle", "sync", "local"):
        framework = build(method, {"batch_norm": mode})
        modes[mode] = (framework.shuffle, framework.sync_batch_norm)
    assert modes == {"shuffle": (True, False), "sync": (False, True), "local": (False, False)}
    split = build(method, {"bn_groups": 4})
    groups = {part.num_splits for part in split.modules() if isinstance(part, SplitBatchNorm2d)}
    assert groups == {4}


BACKBONE_CASES: dict[str, dict[str, Any]] = {
    "name": {},
    "drop_path": {},
    "target_drop_path": {},
    "stem": {},
    "patch_size": {"name": "deit_tiny", "stem": "imagenet"},
    "num_tokens": {"name": "deit_tiny", "stem": "imagenet"},
    "zero_init_residual": {},
    "freeze_patch_embed": {"name": "deit_tiny", "stem": "imagenet"},
    "norm_eps": {"name": "swin_tiny", "stem": "imagenet"},
}


def test_every_option_of_a_backbone_is_tried() -> None:
    assert {key.lower() for key in DEFAULTS.MODEL.BACKBONE} == set(BACKBONE_CASES)


@pytest.mark.parametrize("name", BACKBONE_CASES)
def test_each_option_of_a_backbone_changes_what_is_built(name: str) -> None:
    before = {**section_options(DEFAULTS.MODEL.BACKBONE), "name": "resnet8", **BACKBONE_CASES[name]}
    after = copy.copy(before)
    changes = {
        "drop_path": 0.3,
        "target_drop_path": 0.3,
        "patch_size": 8,
        "num_tokens": 2,
        "norm_eps": 1e-4,
    }
    after[name] = changes.get(name, other(before[name], name))
    if name == "zero_init_residual":  # only values differ, so they must exist
        old, new = (assemble_framework("byol", {}, options) for options in (before, after))
        weights = [framework.online.backbone.layer1[0].bn2.weight for framework in (old, new)]
        assert (float(weights[0].detach().sum()) != 0, float(weights[1].detach().sum())) == (
            True,
            0.0,
        )
        return
    old, new = (described(build("byol", {}, options, img_size=32)) for options in (before, after))
    changed = {
        key.split(".")[0] for key in old.keys() | new.keys() if old.get(key) != new.get(key)
    } - {"structure"}
    expected = {
        "drop_path": {"online"},
        "freeze_patch_embed": {"online"},
        "target_drop_path": {"target"},
    }
    assert changed & {"online", "target"} == expected.get(name, {"online", "target"})


def test_activation_checkpointing_concerns_the_online_network_only() -> None:
    framework = build("byol", {}, {"name": "deit_tiny"}, img_size=32, use_checkpoint=True)
    assert framework.online.backbone.grad_checkpointing
    assert not framework.target.backbone.grad_checkpointing
