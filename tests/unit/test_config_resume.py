"""What a run that goes on may change: every key has one class, and the class is enforced."""

from typing import Any

import pytest

from models import FRAMEWORKS, framework_options
from utils.config.key import ALL_PROGRAMS
from utils.config.load import ConfigError, compare_for_resume, leaves, load_config, to_yaml
from utils.config.schema import declare, key_class

SCHEMA = declare(framework_options())
DEFAULTS = SCHEMA.defaults()

# Written out, so that a new key needs a decision here. Sections are meant with all that is in them.
LOCAL = (
    "NAME TAG OUTPUT DEVICE RESUME DATA.PATH DATA.NUM_WORKERS DATA.CACHE_MODE DATA.DOWNLOAD DATA.TIMEOUT LOG "
    "DATA.INDEX_CACHE TRAIN.RANK_TIMEOUT FINETUNE.SUBSET LINEAR.LABEL_PERCENTS"
).split()
TUNABLE = (
    "DATA.MAX_BAD_FRACTION DATA.MAX_PIXELS TRAIN.BATCH_SIZE TRAIN.ACCUMULATION_STEPS TRAIN.PRECISION "
    "TRAIN.USE_CHECKPOINT TRAIN.COMPILE TRAIN.CUDA_GRAPHS TRAIN.DETERMINISTIC AUG.BACKEND DATA.DECODE "
    "KNN PROBE HELD_OUT CHECKPOINT "
    "LINEAR.BATCH_SIZE FINETUNE.BATCH_SIZE FINETUNE.TEST FINETUNE.EVAL_EPOCHS"
).split()
LINEAR = (
    "LINEAR.LRS LINEAR.WEIGHT_DECAYS LINEAR.CACHED_FEATURES LINEAR.EPOCHS LINEAR.HEAD_INIT "
    "LINEAR.LABEL_SMOOTHING LINEAR.DROP_PATH LINEAR.OPTIM LINEAR.SCHEDULE"
).split()
FINETUNE = [
    f"FINETUNE.{name}"
    for name in (
        "WEIGHTS LR_BACKBONE LR_CLASSIFIER EPOCHS TRAIN_PERCENT HOLD_OUT HEAD_INIT REPRESENTATION_SIZE "
        "DROP_PATH LAYER_DECAY LABEL_SMOOTHING MIXUP CUTMIX MIXUP_PROB SWITCH_PROB MIXUP_MODE REPEATED_AUG "
        "AUG OPTIM SCHEDULE"
    ).split()
]
PIXELS = ["DATA.CHANNELS", "DATA.RANGE", "DATA.MEAN", "DATA.STD"]
IDENTITY = {
    "pretrain": [
        *PIXELS,
        *"SEED DATA.DATASET DATA.IMG_SIZE DATA.REPEATED_AUG MODEL AUG.RECIPE AUG.CROP_MIN AUG.VIEW_SIZE AUG.LOCAL_CROPS OPTIM SCHEDULE "
        "TRAIN.EPOCHS TRAIN.STEPS TRAIN.CHANNELS_LAST".split(),
    ],
    "linear": [*PIXELS, "SEED", "DATA.DATASET", "DATA.IMG_SIZE", "MODEL.BACKBONE", *LINEAR],
    "semisup": [
        *("SEED", "DATA.DATASET", "DATA.IMG_SIZE", "MODEL.BACKBONE", "TRAIN.CHANNELS_LAST"),
        *FINETUNE,
        *PIXELS,
    ],
    "detection": ["SEED", "DATA.DATASET", "DATA.IMG_SIZE", "MODEL", "OPTIM", "TRAIN.CHANNELS_LAST"],
    "segmentation": [
        *("SEED", "DATA.DATASET", "DATA.IMG_SIZE", "MODEL", "OPTIM", "TRAIN.CHANNELS_LAST")
    ],
}
# Read by the other task only: nothing of this run depends on them.
PRETRAINING = (
    "DATA.REPEATED_AUG MODEL.NAME MODEL.STACK_VIEWS AUG OPTIM SCHEDULE TRAIN.EPOCHS TRAIN.STEPS".split()
    + [f"MODEL.{name.upper()}" for name in FRAMEWORKS]
)
FOREIGN = {
    "pretrain": [*LINEAR, *FINETUNE],
    "linear": [*PRETRAINING, "TRAIN.CHANNELS_LAST", *FINETUNE],
    "semisup": [*PRETRAINING, *LINEAR],
    "detection": [
        *PIXELS,
        "DATA.REPEATED_AUG",
        "AUG",
        "SCHEDULE",
        "TRAIN.EPOCHS",
        "TRAIN.STEPS",
        *LINEAR,
        *FINETUNE,
    ],
    "segmentation": [
        *PIXELS,
        "DATA.REPEATED_AUG",
        "AUG",
        "SCHEDULE",
        "TRAIN.EPOCHS",
        "TRAIN.STEPS",
        *LINEAR,
        *FINETUNE,
    ],
}
ALL_KEYS = [key for key, _ in leaves(DEFAULTS)]


