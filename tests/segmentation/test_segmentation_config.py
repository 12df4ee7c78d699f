"""The keys of segmentation: what no segmenter can be is refused, with key, value and remedy."""

import json
from typing import Any

import pytest

from segmentation.defaults import family_of, load_segmentation_config, segmentation_schema
from utils.config.load import ConfigError, load_config
from utils.config.schema import KEYS, declare, key_class

SLIDE = {"SEGMENTATION__TEST": "slide"}
VIT = {"MODEL__BACKBONE__NAME": "vit_small", **SLIDE}
LINEAR = {"MODEL__SEGMENTER__HEAD": "linear", "MODEL__SEGMENTER__AUX_WEIGHT": 0}


def load(**keys: Any) -> Any:
    opts = []
    for key, value in keys.items():
        text = value if isinstance(value, str) else json.dumps(value)
        opts += [key.replace("__", "."), text]
    return load_segmentation_config([], opts, {})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"MODEL__SEGMENTER__HEAD": "linear"}, ["SEGMENTER.AUX_WEIGHT", "0.4", "set it to 0"]),
        ({"SEGMENTATION__LRS": [0.1]}, ["SEGMENTATION.LRS", "[0.1]", "HEAD linear"]),
        ({**LINEAR, "SEGMENTATION__LRS": [0.1]}, ["SEGMENTATION.LRS", "FREEZE"]),
        ({**VIT, "MODEL__SEGMENTER__TAPS": [3, 6]}, ["SEGMENTER.TAPS", "four"]),
        ({"MODEL__SEGMENTER__TAPS": [1, 2, 3, 4]}, ["SEGMENTER.TAPS", "resnet50", "[]"]),
        ({"SEGMENTATION__EVAL_PERIOD": 7000}, ["EVAL_PERIOD", "7000", "160000", "divisor"]),
        ({"SEGMENTATION__RATIO_RANGE": [2.0, 0.5]}, ["RATIO_RANGE", "[2.0, 0.5]"]),
        ({"SEGMENTATION__CROP": [512]}, ["SEGMENTATION.CROP", "give 2"]),
        ({**SLIDE, "SEGMENTATION__STRIDE": [341, 600]}, ["STRIDE", "600", "gaps"]),
        ({"MODEL__SEGMENTER__OUTPUT_STRIDE": 4}, ["OUTPUT_STRIDE", "4", "8, 16, 32"]),
        (
            {"MODEL__BACKBONE__NAME": "swin_tiny", "MODEL__SEGMENTER__OUTPUT_STRIDE": 8},
            ["OUTPUT_STRIDE", "swin_tiny", "32"],
        ),
        ({**VIT, "SEGMENTATION__TEST": "whole"}, ["SEGMENTATION.TEST", "vit_small", "slide"]),
        ({**VIT, "SEGMENTATION__CROP": [512, 1024]}, ["CROP", "[512, 1024]", "equal"]),
        ({**VIT, "SEGMENTATION__CROP": [500, 500]}, ["CROP", "500", "16", "496 or 512"]),
        ({"MODEL__SEGMENTER__AUX_STAGE": 5}, ["AUX_STAGE", "5"]),
        ({"DATA__DATASET": "coco"}, ["DATA.DATASET", "coco", "ade20k"]),
        ({"TRAIN__EPOCHS": 3}, ["TRAIN.EPOCHS"]),
    ],
)
def test_what_no_segmenter_can_be_is_refused(keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(**keys)
    assert all(word in str(error.value) for word in words), error.value


def test_what_a_segmenter_can_be_is_taken() -> None:
    load()
    load(**VIT)
    load(**{**LINEAR, **VIT, "MODEL__SEGMENTER__FREEZE": True, "SEGMENTATION__LRS": [0.1, 0.01]})
    load(MODEL__SEGMENTER__OUTPUT_STRIDE=8, SEGMENTATION__CROP=[513, 769])


@pytest.mark.parametrize("key", ["SEGMENTATION.CROP", "MODEL.SEGMENTER.HEAD"])
def test_a_key_of_segmentation_is_named_as_such_elsewhere(key: str) -> None:
    with pytest.raises(ConfigError, match=r"segmentation/main_segmentation\.py"):
        load_config(declare({}), opts=[key, "1"])


def test_every_key_says_what_it_means_and_what_a_change_means() -> None:
    for name, key in segmentation_schema().items():
        assert key.meaning or name in KEYS, name
        if name.startswith(("SEGMENTATION.", "MODEL.SEGMENTER.")):
            assert key_class(name, "segmentation") == "identity"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet50", "resnet"),
        ("timm/resnext50_32x4d", "resnet"),
        ("swin_tiny", "swin"),
        ("deit_small", "vit"),
        ("mocov3_vit_small", "vit"),
        ("timm/efficientnet_b0", ""),
    ],
)
def test_the_family_of_a_name(name: str, kind: str) -> None:
    assert family_of(name) == kind
