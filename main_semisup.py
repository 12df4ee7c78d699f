"""Fine-tune or probe a pretrained backbone with few labels or all: a rate for backbone and head.

Example: python main_semisup.py --cfg configs/synco_resnet50.yaml --data-path D --train-percent 1

Starts from the newest checkpoint of the pretraining run with the same --cfg, --output and --tag.
"""

import argparse

from utils.cli import Parser, add_which, answer_at_once, make_parser, parse, run_main

_FLAGS: dict[str, tuple[type, str]] = {
    "--train-percent": (float, "percent of each class's labels"),
    "--subset": (str, "file of labelled images, in SimCLR's format"),
    "--weights": (str, "finetune or freeze the backbone"),
    "--hold-out": (float, "share of labels to watch, not the test split"),
    "--lr-backbone": (float, "learning rate of the backbone"),
    "--lr-classifier": (float, "learning rate of the head"),
    "--layer-decay": (float, "rate of a layer over that of the next"),
    "--representation-size": (int, "width of a tanh layer before the head"),
}
_PROTOCOLS = ["barlow", "deit", "swin", "sit", "sit_linear"]


def _parser() -> Parser:
    renamed = {"--batch-size": "FINETUNE.BATCH_SIZE", "--epochs": "FINETUNE.EPOCHS"}
    parser = make_parser(__doc__, renamed=renamed)
    for flag, (kind, text) in _FLAGS.items():
        key = "FINETUNE." + flag[2:].replace("-", "_").upper()
        parser.add_argument(
            flag, dest=key, type=kind, metavar="X", default=argparse.SUPPRESS, help=text
        )
    parser.add_argument(
        "--weight-decay",
        "--wd",
        dest="FINETUNE.OPTIM.WEIGHT_DECAY",
        type=float,
        metavar="X",
        default=argparse.SUPPRESS,
        help="[FINETUNE.OPTIM.WEIGHT_DECAY]",
    )
    pretrained = "weights or a run; none: an untrained backbone"
    parser.add_argument("--pretrained", metavar="FILE", help=pretrained)
    add_which(parser)
    protocol = f"published: {', '.join(_PROTOCOLS)}"
    parser.add_argument("--protocol", choices=_PROTOCOLS, metavar="NAME", help=protocol)
    baseline = "train an untrained backbone as well"
    parser.add_argument("--random-baseline", action="store_true", help=baseline)
    name = "folder below semisup/"
    parser.add_argument("--run-name", metavar="NAME", help=name)
    # SiT's flag: there is one mode here
    parser.add_argument("--training-mode", choices=["finetune"], help=argparse.SUPPRESS)
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser(), program="semisup")

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from yacs.config import CfgNode

from data import build_loader, evaluation_loader
from data.augment.finetune import finetune_recipe
from data.augment.mixing import Mixing
from data.labels import hold_out, label_subset, write_subset
from data.loader import GlobalLoader
from data.sources import open_split, subset
from data.sources.base import Source
from engine.loop import Outcome, fit
from engine.optim import build_optimizer
from engine.plan import Plan, make_plan
from engine.run import Run, start_run
from engine.state import TrainState
from evaluation.accuracy import measure_throughput
from evaluation.finetune import (
    FrozenCheck,
    accuracy,
    check_finetune,
    columns_of,
    finetune_groups,
    fitting_batch,
    run_name,
    summarise,
)
from evaluation.probe import (
    find_weights,
    images_of,
    show_table,
    warn_of_other_pixels,
    weights_fingerprint,
    weights_label,
)
from models import framework_options, pretrained_backbone
from models.classifier import Classifier, freeze, layer_ids, soft_loss
from models.parts.backbones import Backbone
from utils.batch import Batch
from utils.config.load import load_config
from utils.config.programs import config_files
from utils.config.schema import declare
from utils.config.sections import section_options
from utils.distributed import world_size
from utils.names import folder_name
from utils.schedules import Progress

logger = logging.getLogger("synco")