def inside(key: str, names: list[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


@pytest.mark.parametrize("task", list(IDENTITY))
def test_every_key_has_exactly_one_class(task: str) -> None:
    assert set(ALL_PROGRAMS) == set(IDENTITY)
    for key in ALL_KEYS:
        classes = {
            "local": inside(key, LOCAL),
            "tunable": inside(key, TUNABLE) or inside(key, FOREIGN[task]),
            "identity": inside(key, IDENTITY[task]),
        }
        assert sum(classes.values()) == 1, (
            f"{key} needs a decision: local, tunable or identity of {task}?"
        )
        assert key_class(key, task) == next(name for name, holds in classes.items() if holds), key


def test_a_key_in_no_table_is_identity() -> None:
    assert key_class("NEW.KEY") == key_class("NEW.KEY", "linear") == "identity"


def other_value(key: str, value: Any) -> Any:
    choices = {
        "MODEL.BATCHFORMER.LOSS": "joint",
        "MODEL.SIT.VARIANT": "gmml",
        "MODEL.SIT.DROP_TYPE": "noise",
        "DEVICE": "cpu",
        **{f"{section}OPTIM.EXCLUDE_RULE": "norms" for section in ("", "FINETUNE.")},
        "DATA.CACHE_MODE": "no",
        "DATA.DECODE": "device",
        "AUG.BACKEND": "torch",
        "TRAIN.PRECISION": "bf16",
        "LINEAR.HEAD_INIT": "trunc",
        **{f"{section}OPTIM.NAME": "adamw" for section in ("", "LINEAR.", "FINETUNE.")},
        **{f"{section}SCHEDULE.NAME": "linear" for section in ("", "LINEAR.", "FINETUNE.")},
        "FINETUNE.HEAD_INIT": "trunc",
        "FINETUNE.WEIGHTS": "finetune",
        "FINETUNE.MIXUP_MODE": "pair",
        "FINETUNE.AUG.INTERPOLATION": "bicubic",
    }
    if key in choices:
        return choices[key]
    if allowed := SCHEMA[key].choices:
        return next(choice for choice in allowed if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [entry / 2 if isinstance(entry, float) else entry + 1 for entry in value] or [0.5]
    if isinstance(value, int):
        return value + 1
    return value / 2 + 0.125 if isinstance(value, float) else f"{value}x"


@pytest.mark.parametrize("task", list(IDENTITY))
@pytest.mark.parametrize("key", [key for key in ALL_KEYS if key != "MODEL.NAME"])
def test_changing_a_key_on_resume_does_what_its_class_says(key: str, task: str) -> None:
    parts = key.split(".")
    method = (
        parts[1].lower() if parts[0] == "MODEL" and parts[1].lower() in FRAMEWORKS else "moco_v2"
    )
    method = "moco_v2" if method == "batchformer" else method  # its section is read by all
    saved = load_config(SCHEMA, flags={"NAME": "n", "MODEL.NAME": method})
    old = dict(leaves(saved))[key]
    new = other_value(key, old)
    changed = load_config(SCHEMA, flags={"NAME": "n", "MODEL.NAME": method, key: new})
    match key_class(key, task):
        case "identity":
            with pytest.raises(ConfigError) as error:
                compare_for_resume(to_yaml(saved), changed, task)
            assert f"{key}: {old!r} -> {new!r}" in str(error.value)
            assert "--tag" in str(error.value)
        case "tunable":
            assert compare_for_resume(to_yaml(saved), changed, task) == [
                f"{key}: {old!r} -> {new!r}"
            ]
        case "local":
            assert compare_for_resume(to_yaml(saved), changed, task) == []


def test_another_method_is_another_pretraining_but_not_another_probe() -> None:
    saved = load_config(SCHEMA, flags={"NAME": "n", "MODEL.NAME": "byol"})
    changed = load_config(SCHEMA, flags={"NAME": "n", "MODEL.NAME": "moby"})
    with pytest.raises(ConfigError, match=r"MODEL\.NAME: 'byol' -> 'moby'"):
        compare_for_resume(to_yaml(saved), changed)
    assert compare_for_resume(to_yaml(saved), changed, "linear") == ["MODEL.NAME: 'byol' -> 'moby'"]


def test_options_of_methods_that_are_not_selected_are_no_part_of_a_run() -> None:
    changed = load_config(SCHEMA, flags={"MODEL.NAME": "byol", "MODEL.MOBY.QUEUE_SIZE": 8})
    known = framework_options()
    # the code before the other methods existed
    fewer = declare({name: known[name] for name in ("byol", "batchformer")})
    saved = load_config(fewer, flags={"MODEL.NAME": "byol"})
    assert compare_for_resume(to_yaml(saved), changed) == []
    assert compare_for_resume(to_yaml(changed), saved) == []


def test_a_key_that_the_code_did_not_have_had_its_default_and_one_that_is_gone_is_refused() -> None:
    cfg = load_config(SCHEMA)
    text = to_yaml(cfg)
    older = text.replace("SEED: 0\n", "")
    assert older != text
    assert compare_for_resume(older, cfg) == []
    with pytest.raises(ConfigError, match="SEED: 0 -> 3"):
        compare_for_resume(older, load_config(SCHEMA, flags={"SEED": 3}))
    assert compare_for_resume(text.replace("    QUEUE_SIZE: 65536\n", ""), cfg) == [
        "MODEL.MOCO_V2.QUEUE_SIZE: 'absent' -> 65536"
    ]
    del (fewer := load_config(SCHEMA).clone())["KNN"]  # a program's tree may lack what others have
    assert compare_for_resume(to_yaml(fewer), fewer) == []
    with pytest.raises(ConfigError, match=r"EXTRA: 3 -> 'absent'"):
        compare_for_resume(f"{text}EXTRA: 3\n", cfg)
    with pytest.raises(ConfigError, match="configuration"):
        compare_for_resume("not a configuration", cfg)


def test_all_identity_changes_are_named_at_once() -> None:
    changed = load_config(SCHEMA, flags={"SEED": 1, "TRAIN.EPOCHS": 5, "TRAIN.BATCH_SIZE": 8})
    with pytest.raises(ConfigError) as error:
        compare_for_resume(to_yaml(load_config(SCHEMA)), changed)
    assert "SEED: 0 -> 1" in str(error.value)
    assert "TRAIN.EPOCHS: 200 -> 5" in str(error.value)
    assert "BATCH_SIZE" not in str(error.value)
