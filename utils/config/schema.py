"""Every configuration key, each declared once: default, meaning, limits, and its role on resume.

The options of a method are declared by the signature of its class and appear as `MODEL.<METHOD>`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from yacs.config import CfgNode

from utils.config.key import Key, Program, Role
from utils.schedules import SCHEDULES

OPTIMIZERS = ("sgd", "adamw", "lars")
HEAD_INITS = ("normal", "trunc")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BACKENDS = ("auto", "torch", "fused")
DEVICES = ("auto", "cpu", "cuda")

# Sections of `MODEL` that every method reads.
COMMON_SECTIONS = ("BACKBONE", "BATCHFORMER")

# The programs whose result depends on a key.
PRETRAIN: tuple[Program, ...] = ("pretrain",)
MODEL: tuple[Program, ...] = ("pretrain", "detection", "segmentation")
LAYOUT: tuple[Program, ...] = (*MODEL, "semisup")
PIXELS: tuple[Program, ...] = ("pretrain", "linear", "semisup")  # the others read 8-bit RGB

Tree = Mapping[str, "Key | Tree"]


class Schema(dict[str, Key]):
    """The declarations of a program's keys by dotted name, in the order of the yaml file."""

    def defaults(self) -> CfgNode:
        """Return the tree of all defaults."""
        tree = CfgNode()
        for name, key in self.items():
            *sections, leaf = name.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, CfgNode())
            node[leaf] = plain(key.default)
        return tree

    def without(self, *names: str) -> "Schema":
        """Return a copy that lacks these keys and sections."""
        prefixes = tuple(f"{name}." for name in names)
        return Schema(
            {
                name: key
                for name, key in self.items()
                if name not in names and not name.startswith(prefixes)
            }
        )


def declare(methods: Mapping[str, Mapping[str, Key]]) -> Schema:
    """Return all keys; `methods` (method -> option -> key) become sections `MODEL.<METHOD>`."""
    schema = Schema(KEYS)
    for method, options in methods.items():
        for option, key in options.items():
            schema[f"MODEL.{method.upper()}.{option.upper()}"] = key
    return schema


def key_class(key: str, task: str = "pretrain") -> Role:
    """Return what a changed value of a dotted key means to a run of the program `task` on resume.

    A key that is declared nowhere is identity.
    """
    declared = KEYS.get(key)
    if declared is None:
        # Not of KEYS: an option of a method, of detection or of segmentation.
        if key.startswith("LOG."):
            return "local"
        of_others = key.startswith("MODEL.") and task not in MODEL
        return "tunable" if of_others else "identity"
    if declared.role == "identity" and task not in declared.programs:
        return "tunable"
    return declared.role


def plain(value: object) -> object:
    """Return a sequence as a list, anything else as it is."""
    return list(value) if isinstance(value, (list, tuple)) else value


def _optimizer(weight_decay: float = 1e-4) -> dict[str, Key]:
    return {
        "NAME": Key(
            "sgd",
            "the optimiser; timm/<name>: one of `timm.optim.list_optimizers()`, such as timm/lamb",
            choices=OPTIMIZERS,
            library="timm/",
        ),
        "BASE_LR": Key(0.03, "peak learning rate"),
        "WARMUP_LR": Key(0.0, "learning rate at the start of the warm-up"),
        "MIN_LR": Key(0.0, "learning rate at the end of the cosine"),
        "LR_BATCH": Key(0, "multiply the three rates by global batch / this; 0: do not"),
        "WEIGHT_DECAY": Key(weight_decay, "weight decay"),
        "WEIGHT_DECAY_END": Key(0.0, "weight decay at the last step, by a cosine; 0: constant"),
        "EXCLUDE_1D": Key(False, "no weight decay, and no LARS scaling, for biases and norms"),
        "EXCLUDE_TOKENS": Key(False, "no weight decay for tokens, positions and what timm exempts"),
        "EXCLUDE_RULE": Key(
            "1d",
            "1d: the two keys above decide | norms: no decay for names with `norm`, tokens and "
            "positions, but for biases (Swin's detectors) | norm_layers: no decay for norm layers "
            "alone (Detectron2)",
            choices=("1d", "norms", "norm_layers"),
        ),
        "MOMENTUM": Key(0.9, "momentum of SGD and LARS, and of one of timm that has it", most=1.0),
        "NESTEROV": Key(False, "Nesterov momentum of SGD"),
        "BETAS": Key(
            [0.9, 0.999],
            "betas of AdamW; another value than the default also replaces those of timm's",
            most=0.999999,
            entries=(2, 2),
        ),
        "EPS": Key(1e-8, "epsilon of AdamW; as BETAS for one of timm"),
        "TRUST_COEFFICIENT": Key(0.001, "trust coefficient of LARS"),
        "CLIP_GRAD": Key(0.0, "largest L2 norm of the gradient; 0: no clipping"),
        "CLIP_PER_TENSOR": Key(False, "clip the norm of each tensor by itself"),
    }


