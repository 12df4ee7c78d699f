"""What tools for frozen features share: flags, a backbone on its weights, a folder for results."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from data.pixels import refuse_other_pixels
from engine.precision import choose_device
from engine.run import Run
from evaluation.probe import find_weights, weights_label
from models import framework_options, pretrained_backbone
from models.classifier import freeze
from models.parts.backbones import Backbone
from utils.checkpoints import file as checkpoint
from utils.config.key import Value
from utils.config.load import load_config
from utils.config.schema import declare
from utils.logger import setup_logger
from utils.randomness import keyed_seed


@dataclass(frozen=True)
class FrozenBackbone:
    """A frozen backbone, the run that it belongs to and the name of its weights."""

    backbone: Backbone
    run: Run
    label: str

    def folder(self, name: str) -> Path:
        """Return the folder `name` of the run, made if it is not there."""
        folder = self.run.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def open_frozen(
    args: argparse.Namespace,
    flags: Mapping[str, Value],
    needs_path: bool = True,
    any_pixels: bool = False,
) -> FrozenBackbone:
    """Build the backbone that the flags name, on `args.pretrained` or the run's newest weights.

    Raises `ValueError` without data path or weights, and for a run on other pixels than 8-bit RGB
    unless the tool reads `any_pixels`.
    """
    cfg = load_config(declare(framework_options()), [args.cfg], args.opts, flags)
    if not any_pixels:
        refuse_other_pixels(cfg.DATA)
    setup_logger(None, is_main=True)
    if needs_path and not cfg.DATA.PATH:
        raise ValueError("DATA.PATH (--data-path) is empty: name the folder of the data")
    weights = None if args.pretrained == "none" else find_weights(cfg, args.pretrained)
    run = Run(cfg, Path(cfg.OUTPUT) / cfg.NAME / cfg.TAG, choose_device(cfg.DEVICE))
    torch.manual_seed(keyed_seed("model", cfg.SEED))  # `--pretrained none`: as before step 1
    backbone, _ = pretrained_backbone(cfg, weights, args.which, drop_path=0.0)
    label = weights_label(weights, args.which)
    label += f"-{checkpoint.sha256_of(weights)[:8]}" if weights else ""  # two files of one name
    return FrozenBackbone(freeze(run.prepare(backbone)), run, label)
