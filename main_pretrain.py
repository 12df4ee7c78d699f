"""Pretrain a backbone without labels: MoCo v2, SynCo, BYOL, MoBY, SynCo-v2 over ResNet, DeiT, Swin.

python main_pretrain.py --cfg configs/moby_swin_tiny.yaml --data-path D --output O --tag T, on one process or
under torchrun / torch.distributed.launch. Writes to O/<name>/T; the same command again goes on where it
stopped.
"""

from utils.cli import make_parser, parse, run_main


def main() -> int:
    """Build the pieces in order, then hand them to the engine; return the exit code."""
    args, flags = parse(make_parser(__doc__))

    # after the flags are parsed, so that --help and a mistyped flag answer at once
    import torch

    from data.datasets import is_labelled, open_split
    from data.loader import Batch, GlobalLoader, evaluation_batches
    from data.preview import save_preview
    from data.views import build_recipe
    from models import build_framework, framework_defaults
    from utils.config import default_config, load_config, section_options
    from utils.engine import TrainState, fit
    from utils.evaluate import extract_features, knn_accuracy, measure_throughput
    from utils.optim import build_optimizer, parameter_groups
    from utils.plan import global_batch_size, make_plan
    from utils.run import start_run
    from utils.schedules import Progress

    cfg = load_config(default_config(framework_defaults()), [args.cfg], args.opts, flags)
    run = start_run(cfg, training=not (args.eval or args.throughput))

    # data
    source = open_split(cfg.DATA, "train")
    run.fingerprint = source.fingerprint()
    recipe = build_recipe(cfg.AUG.RECIPE, cfg.DATA.IMG_SIZE, cfg.AUG.CROP_MIN or None)
    loader = GlobalLoader(
        source,
        recipe,
        global_batch=global_batch_size(cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS),
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
        seed=cfg.SEED,
        device=run.device,
        num_workers=cfg.DATA.NUM_WORKERS,
        timeout=cfg.DATA.TIMEOUT,
        max_bad_fraction=cfg.DATA.MAX_BAD_FRACTION,
    )

    # model, plan, optimiser
    framework = build_framework(
        cfg.MODEL.NAME,
        section_options(cfg.MODEL[cfg.MODEL.NAME.upper()]),
        section_options(cfg.MODEL.BACKBONE),
        img_size=cfg.DATA.IMG_SIZE,
        use_checkpoint=cfg.TRAIN.USE_CHECKPOINT,
    )
    framework = run.prepare(framework)
    plan = make_plan(
        cfg.OPTIM,
        cfg.SCHEDULE,
        epochs=cfg.TRAIN.EPOCHS,
        steps_per_epoch=loader.steps_per_epoch,
        global_batch=loader.plan.global_batch,
        base_rates=[cfg.OPTIM.BASE_LR],
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
    )
    optimizer = build_optimizer(cfg.OPTIM, parameter_groups(framework, cfg.OPTIM), fused=run.scaler() is None)
    state = TrainState(framework, optimizer, run.wrap(framework), run.scaler())
    resumed = run.resume(state, plan)
    run.describe(framework, plan, len(source))

    def step(batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        with run.autocast():
            return state.model([run.views(view) for view in batch.views], progress)

    # k-NN accuracy now and then; a split that is missing is refused now, not after the first epochs
    knn = {}
    if cfg.KNN.EVERY_EPOCHS or args.eval:
        knn["train"] = source if is_labelled(source) else open_split(cfg.DATA, "train", labelled=True)
        knn["val"] = open_split(cfg.DATA, "val", labelled=True)

    def features(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        batches = evaluation_batches(
            knn[split],
            cfg.DATA.IMG_SIZE,
            batch_size=cfg.TRAIN.BATCH_SIZE,
            device=run.device,
            num_workers=cfg.DATA.NUM_WORKERS,
            timeout=cfg.DATA.TIMEOUT,
            skip_unreadable=split == "train",
        )
        with run.evaluating(framework.online.backbone) as backbone:
            return extract_features(backbone, batches)

    def evaluate(progress: Progress) -> dict[str, float]:
        if knn and (args.eval or progress.epoch % cfg.KNN.EVERY_EPOCHS == 0 or progress.epoch == plan.epochs):
            bank, queries = features("train"), run.shard(*features("val"))
            return knn_accuracy(*bank, *queries, knn["train"].num_classes, cfg.KNN.K, cfg.KNN.TEMPERATURE)
        return {}

    if args.throughput:
        with run.evaluating(framework.online.backbone) as backbone:
            measure_throughput(backbone, cfg.DATA.IMG_SIZE, cfg.TRAIN.BATCH_SIZE, run.device)
        return 0
    if args.eval:
        if not resumed:
            raise ValueError(f"--eval: {run.folder} holds no checkpoint; train first, or give --resume FILE")
        progress = plan.progress(state.step)
        run.meter.record(progress, evaluate(progress), state.best)
        run.finish("done" if state.step == plan.total_steps else "preempted", state.step, "evaluated")
        return 0
    if not resumed:
        run.write_extra("views.png", lambda path: save_preview(path, source, recipe, cfg.SEED))
    return fit(state, loader, step, plan, run, evaluate).value


if __name__ == "__main__":
    run_main(main)
