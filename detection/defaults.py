"""The configuration of a detector: what detection reads of the shared keys, and its own keys."""

from dataclasses import replace

from yacs.config import CfgNode

from utils.config.key import Key, Value
from utils.config.load import ConfigError, load_config
from utils.config.schema import Schema, declare

DATASETS = ("coco", "voc")

# Options of the detector: the section MODEL.RCNN.
RCNN = {
    "NECK": Key(
        "fpn",
        "fpn (ResNet, Swin) | c4 (ResNet: stage 5 is the RoI head) | pyramid (ViT)",
        choices=("fpn", "c4", "pyramid"),
    ),
    "MASKS": Key(False, "Mask R-CNN"),
    "NORM": Key(
        "sync",
        "batch norms, the pretrained ones too: sync (over processes) | batch (local) | frozen",
        choices=("sync", "batch", "frozen"),
    ),
    "EXTRA_NORM": Key(
        True,
        "c4: one more norm after stage 5, as MoCo's detectors have it; none where NORM is frozen",
    ),
    "ANCHOR_SIZES": Key(
        [32, 64, 128, 256, 512], "pixels of the resized image; fpn, pyramid: one a level"
    ),
    "RPN_PRE_NMS": Key(
        [2000, 1000], "proposals (a level) before NMS: training, test", entries=(2, 2)
    ),
    "RPN_POST_NMS": Key([2000, 1000], "proposals after NMS: training, test", entries=(2, 2)),
    "RPN_BATCH": Key(256, "anchors an image that the proposal loss samples", least=1),
    "ROI_BATCH": Key(512, "proposals an image that the loss of the head samples", least=1),
    "PYRAMID_WIDTH": Key(256, "channels of the maps of fpn and pyramid", least=1),
    "BOX_HEAD": Key(
        "2fc",
        "fpn, pyramid: 2fc, two layers | 4conv1fc, four convolutions with batch norm and a layer",
        choices=("2fc", "4conv1fc"),
    ),
    "HEAD_WIDTH": Key(1024, "of the layers of the box head of fpn and pyramid", least=1),
    "MASK_NORM": Key(False, "fpn, pyramid: batch norms in the mask head"),
    "ALIGNED": Key(
        False,
        "RoIAlign with the half-pixel shift and as many samples as a region has cells of the map "
        "(published); False: as torchvision's own detectors",
    ),
    "RPN_LEAST_IOU": Key(0.0, "of an object's best anchor, or it is not matched", most=0.7),
    "RPN_LOSS": Key(
        "smooth_l1", "of boxes: smooth_l1 (beta 1/9) | l1", choices=("smooth_l1", "l1")
    ),
    "BOX_LOSS": Key(
        "smooth_l1",
        "of the head: smooth_l1 (beta 1/9) | l1 | giou, ten times that of the decoded boxes",
        choices=("smooth_l1", "l1", "giou"),
    ),
    "CASCADE": Key(
        [], "fpn, pyramid: IoU thresholds of Cascade R-CNN's stages; empty: one head", most=1.0
    ),
    "CASCADE_WEIGHTS": Key([1.0, 0.5, 0.25], "of the stages' losses"),
    "CASCADE_XY": Key(
        [0.1, 0.05, 0.033], "deviation of box centres that a stage expects, in boxes", least=1e-3
    ),
    "CASCADE_WH": Key([0.2, 0.1, 0.067], "the same of the logarithm of sides", least=1e-3),
    "CASCADE_REG": Key(
        "class",
        "box deltas of a stage: class, of each class | agnostic, of all together",
        choices=("class", "agnostic"),
    ),
    "SCORE_THRESH": Key(0.05, "smallest score of a detection"),
    "MAX_DETECTIONS": Key(100, "of an image"),
}
DETECTION = {
    "TRAIN_SPLIT": Key("train2017", "voc: 2007_trainval+2012_trainval"),
    "TEST_SPLIT": Key("val2017", "voc: 2007_test"),
    "CLASSES": Key("", "voc: names with commas between them; empty: the twenty of Pascal VOC"),
    "MIN_SIZES": Key(
        list(range(640, 801, 32)),
        "of the shorter side in training, one drawn an image",
        least=1,
        entries=(1, 1 << 10),
    ),
    "TEST_SIZE": Key(800, "of the shorter side in a test", least=1),
    "MAX_SIZE": Key(1333, "of the longer side", least=1),
    "CANVAS": Key(
        0,
        "ViT: side of the square that images are padded to; 0: as small as fits. A Swin has 0 but "
        "to go on with a run of earlier versions",
    ),
    "FLIP": Key(0.5, "probability", most=1.0),
    "CROP": Key(0.0, "probability of a crop before the resize (Swin); 0: none", most=1.0),
    "CROP_SIZES": Key(
        [400, 500, 600],
        "of the shorter side in whose pixels a crop is drawn, one drawn an image",
        least=1,
        entries=(1, 1 << 10),
    ),
    "CROP_RANGE": Key(
        [384, 600], "least and most pixels of a crop's side", least=1, entries=(2, 2)
    ),
    "MAX_ITER": Key(90000, "iterations of the training", least=1),
    "STEPS": Key([60000, 80000], "iterations after which the rate is multiplied by GAMMA"),
    "GAMMA": Key(0.1, "see STEPS"),
    "WARMUP_ITERS": Key(1000, "iterations of the linear warm-up"),
    "EVAL_PERIOD": Key(0, "iterations between evaluations (epochs in the log); 0: only at the end"),
}
# Shared sections and keys that detection does not read.
_UNREAD = """
    AUG SCHEDULE KNN PROBE HELD_OUT LINEAR FINETUNE OPTIM.MIN_LR MODEL.STACK_VIEWS
    MODEL.BACKBONE.TARGET_DROP_PATH DATA.REPEATED_AUG DATA.DECODE DATA.CACHE_MODE DATA.INDEX_CACHE
    DATA.DOWNLOAD TRAIN.EPOCHS TRAIN.STEPS TRAIN.COMPILE TRAIN.CUDA_GRAPHS
    DATA.CHANNELS DATA.RANGE DATA.MEAN DATA.STD
""".split()
# Defaults that differ: COCO's 1x schedule of Detectron2, whose rates are those of 16 images.
_DEFAULTS: dict[str, Value] = {
    "MODEL.NAME": "rcnn",
    "TRAIN.BATCH_SIZE": 2,
    "OPTIM.BASE_LR": 0.02,
    "OPTIM.WARMUP_LR": 0.00002,
    "OPTIM.LR_BATCH": 16,
}


