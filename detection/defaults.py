"""The configuration of a detector: what detection reads of the shared tree, and its own keys."""

from yacs.config import CfgNode

from utils.config.load import ConfigError, default_config, load_config

# Options of the detector, the section MODEL.RCNN.
RCNN = {
    "neck": "fpn",  # fpn (ResNet, Swin) | c4 (ResNet: stage 5 is the RoI head) | pyramid (ViT)
    "masks": False,  # Mask R-CNN
    "norm": "sync",  # batch norms, the pretrained ones too: sync (over processes) | batch (local) | frozen
    "extra_norm": True,  # c4: one more norm after stage 5, as MoCo's detectors have it
    "anchor_sizes": [32, 64, 128, 256, 512],  # pixels of the resized image; fpn, pyramid: one a level
    "rpn_pre_nms": [2000, 1000],  # proposals (per level) before suppression, in training and in a test
    "rpn_post_nms": [2000, 1000],
    "rpn_batch": 256,  # anchors an image that the proposal loss samples
    "roi_batch": 512,  # proposals an image that the head's loss samples
    "pyramid_width": 256,  # channels of the maps of fpn and pyramid
    "head_width": 1024,  # of the two layers of the box head of fpn and pyramid
    "score_thresh": 0.05,
    "max_detections": 100,
}
_NECKS = ("fpn", "c4", "pyramid")
_NORMS = ("sync", "batch", "frozen")
DATASETS = ("coco", "voc")
# Sections of the shared tree that a detector reads, and its keys where it does not read all.
_SECTIONS = (
    *("NAME", "TAG", "OUTPUT", "SEED", "DEVICE", "RESUME"),
    *("DATA", "MODEL", "OPTIM", "TRAIN", "CHECKPOINT", "LOG"),
)
_KEYS = {
    "DATA": ("DATASET", "PATH", "IMG_SIZE", "NUM_WORKERS", "MAX_BAD_FRACTION", "TIMEOUT"),
    "TRAIN": (
        *("BATCH_SIZE", "ACCUMULATION_STEPS", "PRECISION"),
        *("CHANNELS_LAST", "USE_CHECKPOINT", "DETERMINISTIC", "RANK_TIMEOUT"),
    ),
    "MODEL": ("NAME", "BACKBONE", "RCNN"),
}


def detection_config() -> CfgNode:
    """Return the tree of defaults: COCO, 1x, ResNet-50 FPN."""
    tree = default_config({"rcnn": RCNN})
    for key in set(tree) - set(_SECTIONS):
        del tree[key]
    for section, keys in _KEYS.items():
        for key in set(tree[section]) - set(keys):
            del tree[section][key]
    del tree.OPTIM["MIN_LR"]
    tree.MODEL.NAME = "rcnn"
    tree.MODEL.BACKBONE.pop("TARGET_DROP_PATH", None)
    tree.DATA.DATASET = "coco"  # coco: COCO's JSON | voc: Pascal VOC's XML
    tree.TRAIN.BATCH_SIZE = 2
    # per 16 images; the warm-up starts at a thousandth, as Detectron2's
    tree.OPTIM.merge_from_list(["BASE_LR", 0.02, "WARMUP_LR", 0.00002, "LR_BATCH", 16])
    tree.LOG.PICTURES = 9  # test images in detections.png; 0: none
    tree.DETECTION = CfgNode(
        {
            "TRAIN_SPLIT": "train2017",  # voc: 2007_trainval+2012_trainval
            "TEST_SPLIT": "val2017",
            "CLASSES": "",  # voc: names with commas between them; empty: Pascal VOC's twenty
            "MIN_SIZES": list(range(640, 801, 32)),  # of the shorter side in training, one drawn an image
            "TEST_SIZE": 800,
            "MAX_SIZE": 1333,  # of the longer side
            "CANVAS": 0,  # side of the square that images are padded to; 0 (ResNet): as small as possible
            "FLIP": 0.5,
            "MAX_ITER": 90000,
            "STEPS": [60000, 80000],  # iterations after which the rate is multiplied by GAMMA
            "GAMMA": 0.1,
            "WARMUP_ITERS": 1000,
            "EVAL_PERIOD": 0,  # iterations between evaluations ("epochs" in the log); 0: only at the end
        }
    )
    return tree


def load_detection_config(files: list[str | None], opts: list[str], flags: dict[str, object]) -> CfgNode:
    """Merge files, ``--opts`` and flags over the defaults and refuse what no detector can be.

    Raises ``ConfigError`` naming key, value and remedy.
    """
    cfg = load_config(detection_config(), files, opts, flags)
    rcnn, detection = cfg.MODEL.RCNN, cfg.DETECTION
    for key, value, choices in (
        ("MODEL.RCNN.NECK", rcnn.NECK, _NECKS),
        ("MODEL.RCNN.NORM", rcnn.NORM, _NORMS),
        ("DATA.DATASET", cfg.DATA.DATASET, DATASETS),
    ):
        if value not in choices:
            raise ConfigError(f"{key}: {value!r} is not one of {', '.join(choices)}")
    _check_sizes(detection)
    if rcnn.MASKS and cfg.DATA.DATASET == "voc":
        raise ConfigError("MODEL.RCNN.MASKS: True, but Pascal VOC's XML has boxes only; set it to False")
    if rcnn.NECK != "c4" and len(rcnn.ANCHOR_SIZES) != 5:
        raise ConfigError(f"MODEL.RCNN.ANCHOR_SIZES: {rcnn.ANCHOR_SIZES}; {rcnn.NECK} has 5 levels, give 5")
    for key in ("PYRAMID_WIDTH", "HEAD_WIDTH", "RPN_BATCH", "ROI_BATCH"):
        if rcnn[key] < 1:
            raise ConfigError(f"MODEL.RCNN.{key}: {rcnn[key]} is out of range; use a value of at least 1")
    for key in ("RPN_PRE_NMS", "RPN_POST_NMS"):
        if len(rcnn[key]) != 2:
            raise ConfigError(f"MODEL.RCNN.{key}: {rcnn[key]}; give two counts, for training and for a test")
    if detection.EVAL_PERIOD and detection.MAX_ITER % detection.EVAL_PERIOD:
        raise ConfigError(
            f"DETECTION.EVAL_PERIOD: {detection.EVAL_PERIOD} does not divide DETECTION.MAX_ITER "
            f"{detection.MAX_ITER}; choose a divisor, or 0 to evaluate at the end only"
        )
    return cfg


def _check_sizes(detection: CfgNode) -> None:
    sizes = [*detection.MIN_SIZES, detection.TEST_SIZE]
    if not detection.MIN_SIZES or min(*sizes, detection.MAX_SIZE, detection.MAX_ITER) < 1:
        raise ConfigError("DETECTION: MIN_SIZES, TEST_SIZE, MAX_SIZE and MAX_ITER must be at least 1")
    if max(sizes) > detection.MAX_SIZE:
        raise ConfigError(
            f"DETECTION.MAX_SIZE: {detection.MAX_SIZE} is below the shorter side's {max(sizes)}; raise it"
        )
    if detection.CANVAS and detection.CANVAS < detection.MAX_SIZE:
        raise ConfigError(
            f"DETECTION.CANVAS: {detection.CANVAS} cannot hold images of up to DETECTION.MAX_SIZE "
            f"{detection.MAX_SIZE}; lower MAX_SIZE or raise CANVAS"
        )
    if detection.FLIP > 1:
        raise ConfigError(f"DETECTION.FLIP: {detection.FLIP} is no probability; use a value between 0 and 1")