def main() -> int:
    """Train on the pretrained weights, and on random ones if asked; return the exit code."""
    args, flags = parse(_parser())
    files = config_files("semisup", args)
    cfg = load_config(declare(framework_options()), files, args.opts, flags)
    check_finetune(cfg.FINETUNE)
    weights = None if args.pretrained == "none" else find_weights(cfg, args.pretrained)
    if args.throughput:
        run = start_run(cfg, task="semisup", training=False)
        backbone = run.prepare(starting_backbone(cfg, weights, args.which)[0])
        size, channels = cfg.DATA.IMG_SIZE, cfg.DATA.CHANNELS
        measure_throughput(run, backbone, size, cfg.FINETUNE.BATCH_SIZE, channels)
        return 0
    results = []
    for start in [weights, None] if args.random_baseline and weights else [weights]:
        folder = f"semisup/{name_of(cfg, args, start)}"
        run = start_run(cfg, folder, task="semisup", training=not args.eval)
        backbone, network = starting_backbone(cfg, start, args.which)
        warn_of_other_pixels(cfg, start)
        fingerprint, label = weights_fingerprint(start, network), weights_label(start, args.which)
        result = finetune(cfg, run, backbone, fingerprint, label)
        if result is None:
            return Outcome.PREEMPTED.value
        results.append(result)
    show_table(results, columns_of(results))
    return 0


def name_of(cfg: CfgNode, args: argparse.Namespace, weights: Path | None) -> str:
    """Return the name of a run's folder: --run-name, or one that tells all settings apart."""
    if not args.run_name:
        return run_name(cfg, weights, args.which)
    name = folder_name(args.run_name, "--run-name")
    return f"{name}-random" if args.random_baseline and weights is None else name


def starting_backbone(cfg: CfgNode, weights: Path | None, which: str) -> tuple[Backbone, str]:
    """Build the backbone on `weights`; return it and the network of the file that was taken."""
    backbone, network = pretrained_backbone(
        cfg,
        weights,
        which,
        drop_path=cfg.FINETUNE.DROP_PATH,
        use_checkpoint=cfg.TRAIN.USE_CHECKPOINT and cfg.FINETUNE.WEIGHTS != "freeze",
    )
    # Fixed positions and patch embeddings are a matter of pretraining: here all parameters train.
    return backbone.requires_grad_(True), network


