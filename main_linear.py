"""Linear probe of a pretrained backbone: a grid of rates in one pass, exact accuracies, k-NN.

Example: python main_linear.py --cfg configs/moby_swin_tiny.yaml --data-path D --output O --tag T

Probes the newest checkpoint of the pretraining run with the same cfg, output and tag, or that of
--pretrained FILE. Writes to O/<name>/T/linear/. Each head trains as if it were alone.
--cached-features computes the features of the images once, without augmentation, and keeps them.
Only so --labels 1 10 100 probes with few labels, on the images that main_semisup.py draws.
"""

import argparse

from utils.cli import Parser, add_which, answer_at_once, make_parser, parse, run_main

_GRIDS = {
    "--lr": ("LINEAR.LRS", "learning-rate grid"),
    "--weight-decay": ("LINEAR.WEIGHT_DECAYS", "each with each learning rate"),
    "--labels": ("LINEAR.LABEL_PERCENTS", "percent of each class's labels, a probe each"),
}


def _parser() -> Parser:
    renamed = {"--batch-size": "LINEAR.BATCH_SIZE", "--epochs": "LINEAR.EPOCHS"}
    # the backbone is frozen: it keeps no activations that could be computed again
    parser = make_parser(__doc__, renamed=renamed, idle=["--use-checkpoint"])
    parser.add_argument("--pretrained", metavar="FILE", help="weights, not the run's own newest")
    add_which(parser)
    parser.add_argument(
        "--protocol",
        choices=["moco", "mocov3", "moby"],
        metavar="NAME",
        help="published: moco, mocov3, moby",
    )
    for flag, (key, text) in _GRIDS.items():
        unset = argparse.SUPPRESS
        parser.add_argument(
            flag, dest=key, type=float, nargs="+", metavar="X", default=unset, help=text
        )
    parser.add_argument(
        "--cached-features",
        dest="LINEAR.CACHED_FEATURES",
        action="store_const",
        const=True,
        default=argparse.SUPPRESS,
        help="on features without augmentation, made once",
    )
    parser.add_argument(
        "--drop-path-rate",
        dest="LINEAR.DROP_PATH",
        type=float,
        default=argparse.SUPPRESS,
        metavar="X",
        help="MoBY: 0.2",
    )
    parser.add_argument("--random-baseline", action="store_true", help="probe random weights too")
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser(), program="linear")

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from data import build_loader, evaluation_loader
from data.augment.recipes import build_recipe
from data.features import FeatureLoader, refuse_missing
from data.labels import label_subset
from data.loader import GlobalLoader
from data.pixels import PLAIN
from data.sources import open_split, subset
from data.sources.base import Source
from engine.loop import Outcome, StepFunction, fit
from engine.optim import build_optimizer
from engine.plan import Plan, global_batch_size, make_plan
from engine.run import Run, start_run
from engine.state import TrainState
from evaluation.accuracy import measure_throughput
from evaluation.feature_cache import cached_features
from evaluation.features import Features, SharedFeatures, compute_features
from evaluation.knn import features_knn
from evaluation.probe import (
    GridPoint,
    check_linear,
    find_weights,
    grid_points,
    head_accuracies,
    head_groups,
    images_of,
    open_points,
    probe_folder,
    show_probes,
    warn_of_other_pixels,
    weights_fingerprint,
    weights_label,
    write_result,
)
from models import framework_options, pretrained_backbone
from models.classifier import LinearHeads, freeze, grid_loss
from models.parts.backbones import Backbone
from models.parts.resolution import is_dense_swin
from utils.batch import Batch
from utils.config.load import load_config
from utils.config.programs import config_files
from utils.config.schema import declare
from utils.config.sections import section_options
from utils.randomness import keyed_seed
from utils.schedules import Progress

logger = logging.getLogger("synco")


def main() -> int:
    """Probe the pretrained weights, and random ones if asked; return the exit code."""
    args, flags = parse(_parser())
    files = config_files("linear", args)
    cfg = load_config(declare(framework_options()), files, args.opts, flags)
    check_linear(cfg.LINEAR)
    weights = find_weights(cfg, args.pretrained)
    if args.throughput:
        run = start_run(cfg, task="linear", training=False)
        backbone, _ = frozen_backbone(cfg, run, weights, args.which)
        size, channels = cfg.DATA.IMG_SIZE, cfg.DATA.CHANNELS
        measure_throughput(run, backbone, size, cfg.LINEAR.BATCH_SIZE, channels)
        return 0
    results = []
    for start in [weights, None] if args.random_baseline else [weights]:
        label, inputs = weights_label(start, args.which), None
        for percent in cfg.LINEAR.LABEL_PERCENTS:
            # a folder for each: probes of other weights or labels do not resume each other
            folder = probe_folder(cfg.LINEAR, label, percent)
            run = start_run(cfg, folder, task="linear", training=not args.eval)
            # The network and its features are the same for each share of the labels.
            inputs = inputs or open_inputs(cfg, run, start, args.which)
            result = probe(cfg, run, inputs, label, percent)
            if result is None:
                return Outcome.PREEMPTED.value
            results.append(result)
    show_probes(results)
    return 0


