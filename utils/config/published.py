"""Translate the yaml files of MoBY and SynCo-v2 into keys of this repository.

Both have the tree of Swin's published code. A translated file has our recipe of the same
method as its base: there are what that code does without a key (scaled rates, no decay of biases).
"""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils.config.key import Value

_RECIPES = Path(__file__).resolve().parents[2] / "configs" / "_base_"
# Their method -> our method, and the recipe that is the base of a translated file.
_METHODS = {
    "moby": ("moby", "moby_recipe.yaml"),
    "byol": ("byol", "byol_recipe.yaml"),
    "synco": ("synco_v2", "synco_v2_recipe.yaml"),
}
# What the published code takes where a yaml is silent, if our recipe differs.
_DEFAULTS: dict[str, Value] = {
    "DATA.BATCH_SIZE": 64,
    "TRAIN.BASE_LR": 5e-4,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.WEIGHT_DECAY": 0.05,
}
# {} is the section of the method.
_RENAMED = {
    "DATA.BATCH_SIZE": "TRAIN.BATCH_SIZE",
    "DATA.DATA_PATH": "DATA.PATH",
    "MODEL.NAME": "NAME",
    "MODEL.RESUME": "RESUME",
    "MODEL.ONLINE_DROP_PATH_RATE": "MODEL.BACKBONE.DROP_PATH",
    "MODEL.TARGET_DROP_PATH_RATE": "MODEL.BACKBONE.TARGET_DROP_PATH",
    "MODEL.STOP_GRAD_CONV1": "MODEL.BACKBONE.FREEZE_PATCH_EMBED",
    "MODEL.CONTRAST_MOMENTUM": "MODEL.{}.BASE_MOMENTUM",
    "MODEL.CONTRAST_TEMPERATURE": "MODEL.{}.TEMPERATURE",
    "MODEL.CONTRAST_NUM_NEGATIVE": "MODEL.{}.QUEUE_SIZE",
    "MODEL.PROJ_NUM_LAYERS": "MODEL.{}.PROJ_NUM_LAYERS",
    "MODEL.PRED_NUM_LAYERS": "MODEL.{}.PRED_NUM_LAYERS",
    "MODEL.N_HARD": "MODEL.{}.NUM_HARD",
    "MODEL.WARMUP_EPOCHS": "MODEL.{}.WARMUP_EPOCHS",
    "MODEL.COOLDOWN_EPOCHS": "MODEL.{}.COOLDOWN_EPOCHS",
    "TRAIN.WARMUP_EPOCHS": "SCHEDULE.WARMUP_EPOCHS",
    "TRAIN.BASE_LR": "OPTIM.BASE_LR",
    "TRAIN.WARMUP_LR": "OPTIM.WARMUP_LR",
    "TRAIN.MIN_LR": "OPTIM.MIN_LR",
    "TRAIN.WEIGHT_DECAY": "OPTIM.WEIGHT_DECAY",
    "TRAIN.CLIP_GRAD": "OPTIM.CLIP_GRAD",
    "TRAIN.TRUST_COEFFICIENT": "OPTIM.TRUST_COEFFICIENT",
    "TRAIN.LR_SCHEDULER.NAME": "SCHEDULE.NAME",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": "SCHEDULE.DECAY_EPOCHS",
    "TRAIN.LR_SCHEDULER.DECAY_RATE": "SCHEDULE.GAMMA",
    "TRAIN.OPTIMIZER.NAME": "OPTIM.NAME",
    "TRAIN.OPTIMIZER.EPS": "OPTIM.EPS",
    "TRAIN.OPTIMIZER.BETAS": "OPTIM.BETAS",
    "TRAIN.OPTIMIZER.MOMENTUM": "OPTIM.MOMENTUM",
    "TRAIN.OPTIMIZER.TRUST_COEFFICIENT": "OPTIM.TRUST_COEFFICIENT",
    "AUG.SSL_AUG_TYPE": "AUG.RECIPE",
    "AUG.SSL_AUG_CROP": "AUG.CROP_MIN",
    "SAVE_FREQ": "CHECKPOINT.EVERY_EPOCHS",
    "PRINT_FREQ": "LOG.PRINT_FREQ",
}
_SUPERVISED = "only for supervised training"
_DEAD = {
    "DATA.INTERPOLATION": _SUPERVISED,
    "DATA.PIN_MEMORY": "chosen by the device",
    "MODEL.NUM_CLASSES": "the data say it",
    "MODEL.DROP_RATE": _SUPERVISED,
    "MODEL.DROP_PATH_RATE": _SUPERVISED,
    "MODEL.LABEL_SMOOTHING": "only for the probe: main_linear.py --protocol moby",
    "MODEL.REPLACE_LN_WITH_BN": "the published code does not use it",
    "TRAIN.START_EPOCH": "a run continues by itself",
    "TRAIN.AUTO_RESUME": "a run continues by itself",
    "LINEAR_EVAL.PRETRAINED": "use main_linear.py --pretrained FILE",
    "LINEAR_EVAL.WEIGHTS": "use main_linear.py or main_semisup.py",
    "AUG.SSL_AUG": "pretraining always makes two views",
    "AUG.SSL_LINEAR_AUG": "the probe has its own views",
    "TEST.CROP": "evaluations always crop the centre",
    "EVAL_MODE": "use --eval",
    "THROUGHPUT_MODE": "use --throughput",
    "LOCAL_RANK": "the launcher sets it",
}
_DEAD |= {f"MODEL.N{kind}": "the published code does not read it" for kind in range(1, 7)}
for _name in (
    "COLOR_JITTER AUTO_AUGMENT REPROB REMODE RECOUNT MIXUP CUTMIX CUTMIX_MINMAX MIXUP_PROB "
    "MIXUP_SWITCH_PROB MIXUP_MODE"
).split():
    _DEAD[f"AUG.{_name}"] = _SUPERVISED
