"""Pretrain a backbone without labels: MoCo v2 and v3, SynCo, SynCo-v2, MoBY, BYOL, BatchFormer, SiT.

python main_pretrain.py --cfg configs/moby_swin_tiny.yaml --data-path D --output O --tag T, on one process or
under torchrun / torch.distributed.launch. Writes to O/<name>/T; the same command again goes on where it
stopped.
"""

import argparse
import logging
from typing import Any

from utils.cli import make_parser, parse, run_main

logger = logging.getLogger("synco")

HELD_OUT = "the method's own losses on the val split, every epoch or with --eval [HELD_OUT.EVERY_EPOCHS=1]"
REPLAY = "play the batch again that a run stopped on (nonfinite_*.pt), say what went wrong, and stop"
TRAINING_MODE = "SiT's published spelling: SSL is this program, finetune is main_semisup.py"


def main() -> int:
    """Build the pieces in order, then hand them to the engine; return the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("--training-mode", choices=["SSL", "finetune"], default="SSL", help=TRAINING_MODE)
    absent: Any = argparse.SUPPRESS
    parser.add_argument(
        "--held-out",
        dest="HELD_OUT.EVERY_EPOCHS",
        action="store_const",
        const=1,
        default=absent,
        help=HELD_OUT,
    )
    parser.add_argument("--replay", metavar="FILE", help=REPLAY)
    args, flags = parse(parser)
    if args.replay:
        return replay_batch(args, flags)
    if args.training_mode == "finetune":
        raise ValueError(
            "--training-mode finetune: use main_semisup.py with the same --cfg, --output and --tag"
        )

    # after the flags are parsed, so that --help and a mistyped flag answer at once
    import torch

    from data.datasets import is_labelled, open_split
    from data.loader import Batch, GlobalLoader, evaluation_batches
    from data.preview import first_views, save_grid, save_preview
    from data.views import build_recipe
    from models import framework_defaults
    from models.sit import SiT
    from utils.config import default_config, load_config
    from utils.engine import Outcome, TrainState, fit
    from utils.evaluate import held_out_losses, measure_throughput
    from utils.features import SharedFeatures, compute_features
    from utils.knn import features_knn
    from utils.optim import build_optimizer, parameter_groups
    from utils.plan import global_batch_size, held_out_batch, make_plan
    from utils.retention import require
    from utils.run import start_run
    from utils.schedules import Progress

    cfg = load_config(default_config(framework_defaults()), [args.cfg], args.opts, flags)
    run = start_run(cfg, training=not (args.eval or args.throughput))

    # data
    source = open_split(cfg.DATA, "train")
    run.fingerprint = source.fingerprint()
    recipe = build_recipe(cfg.AUG.RECIPE, cfg.DATA.IMG_SIZE, cfg.AUG.CROP_MIN or None)

    accumulation = cfg.TRAIN.ACCUMULATION_STEPS
    reading: dict[str, Any] = {
        "device": run.device,
        "num_workers": cfg.DATA.NUM_WORKERS,
        "timeout": cfg.DATA.TIMEOUT,
    }
    loader = GlobalLoader(
        source,
        recipe,
        global_batch=global_batch_size(cfg.TRAIN.BATCH_SIZE, accumulation),
        accumulation=accumulation,
        seed=cfg.SEED,
        max_bad_fraction=cfg.DATA.MAX_BAD_FRACTION,
        repeated_aug=cfg.DATA.REPEATED_AUG,
        backend=cfg.AUG.BACKEND,
        decode=cfg.DATA.DECODE,
        **reading,
    )

    # model, plan, optimiser
    framework = run.prepare(framework_of(cfg))
    if cfg.TRAIN.COMPILE or cfg.TRAIN.CUDA_GRAPHS:
        framework.compile_backbones(cuda_graphs=cfg.TRAIN.CUDA_GRAPHS)
    plan = make_plan(
        cfg.OPTIM,
        cfg.SCHEDULE,
        epochs=cfg.TRAIN.EPOCHS,
        steps_per_epoch=loader.steps_per_epoch,
        global_batch=loader.plan.global_batch,
        base_rates=[cfg.OPTIM.BASE_LR],
        accumulation=accumulation,
    )
    optimizer = build_optimizer(cfg.OPTIM, parameter_groups(framework, cfg.OPTIM), fused=run.scaler() is None)
    state = TrainState(framework, optimizer, run.wrap(framework), run.scaler())
    resumed = run.resume(state, plan)
    run.describe(framework, plan, len(source))

    def step(batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        with run.autocast():
            return state.model([run.views(view) for view in batch.views], progress)

    # evaluations now and then; a split that is missing is refused now, not after the first epochs
    knn, held_out = {}, None
    if cfg.HELD_OUT.EVERY_EPOCHS:
        unseen = open_split(cfg.DATA, "val")
        batch_size = held_out_batch(len(unseen), cfg.TRAIN.BATCH_SIZE)
        held_out = GlobalLoader(
            unseen,
            recipe,
            global_batch=batch_size,
            seed=cfg.SEED,
            max_bad_fraction=0.0,
            backend=cfg.AUG.BACKEND,
            decode=cfg.DATA.DECODE,
            **reading,
        )
        seen = held_out.steps_per_epoch * batch_size
        logger.info("held out: %d of %d images, in batches of %d", seen, len(unseen), batch_size)
    if cfg.KNN.EVERY_EPOCHS or (args.eval and not held_out):
        knn["train"] = source if is_labelled(source) else open_split(cfg.DATA, "train", labelled=True)
        knn["val"] = open_split(cfg.DATA, "val", labelled=True)

    if not cfg.CHECKPOINT.KEEP_BEST.startswith("held_out_" if held_out else "-"):
        names = [f"knn{k}_{top}" for k in cfg.KNN.K for top in ("top1", "top5")]
        require(cfg.CHECKPOINT.KEEP_BEST, names if cfg.KNN.EVERY_EPOCHS else [])

    def features(split: str) -> SharedFeatures:
        batches = evaluation_batches(
            knn[split],
            cfg.DATA.IMG_SIZE,
            batch_size=cfg.TRAIN.BATCH_SIZE,
            skip_unreadable=split == "train",
            **reading,
        )
        with run.evaluating(framework.online.backbone) as backbone:
            return compute_features(backbone, batches)

    def evaluate(progress: Progress) -> dict[str, float]:
        def due(every: int) -> bool:
            return args.eval or progress.epoch % every == 0 or progress.epoch == plan.epochs

        values: dict[str, float] = {}
        if knn and due(cfg.KNN.EVERY_EPOCHS):
            bank, queries = features("train"), features("val").blocks()
            values |= features_knn(bank, queries, knn["train"].num_classes, cfg.KNN.K, cfg.KNN.TEMPERATURE)
        if held_out and due(cfg.HELD_OUT.EVERY_EPOCHS):
            steps = held_out.from_step(0, held_out.steps_per_epoch)
            views = ([run.views(view) for view in batch.views] for _, batches in steps for batch in batches)
            with run.evaluating(framework):
                values |= held_out_losses(lambda seen: framework(seen, progress), views, cfg.SEED)
        return values

    def show_restored() -> None:
        """Let a method that restores images show clean, corrupted and restored ones."""
        if isinstance(framework, SiT):
            clean = first_views(source, recipe, cfg.SEED)[0]
            with run.evaluating(framework):
                seen, restored = framework.restore(run.views(clean.to(run.device)), cfg.SEED)
            columns = torch.stack([clean, seen.cpu(), restored.cpu()], dim=1)
            titles = ["clean", "corrupted", "reconstruction"]
            run.write_extra(
                f"reconstruction_{state.step:07d}.png", lambda path: save_grid(path, columns, titles)
            )

    if args.throughput:
        with run.evaluating(framework.online.backbone) as backbone:
            measure_throughput(backbone, cfg.DATA.IMG_SIZE, cfg.TRAIN.BATCH_SIZE, run.device)
        return 0
    if args.eval:
        if not resumed:
            raise ValueError(f"--eval: {run.folder} holds no checkpoint; train first, or give --resume FILE")
        progress = plan.progress(state.step)
        run.meter.record(progress, evaluate(progress), state.best)
        return 0
    if not resumed:
        run.write_extra("views.png", lambda path: save_preview(path, source, recipe, cfg.SEED))
        show_restored()
    outcome = fit(state, loader, step, plan, run, evaluate)
    if outcome is Outcome.DONE:  # a run that is asked to stop has no time for pictures
        show_restored()
    return outcome.value


def framework_of(cfg: Any) -> Any:
    """Build the method that a configuration describes."""
    from models import build_framework
    from utils.config import method_section, section_options

    return build_framework(
        cfg.MODEL.NAME,
        section_options(cfg.MODEL[method_section(cfg.MODEL.NAME)]),
        section_options(cfg.MODEL.BACKBONE),
        batchformer=section_options(cfg.MODEL.BATCHFORMER),
        img_size=cfg.DATA.IMG_SIZE,
        use_checkpoint=cfg.TRAIN.USE_CHECKPOINT,
        stack_views=cfg.MODEL.STACK_VIEWS,
    )


def replay_batch(args: argparse.Namespace, flags: dict[str, Any]) -> int:
    """Play the batch of ``--replay`` again, on one process; all but the device comes from the file."""
    from pathlib import Path

    from models import framework_defaults
    from utils.config import default_config, load_saved
    from utils.distributed import world_size
    from utils.replay import load_kept, replay
    from utils.run import start_run

    path = Path(args.replay)
    kept = load_kept(path)
    device = {"DEVICE": flags.get("DEVICE", "auto")}
    cfg = load_saved(default_config(framework_defaults()), kept["config"], path, device)
    run = start_run(cfg, training=False)
    if world_size() > 1:
        raise ValueError("--replay: plays on one process; start it without torchrun")
    replay(run, run.prepare(framework_of(cfg)), kept, path)
    return 0


if __name__ == "__main__":
    run_main(main)
