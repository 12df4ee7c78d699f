"""Pretrain a backbone without labels: MoCo v2, v3, SynCo, SynCo-v2, MoBY, BYOL, BatchFormer, SiT.

Example: python main_pretrain.py --cfg configs/moby_swin_tiny.yaml --data-path D --output O --tag T

On one process or under torchrun / torch.distributed.launch. Writes to O/<name>/T; the same command
again goes on where it stopped.
"""

import argparse

from utils.cli import Parser, add_which, answer_at_once, make_parser, parse, run_main
from utils.config.flags import SPECIAL

HELD_OUT = (
    "the method's own losses on the val split, every epoch or with --eval [HELD_OUT.EVERY_EPOCHS=1]"
)
REPLAY = (
    "play the batch again that a run stopped on (nonfinite_*.pt), say what went wrong, and stop"
)
TRAINING_MODE = "SiT's published spelling: SSL is this program, finetune is main_semisup.py"


def _training_mode(text: str) -> str:
    if text == "SSL":
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is no pretraining: for finetune use main_semisup.py with the same --cfg, "
        "--output and --tag; for SSL leave it out"
    )


def _parser() -> Parser:
    parser = make_parser(__doc__)
    parser.add_argument("--training-mode", type=_training_mode, metavar="SSL", help=TRAINING_MODE)
    parser.add_argument(
        "--held-out",
        dest="HELD_OUT.EVERY_EPOCHS",
        action="store_const",
        const=1,
        default=argparse.SUPPRESS,
        help=HELD_OUT,
    )
    parser.group(SPECIAL).add_argument(
        "--dry-run", action="store_true", help="three steps: what a run would do and need"
    )
    parser.add_argument("--replay", metavar="FILE", help=REPLAY)
    parser.add_argument("--pretrained", metavar="FILE", help="weights to start from, in any layout")
    add_which(parser)
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser(), program="pretrain")

import logging
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from data import build_loader, build_views
from data.augment.base import Recipe, view_size
from data.augment.preview import first_batch, save_grid, save_preview
from data.loader import GlobalLoader
from data.sources import is_labelled, open_split
from data.sources.base import Source
from engine.loop import Outcome, fit
from engine.optim import build_optimizer, parameter_groups
from engine.plan import Plan, global_batch_size, make_plan
from engine.replay import load_kept, replay
from engine.run import Run, start_run
from engine.state import TrainState
from evaluation.accuracy import held_out_names, measure_throughput
from evaluation.online_probe import OnlineProbe, open_probe
from evaluation.probe import images_of
from models import build_framework, framework_options
from models.parts.momentum import MomentumFramework
from models.weights.start import start_from
from pretraining.dry_run import dry_run
from pretraining.evaluations import Evaluations
from utils.batch import Batch
from utils.checkpoints.file import sha256_of
from utils.cli.closing import command
from utils.config.key import Value
from utils.config.load import load_saved, load_with_origins
from utils.config.programs import check_graphs
from utils.config.schema import declare
from utils.distributed import on_main, world_size
from utils.schedules import Progress

logger = logging.getLogger("synco")


