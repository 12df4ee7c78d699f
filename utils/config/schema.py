"""Every configuration key with its default, its range, and what it means for a run that goes on."""

from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode


def _optimizer(**changes: Any) -> CfgNode:
    node = CfgNode(
        {
            "NAME": "sgd",  # sgd | adamw | lars
            "BASE_LR": 0.03,
            "WARMUP_LR": 0.0,  # where the warm-up starts
            "MIN_LR": 0.0,  # where the cosine ends
            "LR_BATCH": 0,  # multiply the three rates by global batch / this; 0: use them as they are
            "WEIGHT_DECAY": 1e-4,
            "WEIGHT_DECAY_END": 0.0,  # where a cosine takes it by the last step; 0: constant
            "EXCLUDE_1D": False,  # no decay (and in LARS no scaling) for biases and norms
            "EXCLUDE_TOKENS": False,  # nor for class tokens, positions, relative position tables
            "MOMENTUM": 0.9,
            "NESTEROV": False,
            "BETAS": [0.9, 0.999],
            "EPS": 1e-8,
            "TRUST_COEFFICIENT": 0.001,  # LARS
            "CLIP_GRAD": 0.0,  # global L2 norm; 0: no clipping
            "CLIP_PER_TENSOR": False,  # the norm of each tensor by itself
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


def _finetune() -> CfgNode:
    """Return the section of ``main_semisup.py``; the defaults are Barlow Twins' and SynCo's protocol."""
    optimizer = _optimizer(WEIGHT_DECAY=1e-6)
    del optimizer["BASE_LR"]  # LR_BACKBONE and LR_CLASSIFIER stand for it
    schedule = _schedule()
    schedule.PER_EPOCH = True
    return CfgNode(
        {
            "WEIGHTS": "freeze",  # freeze | finetune
            "LR_BACKBONE": 0.0,
            "LR_CLASSIFIER": 0.3,
            "EPOCHS": 100,
            "BATCH_SIZE": 256,  # per process; fewer where there are fewer images
            "TRAIN_PERCENT": 100.0,  # of the labels of each class, drawn by (SEED, percent)
            "SUBSET": "",  # a list of file names in SimCLR's format, which stands for the draw
            "HOLD_OUT": 0.0,  # share of these labels kept for validation; 0: the test split is watched
            "TEST": True,  # read the test split: once, at the end, if labels are held out
            "EVAL_EPOCHS": 1,  # evaluate every so many epochs, and after the last
            "HEAD_INIT": "normal",  # normal (std 0.01) | trunc (std 0.02)
            "REPRESENTATION_SIZE": 0,  # width of a tanh layer before the head; 0: none
            "DROP_PATH": 0.0,  # also active in a frozen backbone, whose batch norms stay as they are
            "LAYER_DECAY": 1.0,  # learning rate of a layer over that of the next; 1: one rate for all
            "LABEL_SMOOTHING": 0.0,
            "MIXUP": 0.0,  # alpha of the Beta distribution; 0: off
            "CUTMIX": 0.0,
            "MIXUP_PROB": 1.0,
            "SWITCH_PROB": 0.5,  # of Cutmix where both are on
            "MIXUP_MODE": "batch",  # batch | pair | elem
            "REPEATED_AUG": 1,  # views of an image in an epoch, of so many times fewer images (DeiT: 3)
            "AUG": {
                "CROP_MIN": 0.08,
                "INTERPOLATION": "bilinear",  # bilinear | bicubic
                "COLOR_JITTER": 0.0,  # strength; not together with RAND_AUGMENT
                "RAND_AUGMENT": "",  # timm's notation, e.g. rand-m9-mstd0.5-inc1
                "ERASING": 0.0,  # probability
            },
            "OPTIM": optimizer,
            "SCHEDULE": schedule,
        }
    )


def default_config(methods: Mapping[str, Mapping[str, Any]]) -> CfgNode:
    """Return the whole tree; ``methods`` (name -> options with defaults) become ``MODEL.<NAME>`` sections."""
    linear_optimizer = _optimizer(WEIGHT_DECAY=0.0)
    del linear_optimizer["BASE_LR"]  # LINEAR.LRS stands for it
    for key in ("EXCLUDE_1D", "EXCLUDE_TOKENS"):  # a head is one matrix and one bias, neither of them exempt
        del linear_optimizer[key]
    tree = CfgNode(
        {
            "NAME": "",  # of the run's folder OUTPUT/NAME/TAG; empty: the yaml's file name
            "TAG": "default",
            "OUTPUT": "output",
            "SEED": 0,
            "DEVICE": "auto",  # auto: cuda where there is one; cpu, cuda
            "RESUME": "",  # a checkpoint to go on from; empty: the newest valid one of the run's folder
            "DATA": {
                "DATASET": "imagefolder",
                "PATH": "",
                "IMG_SIZE": 224,
                "REPEATED_AUG": 1,  # pretraining: copies of an image in an epoch, which holds fewer images
                "NUM_WORKERS": 8,
                "DECODE": "worker",  # pretraining's JPEGs: worker | device (by nvJPEG on a GPU)
                "CACHE_MODE": "part",  # zip only: no | full | part
                "INDEX_CACHE": "",  # folder of image listings; empty: ~/.cache/synco; off: none
                "DOWNLOAD": False,
                "MAX_BAD_FRACTION": 1e-4,  # of an epoch's images that may be unreadable before the run stops
                "MAX_PIXELS": 1 << 27,  # an image of more (about 134 million) is unreadable
                "TIMEOUT": 300.0,  # seconds to wait for a loader worker
            },
            "MODEL": {
                "NAME": "moco_v2",
                "STACK_VIEWS": False,  # one pass of the backbone for all views; joint batch norm statistics
                "BACKBONE": {
                    "NAME": "resnet50",
                    "DROP_PATH": 0.0,
                    "TARGET_DROP_PATH": 0.0,
                    "STEM": "imagenet",  # ResNets: imagenet | cifar | cifar_stride2
                    "PATCH_SIZE": 0,  # transformers; 0: the model's own
                    "NUM_TOKENS": 1,  # plain ViTs; SiT reads two
                    "ZERO_INIT_RESIDUAL": False,
                    "FREEZE_PATCH_EMBED": False,
                    "NORM_EPS": 0.0,  # of all layer norms but those before the MLPs; 0: the model's own
                },
            },
            "AUG": {
                "RECIPE": "moco_v2",
                "CROP_MIN": 0.0,  # smallest crop area; 0: the recipe's
                "BACKEND": "auto",  # of all programs: auto | torch | fused (numba on a CPU, Triton on a GPU)
            },
            "OPTIM": _optimizer(),
            "SCHEDULE": _schedule(),
            "TRAIN": {
                "EPOCHS": 200,
                "BATCH_SIZE": 64,  # per process and micro-batch
                "ACCUMULATION_STEPS": 1,
                "PRECISION": "fp32",  # auto (what the device is fast at) | fp32 | bf16 | fp16
                "CHANNELS_LAST": True,
                "USE_CHECKPOINT": False,
                "COMPILE": False,  # torch.compile of the backbones: for a GPU; on a CPU it gains nothing
                "CUDA_GRAPHS": False,  # the same, replayed as graphs: for small batches
                "DETERMINISTIC": False,  # bit-reproducible kernels, slower on a GPU
                "RANK_TIMEOUT": 600.0,  # seconds that a process waits for another before it names it
            },
            "KNN": {
                "EVERY_EPOCHS": 0,  # k-NN accuracy during pretraining; 0: never
                "K": [10, 20, 100, 200],
                "TEMPERATURE": 0.07,
            },
            "HELD_OUT": {"EVERY_EPOCHS": 0},  # the method's own losses on the val split; 0: never
            "CHECKPOINT": {
                "EVERY_EPOCHS": 1,
                "EVERY_STEPS": 0,  # also every so many optimiser steps; 0: only by epochs
                "KEEP_LAST": 2,
                "KEEP_EVERY_EPOCHS": 0,  # keep these for good; 0: none
                "KEEP_BEST": "",  # and the one that this evaluation liked best, e.g. knn20_top1; empty: none
            },
            "LOG": {"PRINT_FREQ": 10, "TENSORBOARD": True},
            "LINEAR": {
                "LRS": [30.0],  # a grid with WEIGHT_DECAYS, all trained in one pass over the features
                "WEIGHT_DECAYS": [],  # empty: OPTIM.WEIGHT_DECAY
                "CACHED_FEATURES": False,  # of images without augmentation, computed once and kept
                "LABEL_PERCENTS": [100.0],  # of each class: a run each; all but 100 need CACHED_FEATURES
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
    tree["FINETUNE"] = _finetune()
    for name, options in methods.items():
        tree.MODEL[name.upper()] = CfgNode({key.upper(): plain(value) for key, value in options.items()})
    return tree


def plain(value: Any) -> Any:
    """Return a sequence as a list, anything else as it is."""
    return list(value) if isinstance(value, (list, tuple)) else value


# ---- what a key means for a run that goes on ------------------------------------------------------------

# Where and with what help it runs: may change, nobody needs to know.
LOCAL_KEYS = (
    *("NAME", "TAG", "OUTPUT", "DEVICE", "RESUME", "DATA.PATH", "DATA.NUM_WORKERS", "DATA.CACHE_MODE"),
    *("DATA.INDEX_CACHE", "DATA.DOWNLOAD", "DATA.TIMEOUT", "TRAIN.RANK_TIMEOUT", "LOG.*"),
    "FINETUNE.SUBSET",  # where the list is; what it says is part of the data's fingerprint
    "LINEAR.LABEL_PERCENTS",  # each is a run of its own, and part of its data's fingerprint
)
# What is saved and watched, and how a step is computed: may change, and the log says so. The batch sizes are
# here because the run itself holds their product with the number of processes fixed.
TUNABLE_KEYS = (
    *("DATA.MAX_BAD_FRACTION", "DATA.MAX_PIXELS"),
    *("TRAIN.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS", "TRAIN.PRECISION"),
    *("TRAIN.USE_CHECKPOINT", "TRAIN.COMPILE", "TRAIN.CUDA_GRAPHS", "TRAIN.DETERMINISTIC"),
    *("AUG.BACKEND", "DATA.DECODE", "KNN.*", "HELD_OUT.*", "CHECKPOINT.*"),
    *("LINEAR.BATCH_SIZE", "FINETUNE.BATCH_SIZE", "FINETUNE.TEST", "FINETUNE.EVAL_EPOCHS"),
)
# Sections of MODEL that every run reads, and whose section a method without one of its own reads.
COMMON_SECTIONS = ("BACKBONE", "BATCHFORMER")
SECTION_OF = {"batchformer": "MOCOV3"}  # which has BatchFormer whatever MODEL.BATCHFORMER.ENABLED says
# What the result is a function of: another value would be another run.
IDENTITY_KEYS = {
    "pretrain": (
        *("SEED", "DATA.DATASET", "DATA.IMG_SIZE", "DATA.REPEATED_AUG"),
        *("MODEL.*", "AUG.*", "OPTIM.*", "SCHEDULE.*"),
        *("TRAIN.EPOCHS", "TRAIN.CHANNELS_LAST"),  # the optimiser's state is laid out as the weights are
    ),
    "linear": ("SEED", "DATA.DATASET", "DATA.IMG_SIZE", "MODEL.BACKBONE.*", "LINEAR.*"),
    "semisup": (
        *("SEED", "DATA.DATASET", "DATA.IMG_SIZE", "MODEL.BACKBONE.*", "FINETUNE.*"),
        "TRAIN.CHANNELS_LAST",
    ),
    # and DETECTION.*, which only its own tree has (detection/defaults.py): a key in no table is identity
    "detection": ("SEED", "DATA.DATASET", "DATA.IMG_SIZE", "MODEL.*", "OPTIM.*", "TRAIN.CHANNELS_LAST"),
}


def key_class(key: str, task: str = "pretrain") -> str:
    """Return ``local``, ``tunable`` or ``identity``: what a dotted key is to a run of ``task``.

    What only another task reads (``LINEAR.LRS`` while pretraining) is tunable; a key in no table is identity.
    """
    if _listed(key, LOCAL_KEYS):
        return "local"
    if _listed(key, TUNABLE_KEYS):
        return "tunable"
    others = [keys for name, keys in IDENTITY_KEYS.items() if name != task]
    foreign = not _listed(key, IDENTITY_KEYS[task]) and any(_listed(key, keys) for keys in others)
    return "tunable" if foreign else "identity"


def _listed(key: str, patterns: tuple[str, ...]) -> bool:
    return any(key == p or (p.endswith(".*") and key.startswith(p[:-1])) for p in patterns)


# ---- what a value may be --------------------------------------------------------------------------------

# By name, or by dotted key where the name means several things; every other number must be at least 0.
MINIMUM = {
    **{name: 1 for name in ("IMG_SIZE", "EPOCHS", "BATCH_SIZE", "ACCUMULATION_STEPS", "PRINT_FREQ", "K")},
    **{name: 1 for name in ("NUM_TOKENS", "NUM_LAYERS", "NUM_HEADS", "DROP_ALIGN")},
    **{name: 1 for name in ("QUEUE_SIZE", "OUT_DIM", "HIDDEN_DIM", "DECAY_EPOCHS", "BN_GROUPS", "NUM_HARD")},
    **{name: 1 for name in ("EVAL_EPOCHS", "REPEATED_AUG", "MAX_PIXELS")},
    **{name: 1e-6 for name in ("TRAIN_PERCENT", "LABEL_PERCENTS")},
    "LAYER_DECAY": 1e-6,
    "KEEP_LAST": 2,  # the newest may be the one that a crash spoilt
    "TEMPERATURE": 1e-6,
    "TIMEOUT": 1.0,
    "RANK_TIMEOUT": 1.0,
}
MAXIMUM = {
    **{name: 1.0 for name in ("DROP_PATH", "TARGET_DROP_PATH", "BASE_MOMENTUM", "MOMENTUM", "CROP_MIN")},
    **{name: 1.0 for name in ("LABEL_SMOOTHING", "MAX_BAD_FRACTION", "DROP_FRACTION", "REPLACE_FRACTION")},
    **{name: 1.0 for name in ("MIXUP_PROB", "SWITCH_PROB", "ERASING", "LAYER_DECAY", "DROPOUT")},
    **{name: 100.0 for name in ("TRAIN_PERCENT", "LABEL_PERCENTS")},
    "HOLD_OUT": 0.9,
    "BETAS": 0.999999,
}
_OPTIMIZERS = ("sgd", "adamw", "lars")
_SCHEDULES = ("cosine", "linear", "step", "milestones", "constant")
CHOICES = {
    "DEVICE": ("auto", "cpu", "cuda"),
    "PRECISION": ("auto", "fp32", "bf16", "fp16"),
    "BACKEND": ("auto", "torch", "fused"),
    "DECODE": ("worker", "device"),
    "CACHE_MODE": ("no", "full", "part"),
    "HEAD_INIT": ("normal", "trunc"),
    "MODEL.BATCHFORMER.LOSS": ("mean", "sum", "joint"),
    "MODEL.SIT.VARIANT": ("rotation", "gmml"),
    "MODEL.SIT.DROP_TYPE": ("zeros", "noise"),
    "WEIGHTS": ("finetune", "freeze"),
    "MIXUP_MODE": ("batch", "pair", "elem"),
    "INTERPOLATION": ("bilinear", "bicubic"),
    **{f"{section}OPTIM.NAME": _OPTIMIZERS for section in ("", "LINEAR.", "FINETUNE.")},
    **{f"{section}SCHEDULE.NAME": _SCHEDULES for section in ("", "LINEAR.", "FINETUNE.")},
}
# least and most entries of a list
LENGTHS = {
    **{"BETAS": (2, 2), "NUM_SYNTHETIC": (6, 6)},
    **{"LRS": (1, 1 << 10), "WEIGHT_DECAYS": (0, 1 << 10), "LABEL_PERCENTS": (1, 1 << 6)},
}
