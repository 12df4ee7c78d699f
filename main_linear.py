"""Linear probe of a pretrained backbone: a grid of rates in one pass, exact accuracies, k-NN.

python main_linear.py --cfg configs/moby_swin_tiny.yaml --data-path D --output O --tag T finds the
checkpoint of the pretraining run with the same cfg, output and tag; --pretrained FILE names
another. Writes to O/<name>/T/linear/. Each head trains as if it were alone.

--cached-features trains on features of the images without augmentation, which are computed once,
kept in O/<name>/T/linear/<weights>-cached/ and used again while weights, images, size and precision
are the same. Only so --labels 1 10 100 probes with few labels: each percentage is the run that it
would be alone, on the images that main_semisup.py draws, with LINEAR.EPOCHS epochs of them and a
folder of its own.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import add_which, make_parser, parse, run_main

if TYPE_CHECKING:
    import torch

    from data.batch import Batch
    from data.features import FeatureLoader
    from data.loader import GlobalLoader
    from data.sources.base import Source
    from engine.run import Run
    from engine.state import TrainState
    from evaluation.features import Features, SharedFeatures
    from evaluation.probe import GridPoint
    from models.classifier import LinearHeads
    from models.parts.backbones import Backbone
    from utils.schedules import Progress

logger = logging.getLogger("synco")

CONFIGS = Path(__file__).parent / "configs"


def main() -> int:
    """Probe the pretrained weights, and random ones if asked; return the exit code."""
    args, flags = parse(_parser())

    from evaluation.probe import check_linear, find_weights, show_probes
    from models import framework_options
    from utils.config.load import load_config
    from utils.config.schema import declare

    protocol = CONFIGS / "_base_" / f"linear_{args.protocol}.yaml" if args.protocol else None
    cfg = load_config(declare(framework_options()), [args.cfg, protocol], args.opts, flags)
    check_linear(cfg.LINEAR)
    weights = find_weights(cfg, args.pretrained)
    results = []
    for path in [weights, None] if args.random_baseline else [weights]:
        found, exit_code = probe(cfg, args, path)
        if exit_code:
            return exit_code
        results += found
    if not args.throughput:
        show_probes(results)
    return 0


def _parser() -> Any:
    parser = make_parser(
        __doc__, renamed={"--batch-size": "LINEAR.BATCH_SIZE", "--epochs": "LINEAR.EPOCHS"}
    )
    absent: Any = argparse.SUPPRESS
    parser.add_argument(
        "--pretrained", metavar="FILE", help="weights to probe instead of the run's own newest"
    )
    add_which(parser)
    parser.add_argument("--protocol", choices=["moco", "mocov3", "moby"], help="a published one")
    for flag, key, text in (
        ("--lr", "LINEAR.LRS", "learning-rate grid"),
        ("--weight-decay", "LINEAR.WEIGHT_DECAYS", "each with each learning rate"),
        ("--labels", "LINEAR.LABEL_PERCENTS", "percent of each class's labels, a probe each"),
    ):
        parser.add_argument(
            flag, dest=key, type=float, nargs="+", default=absent, help=f"{text} [{key}]"
        )
    parser.add_argument(
        "--cached-features",
        dest="LINEAR.CACHED_FEATURES",
        action="store_const",
        const=True,
        default=absent,
        help="train on features of images without augmentation, computed once",
    )
    parser.add_argument(
        "--drop-path-rate", dest="LINEAR.DROP_PATH", type=float, default=absent, help="MoBY: 0.2"
    )
    parser.add_argument("--random-baseline", action="store_true", help="probe random weights too")
    return parser


@dataclass
class ProbeInputs:
    """What the probes of one set of weights share: the network, the images, their features."""

    backbone: "Backbone"
    name: str  # of the weights, with their sha256
    train: "Source"
    bank: "Features | None"  # of the training images, where they are needed
    queries: list[
        tuple["torch.Tensor", "torch.Tensor"]
    ]  # this process's features and labels of the val split


def probe(
    cfg: Any, args: argparse.Namespace, weights: Path | None
) -> tuple[list[dict[str, Any]], int]:
    """Probe `weights` (`None`: random ones) with each share of labels; return results and code."""
    from engine.run import start_run
    from evaluation.accuracy import measure_throughput
    from evaluation.probe import probe_folder, weights_label

    label = weights_label(weights, args.which)
    frozen, results = None, []
    for percent in cfg.LINEAR.LABEL_PERCENTS:
        folder = probe_folder(cfg.LINEAR, label, percent)
        run = start_run(cfg, folder, task="linear", training=not (args.eval or args.throughput))
        if args.throughput:
            backbone, _ = frozen_backbone(cfg, run, weights, args.which)
            measure_throughput(backbone, cfg.DATA.IMG_SIZE, cfg.LINEAR.BATCH_SIZE, run.device)
            return [], 0
        frozen = frozen or freeze_network(cfg, run, weights, args.which)
        result, exit_code = train_heads(cfg, args, run, frozen, label, percent)
        if exit_code:
            return [], exit_code
        results.append(result)
    return results, 0


def frozen_backbone(
    cfg: Any, run: "Run", weights: Path | None, which: str
) -> tuple["Backbone", str]:
    """Build the backbone, load `weights`, freeze it; return it and the network that was taken."""
    from models.classifier import freeze, pretrained_backbone
    from models.weights.find import find_network
    from utils.checkpoints.foreign import read_torch
    from utils.config.load import section_options

    checkpoint = read_torch(weights) if weights else None
    backbone = pretrained_backbone(
        section_options(cfg.MODEL.BACKBONE),
        checkpoint,
        str(weights),
        which,
        img_size=cfg.DATA.IMG_SIZE,
        drop_path=cfg.LINEAR.DROP_PATH,
    )
    own = backbone.state_dict()
    taken = find_network(checkpoint, which, own=own).taken if checkpoint else "online"
    return freeze(run.prepare(backbone), active_drop_path=cfg.LINEAR.DROP_PATH > 0), taken


def freeze_network(cfg: Any, run: "Run", weights: Path | None, which: str) -> ProbeInputs:
    """Return the frozen backbone and the features that do not change while heads train."""
    from data.augment.recipes import build_recipe
    from data.features import refuse_missing
    from data.loader import evaluation_batches
    from data.sources import open_split
    from evaluation.feature_cache import cached_features
    from evaluation.features import compute_features
    from evaluation.probe import probe_folder, weights_fingerprint, weights_label
    from utils.config.load import section_options

    cached, size = cfg.LINEAR.CACHED_FEATURES, cfg.DATA.IMG_SIZE
    backbone, taken = frozen_backbone(cfg, run, weights, which)
    name = weights_fingerprint(weights, taken)
    place = run.folder.parents[1] / probe_folder(cfg.LINEAR, weights_label(weights, which), 100)

    def features_of(split: str, source: "Source") -> "Features":
        def compute() -> "SharedFeatures":
            batches = evaluation_batches(
                source,
                size,
                batch_size=cfg.LINEAR.BATCH_SIZE,
                device=run.device,
                num_workers=cfg.DATA.NUM_WORKERS,
                timeout=cfg.DATA.TIMEOUT,
                skip_unreadable=split == "train",  # as in training, where another image stands in
            )
            with run.evaluating(backbone):
                return compute_features(backbone, batches)

        if not cached:
            return compute()
        key = {
            "weights": name if weights else f"{name}, seed {run.seed}",
            "backbone": section_options(cfg.MODEL.BACKBONE),
            "data": source.fingerprint(),
            "view": repr(build_recipe("eval", size)),
            "precision": run.precision,
        }
        return cached_features(
            place, split, key, source.labels, run.device, compute, write=run.training
        )

    train, val = (open_split(cfg.DATA, split, labelled=True) for split in ("train", "val"))
    queries = features_of("val", val).blocks()
    bank = features_of("train", train) if cfg.KNN.K or cached else None
    if cached and bank is not None:
        refuse_missing(train, bank.indices, cfg.DATA.MAX_BAD_FRACTION)
    return ProbeInputs(backbone, name, train, bank, queries)


def train_heads(
    cfg: Any, args: argparse.Namespace, run: "Run", frozen: ProbeInputs, label: str, percent: float
) -> tuple[dict[str, Any], int]:
    """Train the grid of heads on ``percent`` of the labels; return the results and an exit code."""
    import torch

    from engine.loop import fit
    from engine.plan import make_plan
    from evaluation.knn import features_knn
    from evaluation.probe import grid_points, head_accuracies, open_points, write_result
    from models.classifier import grid_loss

    linear, points = cfg.LINEAR, grid_points(cfg.LINEAR)
    source, bank = labelled_images(frozen, percent, cfg.SEED)
    run.fingerprint = f"{frozen.name}, data {source.fingerprint()}"
    knn = {}
    if cfg.KNN.K and bank is not None:
        knn = features_knn(bank, frozen.queries, source.num_classes, cfg.KNN.K, cfg.KNN.TEMPERATURE)
    loader = open_loader(cfg, run, source, bank)

    heads = draw_heads(cfg, run, frozen, points)
    plan = make_plan(
        linear.OPTIM,
        linear.SCHEDULE,
        epochs=linear.EPOCHS,
        steps_per_epoch=loader.steps_per_epoch,
        global_batch=loader.plan.global_batch,
        base_rates=linear.LRS,
        section="LINEAR.",
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
    )
    state = open_state(cfg, run, heads, points)
    resumed = run.resume(state, plan)
    run.describe(heads, plan, len(source))

    def step(batch: "Batch", progress: "Progress") -> dict[str, torch.Tensor]:
        features = batch.views[0]
        if not linear.CACHED_FEATURES:
            with torch.no_grad(), run.autocast():
                features = frozen.backbone(run.views(features)).float()
        losses = grid_loss(state.model(features), batch.labels, linear.LABEL_SMOOTHING)
        # The loss of a head that diverges stays out of the sum; its gradient is still not finite.
        finite = losses.detach().isfinite()
        best = losses.detach().where(finite, torch.inf).min()
        return {"loss": losses.where(finite, 0.0).sum(), "best_loss": best}

    def evaluate(progress: "Progress") -> dict[str, float]:
        return head_accuracies(heads, frozen.queries, open_points(points, state.closed_at))

    if args.eval and not resumed:
        raise ValueError(
            f"--eval: {run.folder} holds no trained probe; run it without --eval first, or give "
            "--resume"
        )
    if not args.eval:
        outcome = fit(state, loader, step, plan, run, evaluate)
        if outcome.value:
            return {}, outcome.value
    final = evaluate(plan.progress(state.step))
    what = {"weights": label, "labels": f"{percent:g}pct", "images": len(source)}
    return write_result(run, what, state.best, final, knn, points, state.closed_at), 0


def labelled_images(
    frozen: ProbeInputs, percent: float, seed: int
) -> tuple["Source", "Features | None"]:
    """Return the training images with labels, and their features; few labels are few for both."""
    import torch

    from data.labels import label_subset
    from data.sources import subset

    if percent == 100:
        return frozen.train, frozen.bank
    chosen = label_subset(frozen.train, percent, seed)
    return subset(frozen.train, chosen), frozen.bank and frozen.bank.select(
        torch.from_numpy(chosen)
    )


def open_loader(
    cfg: Any, run: "Run", source: "Source", features: "Features | None"
) -> "GlobalLoader | FeatureLoader":
    """Return the loader of the heads' batches: augmented images, or kept features."""
    from data.augment.recipes import build_recipe
    from data.features import FeatureLoader
    from data.loader import GlobalLoader
    from engine.plan import global_batch_size

    accumulation = cfg.TRAIN.ACCUMULATION_STEPS
    batches: dict[str, Any] = {
        "global_batch": global_batch_size(cfg.LINEAR.BATCH_SIZE, accumulation),
        "accumulation": accumulation,
        "seed": cfg.SEED,
    }
    if cfg.LINEAR.CACHED_FEATURES:
        assert features is not None
        return FeatureLoader(features.at, features.labels, features.indices, **batches)
    return GlobalLoader(
        source,
        build_recipe("linear", cfg.DATA.IMG_SIZE),
        drop_last=False,
        device=run.device,
        num_workers=cfg.DATA.NUM_WORKERS,
        timeout=cfg.DATA.TIMEOUT,
        max_bad_fraction=cfg.DATA.MAX_BAD_FRACTION,
        backend=cfg.AUG.BACKEND,
        size_key="LINEAR.BATCH_SIZE",
        **batches,
    )


