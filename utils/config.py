"""The configuration: every key with its default, yaml files with ``_BASE_``, overrides, and one kind of error.

Precedence: defaults < ``_BASE_`` files < yaml < ``--opts`` < explicit flags. The tree is frozen once; numbers derived
from it live in ``utils.plan.Plan``.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

BASE_KEY = "_BASE_"
_MAX_BASES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names key or file, value and remedy."""


def _optimizer(**changes: Any) -> CfgNode:
    node = CfgNode(
        {
            "NAME": "sgd",  # sgd | adamw | lars
            "BASE_LR": 0.03,
            "WARMUP_LR": 0.0,  # where the warm-up starts
            "MIN_LR": 0.0,  # where the cosine ends
            "LR_BATCH": 0,  # multiply the three rates by global batch / this; 0: use them as they are
            "WEIGHT_DECAY": 1e-4,
            "EXCLUDE_1D": False,  # no decay (and in LARS no scaling) for biases and norms
            "EXCLUDE_TOKENS": False,  # no decay for class tokens, positions and relative position tables either
            "MOMENTUM": 0.9,
            "NESTEROV": False,
            "BETAS": [0.9, 0.999],
            "EPS": 1e-8,
            "TRUST_COEFFICIENT": 0.001,  # LARS
            "CLIP_GRAD": 0.0,  # global L2 norm; 0: no clipping
        }
    )
    for key, value in changes.items():
        node[key] = value
    return node


def _schedule() -> CfgNode:
    return CfgNode(
        {
            "NAME": "cosine",  # cosine | linear | step | milestones | constant
            "WARMUP_EPOCHS": 0,
            "PER_EPOCH": False,  # hold the rate for an epoch (MoCo) or change it at every step
            "SHIFTED": False,  # start the cosine after the warm-up (MoCo v3) or at step 0 (timm, MoBY)
            "LAG": False,  # the one-step lag of the published MoBY and SiT code
            "MILESTONES": [120, 160],  # epochs, for milestones
            "GAMMA": 0.1,  # factor, for milestones and step
            "DECAY_EPOCHS": 30,  # for step
        }
    )


def default_config(methods: Mapping[str, Mapping[str, Any]]) -> CfgNode:
    """Return the whole tree; ``methods`` (name -> options with defaults) become ``MODEL.<NAME>`` sections."""
    linear_optimizer = _optimizer(WEIGHT_DECAY=0.0)
    del linear_optimizer["BASE_LR"]  # LINEAR.LRS stands for it
    tree = CfgNode(
        {
            "NAME": "",  # of the run's folder OUTPUT/NAME/TAG; empty: the yaml's file name
            "TAG": "default",
            "OUTPUT": "output",
            "SEED": 0,
            "DEVICE": "auto",  # auto: cuda where there is one; cpu, cuda
            "RESUME": "",  # a checkpoint to go on from; empty: the newest valid one of the run's folder, if any
            "DATA": {
                "DATASET": "imagefolder",
                "PATH": "",
                "IMG_SIZE": 224,
                "NUM_WORKERS": 8,
                "CACHE_MODE": "part",  # zip only: no | full | part
                "DOWNLOAD": False,
                "MAX_BAD_FRACTION": 1e-4,  # of an epoch's images that may be unreadable before the run stops
                "TIMEOUT": 300.0,  # seconds to wait for a loader worker
            },
            "MODEL": {
                "NAME": "moco_v2",
                "BACKBONE": {
                    "NAME": "resnet50",
                    "DROP_PATH": 0.0,
                    "TARGET_DROP_PATH": 0.0,
                    "STEM": "imagenet",  # ResNets: imagenet | cifar | cifar_stride2
                    "PATCH_SIZE": 0,  # transformers; 0: the model's own
                    "ZERO_INIT_RESIDUAL": False,
                    "FREEZE_PATCH_EMBED": False,
                },
            },
            "AUG": {"RECIPE": "moco_v2", "CROP_MIN": 0.0},  # CROP_MIN: smallest crop area; 0: the recipe's
            "OPTIM": _optimizer(),
            "SCHEDULE": _schedule(),
            "TRAIN": {
                "EPOCHS": 200,
                "BATCH_SIZE": 64,  # per process and micro-batch
                "ACCUMULATION_STEPS": 1,
                "PRECISION": "fp32",  # fp32 | bf16 | fp16
                "CHANNELS_LAST": True,
                "USE_CHECKPOINT": False,
                "DETERMINISTIC": False,  # bit-reproducible kernels, slower on a GPU
            },
            "KNN": {
                "EVERY_EPOCHS": 0,  # k-NN accuracy during pretraining; 0: never
                "K": [10, 20, 100, 200],
                "TEMPERATURE": 0.07,
            },
            "CHECKPOINT": {
                "EVERY_EPOCHS": 1,
                "EVERY_STEPS": 0,  # also every so many optimiser steps; 0: only by epochs
                "KEEP_LAST": 2,
                "KEEP_EVERY_EPOCHS": 0,  # keep these for good; 0: none
            },
            "LOG": {"PRINT_FREQ": 10, "TENSORBOARD": True},
            "LINEAR": {
                "LRS": [30.0],  # a grid, all trained in one pass over the features
                "EPOCHS": 100,
                "BATCH_SIZE": 256,
                "HEAD_INIT": "normal",  # normal (std 0.01) | trunc (std 0.02)
                "LABEL_SMOOTHING": 0.0,
                "DROP_PATH": 0.0,  # of the frozen backbone while the heads train (MoBY: 0.2)
                "OPTIM": linear_optimizer,
                "SCHEDULE": _schedule(),
            },
        }
    )
    for name, options in methods.items():
        tree.MODEL[name.upper()] = CfgNode({key.upper(): _plain(value) for key, value in options.items()})
    return tree