@dataclass
class ProbeInputs:
    """What the probes of one set of weights share: the network, the images, their features."""

    backbone: Backbone
    name: str  # of the weights, with their sha256
    train: Source
    bank: Features | None  # of the training images, where they are needed
    queries: list[tuple[Tensor, Tensor]]  # this process's features and labels of the val split
    images: dict[str, str]  # digests of both splits


def open_inputs(cfg: CfgNode, run: Run, weights: Path | None, which: str) -> ProbeInputs:
    """Return the frozen backbone and the features that do not change while heads train."""
    warn_of_other_pixels(cfg, weights)
    backbone, network = frozen_backbone(cfg, run, weights, which)
    name = weights_fingerprint(weights, network)
    kept = {
        "weights": name if weights else f"{name}, seed {run.seed}",
        "folder": probe_folder(cfg.LINEAR, weights_label(weights, which), 100),
    }
    train, val = (open_split(cfg.DATA, split, labelled=True) for split in ("train", "val"))
    # The network is frozen: features of val are the same at every epoch.
    queries = split_features(cfg, run, backbone, val, "val", **kept).blocks()
    bank = None
    if cfg.KNN.K or cfg.LINEAR.CACHED_FEATURES:
        bank = split_features(cfg, run, backbone, train, "train", **kept)
    if cfg.LINEAR.CACHED_FEATURES and bank is not None:
        refuse_missing(train, bank.indices, cfg.DATA.MAX_BAD_FRACTION)
    return ProbeInputs(backbone, name, train, bank, queries, images_of(training=train, test=val))


def frozen_backbone(
    cfg: CfgNode, run: Run, weights: Path | None, which: str
) -> tuple[Backbone, str]:
    """Build the backbone on `weights` and freeze it; return it and the network that was taken."""
    drop = cfg.LINEAR.DROP_PATH
    backbone, network = pretrained_backbone(cfg, weights, which, drop_path=drop)
    return freeze(run.prepare(backbone), active_drop_path=drop > 0), network


def split_features(
    cfg: CfgNode,
    run: Run,
    backbone: Backbone,
    source: Source,
    split: str,
    *,
    weights: str,
    folder: str,
) -> Features:
    """Return a split's features without augmentation; with --cached-features those in `folder`."""

    def compute() -> SharedFeatures:
        # In training another image stands in for an unreadable one: the bank may go without it.
        skip = split == "train"
        batches = evaluation_loader(cfg, source, run.device, cfg.LINEAR.BATCH_SIZE, skip)
        with run.evaluating(backbone):
            return compute_features(backbone, batches)

    if not cfg.LINEAR.CACHED_FEATURES:
        return compute()
    key: dict[str, object] = {
        "weights": weights,
        "backbone": section_options(cfg.MODEL.BACKBONE),
        "data": images_of(split=source)["split"],
        "view": repr(build_recipe("eval", cfg.DATA.IMG_SIZE)),
        "precision": run.precision,
    }
    # left out for 8-bit RGB, whose features may be there from before the key was
    if source.pixels != PLAIN:
        key["pixels"] = repr(source.pixels)
    if is_dense_swin(backbone):  # its features may be there as those of timm's Swin
        key["windows"] = "padded"
    place, write = run.folder.parents[1] / folder, run.training
    return cached_features(place, split, key, source.labels, run.device, compute, write=write)


def probe(
    cfg: CfgNode, run: Run, inputs: ProbeInputs, label: str, percent: float
) -> dict[str, object] | None:
    """Train the grid of heads on `percent` of the labels; with --eval only evaluate them.

    Returns the results, None if the run was asked to stop.
    """
    points = grid_points(cfg.LINEAR)
    source, bank = labelled_images(inputs, percent, cfg.SEED)
    run.fingerprint = f"{inputs.name}, data {source.fingerprint()}"
    run.checkpoints.images = inputs.images
    knn = {}
    if cfg.KNN.K and bank is not None:
        classes = source.num_classes
        knn = features_knn(bank, inputs.queries, classes, cfg.KNN.K, cfg.KNN.TEMPERATURE)

    loader = open_loader(cfg, run, source, bank)
    heads = draw_heads(cfg, run, inputs, len(points))
    plan = plan_of(cfg, loader)
    state = open_state(cfg, run, heads, points)
    resumed = run.resume(state, plan)
    run.describe(heads, plan, len(source))

    def evaluate(progress: Progress) -> dict[str, float]:
        return head_accuracies(heads, inputs.queries, open_points(points, state.closed_at))

    if run.training:
        step = step_of(cfg, run, inputs.backbone, state)
        if fit(state, loader, step, plan, run, evaluate) is not Outcome.DONE:
            return None
    elif not resumed:
        raise ValueError(
            f"--eval: {run.folder} holds no trained probe; run it without --eval first, or give "
            "--resume"
        )
    # also of a probe that was complete before: its last epoch is evaluated again
    final = evaluate(plan.progress(state.step))
    what = {"weights": label, "labels": f"{percent:g}pct", "images": len(source)}
    return write_result(run, what, state.best, final, knn, points, state.closed_at)