def _schedule(per_epoch: bool = False) -> dict[str, Key]:
    return {
        "NAME": Key("cosine", "of the learning rate", choices=SCHEDULES),
        "WARMUP_EPOCHS": Key(0, "epochs of linear warm-up"),
        "PER_EPOCH": Key(per_epoch, "hold the rate for an epoch (MoCo) instead of a step"),
        "SHIFTED": Key(False, "start the cosine after the warm-up (MoCo v3) instead of at step 0"),
        "LAG": Key(False, "the one-step lag of the published MoBY and SiT code"),
        "MILESTONES": Key([120, 160], "epochs, for milestones"),
        "GAMMA": Key(0.1, "factor, for milestones and step"),
        "DECAY_EPOCHS": Key(30, "epochs between two steps, for step", least=1),
    }


def _linear() -> dict[str, Key | Tree]:
    # LRS replaces BASE_LR; the exemptions have no meaning for one matrix and one bias
    optimizer = _optimizer(weight_decay=0.0)
    for name in ("BASE_LR", "EXCLUDE_1D", "EXCLUDE_TOKENS", "EXCLUDE_RULE"):
        del optimizer[name]

    return {
        "LRS": Key([30.0], "learning rates, a grid with WEIGHT_DECAYS", entries=(1, 1 << 10)),
        "WEIGHT_DECAYS": Key([], "empty: OPTIM.WEIGHT_DECAY", entries=(0, 1 << 10)),
        "CACHED_FEATURES": Key(False, "compute features without augmentation once and keep them"),
        "LABEL_PERCENTS": Key(
            [100.0],
            "share of the labels of each class, a run each; all but 100 need CACHED_FEATURES",
            least=1e-6,
            most=100.0,
            entries=(1, 1 << 6),
            role="local",  # each share is a run of its own folder and data fingerprint
        ),
        "EPOCHS": Key(100, "", least=1),
        "BATCH_SIZE": Key(256, "per process", least=1, role="tunable"),
        "HEAD_INIT": Key("normal", "normal (std 0.01) | trunc (std 0.02)", choices=HEAD_INITS),
        "LABEL_SMOOTHING": Key(0.0, "", most=1.0),
        "DROP_PATH": Key(0.0, "of the frozen backbone while the heads train (MoBY: 0.2)", most=1.0),
        "OPTIM": optimizer,
        "SCHEDULE": _schedule(),
    }


def _finetune() -> dict[str, Key | Tree]:
    """Return the section of `main_semisup.py`, with Barlow Twins' and SynCo's protocol."""
    optimizer = _optimizer(weight_decay=1e-6)
    del optimizer["BASE_LR"]  # LR_BACKBONE and LR_CLASSIFIER replace it

    return {
        "WEIGHTS": Key("freeze", "of the backbone", choices=("freeze", "finetune")),
        "LR_BACKBONE": Key(0.0, "peak learning rate of the backbone"),
        "LR_CLASSIFIER": Key(0.3, "peak learning rate of the head"),
        "EPOCHS": Key(100, "", least=1),
        "BATCH_SIZE": Key(256, "per process, at most all images", least=1, role="tunable"),
        "TRAIN_PERCENT": Key(100.0, "of the labels of each class", least=1e-6, most=100.0),
        # the list's content is part of the data's fingerprint, so its path may change
        "SUBSET": Key("", "file in SimCLR's format, instead of the draw", role="local"),
        "HOLD_OUT": Key(0.0, "share of the labels for validation; 0: the test split", most=0.9),
        "TEST": Key(True, "read the test split, once if labels are held out", role="tunable"),
        "EVAL_EPOCHS": Key(1, "epochs between evaluations", least=1, role="tunable"),
        "HEAD_INIT": Key("normal", "normal (std 0.01) | trunc (std 0.02)", choices=HEAD_INITS),
        "REPRESENTATION_SIZE": Key(0, "width of a tanh layer before the head; 0: none"),
        "DROP_PATH": Key(0.0, "also of a frozen backbone", most=1.0),
        "LAYER_DECAY": Key(1.0, "rate of a layer over that of the next", least=1e-6, most=1.0),
        "LABEL_SMOOTHING": Key(0.0, "", most=1.0),
        "MIXUP": Key(0.0, "alpha of the Beta distribution; 0: off"),
        "CUTMIX": Key(0.0, "alpha of the Beta distribution; 0: off"),
        "MIXUP_PROB": Key(1.0, "", most=1.0),
        "SWITCH_PROB": Key(0.5, "of Cutmix where both are on", most=1.0),
        "MIXUP_MODE": Key("batch", "", choices=("batch", "pair", "elem")),
        "REPEATED_AUG": Key(1, "views of an image in an epoch of fewer images", least=1),
        "AUG": {
            "CROP_MIN": Key(0.08, "smallest crop area", most=1.0),
            "INTERPOLATION": Key("bilinear", "", choices=("bilinear", "bicubic")),
            "COLOR_JITTER": Key(0.0, "strength; not together with RAND_AUGMENT"),
            "RAND_AUGMENT": Key("", "timm's notation, e.g. rand-m9-mstd0.5-inc1"),
            "ERASING": Key(0.0, "probability", most=1.0),
        },
        "OPTIM": optimizer,
        "SCHEDULE": _schedule(per_epoch=True),
    }


