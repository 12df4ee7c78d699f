"""The configuration of a program, checked for all that needs neither data nor torch.

The mains load it a second time after their imports; here a mistake is answered at once.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from yacs.config import CfgNode

from utils.config.datasets import CLASS_FOLDERS, UNLABELLED, check_place
from utils.config.key import Program, Value
from utils.config.load import ConfigError, leaves, load_with_origins
from utils.config.methods import method_options
from utils.config.schema import Schema, declare
from utils.config.sections import method_section

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# What --protocol reads after --cfg.
_PROTOCOLS = {"linear": "linear", "semisup": "finetune"}
_NO_KNN = "--opts KNN.EVERY_EPOCHS 0"


def answer_from_config(
    program: Program,
    args: argparse.Namespace,
    flags: Mapping[str, Value],
    schema: Schema | None = None,
) -> str:
    """Check the configuration of a command line; return what `--show-config` prints, else "".

    `schema`: the keys of a transfer, whose main knows what must be checked.
    """
    if getattr(args, "replay", None):  # the file holds its configuration
        return ""
    keys = schema or declare(method_options())
    cfg, origins = load_with_origins(keys, config_files(program, args), args.opts, flags)
    if args.show_config:
        return show_config(cfg, origins, keys, program)
    if schema:
        return ""
    if program == "pretrain" and cfg.TRAIN.STEPS and "TRAIN.EPOCHS" in flags:
        raise ConfigError(
            f"--epochs {flags['TRAIN.EPOCHS']}: has no effect, since TRAIN.STEPS is "
            f"{cfg.TRAIN.STEPS}; leave it out, or set TRAIN.STEPS to 0"
        )
    check_program(program, args, cfg)
    return ""


def config_files(program: Program, args: argparse.Namespace) -> list[str | Path | None]:
    """Return the yaml files that a command line names: --cfg, then --protocol."""
    files: list[str | Path | None] = [args.cfg]
    if getattr(args, "protocol", None):
        files.append(CONFIGS / "_base_" / f"{_PROTOCOLS[program]}_{args.protocol}.yaml")
    return files


def check_program(program: Program, args: argparse.Namespace, cfg: CfgNode) -> None:
    """Refuse what can be refused before torch is imported and a folder is made."""
    check_place(cfg.DATA.DATASET, cfg.DATA.PATH, cfg.DATA.DOWNLOAD)
    if program != "pretrain" and cfg.DATA.DATASET in UNLABELLED:
        raise ConfigError(
            f"DATA.DATASET (--dataset) {cfg.DATA.DATASET!r} has no labels, and this program needs "
            "them; use imagefolder, with a folder for each class"
        )
    if program == "pretrain":
        check_graphs(cfg.TRAIN)
        if getattr(args, "dry_run", False) and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError("--dry-run: measures one process; start it without torchrun")
        if not (args.eval or args.throughput):
            check_training(cfg)


def check_graphs(train: CfgNode) -> None:
    """Refuse CUDA graphs with accumulation in a `TRAIN` section."""
    if train.CUDA_GRAPHS and train.ACCUMULATION_STEPS > 1:
        raise ConfigError(
            "TRAIN.CUDA_GRAPHS: the gradients of a graph do not outlive a micro-batch; set it to "
            "False, or TRAIN.ACCUMULATION_STEPS (--accumulation-steps) to 1"
        )


def check_training(cfg: CfgNode) -> None:
    """Refuse what would stop a pretraining at its first step, or after its first epoch."""
    _check_queue(cfg)
    if cfg.KNN.EVERY_EPOCHS > 0 and cfg.DATA.DATASET in UNLABELLED:
        raise ConfigError(
            f"KNN.EVERY_EPOCHS: {cfg.KNN.EVERY_EPOCHS}, but DATA.DATASET {cfg.DATA.DATASET!r} has "
            f"no labels; add {_NO_KNN}, or use --dataset imagefolder"
        )
    if cfg.PROBE.ONLINE:
        _check_probe(cfg)
    root = Path(cfg.DATA.PATH)
    if cfg.DATA.DATASET in CLASS_FOLDERS and (root / "train").is_dir():
        # Hours later the first evaluation would fail, so it is asked for now.
        for key, remedy in (("KNN", _NO_KNN), ("HELD_OUT", "--opts HELD_OUT.EVERY_EPOCHS 0")):
            if cfg[key].EVERY_EPOCHS > 0 and not (root / "val").is_dir():
                raise ConfigError(
                    f"{key}.EVERY_EPOCHS: {cfg[key].EVERY_EPOCHS} needs images to test, but "
                    f"{root / 'val'} does not exist; make it, or add {remedy}"
                )


def _check_probe(cfg: CfgNode) -> None:
    place, remedy = Path(cfg.DATA.PATH), "set PROBE.ONLINE to False"
    if cfg.DATA.DATASET in UNLABELLED:
        raise ConfigError(
            f"PROBE.ONLINE: DATA.DATASET {cfg.DATA.DATASET!r} has no labels to learn from; "
            f"{remedy}, or use --dataset imagefolder"
        )
    if cfg.KNN.EVERY_EPOCHS == 0:
        raise ConfigError(
            "PROBE.ONLINE: its accuracy is measured with the k-NN, and KNN.EVERY_EPOCHS is 0; set "
            f"that to -1 or more epochs, or {remedy}"
        )
    if cfg.DATA.DATASET in CLASS_FOLDERS and (place / "train").is_dir():
        if not (place / "val").is_dir():
            raise ConfigError(
                f"PROBE.ONLINE: it needs images to test, but {place / 'val'} does not exist; make "
                f"it, or {remedy}"
            )


def _check_queue(cfg: CfgNode) -> None:
    section = method_section(cfg.MODEL.NAME)
    options = cfg.MODEL[section]
    size = options.get("QUEUE_SIZE")
    world = os.environ.get("WORLD_SIZE") or "1"
    if size is None or not world.isdecimal():  # a wrong WORLD_SIZE is refused where it is used
        return
    streams = 1 + bool(cfg.MODEL.BATCHFORMER.ENABLED)
    streams *= 1 + bool(options.get("SYMMETRIC", False))
    share = int(world) * cfg.TRAIN.ACCUMULATION_STEPS * streams
    keys = cfg.TRAIN.BATCH_SIZE * share
    if size % keys == 0:
        return
    below = size // keys * keys
    sizes = f"{below} or {below + keys}" if below else f"{keys}"
    batches = [n for n in range(1, size // share + 1) if size % (n * share) == 0]
    remedy = f"--opts MODEL.{section}.QUEUE_SIZE {sizes}"
    if batches:
        nearest = min(batches, key=lambda n: abs(n - cfg.TRAIN.BATCH_SIZE))
        remedy = f"--batch-size {nearest}, or {remedy}"
    raise ConfigError(
        f"MODEL.{section}.QUEUE_SIZE: {size} is not a multiple of the {keys} keys of one step "
        "(batch size x processes x accumulation, twice that under BatchFormer or SYMMETRIC); use "
        f"{remedy}"
    )


def show_config(cfg: CfgNode, origins: Mapping[str, str], schema: Schema, program: Program) -> str:
    """Return each key that the program reads, its value and where the value comes from."""
    method = method_section(cfg.MODEL.NAME)
    values = dict(leaves(cfg))
    rows = []
    for key, origin in origins.items():
        sections = key.split(".")
        # Sections of MODEL: the other methods have no part in this run.
        of_other = len(sections) == 3 and sections[0] == "MODEL"
        of_other = of_other and sections[1] not in (method, "BACKBONE", "BATCHFORMER")
        if program in schema[key].programs and not of_other:
            rows.append((key, str(values[key]) if values[key] != "" else "''", origin))
    width = max(len(key) for key, *_ in rows)
    return "\n".join(f"{key:{width}}  {value:24} {origin}" for key, value, origin in rows) + "\n"