def labelled_images(
    inputs: ProbeInputs, percent: float, seed: int
) -> tuple[Source, Features | None]:
    """Return the training images with labels, and their features; few labels are few for both."""
    if percent == 100:
        return inputs.train, inputs.bank
    chosen = label_subset(inputs.train, percent, seed)
    bank = inputs.bank and inputs.bank.select(torch.from_numpy(chosen))
    return subset(inputs.train, chosen), bank


def open_loader(
    cfg: CfgNode, run: Run, source: Source, bank: Features | None
) -> GlobalLoader | FeatureLoader:
    """Return the loader of the heads' batches: augmented images, or kept features."""
    accumulation = cfg.TRAIN.ACCUMULATION_STEPS
    global_batch = global_batch_size(cfg.LINEAR.BATCH_SIZE, accumulation)
    if cfg.LINEAR.CACHED_FEATURES:
        assert bank is not None
        return FeatureLoader(
            bank.at,
            bank.labels,
            bank.indices,
            global_batch=global_batch,
            seed=cfg.SEED,
            accumulation=accumulation,
        )
    return build_loader(
        cfg,
        source,
        build_recipe("linear", cfg.DATA.IMG_SIZE),
        run.device,
        global_batch=global_batch,
        accumulation=accumulation,
        drop_last=False,
        size_key="LINEAR.BATCH_SIZE",
    )


def draw_heads(cfg: CfgNode, run: Run, inputs: ProbeInputs, count: int) -> LinearHeads:
    """Return `count` heads, one for each point of the grid."""
    # A key for the heads alone: they do not depend on what the backbone drew before.
    torch.manual_seed(keyed_seed("heads", cfg.SEED))
    num_features, num_classes = inputs.backbone.num_features, inputs.train.num_classes
    return run.prepare(LinearHeads(num_features, num_classes, count, cfg.LINEAR.HEAD_INIT))


def plan_of(cfg: CfgNode, loader: GlobalLoader | FeatureLoader) -> Plan:
    """Return the plan of the probe; each learning rate of the grid has a schedule."""
    linear = cfg.LINEAR
    return make_plan(
        linear.OPTIM,
        linear.SCHEDULE,
        epochs=linear.EPOCHS,
        steps_per_epoch=loader.steps_per_epoch,
        global_batch=loader.plan.global_batch,
        base_rates=linear.LRS,
        section="LINEAR.",
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
    )


def open_state(cfg: CfgNode, run: Run, heads: LinearHeads, points: list[GridPoint]) -> TrainState:
    """Return heads and optimiser; each head has its rate and is clipped by itself."""
    groups = head_groups(cfg.LINEAR.OPTIM, heads.pairs(), points)
    optimizer = build_optimizer(cfg.LINEAR.OPTIM, groups)
    # A grid closes the heads that diverge; a single head stops the run.
    closed_at = torch.full((len(points),), -1, device=run.device) if len(points) > 1 else None
    return TrainState(
        heads, optimizer, run.wrap(heads), clip_groups=heads.pairs(), closed_at=closed_at
    )


def step_of(cfg: CfgNode, run: Run, backbone: Backbone, state: TrainState) -> StepFunction[Batch]:
    """Return the step that trains all heads on one batch of images, or of kept features."""

    def step(batch: Batch, progress: Progress) -> dict[str, Tensor]:
        seen = batch.views[0]
        if not cfg.LINEAR.CACHED_FEATURES:
            # The backbone is frozen: only the heads, in float32, need a gradient.
            with torch.no_grad(), run.autocast():
                seen = backbone(run.views(seen)).float()
        losses = grid_loss(state.model(seen), batch.labels, cfg.LINEAR.LABEL_SMOOTHING)
        # The loss of a head that diverges stays out of the sum; its gradient is still not finite.
        finite = losses.detach().isfinite()
        best = losses.detach().where(finite, torch.inf).min()
        return {"loss": losses.where(finite, 0.0).sum(), "best_loss": best}

    return step


if __name__ == "__main__":
    run_main(main)