_SWIN = "MODEL.SWIN."
# (EMBED_DIM, blocks of the third stage) of Swin; what else that section holds never varied.
_SWINS = {(96, 6): "swin_tiny", (96, 18): "swin_small", (128, 18): "swin_base"}
_PRECISIONS = {"": "fp32", "O0": "fp32", "O1": "bf16", "O2": "bf16"}
# Files whose table has been shown: a program reads its configuration twice.
_told: set[Path] = set()


def translated(values: dict[str, object], file: Path) -> dict[str, object]:
    """Return the `values` of a published yaml under our keys, and say once what became of each.

    Any other yaml is returned as it is. A key that is not known here keeps its name, so the caller
    refuses it. Raises `ValueError` for values that have no counterpart.
    """
    model = values.get("MODEL")
    if not isinstance(model, Mapping) or model.get("TYPE") not in _METHODS:
        return values
    moby = "MOBY" in model
    # MoBY has a section where SynCo-v2 has the keys in MODEL itself
    flat = {key.replace("MODEL.MOBY.", "MODEL."): value for key, value in _flat(values)}
    method, recipe = _METHODS[str(model["TYPE"])]
    backbone = _backbone(flat, file)
    ours: dict[str, object] = {"_BASE_": str(_RECIPES / recipe), "MODEL.NAME": method}
    ours["MODEL.BACKBONE.NAME"] = backbone
    lines = [f"MODEL.TYPE -> MODEL.NAME {method}, on {recipe}"]
    lines.append(f"MODEL.ENCODER -> MODEL.BACKBONE.NAME {backbone}")
    if not moby and backbone.startswith("swin"):
        # SynCo-v2's code builds Swin with another eps than MoBY's and timm's
        ours["MODEL.BACKBONE.NORM_EPS"] = 1e-6
        lines.append("(that code's Swin) -> MODEL.BACKBONE.NORM_EPS 1e-06")

    defaults = {**_DEFAULTS, "MODEL.ONLINE_DROP_PATH_RATE": 0.1 if moby else 0.2}
    for key, value in {**defaults, **flat}.items():
        if key in ("MODEL.TYPE", "MODEL.ENCODER") or key.startswith(_SWIN):
            continue
        if key in _DEAD or (key == "BASE" and value in ("", [""], [])):
            lines.append(f"{key} -> dropped: {_DEAD.get(key, 'empty')}")
            continue
        name, kept = _moved(key, value, method.upper(), file)
        ours[name] = kept
        lines.append(f"{key} -> {name} {kept}{'' if key in flat else ' (the default there)'}")
    _tell(file, lines)
    return ours


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _backbone(flat: Mapping[str, object], file: Path) -> str:
    """Return our name of the encoder; MoBY's `swin` names its size in the section SWIN."""
    encoder = flat.get("MODEL.ENCODER", "swin_tiny")
    if encoder != "swin":
        return str(encoder)
    depths = flat.get(f"{_SWIN}DEPTHS", [2, 2, 6, 2])
    width = flat.get(f"{_SWIN}EMBED_DIM", 96)
    third = depths[2] if isinstance(depths, list) and len(depths) == 4 else 0
    for size, name in _SWINS.items():
        if size == (width, third):
            return name
    raise ValueError(
        f"{file}: MODEL.SWIN: EMBED_DIM {width} and DEPTHS {depths} are no Swin-T, -S or -B; "
        "use the keys of this repository with MODEL.BACKBONE.NAME timm/<model>"
    )


def _moved(key: str, value: object, section: str, file: Path) -> tuple[str, object]:
    """Return the name and value here of one key."""
    if key == "BASE":
        raise ValueError(f"{file}: BASE {value}: copy the keys of that file into this one")
    if key == "AMP_OPT_LEVEL" and value in _PRECISIONS:
        return "TRAIN.PRECISION", _PRECISIONS[str(value)]
    # There 0 means no accumulation.
    if key == "TRAIN.ACCUMULATION_STEPS" and value == 0:
        return key, 1
    if key == "DATA.ZIP_MODE":
        return "DATA.DATASET", "zip" if value else "imagenet"
    return _RENAMED.get(key, key).format(section), value


def _tell(file: Path, lines: list[str]) -> None:
    """Write the table to standard error, on one process and once a file."""
    if file in _told or os.environ.get("RANK", "0") != "0":
        return
    _told.add(file)
    # Not on standard output, which belongs to --show-config.
    table = "\n".join(f"  {line}" for line in lines)
    sys.stderr.write(f"{file} is a yaml of MoBY or SynCo-v2 and was translated:\n{table}\n")
