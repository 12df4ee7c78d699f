"""The configuration of a segmenter: what it reads of the shared keys, and its own keys."""

from dataclasses import replace

from yacs.config import CfgNode

from utils.config.key import Key, Value
from utils.config.load import ConfigError, load_config
from utils.config.schema import Schema, declare

DATASETS = ("ade20k", "voc", "cityscapes", "folders", "pets")
_PATCH = 16  # of plain ViTs, where MODEL.BACKBONE.PATCH_SIZE is 0

# Options of the network: the section MODEL.SEGMENTER.
SEGMENTER = {
    "HEAD": Key(
        "upernet",
        "upernet | fcn, on the last map | linear, batch norm and one layer",
        choices=("upernet", "fcn", "linear"),
    ),
    "WIDTH": Key(512, "channels of upernet and fcn", least=1),
    "POOL_SCALES": Key([1, 2, 3, 6], "upernet: sides of the pooled last map", least=1),
    "FCN_CONVS": Key(2, "fcn: convolutions of 3x3", least=1),
    "FCN_DILATION": Key(1, "fcn: of these convolutions", least=1),
    "FCN_CONCAT": Key(True, "fcn: join their result with the map, and one more convolution"),
    "DROPOUT": Key(0.1, "of whole channels before the class layer", most=1.0),
    "AUX_WEIGHT": Key(0.4, "of the loss of a second head, in training only; 0: none"),
    "AUX_WIDTH": Key(256, "channels of the second head", least=1),
    "AUX_STAGE": Key(3, "which map the second head is on, 1 to 4", least=1, most=4),
    "NORM": Key(
        "sync",
        "batch norms, the pretrained ones too: sync (over processes) | batch (local) | frozen",
        choices=("sync", "batch", "frozen"),
    ),
    "OUTPUT_STRIDE": Key(32, "ResNets: 32 | 16 | 8, later stages dilated instead of strided"),
    "TAPS": Key(
        [],
        "ViTs: after which blocks maps are taken, from 1; empty: four quarters of the depth, for a "
        "linear head the last block",
        least=1,
    ),
    "FREEZE": Key(False, "the pretrained backbone does not learn, and stays in eval mode"),
    "LOSS_OVER": Key(
        "all",
        "mean over all pixels, ignored ones counting 0 (published) | labelled, those with a class",
        choices=("all", "labelled"),
    ),
}
SEGMENTATION = {
    "TRAIN_SPLIT": Key("training", "voc: train, train+aug; cityscapes: train"),
    "TEST_SPLIT": Key("validation", "voc, cityscapes: val"),
    "CLASSES": Key("", "names with commas between them; empty: those of the data set"),
    "CLASSES_OF": Key(
        "binary",
        "pets: binary (background, pet) | species (background, cat, dog)",
        choices=("binary", "species"),
    ),
    "LABEL_MAP": Key("", 'stored value to class, 255 for none, e.g. "0:255,1:0,2:1"'),
    "REDUCE_ZERO_LABEL": Key(
        "auto",
        "stored values: shift (0 is no class, 1 the first) | keep | auto (shift for ade20k)",
        choices=("auto", "shift", "keep"),
    ),
    "SCALE": Key(
        [2048, 512], "longer and shorter side that images fit into", least=1, entries=(2, 2)
    ),
    "RATIO_RANGE": Key([0.5, 2.0], "of the scale in training", least=1e-3, entries=(2, 2)),
    "CROP": Key(
        [512, 512], "height and width of training crops and of windows", least=1, entries=(2, 2)
    ),
    "CAT_MAX_RATIO": Key(0.75, "largest share of one class in a crop; 1: any", most=1.0),
    "FLIP": Key(0.5, "probability", most=1.0),
    "PHOTOMETRIC": Key(True, "distort brightness, contrast, saturation and hue"),
    "MAX_ITER": Key(160000, "iterations of the training", least=1),
    "SCHEDULE": Key("poly", "of the learning rate", choices=("poly", "milestones")),
    "POWER": Key(1.0, "poly: (1 - iteration / MAX_ITER) to this power"),
    "STEPS": Key([], "milestones: iterations after which the rate is multiplied by GAMMA"),
    "GAMMA": Key(0.1, "see STEPS"),
    "WARMUP_ITERS": Key(1500, "iterations of the linear warm-up"),
    "LAYER_DECAY": Key(1.0, "ViTs: rate of a block over that of the next", least=1e-6, most=1.0),
    "LRS": Key([], "linear: peak rates, a head each in one pass; empty: OPTIM.BASE_LR"),
    "EVAL_PERIOD": Key(
        16000, "iterations between evaluations (epochs in the log); 0: only at the end"
    ),
    "TEST": Key(
        "whole",
        "whole: an image in one piece | slide: by windows of CROP",
        choices=("whole", "slide"),
    ),
    "STRIDE": Key([341, 341], "slide: between two windows", least=1, entries=(2, 2)),
    "RATIOS": Key(
        [0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
        "--multi-scale: of the scale, each also mirrored",
        least=1e-3,
        entries=(1, 1 << 6),
    ),
}
# Shared sections and keys that segmentation does not read.
_UNREAD = """
    AUG SCHEDULE KNN PROBE HELD_OUT LINEAR FINETUNE MODEL.STACK_VIEWS
    MODEL.BACKBONE.TARGET_DROP_PATH DATA.REPEATED_AUG DATA.DECODE DATA.CACHE_MODE DATA.INDEX_CACHE
    DATA.DOWNLOAD TRAIN.EPOCHS TRAIN.STEPS TRAIN.COMPILE TRAIN.CUDA_GRAPHS
    DATA.CHANNELS DATA.RANGE DATA.MEAN DATA.STD
""".split()
# Defaults that differ: UPerNet's schedule on ADE20K, whose rates are those of 16 images.
_DEFAULTS: dict[str, Value] = {
    "MODEL.NAME": "segmenter",
    "TRAIN.BATCH_SIZE": 2,
    "OPTIM.LR_BATCH": 16,
}


def segmentation_schema() -> Schema:
    """Return all keys of segmentation; the defaults are ADE20K."""
    schema = declare({"segmenter": SEGMENTER}).without(*_UNREAD)
    for name, default in _DEFAULTS.items():
        schema[name] = replace(schema[name], default=default)
    schema["DATA.DATASET"] = Key("ade20k", "the layout of the data set", choices=DATASETS)
    schema["LOG.PICTURES"] = Key(6, "test images in segmentation.png; 0: none", role="local")
    for name, key in SEGMENTATION.items():
        schema[f"SEGMENTATION.{name}"] = key
    return schema


def load_segmentation_config(
    files: list[str | None], opts: list[str], flags: dict[str, Value]
) -> CfgNode:
    """Merge files, `--opts` and flags over the defaults and refuse what cannot be built.

    Raises `ConfigError` naming key, value and remedy.
    """
    cfg = load_config(segmentation_schema(), files, opts, flags)
    _check_head(cfg.MODEL.SEGMENTER, cfg.SEGMENTATION.LRS)
    _check_numbers(cfg.SEGMENTATION)
    _check_backbone(cfg, family_of(cfg.MODEL.BACKBONE.NAME))
    return cfg


def family_of(name: str) -> str:
    """Guess the family of a backbone by its name: resnet, swin or vit; "" for another."""
    # by its name only: torch is not loaded yet, and building a backbone takes seconds
    kinds = {"resnet": "resnet", "resnext": "resnet", "swin": "swin", "vit": "vit", "deit": "vit"}
    return next((kind for word, kind in kinds.items() if word in name), "")


def _check_head(segmenter: CfgNode, rates: list[float]) -> None:
    linear = segmenter.HEAD == "linear"
    if linear and segmenter.AUX_WEIGHT:
        raise ConfigError(
            f"MODEL.SEGMENTER.AUX_WEIGHT: {segmenter.AUX_WEIGHT}, but a linear head stands alone; "
            "set it to 0"
        )
    if rates and not (linear and segmenter.FREEZE):
        raise ConfigError(
            f"SEGMENTATION.LRS: {rates} is for linear heads on a frozen backbone; set "
            "MODEL.SEGMENTER.HEAD linear and FREEZE True, or use OPTIM.BASE_LR"
        )
    if segmenter.TAPS and not linear and len(segmenter.TAPS) != 4:
        raise ConfigError(
            f"MODEL.SEGMENTER.TAPS: {segmenter.TAPS}; {segmenter.HEAD} reads four maps, give four "
            "blocks or none"
        )


def _check_numbers(node: CfgNode) -> None:
    if node.EVAL_PERIOD and node.MAX_ITER % node.EVAL_PERIOD:
        raise ConfigError(
            f"SEGMENTATION.EVAL_PERIOD: {node.EVAL_PERIOD} does not divide SEGMENTATION.MAX_ITER "
            f"{node.MAX_ITER}; choose a divisor, or 0 to evaluate at the end only"
        )
    if node.RATIO_RANGE[0] > node.RATIO_RANGE[1]:
        raise ConfigError(
            f"SEGMENTATION.RATIO_RANGE: {node.RATIO_RANGE}; give the smaller ratio first"
        )
    if any(step > crop for step, crop in zip(node.STRIDE, node.CROP, strict=True)):
        if node.TEST == "slide":
            raise ConfigError(
                f"SEGMENTATION.STRIDE: {node.STRIDE} leaves gaps between windows of "
                f"SEGMENTATION.CROP {node.CROP}; use at most the crop"
            )


def _check_backbone(cfg: CfgNode, kind: str) -> None:
    segmenter, name = cfg.MODEL.SEGMENTER, cfg.MODEL.BACKBONE.NAME
    stride = segmenter.OUTPUT_STRIDE
    if stride not in (8, 16, 32):
        raise ConfigError(f"MODEL.SEGMENTER.OUTPUT_STRIDE: {stride} is not one of 8, 16, 32")
    if stride != 32 and kind in ("swin", "vit"):
        raise ConfigError(
            f"MODEL.SEGMENTER.OUTPUT_STRIDE: {stride} is for ResNets, and {name} is none; set it "
            "to 32"
        )
    if kind == "vit":
        _check_vit(cfg)
    elif segmenter.TAPS:
        raise ConfigError(
            f"MODEL.SEGMENTER.TAPS: {segmenter.TAPS} is for ViTs, and {name} is none; set it to []"
        )


def _check_vit(cfg: CfgNode) -> None:
    node, name = cfg.SEGMENTATION, cfg.MODEL.BACKBONE.NAME
    # A ViT's positions are interpolated once, to the crop: it sees no other size.
    if node.TEST == "whole":
        raise ConfigError(
            f"SEGMENTATION.TEST: whole, but {name} takes images of SEGMENTATION.CROP only; set it "
            "to slide"
        )
    height, width = node.CROP
    if height != width:
        raise ConfigError(
            f"SEGMENTATION.CROP: {node.CROP} is no square, which {name} needs; give two equal sides"
        )
    patch = cfg.MODEL.BACKBONE.PATCH_SIZE or _PATCH
    if height % patch and not name.startswith("timm/"):
        below = height // patch * patch
        raise ConfigError(
            f"SEGMENTATION.CROP: {node.CROP} is no multiple of {name}'s patch, {patch} pixels; use "
            f"{below or below + patch} or {below + patch}"
        )
