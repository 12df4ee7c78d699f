"""The flags that programs share: the key that each sets, its group in `--help`, its text."""

from typing import NamedTuple


class Flag(NamedTuple):
    """A flag that sets one configuration key."""

    group: str
    key: str
    text: str
    kind: type = str
    metavar: str = "NAME"
    constant: bool | str | None = None  # of a switch: the value that it sets


RUN, DATA, METHOD, MACHINE, SPECIAL = (
    "run",
    "data",
    "method and optimisation",
    "machine",
    "instead of a run",
)
GROUPS = (RUN, DATA, METHOD, MACHINE, SPECIAL)

# A flag that is not given leaves the configuration alone.
FLAGS: dict[str, Flag] = {
    "--output": Flag(RUN, "OUTPUT", "folder of all runs", metavar="DIR"),
    "--tag": Flag(RUN, "TAG", "name of this run"),
    "--epochs": Flag(RUN, "TRAIN.EPOCHS", "length of the run", int, "N"),
    "--resume": Flag(RUN, "RESUME", "go on from this checkpoint", metavar="FILE"),
    "--seed": Flag(RUN, "SEED", "of everything random", int, "N"),
    "--data-path": Flag(DATA, "DATA.PATH", "folder of the data set", metavar="DIR"),
    "--dataset": Flag(DATA, "DATA.DATASET", "see --list datasets"),
    "--img-size": Flag(DATA, "DATA.IMG_SIZE", "side in pixels", int, "N"),
    "--workers": Flag(DATA, "DATA.NUM_WORKERS", "loaders a process", int, "N"),
    "--download": Flag(DATA, "DATA.DOWNLOAD", "fetch the data set", constant=True),
    "--zip": Flag(DATA, "DATA.DATASET", "images in zip files", constant="zip"),
    "--cache-mode": Flag(DATA, "DATA.CACHE_MODE", "zip only: no, full, part"),
    "--backbone": Flag(METHOD, "MODEL.BACKBONE.NAME", "see --list"),
    "--batch-size": Flag(METHOD, "TRAIN.BATCH_SIZE", "per process", int, "N"),
    "--accumulation-steps": Flag(
        METHOD, "TRAIN.ACCUMULATION_STEPS", "micro-batches a step", int, "N"
    ),
    "--lr": Flag(METHOD, "OPTIM.BASE_LR", "peak rate", float, "X"),
    "--weight-decay": Flag(METHOD, "OPTIM.WEIGHT_DECAY", "", float, "X"),
    "--device": Flag(MACHINE, "DEVICE", "auto, cpu or cuda"),
    "--precision": Flag(MACHINE, "TRAIN.PRECISION", "auto, fp32, bf16 or fp16"),
    "--use-checkpoint": Flag(MACHINE, "TRAIN.USE_CHECKPOINT", "save memory", constant=True),
}
# Programs that train a head have other keys for these.
OF_PRETRAINING = ("--lr", "--weight-decay")
