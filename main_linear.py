"""Linear probe of a pretrained backbone: a grid of learning rates in one pass, exact accuracies, k-NN beside
them.

python main_linear.py --cfg configs/moby_swin_tiny.yaml --data-path D --output O --tag T finds the checkpoint
of the pretraining run with the same cfg, output and tag; --pretrained FILE names another. Writes to
O/<name>/T/linear/.
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import make_parser, parse, run_main

if TYPE_CHECKING:
    from models.parts.backbones import Backbone
    from utils.run import Run

logger = logging.getLogger("synco")

CONFIGS = Path(__file__).parent / "configs"


def main() -> int:
    """Probe the pretrained weights, and random ones if asked; print one table; return the exit code."""
    parser = make_parser(__doc__, renamed={"--batch-size": "LINEAR.BATCH_SIZE", "--epochs": "LINEAR.EPOCHS"})
    absent: Any = argparse.SUPPRESS
    parser.add_argument(
        "--pretrained", metavar="FILE", help="weights to probe instead of the run's own newest"
    )
    parser.add_argument(
        "--protocol", choices=["moco", "mocov3", "moby"], help="a published protocol, not the recipe's own"
    )
    parser.add_argument(
        "--lr", dest="LINEAR.LRS", type=float, nargs="+", default=absent, help="learning-rate grid"
    )
    parser.add_argument(
        "--drop-path-rate", dest="LINEAR.DROP_PATH", type=float, default=absent, help="MoBY: 0.2"
    )
    parser.add_argument("--random-baseline", action="store_true", help="probe the untrained backbone as well")
    args, flags = parse(parser)

    from models import framework_defaults
    from utils.config import default_config, load_config
    from utils.probe import find_weights, show_probes

    protocol = CONFIGS / "_base_" / f"linear_{args.protocol}.yaml" if args.protocol else None
    cfg = load_config(default_config(framework_defaults()), [args.cfg, protocol], args.opts, flags)
    weights = find_weights(cfg, args.pretrained)
    results = []
    for path in [weights, None] if args.random_baseline else [weights]:
        result, exit_code = probe(cfg, args, path)
        if exit_code:
            return exit_code
        results.append(result)
    if not args.throughput:
        show_probes(results)
    return 0


def probe(cfg: Any, args: argparse.Namespace, weights: Path | None) -> tuple[dict[str, Any], int]:
    """Train the grid of heads on weights (``None``: random ones); return the results and an exit code."""
    import torch

    from data.datasets import open_split
    from data.loader import Batch, GlobalLoader, evaluation_batches
    from data.views import build_recipe
    from models.classifier import LinearHeads, grid_loss
    from utils.engine import TrainState, fit
    from utils.evaluate import extract_features, knn_accuracy, measure_throughput
    from utils.optim import build_optimizer
    from utils.plan import global_batch_size, make_plan
    from utils.probe import head_accuracies, write_result
    from utils.run import start_run
    from utils.schedules import Progress

    label = weights.stem if weights else "random"
    run = start_run(cfg, f"linear/{label}", task="linear", training=not (args.eval or args.throughput))
    linear = cfg.LINEAR

    backbone = frozen_backbone(cfg, run, weights)
    if args.throughput:
        measure_throughput(backbone, cfg.DATA.IMG_SIZE, linear.BATCH_SIZE, run.device)
        return {}, 0

    # data; the features of frozen weights under a fixed transform are computed once
    train, val = (open_split(cfg.DATA, split, labelled=True) for split in ("train", "val"))
    run.fingerprint += f", data {train.fingerprint()}"
    reading: dict[str, Any] = {
        "batch_size": linear.BATCH_SIZE,
        "device": run.device,
        "num_workers": cfg.DATA.NUM_WORKERS,
        "timeout": cfg.DATA.TIMEOUT,
    }
    with run.evaluating(backbone):
        queries = extract_features(backbone, evaluation_batches(val, cfg.DATA.IMG_SIZE, **reading))
        knn = {}
        if cfg.KNN.K:
            reading["skip_unreadable"] = True  # as in training, where another image stands in
            bank = extract_features(backbone, evaluation_batches(train, cfg.DATA.IMG_SIZE, **reading))
            mine = run.shard(*queries)
            knn = knn_accuracy(*bank, *mine, train.num_classes, cfg.KNN.K, cfg.KNN.TEMPERATURE)
    loader = GlobalLoader(
        train,
        build_recipe("linear", cfg.DATA.IMG_SIZE),
        global_batch=global_batch_size(linear.BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS),
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
        drop_last=False,
        seed=cfg.SEED,
        device=run.device,
        num_workers=cfg.DATA.NUM_WORKERS,
        timeout=cfg.DATA.TIMEOUT,
        max_bad_fraction=cfg.DATA.MAX_BAD_FRACTION,
    )

    # one head a learning rate: a parameter group each, clipped each by itself
    heads = run.prepare(
        LinearHeads(backbone.num_features, train.num_classes, len(linear.LRS), linear.HEAD_INIT)
    )
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
    groups = [{"params": list(pair), "rate": index} for index, pair in enumerate(heads.pairs())]
    optimizer = build_optimizer(linear.OPTIM, groups)
    state = TrainState(heads, optimizer, run.wrap(heads), clip_groups=heads.pairs())
    resumed = run.resume(state, plan)
    run.describe(heads, plan, len(train))

    def step(batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        with torch.no_grad(), run.autocast():
            features = backbone(run.views(batch.views[0])).float()
        losses = grid_loss(state.model(features), batch.labels, linear.LABEL_SMOOTHING)
        return {"loss": losses.sum(), "best_loss": losses.detach().min()}

    def evaluate(progress: Progress) -> dict[str, float]:
        return head_accuracies(heads, *queries, linear.LRS)

    if args.eval and not resumed:
        raise ValueError(
            f"--eval: {run.folder} holds no trained probe; run it without --eval first, or give --resume"
        )
    if not args.eval:
        outcome = fit(state, loader, step, plan, run, evaluate)
        if outcome.value:
            return {}, outcome.value
    final = evaluate(plan.progress(state.step))
    return write_result(run, label, state.best, final, knn, linear.LRS), 0


def frozen_backbone(cfg: Any, run: "Run", weights: Path | None) -> "Backbone":
    """Build the backbone, load ``weights`` if any and freeze it; note in the run what it is about."""
    from models.classifier import freeze, pretrained_backbone
    from utils.config import section_options
    from utils.foreign import read_torch
    from utils.probe import weights_fingerprint

    backbone = pretrained_backbone(
        section_options(cfg.MODEL.BACKBONE),
        read_torch(weights) if weights else None,
        str(weights),
        img_size=cfg.DATA.IMG_SIZE,
        drop_path=cfg.LINEAR.DROP_PATH,
    )
    run.fingerprint = weights_fingerprint(weights)
    return freeze(run.prepare(backbone), active_drop_path=cfg.LINEAR.DROP_PATH > 0)


if __name__ == "__main__":
    run_main(main)
