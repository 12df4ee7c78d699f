"""Fine-tune or probe a pretrained backbone with few labels or all: a rate for backbone and head.

python main_semisup.py --cfg configs/synco_resnet50.yaml --data-path D --output O --tag T
--train-percent 1 --weights finetune --lr-backbone 0.01 --lr-classifier 0.5 starts from the newest
checkpoint of the pretraining run with the same cfg, output and tag, or from --pretrained FILE. Each
setting writes to a folder of its own in O/<name>/T/semisup/, and the same command goes on where it
stopped.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import add_which, make_parser, parse, run_main

if TYPE_CHECKING:
    import numpy as np
    import torch

    from data.batch import Batch
    from data.loader import GlobalLoader
    from data.sources.base import Source
    from engine.run import Run
    from utils.schedules import Progress

logger = logging.getLogger("synco")

PROTOCOLS = Path(__file__).parent / "configs" / "_base_"
_FLAGS: dict[str, tuple[type, str]] = {
    "--train-percent": (float, "percent of each class's labels"),
    "--subset": (str, "list of labelled images in SimCLR's format, instead of a draw"),
    "--weights": (str, "finetune or freeze the backbone"),
    "--hold-out": (
        float,
        "share of these labels that is held out and watched instead of the test split",
    ),
    "--lr-backbone": (float, "its learning rate"),
    "--lr-classifier": (float, "that of the head"),
    "--layer-decay": (float, "factor from a layer's learning rate to that of the layer below"),
    "--representation-size": (int, "width of a tanh layer before the head; 0: none"),
}


def main() -> int:
    """Train on the pretrained weights, and on random ones if asked; return the exit code."""
    args, flags = parse(_parser())

    from evaluation.finetune import columns_of
    from evaluation.probe import find_weights, show_table
    from models import framework_options
    from utils.config.load import load_config
    from utils.config.schema import declare

    protocol = PROTOCOLS / f"finetune_{args.protocol}.yaml" if args.protocol else None
    cfg = load_config(declare(framework_options()), [args.cfg, protocol], args.opts, flags)
    starts: list[Path | None] = (
        [None] if args.pretrained == "none" else [find_weights(cfg, args.pretrained)]
    )
    if args.random_baseline and starts != [None]:
        starts.append(None)
    results = []
    for weights in starts:
        result, exit_code = finetune(cfg, args, weights)
        if exit_code:
            return exit_code
        results.append(result)
    if not args.throughput:
        show_table(results, columns_of(results))
    return 0


def _parser() -> Any:
    parser = make_parser(
        __doc__, renamed={"--batch-size": "FINETUNE.BATCH_SIZE", "--epochs": "FINETUNE.EPOCHS"}
    )
    absent: Any = argparse.SUPPRESS
    for flag, (kind, text) in _FLAGS.items():
        key = "FINETUNE." + flag[2:].replace("-", "_").upper()
        parser.add_argument(flag, dest=key, type=kind, default=absent, help=f"{text} [{key}]")
    parser.add_argument(
        "--weight-decay", "--wd", dest="FINETUNE.OPTIM.WEIGHT_DECAY", type=float, default=absent
    )
    parser.add_argument(
        "--pretrained",
        metavar="FILE",
        help="weights or a run's folder; none: an untrained backbone",
    )
    add_which(parser)
    parser.add_argument(
        "--protocol",
        choices=["barlow", "deit", "swin", "sit", "sit_linear"],
        help="a published protocol, not the recipe's own",
    )
    parser.add_argument(
        "--random-baseline", action="store_true", help="train an untrained backbone as well"
    )
    parser.add_argument(
        "--run-name", help="name of the folder below semisup/, instead of one made up"
    )
    parser.add_argument(
        "--training-mode", choices=["finetune"], help="SiT's flag: there is one mode here"
    )
    return parser


@dataclass
class Splits:
    """The labels that may be used, those held out of them, and the test split."""

    source: "Source"  # the whole training split
    chosen: "np.ndarray"  # its indices whose labels may be used
    train: "Source"
    watched: "Source"  # what is evaluated while it trains
    prefix: str  # of its accuracies' names
    test: Any  # None where it may not be looked at

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return self.source.num_classes


def _splits(cfg: Any) -> Splits:
    from data.labels import hold_out, label_subset
    from data.sources import open_split, subset

    node = cfg.FINETUNE
    source = open_split(cfg.DATA, "train", labelled=True)
    chosen = label_subset(source, node.TRAIN_PERCENT, cfg.SEED, node.SUBSET)
    test = open_split(cfg.DATA, "val", labelled=True) if node.TEST or not node.HOLD_OUT else None
    if not node.HOLD_OUT:
        assert test is not None
        return Splits(source, chosen, subset(source, chosen), test, "test_", test)
    kept, held = hold_out(source, chosen, node.HOLD_OUT, cfg.SEED)
    return Splits(source, chosen, subset(source, kept), subset(source, held), "val_", test)


def _reading(cfg: Any) -> dict[str, Any]:
    return {key: cfg.DATA[key.upper()] for key in ("num_workers", "timeout")}


def _loader(cfg: Any, train: "Source", even: bool, device: "torch.device") -> "GlobalLoader":
    """Return the loader of the training images; ``even`` batches can be mixed in pairs."""
    from data.augment.finetune import finetune_recipe
    from data.loader import GlobalLoader
    from evaluation.finetune import fitting_batch
    from utils.config.load import section_options
    from utils.distributed import world_size

    node, accumulation = cfg.FINETUNE, cfg.TRAIN.ACCUMULATION_STEPS
    share = accumulation * world_size()
    return GlobalLoader(
        train,
        finetune_recipe(cfg.DATA.IMG_SIZE, **section_options(node.AUG)),
        global_batch=fitting_batch(len(train), node.BATCH_SIZE * share, share, even),
        drop_last=False,
        accumulation=accumulation,
        repeated_aug=node.REPEATED_AUG,
        max_bad_fraction=cfg.DATA.MAX_BAD_FRACTION,
        seed=cfg.SEED,
        backend=cfg.AUG.BACKEND,
        device=device,
        **_reading(cfg),
    )


def finetune(
    cfg: Any, args: argparse.Namespace, weights: Path | None
) -> tuple[dict[str, Any], int]:
    """Train from ``weights`` (``None``: random ones); return the results and an exit code."""
    from engine.run import start_run
    from evaluation.accuracy import measure_throughput
    from evaluation.finetune import check_finetune, run_name
    from evaluation.probe import weights_fingerprint, weights_label
    from models.classifier import pretrained_backbone
    from models.weights.find import find_network
    from utils.checkpoints.foreign import read_torch
    from utils.config.load import section_options
    from utils.names import folder_name

    node = cfg.FINETUNE
    check_finetune(node)
    name = (
        folder_name(args.run_name, "--run-name")
        if args.run_name
        else run_name(cfg, weights, args.which)
    )
    if args.run_name and args.random_baseline and weights is None:
        name += "-random"
    run = start_run(
        cfg, f"semisup/{name}", task="semisup", training=not (args.eval or args.throughput)
    )
    checkpoint = read_torch(weights) if weights else None
    backbone = pretrained_backbone(
        section_options(cfg.MODEL.BACKBONE),
        checkpoint,
        str(weights),
        args.which,
        img_size=cfg.DATA.IMG_SIZE,
        drop_path=node.DROP_PATH,
        use_checkpoint=cfg.TRAIN.USE_CHECKPOINT and node.WEIGHTS != "freeze",
    ).requires_grad_(True)  # fixed positions and patch embeddings are a matter of pretraining
    if args.throughput:
        backbone = run.prepare(backbone).eval()
        measure_throughput(backbone, cfg.DATA.IMG_SIZE, node.BATCH_SIZE, run.device)
        return {}, 0
    own = backbone.state_dict()
    taken = find_network(checkpoint, args.which, own=own).taken if checkpoint else "online"
    start = weights_fingerprint(weights, taken)
    return _train_and_test(
        cfg, run, backbone, weights_label(weights, args.which), start, train=not args.eval
    )


def _train_and_test(
    cfg: Any, run: "Run", backbone: Any, label: str, start: str, train: bool
) -> tuple[dict[str, Any], int]:
    """Train a head and, unless it is frozen, the backbone; or look at what is there."""
    from data.augment.mixing import Mixing
    from data.labels import write_subset
    from data.loader import evaluation_batches
    from engine.loop import fit
    from engine.optim import build_optimizer
    from engine.plan import make_plan
    from engine.state import TrainState
    from evaluation.finetune import FrozenCheck, accuracy, finetune_groups, summarise
    from models.classifier import Classifier, freeze, layer_ids, soft_loss

    node, frozen = cfg.FINETUNE, cfg.FINETUNE.WEIGHTS == "freeze"
    splits = _splits(cfg)
    run.fingerprint = f"{start}, labels {splits.train.fingerprint()}"
    mixing = Mixing(
        splits.num_classes,
        **{key: node[key.upper()] for key in ("mixup", "cutmix", "switch_prob")},
        **{"prob": node.MIXUP_PROB, "mode": node.MIXUP_MODE, "smoothing": node.LABEL_SMOOTHING},
        seed=cfg.SEED,
    )
    loader = _loader(cfg, splits.train, mixing.active, run.device)

    # classifier, plan, optimiser
    classifier = Classifier(
        freeze(backbone, node.DROP_PATH > 0) if frozen else backbone,
        splits.num_classes,
        representation_size=node.REPRESENTATION_SIZE,
        init=node.HEAD_INIT,
    )
    classifier = run.prepare(classifier)
    plan = make_plan(
        node.OPTIM,
        node.SCHEDULE,
        section="FINETUNE.",
        base_rates=[node.LR_BACKBONE, node.LR_CLASSIFIER],
        epochs=node.EPOCHS,
        steps_per_epoch=loader.steps_per_epoch,
        global_batch=loader.plan.global_batch,
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
    )
    layers = layer_ids(backbone) if node.LAYER_DECAY < 1 else None
    groups = finetune_groups(backbone, classifier.heads, node, layers)
    optimizer = build_optimizer(node.OPTIM, groups, fused=run.scaler() is None)
    state = TrainState(classifier, optimizer, run.wrap(classifier), run.scaler())
    # The reference is what training starts from, not a checkpoint, which may hold a backbone that
    # moved.
    unmoved = FrozenCheck(backbone) if frozen and train else None
    if not run.resume(state, plan) and not train:
        others = ", ".join(sorted(path.name for path in run.folder.parent.glob("*/"))) or "none"
        raise ValueError(
            f"--eval: {run.folder} holds no checkpoint; run it without --eval first, with as many "
            f"processes, or name a run with --run-name (there are: {others})"
        )
    run.describe(classifier, plan, len(splits.train))
    if train:
        run.write_extra("subset.txt", lambda path: write_subset(path, splits.source, splits.chosen))

    def step(batch: "Batch", progress: "Progress") -> dict[str, "torch.Tensor"]:
        images, targets = mixing(batch.views[0], batch.labels, batch.indices, progress.step)
        with run.autocast():
            logits = state.model(run.views(images))
        return {"loss": soft_loss(logits, targets).sum()}

    def measure(split: "Source", prefix: str) -> dict[str, float]:
        batches = evaluation_batches(
            split,
            cfg.DATA.IMG_SIZE,
            batch_size=node.BATCH_SIZE,
            skip_unreadable=prefix == "val_",
            device=run.device,
            **_reading(cfg),
        )
        with run.evaluating(classifier):
            return accuracy(classifier.predict, batches, prefix, run.device)

    last: dict[str, float] = {}

    def evaluate(progress: "Progress") -> dict[str, float]:
        if unmoved:
            unmoved.check()
        if progress.epoch % node.EVAL_EPOCHS and progress.epoch < plan.epochs:
            return {}
        last.update(measure(splits.watched, splits.prefix))
        return last

    if train:
        outcome = fit(state, loader, step, plan, run, evaluate)
        if outcome.value:
            return {}, outcome.value
    accuracies = last or measure(splits.watched, splits.prefix)  # nothing was left to train
    if node.HOLD_OUT and node.TEST:
        accuracies |= measure(splits.test, "test_")
    images = (len(splits.train), len(splits.chosen) - len(splits.train))
    complete = state.step == plan.total_steps
    return summarise(run, label, images, accuracies, state.best, write=complete), 0


if __name__ == "__main__":
    run_main(main)