def finetune(
    cfg: CfgNode, run: Run, backbone: Backbone, fingerprint: str, label: str
) -> dict[str, object] | None:
    """Train a head and, unless it is frozen, the backbone; with --eval only evaluate it.

    Returns the results, None if the run was asked to stop.
    """
    node = cfg.FINETUNE
    splits = open_splits(cfg)
    run.fingerprint = f"{fingerprint}, labels {splits.train.fingerprint()}"
    run.checkpoints.images = images_of(training=splits.source, test=splits.watched)
    mixing = open_mixing(cfg, splits.train.num_classes)
    loader = open_loader(cfg, run, splits.train, in_pairs=mixing.active)

    classifier = run.prepare(build_classifier(cfg, backbone, splits.train.num_classes))
    plan = plan_of(cfg, loader)
    state = open_state(cfg, run, classifier)
    # Compared with what training starts from: a checkpoint may hold a backbone that moved.
    unmoved = FrozenCheck(backbone) if node.WEIGHTS == "freeze" and run.training else None
    if not run.resume(state, plan) and not run.training:
        raise ValueError(_nothing_to_evaluate(run))
    run.describe(classifier, plan, len(splits.train))

    def step(batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images, targets = mixing(batch.views[0], batch.labels, batch.indices, progress.step)
        with run.autocast():
            logits = state.model(run.views(images))
        return {"loss": soft_loss(logits, targets).sum()}

    def measure(split: Source, prefix: str) -> dict[str, float]:
        skip = prefix == "val_"  # held-out training images may be unreadable, test images not
        batches = evaluation_loader(cfg, split, run.device, node.BATCH_SIZE, skip)
        with run.evaluating(classifier):
            return accuracy(classifier.predict, batches, prefix, run.device)

    last: dict[str, float] = {}

    def evaluate(progress: Progress) -> dict[str, float]:
        if unmoved:
            unmoved.check()
        # The last epoch is always evaluated.
        if progress.epoch % node.EVAL_EPOCHS and progress.epoch < plan.epochs:
            return {}
        last.update(measure(splits.watched, splits.prefix))
        return last

    if run.training:
        run.write_extra("subset.txt", lambda path: write_subset(path, splits.source, splits.chosen))
        if fit(state, loader, step, plan, run, evaluate) is not Outcome.DONE:
            return None
    accuracies = last or measure(splits.watched, splits.prefix)  # nothing was left to train
    if splits.test is not None and node.HOLD_OUT:
        accuracies |= measure(splits.test, "test_")
    images = (len(splits.train), len(splits.chosen) - len(splits.train))
    # With --eval a run may be looked at before its end; result.json is of whole runs.
    complete = state.step == plan.total_steps
    return summarise(run, label, images, accuracies, state.best, write=complete)


@dataclass
class Splits:
    """The labels that may be used, those held out of them, and the test split."""

    source: Source  # the whole training split
    chosen: np.ndarray  # its indices whose labels may be used
    train: Source
    watched: Source  # what is evaluated while it trains
    prefix: str  # of the names of its accuracies
    test: Source | None  # None where it may not be looked at


def open_splits(cfg: CfgNode) -> Splits:
    """Draw the labels that may be used, and hold some out of them if asked."""
    node = cfg.FINETUNE
    source = open_split(cfg.DATA, "train", labelled=True)
    chosen = label_subset(source, node.TRAIN_PERCENT, cfg.SEED, node.SUBSET)
    test = open_split(cfg.DATA, "val", labelled=True) if node.TEST or not node.HOLD_OUT else None
    if not node.HOLD_OUT:
        assert test is not None
        return Splits(source, chosen, subset(source, chosen), test, "test_", test)
    kept, held = hold_out(source, chosen, node.HOLD_OUT, cfg.SEED)
    return Splits(source, chosen, subset(source, kept), subset(source, held), "val_", test)


def open_mixing(cfg: CfgNode, num_classes: int) -> Mixing:
    """Return the Mixup and Cutmix of the training batches, which smooths labels too."""
    node = cfg.FINETUNE
    return Mixing(
        num_classes,
        mixup=node.MIXUP,
        cutmix=node.CUTMIX,
        prob=node.MIXUP_PROB,
        switch_prob=node.SWITCH_PROB,
        mode=node.MIXUP_MODE,
        smoothing=node.LABEL_SMOOTHING,
        seed=cfg.SEED,
    )


def open_loader(cfg: CfgNode, run: Run, train: Source, in_pairs: bool) -> GlobalLoader:
    """Return the loader of the training images; `in_pairs`: each batch can be mixed in pairs."""
    node, accumulation = cfg.FINETUNE, cfg.TRAIN.ACCUMULATION_STEPS
    # With few labels a batch may be all of them: it shrinks, evenly for all processes.
    share = accumulation * world_size()
    return build_loader(
        cfg,
        train,
        finetune_recipe(cfg.DATA.IMG_SIZE, **section_options(node.AUG)),
        run.device,
        global_batch=fitting_batch(len(train), node.BATCH_SIZE * share, share, in_pairs),
        accumulation=accumulation,
        drop_last=False,
        repeated_aug=node.REPEATED_AUG,
    )


def build_classifier(cfg: CfgNode, backbone: Backbone, num_classes: int) -> Classifier:
    """Put a head on the backbone, which is frozen first if it is only to be probed."""
    node = cfg.FINETUNE
    if node.WEIGHTS == "freeze":
        freeze(backbone, active_drop_path=node.DROP_PATH > 0)
    return Classifier(
        backbone,
        num_classes,
        representation_size=node.REPRESENTATION_SIZE,
        init=node.HEAD_INIT,
    )


def plan_of(cfg: CfgNode, loader: GlobalLoader) -> Plan:
    """Return the plan of the run: the backbone follows the first rate, the head the second."""
    node = cfg.FINETUNE
    return make_plan(
        node.OPTIM,
        node.SCHEDULE,
        section="FINETUNE.",
        base_rates=[node.LR_BACKBONE, node.LR_CLASSIFIER],
        epochs=node.EPOCHS,
        steps_per_epoch=loader.steps_per_epoch,
        global_batch=loader.plan.global_batch,
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
    )


def open_state(cfg: CfgNode, run: Run, classifier: Classifier) -> TrainState:
    """Return classifier and optimiser, with a rate for each layer where they decay."""
    node, backbone = cfg.FINETUNE, classifier.backbone
    layers = layer_ids(backbone) if node.LAYER_DECAY < 1 else None
    groups = finetune_groups(backbone, classifier.heads, node, layers)
    scaler = run.scaler()
    optimizer = build_optimizer(node.OPTIM, groups, fused=scaler is None)
    return TrainState(classifier, optimizer, run.wrap(classifier), scaler)


def _nothing_to_evaluate(run: Run) -> str:
    others = ", ".join(sorted(path.name for path in run.folder.parent.glob("*/"))) or "none"
    return (
        f"--eval: {run.folder} holds no checkpoint; run it without --eval first, with as many "
        f"processes, or name a run with --run-name (there are: {others})"
    )


if __name__ == "__main__":
    run_main(main)