def _named(prefix: str, tree: Tree) -> Iterator[tuple[str, Key]]:
    """Yield (dotted name, declaration) of nested sections."""
    for name, value in tree.items():
        if isinstance(value, Key):
            yield f"{prefix}{name}", value
        else:
            yield from _named(f"{prefix}{name}.", value)


def _for(programs: tuple[Program, ...], tree: Tree) -> Tree:
    """Return a section whose keys are part of these programs only."""
    return {
        name: replace(value, programs=programs) if isinstance(value, Key) else _for(programs, value)
        for name, value in tree.items()
    }


_DATA: Tree = {
    "DATASET": Key("imagefolder", "one of data.sources.SOURCES"),
    "PATH": Key("", "folder or file of the data set", role="local"),
    "IMG_SIZE": Key(224, "pixels of a view's side", least=1),
    "CHANNELS": Key(3, "of an image; not 3: give MEAN and STD", least=1, programs=PIXELS),
    "RANGE": Key("", "levels that become 0 to 1: low,high | type; empty: 8 bits", programs=PIXELS),
    "MEAN": Key([], "of each channel, in 0 to 1; empty: ImageNet's", programs=PIXELS),
    "STD": Key([], "of each channel; empty: ImageNet's", programs=PIXELS),
    "REPEATED_AUG": Key(1, "copies of an image in an epoch", least=1, programs=PRETRAIN),
    "NUM_WORKERS": Key(8, "loader workers per process", role="local"),
    "DECODE": Key("worker", "device: by nvJPEG", choices=("worker", "device"), role="tunable"),
    "CACHE_MODE": Key("part", "zip only", choices=("no", "full", "part"), role="local"),
    "INDEX_CACHE": Key("", "of image listings; empty: ~/.cache/synco; off: none", role="local"),
    "DOWNLOAD": Key(False, "download the data set where torchvision can", role="local"),
    "MAX_BAD_FRACTION": Key(1e-4, "unreadable images that stop a run", most=1.0, role="tunable"),
    "MAX_PIXELS": Key(1 << 27, "an image of more is unreadable", least=1, role="tunable"),
    "TIMEOUT": Key(300.0, "seconds to wait for a loader worker", least=1.0, role="local"),
}

_BACKBONE: Tree = {
    "NAME": Key("resnet50", "a backbone of this repository, or timm/<model>"),
    "DROP_PATH": Key(0.0, "of the online network", most=1.0),
    "TARGET_DROP_PATH": Key(0.0, "of the target network", most=1.0),
    "STEM": Key("imagenet", "ResNets: imagenet | cifar | cifar_stride2"),
    "PATCH_SIZE": Key(0, "transformers; 0: the model's own"),
    "NUM_TOKENS": Key(1, "tokens of plain ViTs before the patches; SiT reads two", least=1),
    "ZERO_INIT_RESIDUAL": Key(False, "last batch norm of a residual block starts at zero"),
    "FREEZE_PATCH_EMBED": Key(False, "MoCo v3: the patch embedding keeps its random start"),
    "NORM_EPS": Key(0.0, "of the layer norms, but not before the MLPs; 0: the model's own"),
}

_TRAIN: Tree = {
    "EPOCHS": Key(200, "", least=1, programs=PRETRAIN),
    "STEPS": Key(0, "length in optimiser steps; 0: EPOCHS", programs=PRETRAIN),
    "BATCH_SIZE": Key(64, "per process and micro-batch", least=1, role="tunable"),
    "ACCUMULATION_STEPS": Key(1, "micro-batches of a step", least=1, role="tunable"),
    "PRECISION": Key("fp32", "auto: the device's fastest", choices=PRECISIONS, role="tunable"),
    # the optimiser's state has the layout of the weights
    "CHANNELS_LAST": Key(True, "memory layout of convolutions", programs=LAYOUT),
    "USE_CHECKPOINT": Key(False, "recompute activations to save memory", role="tunable"),
    "COMPILE": Key(False, "torch.compile of the backbones, for a GPU", role="tunable"),
    "CUDA_GRAPHS": Key(False, "the same, replayed as graphs: for small batches", role="tunable"),
    "DETERMINISTIC": Key(False, "bit-reproducible kernels, slower on a GPU", role="tunable"),
    "RANK_TIMEOUT": Key(600.0, "seconds to wait for another process", least=1.0, role="local"),
}