def draw_heads(
    cfg: Any, run: "Run", frozen: ProbeInputs, points: list["GridPoint"]
) -> "LinearHeads":
    """Return a head for each point of the grid, drawn from a key of its own."""
    import torch

    from models.classifier import LinearHeads
    from utils.randomness import keyed_seed

    torch.manual_seed(keyed_seed("heads", cfg.SEED))
    num_features, num_classes = frozen.backbone.num_features, frozen.train.num_classes
    return run.prepare(LinearHeads(num_features, num_classes, len(points), cfg.LINEAR.HEAD_INIT))


def open_state(
    cfg: Any, run: "Run", heads: "LinearHeads", points: list["GridPoint"]
) -> "TrainState":
    """Return heads and optimiser: a parameter group for each head, clipped each by itself."""
    import torch

    from engine.optim import build_optimizer
    from engine.state import TrainState

    groups = [
        {"params": list(pair), "rate": point.rate, "weight_decay": point.weight_decay}
        for pair, point in zip(heads.pairs(), points, strict=True)
    ]
    optimizer = build_optimizer(cfg.LINEAR.OPTIM, groups)
    # A grid closes the heads that diverge; a single head stops the run.
    closed_at = torch.full((len(points),), -1, device=run.device) if len(points) > 1 else None
    return TrainState(
        heads, optimizer, run.wrap(heads), clip_groups=heads.pairs(), closed_at=closed_at
    )


if __name__ == "__main__":
    run_main(main)