def main() -> int:
    """Build the pieces in order, then hand them to the engine; return the exit code."""
    args, flags = parse(_parser())
    if args.replay:
        return replay_batch(args, flags)
    cfg, origins = load_with_origins(declare(framework_options()), [args.cfg], args.opts, flags)
    check_graphs(cfg.TRAIN)
    run = start_run(cfg, training=not (args.eval or args.throughput or args.dry_run))

    # data
    source = open_split(cfg.DATA, "train")
    run.fingerprint = source.fingerprint()  # resume refuses other data by it
    recipe = build_views(cfg)
    loader = open_loader(cfg, run, source, recipe)

    # model, plan, optimiser
    framework = run.prepare(build_framework(cfg))
    plan = plan_of(cfg, loader)
    state = open_state(cfg, run, framework)
    if args.pretrained:
        run.checkpoints.start = started_from(Path(args.pretrained), args.which)
    state.probe = probe = probe_beside(cfg, run, framework, source)
    resumed = not args.dry_run and run.resume(state, plan)
    if args.pretrained and not resumed:  # a checkpoint holds all of the state
        start_from(framework, cfg, Path(args.pretrained), args.which)
    run.describe(framework, plan, len(source))
    if args.throughput:
        backbone, batch = framework.online.backbone, cfg.TRAIN.BATCH_SIZE
        for size in dict.fromkeys(view_size(view) for view in recipe):
            measure_throughput(run, backbone, size, batch, cfg.DATA.CHANNELS)
        return 0
    evaluate = Evaluations(cfg, run, framework, source, recipe, args.eval, probe)
    if args.eval:
        evaluate_once(run, state, plan, evaluate, resumed)
        return 0
    if left_out := framework.left_out(plan.progress(plan.total_steps - 1)):
        logger.warning("%s", left_out)

    # The one place where model and data meet; the engine knows neither.
    def step(batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with run.autocast():
            out = state.model([run.views(view) for view in batch.views], progress)
        if probe:
            probe.learn(framework.online.take_features(), batch.labels)
        return out

    if args.dry_run:
        tried = dry_run(cfg, origins, run, source, recipe, loader, framework, state, plan, step)
        sys.stdout.write(tried)
        return 0
    run.checkpoints.watch(on_main(lambda: images_of(**evaluate.knn)))
    if not resumed:
        run.write_extra("views.png", lambda path: save_preview(path, source, recipe, cfg.SEED))
        show_restored(run, framework, source, recipe, state.step)
    run.next_commands = next_commands(args, flags, run.folder, is_labelled(source))
    outcome = fit(state, loader, step, plan, run, evaluate)
    if outcome is Outcome.DONE:  # a run that is asked to stop has no time for pictures
        show_restored(run, framework, source, recipe, state.step)
    return outcome.value


def evaluate_once(
    run: Run, state: TrainState, plan: Plan, evaluate: Evaluations, resumed: bool
) -> None:
    """Evaluate the checkpoint that was resumed from, and log the result."""
    if not resumed:
        raise ValueError(
            f"--eval: {run.folder} holds no checkpoint; train first, or give --resume FILE"
        )
    progress = plan.progress(state.step)
    run.meter.record(progress, evaluate(progress), state)


def probe_beside(
    cfg: CfgNode, run: Run, framework: MomentumFramework, source: Source
) -> OnlineProbe | None:
    """Return the probe that learns beside the run; the online network keeps features for it."""
    classes = source.num_classes if is_labelled(source) else 0
    probe = open_probe(cfg, run, framework.online.backbone, classes)
    framework.online.keeps_features = probe is not None
    return probe


def started_from(weights: Path, which: str) -> str:
    """Say which weights a run starts from: a part of its identity. "" for a file that is gone."""
    # a run that resumes needs the file no longer
    digest = on_main(lambda: sha256_of(weights) if weights.is_file() else "")
    asked = f" --which {which}" if which else ""
    return f"{weights.name}{asked}, sha256 {digest}" if digest else ""


def next_commands(
    args: argparse.Namespace, flags: dict[str, Value], folder: Path, labelled: bool
) -> list[str]:
    """Return what to do with a complete run. A probe needs labels."""
    run = shlex.quote(str(folder))
    export = f"python tools/convert.py export {run} --to timm --output backbone.pth"
    probe = command("main_linear.py", args, flags) if labelled else export
    return [probe, f"python tools/report.py {run}"]


def open_loader(cfg: CfgNode, run: Run, source: Source, recipe: Recipe) -> GlobalLoader:
    """Return the loader of the run's batches."""
    return build_loader(
        cfg,
        source,
        recipe,
        run.device,
        global_batch=global_batch_size(cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS),
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
        repeated_aug=cfg.DATA.REPEATED_AUG,
        decode=cfg.DATA.DECODE,
    )


def plan_of(cfg: CfgNode, loader: GlobalLoader) -> Plan:
    """Return the plan of the run: steps, and the schedule of the learning rate."""
    return make_plan(
        cfg.OPTIM,
        cfg.SCHEDULE,
        epochs=cfg.TRAIN.EPOCHS,
        steps_per_epoch=loader.steps_per_epoch,
        global_batch=loader.plan.global_batch,
        base_rates=[cfg.OPTIM.BASE_LR],
        accumulation=cfg.TRAIN.ACCUMULATION_STEPS,
        steps=cfg.TRAIN.STEPS,
    )


def open_state(cfg: CfgNode, run: Run, framework: MomentumFramework) -> TrainState:
    """Return the method with its optimiser, compiled and wrapped as configured."""
    if cfg.TRAIN.COMPILE or cfg.TRAIN.CUDA_GRAPHS:
        framework.compile_backbones(cuda_graphs=cfg.TRAIN.CUDA_GRAPHS)
    scaler = run.scaler()
    groups = parameter_groups(framework, cfg.OPTIM)
    # Under a gradient scaler a fused optimiser would skip steps by itself.
    optimizer = build_optimizer(cfg.OPTIM, groups, fused=scaler is None)
    losses = held_out_names(framework.lower_is_better)
    model = run.wrap(framework)
    return TrainState(framework, optimizer, model, scaler, lower_is_better=losses)


def show_restored(
    run: Run, framework: MomentumFramework, source: Source, recipe: Recipe, step: int
) -> None:
    """Let a method that restores images show clean, corrupted and restored ones."""
    if not framework.restores_images:
        return
    # The same images and the same corruption at each call, so that pictures can be compared.
    clean = first_batch(source, recipe, run.seed).views[0]
    with run.evaluating(framework):
        seen, restored = framework.restore(run.views(clean.to(run.device)), run.seed)
    columns = torch.stack([clean, seen.cpu(), restored.cpu()], dim=1)
    titles = ["clean", "corrupted", "reconstruction"]
    run.write_extra(
        f"reconstruction_{step:07d}.png",
        lambda path: save_grid(path, columns, titles, source.pixels),
    )


def replay_batch(args: argparse.Namespace, flags: dict[str, Value]) -> int:
    """Play the batch of `--replay` again on one process; all but the device comes from the file."""
    path = Path(args.replay)
    kept = load_kept(path)
    device = {"DEVICE": flags.get("DEVICE", "auto")}
    cfg = load_saved(declare(framework_options()), kept["config"], path, device)
    run = start_run(cfg, training=False)
    if world_size() > 1:
        raise ValueError("--replay: plays on one process; start it without torchrun")
    replay(run, run.prepare(build_framework(cfg)), kept, path)
    return 0


if __name__ == "__main__":
    run_main(main)