def detection_schema() -> Schema:
    """Return all keys of detection; the defaults are COCO, 1x, ResNet-50 FPN."""
    schema = declare({"rcnn": RCNN}).without(*_UNREAD)
    for name, default in _DEFAULTS.items():
        schema[name] = replace(schema[name], default=default)
    schema["DATA.DATASET"] = Key(
        "coco", "coco: COCO's JSON | voc: Pascal VOC's XML", choices=DATASETS
    )
    schema["LOG.PICTURES"] = Key(9, "test images in detections.png; 0: none", role="local")
    for name, key in DETECTION.items():
        schema[f"DETECTION.{name}"] = key
    return schema


def load_detection_config(
    files: list[str | None], opts: list[str], flags: dict[str, Value]
) -> CfgNode:
    """Merge files, `--opts` and flags over the defaults and refuse what no detector can be.

    Raises `ConfigError` naming key, value and remedy.
    """
    cfg = load_config(detection_schema(), files, opts, flags)
    rcnn, detection = cfg.MODEL.RCNN, cfg.DETECTION
    _check_sizes(detection)
    if rcnn.MASKS and cfg.DATA.DATASET == "voc":
        raise ConfigError(
            "MODEL.RCNN.MASKS: True, but Pascal VOC's XML has boxes only; set it to False"
        )
    _check_heads(rcnn)
    if rcnn.NECK != "c4" and len(rcnn.ANCHOR_SIZES) != 5:
        raise ConfigError(
            f"MODEL.RCNN.ANCHOR_SIZES: {rcnn.ANCHOR_SIZES}; {rcnn.NECK} has 5 levels, give 5"
        )
    if detection.EVAL_PERIOD and detection.MAX_ITER % detection.EVAL_PERIOD:
        raise ConfigError(
            f"DETECTION.EVAL_PERIOD: {detection.EVAL_PERIOD} does not divide DETECTION.MAX_ITER "
            f"{detection.MAX_ITER}; choose a divisor, or 0 to evaluate at the end only"
        )
    return cfg


def _check_heads(rcnn: CfgNode) -> None:
    if rcnn.NECK == "c4":
        for key, only in (("BOX_HEAD", "2fc"), ("MASK_NORM", False), ("CASCADE", [])):
            if rcnn[key] != only:
                raise ConfigError(
                    f"MODEL.RCNN.{key}: {rcnn[key]!r}, but stage 5 is the head of NECK c4; set it "
                    f"to {only!r}, or NECK to fpn"
                )
    if rcnn.MASK_NORM and not rcnn.MASKS:
        raise ConfigError("MODEL.RCNN.MASK_NORM: True without masks; set it to False or MASKS True")
    stages = len(rcnn.CASCADE)
    for key in ("CASCADE_WEIGHTS", "CASCADE_XY", "CASCADE_WH"):
        if stages and len(rcnn[key]) != stages:
            raise ConfigError(
                f"MODEL.RCNN.{key}: {rcnn[key]}, but MODEL.RCNN.CASCADE has {stages} stages; give "
                f"{stages} numbers"
            )
    for key in ("BOX_HEAD", "MASK_NORM"):
        if rcnn.NORM == "frozen" and rcnn[key] in ("4conv1fc", True):
            raise ConfigError(
                f"MODEL.RCNN.{key}: {rcnn[key]!r} has new batch norms, which MODEL.RCNN.NORM "
                "'frozen' would leave untrained; set NORM to sync or batch"
            )


def _check_sizes(detection: CfgNode) -> None:
    cropped = detection.CROP_SIZES if detection.CROP else []
    least, most = detection.CROP_RANGE
    if least > most:
        raise ConfigError(
            f"DETECTION.CROP_RANGE: {detection.CROP_RANGE} starts above its end; give the smaller "
            f"number first, [{most}, {least}]"
        )
    largest = max(*detection.MIN_SIZES, *cropped, detection.TEST_SIZE)
    if largest > detection.MAX_SIZE:
        raise ConfigError(
            f"DETECTION.MAX_SIZE: {detection.MAX_SIZE} is below the shorter side's {largest}; "
            "raise it"
        )
    if detection.CANVAS and detection.CANVAS < detection.MAX_SIZE:
        raise ConfigError(
            f"DETECTION.CANVAS: {detection.CANVAS} cannot hold images of up to DETECTION.MAX_SIZE "
            f"{detection.MAX_SIZE}; lower MAX_SIZE or raise CANVAS"
        )