# Keys that may differ when a run goes on. All others are its identity: changing one would be another run.
LOCAL_KEYS = (
    *("NAME", "TAG", "OUTPUT", "DEVICE", "RESUME", "DATA.PATH", "DATA.NUM_WORKERS", "DATA.CACHE_MODE"),
    *("DATA.DOWNLOAD", "DATA.TIMEOUT", "LOG.PRINT_FREQ", "LOG.TENSORBOARD"),
)
TUNABLE_KEYS = (
    *("DATA.MAX_BAD_FRACTION", "TRAIN.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS", "TRAIN.PRECISION"),
    *("TRAIN.CHANNELS_LAST", "TRAIN.USE_CHECKPOINT", "TRAIN.DETERMINISTIC", "KNN.*", "CHECKPOINT.*"),
)


def key_class(key: str) -> str:
    """Return ``local``, ``tunable`` or ``identity`` for a dotted key."""
    section = f"{key.split('.')[0]}.*"
    if key in LOCAL_KEYS or section in LOCAL_KEYS:
        return "local"
    return "tunable" if key in TUNABLE_KEYS or section in TUNABLE_KEYS else "identity"


def load_config(
    defaults: CfgNode,
    files: Sequence[str | Path | None] = (),
    opts: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> CfgNode:
    """Merge yaml ``files``, ``opts`` (key, value, key, value, ...) and ``flags`` (dotted key -> value) and freeze.

    The first file names the run, unless ``NAME`` does; a ``None`` among them is passed over.

    Raises ``ConfigError`` for an unknown key, a value of the wrong type or out of range, a bad or cyclic file.
    """
    tree = defaults.clone()
    paths = [Path(file) for file in files if file is not None]
    for path in paths:
        for source, values in _read_chain(path):
            _merge(tree, values, source)
    if len(opts) % 2:
        raise ConfigError(
            f"--opts: {' '.join(opts)!r} is not a list of KEY VALUE pairs; the last value is missing"
        )
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        assign(tree, key, _parse_scalar(text, key), "--opts")
    for key, value in (flags or {}).items():
        assign(tree, key, value, "command line")
    tree.NAME = tree.NAME or (paths[0].stem if paths else tree.MODEL.NAME)
    validate(tree)
    tree.freeze()
    return tree


def assign(tree: CfgNode, key: str, value: Any, source: str) -> None:
    """Set the leaf with the dotted name ``key``, coerced to its default's type."""
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, CfgNode) or part not in node:
            raise ConfigError(f"{source}: there is no key {key!r}{_nearest(key, tree)}")
        if depth < len(parts) - 1:
            node = node[part]
    if isinstance(node[parts[-1]], CfgNode):
        raise ConfigError(
            f"{source}: {key} is a section; set a key of it, e.g. {key}.{next(iter(node[parts[-1]]))}"
        )
    node[parts[-1]] = _coerce(node[parts[-1]], value, key, source)


