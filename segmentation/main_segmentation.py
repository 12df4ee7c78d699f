"""Semantic segmentation on a pretrained backbone: UPerNet, FCN or a linear head.

Example: python segmentation/main_segmentation.py --data-path D --pretrained FILE
             --cfg segmentation/configs/ade20k_upernet_swin_tiny.yaml

--pretrained none starts from random weights. Writes to <--output>/<name>/<--tag>. Also under
torchrun.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segmentation.defaults import load_segmentation_config, segmentation_schema
from utils.cli import Parser, answer_at_once, make_transfer_parser, parse, run_main


def _parser() -> Parser:
    parser = make_transfer_parser(__doc__)
    parser.add_argument(
        "--multi-scale",
        action="store_true",
        help="also evaluate over several scales, mirrored too",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="take the heads of --pretrained too; with --eval it is judged as it is",
    )
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser(), program="segmentation", schema=segmentation_schema())

from collections.abc import Iterator

import numpy as np
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from engine.optim import build_optimizer
from engine.plan import global_batch_size, iteration_plan
from engine.run import Run, start_run
from engine.state import TrainState
from evaluation.accuracy import measure_throughput
from evaluation.transfer import Transfer, run_transfer, start_fingerprint, starting_weights
from models.weights.load import network_of
from segmentation.datasets import SegmentationData, open_dataset
from segmentation.evaluation import Judgement, evaluate, predictions
from segmentation.heads import LinearGrid
from segmentation.loader import build_train_loader
from segmentation.model import Segmenter, build_segmenter, optimizer_groups
from segmentation.pictures import draw_rows
from utils.batch import Batch
from utils.distributed import refuse_different
from utils.schedules import Progress


def main() -> int:
    """Fine-tune, evaluate and draw the labels; return the exit code."""
    args, flags = parse(_parser())
    cfg = load_segmentation_config([args.cfg], args.opts, flags)
    weights = starting_weights(cfg, args.pretrained)
    if args.whole and weights is None:
        raise ValueError("--whole: --pretrained none has no heads; name a file")
    run = start_run(cfg, task="segmentation", training=not (args.eval or args.throughput))

    # data
    node = cfg.SEGMENTATION
    train, test = open_splits(cfg)
    global_batch = global_batch_size(cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS)
    loader = build_train_loader(cfg, train, global_batch=global_batch, device=run.device)

    # model, plan, optimiser
    segmenter = build_segmenter(cfg, len(train.classes), weights, args.which, args.whole)
    segmenter = run.prepare(segmenter)
    network = "whole" if args.whole else network_of(weights, args.which)
    run.fingerprint = start_fingerprint(weights, network, train.fingerprint())
    run.checkpoints.images = {"test": test.fingerprint()}
    plan = iteration_plan(
        cfg.OPTIM,
        node,
        global_batch,
        cfg.TRAIN.ACCUMULATION_STEPS,
        schedule=node.SCHEDULE,
        power=node.POWER,
        base_rates=node.LRS,
        section="SEGMENTATION.",
    )

    def step(batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with run.autocast():
            losses = state.model(run.views(batch.views[0]), batch.labels)
        return {**losses, "loss": sum(losses.values())}

    def throughput() -> None:
        measure_throughput(run, segmenter.backbone, node.CROP[0], cfg.TRAIN.BATCH_SIZE)

    state = open_state(cfg, run, segmenter)
    judge = Judge(run, segmenter, test, args.multi_scale)
    task = Transfer(
        state=state,
        plan=plan,
        loader=loader,
        step=step,
        measure=judge.measure,
        conclude=judge.conclude,
        throughput=throughput,
        draw=lambda: draw(run, segmenter, test),
        split=node.TEST_SPLIT,
        num_images=len(train),
        trained=args.whole,
    )
    return run_transfer(run, task, args, network)


def open_splits(cfg: CfgNode) -> tuple[SegmentationData, SegmentationData]:
    """Read and check the splits of training and test."""
    node = cfg.SEGMENTATION
    train, test = open_dataset(cfg, node.TRAIN_SPLIT), open_dataset(cfg, node.TEST_SPLIT)
    if test.classes != train.classes:
        raise ValueError(
            f"SEGMENTATION.TEST_SPLIT: {node.TEST_SPLIT} has other classes than {node.TRAIN_SPLIT}"
        )
    for data in (train, test):
        refuse_different(data.fingerprint, f"DATA.PATH (--data-path) {cfg.DATA.PATH!r}")
    return train, test


def open_state(cfg: CfgNode, run: Run, segmenter: Segmenter) -> TrainState:
    """Return the segmenter with its optimiser, ready for the engine."""
    groups = optimizer_groups(segmenter, cfg)
    optimizer = build_optimizer(cfg.OPTIM, groups, fused=run.scaler() is None)
    state = TrainState(segmenter, optimizer, run.wrap(segmenter), run.scaler())
    if isinstance(segmenter.decode_head, LinearGrid):
        # clipped apart: each head then learns as it would alone
        state.clip_groups = [list(head.parameters()) for head in segmenter.decode_head.heads]
    return state


class Judge:
    """Evaluate a segmenter; the last evaluation is kept for the result."""

    def __init__(
        self, run: Run, segmenter: Segmenter, test: SegmentationData, multi_scale: bool
    ) -> None:
        self.run, self.segmenter, self.test = run, segmenter, test
        self.multi_scale = multi_scale
        self.newest: Judgement | None = None

    def measure(self, progress: Progress) -> dict[str, float]:
        """Return the metrics of one scale; several scales would take twelve times as long."""
        self.newest = self.evaluate()
        return dict(self.newest.values)

    def conclude(self) -> dict[str, object]:
        """Return the result of the run."""
        # a run that was complete before has not been evaluated by this process
        single = self.newest or self.evaluate()
        result: dict[str, object] = {**single.values, "iou": single.ious}
        if self.multi_scale:
            many = self.evaluate(multi_scale=True)
            result |= {f"ms/{name}": value for name, value in many.values.items()}
            result["ms/iou"] = many.ious
        return result

    def evaluate(self, multi_scale: bool = False) -> Judgement:
        """Judge all test images."""
        with self.run.evaluating(self.segmenter) as model:
            return evaluate(model, self.test, self.run.cfg, self.run.device, multi_scale)


def draw(run: Run, segmenter: Segmenter, test: SegmentationData) -> None:
    """Write `segmentation.png`: the first test images, their truth, and the labels found."""
    if not run.cfg.LOG.PICTURES:
        return
    with run.evaluating(segmenter) as model:
        run.write_extra("segmentation.png", lambda path: draw_rows(shown(run, model, test), path))


def shown(
    run: Run, model: Segmenter, test: SegmentationData
) -> Iterator[tuple[Image.Image, np.ndarray, np.ndarray]]:
    """Yield image, truth and labels of the first test images."""
    found = predictions(model, test, run.cfg, run.device, count=run.cfg.LOG.PICTURES)
    for index, (truth, labels) in enumerate(found):
        yield test.image(index), truth.cpu().numpy(), labels[0].cpu().numpy()


if __name__ == "__main__":
    run_main(main)