_AUG: Tree = {
    "RECIPE": Key("moco_v2", "the views", programs=PRETRAIN),
    "CROP_MIN": Key(0.0, "smallest crop area; 0: the recipe's", most=1.0, programs=PRETRAIN),
    "VIEW_SIZE": Key(
        0, "pixels of the views; 0: DATA.IMG_SIZE, at which evaluation looks", programs=PRETRAIN
    ),
    "LOCAL_CROPS": _for(
        PRETRAIN,
        {
            "NUMBER": Key(0, "small views beside the two; only the online network sees them"),
            "SIZE": Key(96, "their pixels", least=1),
            "SCALE": Key(
                [0.05, 0.25],
                "share of the image's area; DINO sets CROP_MIN 0.25, SwAV has [0.05, 0.14] and "
                "CROP_MIN 0.14",
                least=1e-6,
                most=1.0,
                entries=(2, 2),
            ),
        },
    ),
    "BACKEND": Key("auto", "fused: numba or Triton", choices=BACKENDS, role="tunable"),
}

_KNN: Tree = {
    "EVERY_EPOCHS": Key(
        -1,
        "k-NN accuracy during pretraining; 0: never; -1: every 10 where there are labels",
        least=-1,
        role="tunable",
    ),
    "K": Key([10, 20, 100, 200], "numbers of neighbours", least=1, role="tunable"),
    "TEMPERATURE": Key(0.07, "of the weights of neighbours", least=1e-6, role="tunable"),
}

_CHECKPOINT: Tree = {
    "EVERY_EPOCHS": Key(1, "epochs between checkpoints", role="tunable"),
    "EVERY_STEPS": Key(0, "also every so many optimiser steps; 0: only by epochs", role="tunable"),
    # at least two: the newest may be the one that a crash damaged
    "KEEP_LAST": Key(2, "checkpoints to keep", least=2, role="tunable"),
    "KEEP_EVERY_EPOCHS": Key(0, "keep these for good; 0: none", role="tunable"),
    "KEEP_BEST": Key("", "keep the best by this metric, e.g. knn20_top1", role="tunable"),
}

_TREE: Tree = {
    "NAME": Key("", "of the folder OUTPUT/NAME/TAG; empty: the yaml's name", role="local"),
    "TAG": Key("default", "of the run's folder", role="local"),
    "OUTPUT": Key("output", "folder of all runs", role="local"),
    "SEED": Key(0, "of every random draw"),
    "DEVICE": Key("auto", "auto: cuda where there is one", choices=DEVICES, role="local"),
    "RESUME": Key("", "checkpoint; empty: the newest valid one of the run", role="local"),
    "DATA": _DATA,
    "MODEL": {
        "NAME": Key("moco_v2", "the method", programs=MODEL),
        "STACK_VIEWS": Key(False, "all views in one pass, with joint batch norms", programs=MODEL),
        "BACKBONE": _BACKBONE,
    },
    "AUG": _AUG,
    "OPTIM": _for(MODEL, _optimizer()),
    "SCHEDULE": _for(PRETRAIN, _schedule()),
    "TRAIN": _TRAIN,
    "KNN": _KNN,
    "PROBE": _for(
        PRETRAIN,
        {
            # The weights of the run do not depend on it: it may come and go.
            "ONLINE": Key(False, "a linear probe that learns beside the run", role="tunable"),
            "LR": Key(1e-3, "its learning rate (AdamW)", role="tunable"),
        },
    ),
    "HELD_OUT": {
        "EVERY_EPOCHS": Key(0, "the method's losses on the val split; 0: never", role="tunable")
    },
    "CHECKPOINT": _CHECKPOINT,
    "LOG": {
        "PRINT_FREQ": Key(10, "steps between two log lines", least=1, role="local"),
        "TENSORBOARD": Key(True, "write TensorBoard events", role="local"),
        "WANDB": Key(
            False, "log to Weights & Biases, by its own `WANDB_*` variables", role="local"
        ),
        "MLFLOW": Key(False, "log to MLflow, by its own `MLFLOW_*` variables", role="local"),
    },
    "LINEAR": _for(("linear",), _linear()),
    "FINETUNE": _for(("semisup",), _finetune()),
}

# All keys but the options of the methods.
KEYS: dict[str, Key] = dict(_named("", _TREE))