def leaves(tree: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every (dotted key, value) of the tree."""
    for key, value in tree.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_yaml(tree: CfgNode) -> str:
    """Write the tree as YAML text, which ``yaml.safe_load`` reads back."""
    nested = {
        key: yaml.safe_load(to_yaml(v)) if isinstance(v, CfgNode) else _plain(v) for key, v in tree.items()
    }
    return yaml.safe_dump(nested, sort_keys=False)


def section_options(node: CfgNode) -> dict[str, Any]:
    """Return a section as keyword arguments, names in lower case."""
    return {key.lower(): value for key, value in node.items()}


def compare_for_resume(saved_yaml: str, tree: CfgNode) -> list[str]:
    """Return the tunable changes against the saved configuration; refuse a change of identity.

    Raises ``ConfigError`` naming each identity key with its old and new value.
    """
    saved = dict(leaves(CfgNode(yaml.safe_load(saved_yaml))))
    changed = [
        (key, saved.get(key, "absent"), value)
        for key, value in leaves(tree)
        if saved.get(key, "absent") != value and key_class(key) != "local"
    ]
    fatal = [f"{key}: {old!r} -> {new!r}" for key, old, new in changed if key_class(key) == "identity"]
    if fatal:
        raise ConfigError(
            "the checkpoint belongs to another configuration ("
            + "; ".join(fatal)
            + "); restore these values, or start a run of its own with another --tag"
        )
    return [f"{key}: {old!r} -> {new!r}" for key, old, new in changed]


def validate(tree: CfgNode) -> None:
    """Refuse values that no run can use: ranges, choices, folder names."""
    for key in ("TAG", "NAME"):
        if not _NAME.fullmatch(str(tree[key])):
            raise ConfigError(
                f"{key}: {tree[key]!r} is no folder name; use letters, digits, '.', '_' and '-'"
            )
    for key, value in leaves(tree):
        name = key.rsplit(".", 1)[-1]
        low = _MINIMUM.get(key, _MINIMUM.get(name, 0))
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and number < low:
                raise ConfigError(f"{key}: {number} is out of range; use a value of at least {low}")
            if name in _FRACTIONS and number > 1:
                raise ConfigError(f"{key}: {number} is out of range; use a value between 0 and 1")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ConfigError(f"{key}: {value!r} is not one of {', '.join(_CHOICES[name])}")
    for key in ("OPTIM.NAME", "LINEAR.OPTIM.NAME"):
        node = tree.LINEAR.OPTIM if key.startswith("LINEAR") else tree.OPTIM
        if node.NAME not in ("sgd", "adamw", "lars"):
            raise ConfigError(f"{key}: {node.NAME!r} is not one of sgd, adamw, lars")
    if not tree.LINEAR.LRS:
        raise ConfigError("LINEAR.LRS: the grid of learning rates is empty; give at least one, e.g. [30.0]")


_MINIMUM = {
    **{name: 1 for name in ("IMG_SIZE", "EPOCHS", "BATCH_SIZE", "ACCUMULATION_STEPS", "PRINT_FREQ", "K")},
    **{name: 1 for name in ("QUEUE_SIZE", "OUT_DIM", "HIDDEN_DIM", "DECAY_EPOCHS", "BN_GROUPS", "NUM_HARD")},
    "KEEP_LAST": 2,  # the newest may be the one that a crash spoilt
    "TEMPERATURE": 1e-6,
    "TIMEOUT": 1.0,
}
_FRACTIONS = (
    "DROP_PATH",
    "TARGET_DROP_PATH",
    "BASE_MOMENTUM",
    "MOMENTUM",
    "LABEL_SMOOTHING",
    "MAX_BAD_FRACTION",
)
_FRACTIONS = (*_FRACTIONS, "CROP_MIN")
_CHOICES = {
    "PRECISION": ("fp32", "bf16", "fp16"),
    "CACHE_MODE": ("no", "full", "part"),
    "HEAD_INIT": ("normal", "trunc"),
}


def _read_chain(file: Path, seen: tuple[Path, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file name, values) of the bases first, then of the file itself."""
    path = file.resolve()
    if path in seen:
        raise ConfigError(f"{file}: {BASE_KEY} comes back to {path.name}; remove the cycle")
    if len(seen) > _MAX_BASES:
        raise ConfigError(f"{file}: more than {_MAX_BASES} nested {BASE_KEY} files; flatten them")
    values = _read_yaml(file)
    bases = values.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{file}: {BASE_KEY} must be a path or a list of paths, not {bases!r}")
    for base in bases:
        yield from _read_chain(file.parent / base, (*seen, path))
    yield str(file), values


def _read_yaml(file: Path) -> dict[str, Any]:
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"{file}: a configuration is a .yaml file; nothing else is read, and none is executed"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({error}); check the path of --cfg or {BASE_KEY}"
        ) from error
    return _parse_yaml(text, str(file))


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader, only stricter
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"{source}: is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: holds a {type(values).__name__}, not KEY: value lines")
    return values


def _parse_scalar(text: str, key: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader, only stricter
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"--opts {key}: {text!r} is no value: {' '.join(str(error).split())}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars (2e-4 is a number, 010 is not 8, no is not False), no duplicate keys, no aliases."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - yaml's own protocol

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.YAMLError(
                    f"key {key_node.value!r} stands twice (line {key_node.start_mark.line + 1})"
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _merge(tree: CfgNode, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            _merge(tree, value, source, f"{dotted}.")
        else:
            assign(tree, dotted, value, source)


def _coerce(default: Any, value: Any, key: str, source: str) -> Any:
    wanted = type(default)
    where = f"{source}: {key}"
    if wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: {value} is not a finite number")
        return float(value)
    if wanted is list and isinstance(value, (list, tuple)):
        return [_coerce(default[0], item, key, source) for item in value] if default else list(value)
    if wanted is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # --tag 42
    if type(value) is wanted:
        return value
    raise ConfigError(
        f"{where}: {value!r} is a {type(value).__name__}; give a {wanted.__name__} such as {default!r}"
    )


def _nearest(key: str, tree: CfgNode) -> str:
    known = [name for name, _ in leaves(tree)]
    close = difflib.get_close_matches(key.upper(), known, n=2, cutoff=0.5)
    if not close:  # the right name in the wrong section
        close = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1].upper()][:2]
    return f"; did you mean {' or '.join(close)}?" if close else "; see utils/config.py for all keys"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
