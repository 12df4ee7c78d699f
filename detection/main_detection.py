"""Object detection on a pretrained backbone with torchvision's parts: COCO or Pascal VOC.

Example: python detection/main_detection.py --cfg detection/configs/voc_r50_c4_24k.yaml
             --data-path D --pretrained FILE --output O --tag T

--pretrained none starts from random weights. Writes to O/<name>/T/. Also under torchrun.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detection.defaults import detection_schema, load_detection_config
from utils.cli import answer_at_once, make_transfer_parser, parse, run_main

# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(make_transfer_parser(__doc__), program="detection", schema=detection_schema())

from dataclasses import replace

from torch import Tensor, nn
from yacs.config import CfgNode

from detection.evaluation import coco_api, detections, evaluate
from detection.loader import DetectionBatch, DetectionLoader
from detection.model import Detector, build_detector
from detection.pictures import draw_grid
from detection.sources.annotations import DetectionData
from detection.sources.datasets import read_split
from engine.optim import build_optimizer, parameter_groups
from engine.plan import global_batch_size, iteration_plan
from engine.run import Run, start_run
from engine.state import TrainState
from evaluation.accuracy import measure_throughput
from evaluation.transfer import Transfer, run_transfer, start_fingerprint, starting_weights
from models.weights.load import network_of
from utils.distributed import refuse_different
from utils.schedules import Progress


def main() -> int:
    """Fine-tune, evaluate and draw what was found; return the exit code."""
    args, flags = parse(make_transfer_parser(__doc__))
    cfg = load_detection_config([args.cfg], args.opts, flags)
    weights = starting_weights(cfg, args.pretrained)
    if cfg.DATA.DATASET == "coco":
        coco_api()  # an evaluator that is missing is told now, not after the training
    run = start_run(cfg, task="detection", training=not (args.eval or args.throughput))

    # data
    detection = cfg.DETECTION
    train, test = open_splits(cfg)
    global_batch = global_batch_size(cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.ACCUMULATION_STEPS)
    loader = DetectionLoader(train, cfg, global_batch=global_batch, device=run.device)

    # model, plan, optimiser
    detector = run.prepare(build_detector(cfg, len(train.classes), weights, args.which))
    network = network_of(weights, args.which)
    run.fingerprint = start_fingerprint(weights, network, train.fingerprint())
    run.checkpoints.images = {"test": test.fingerprint()}
    plan = iteration_plan(
        cfg.OPTIM,
        detection,
        global_batch,
        cfg.TRAIN.ACCUMULATION_STEPS,
        section="DETECTION.",
    )
    state = open_state(cfg, run, detector)

    def step(batch: DetectionBatch, progress: Progress) -> dict[str, Tensor]:
        with run.autocast():
            losses = state.model(batch.views, batch.targets)
        return {**losses, "loss": sum(losses.values())}

    measured: dict[str, float] = {}

    def measure(progress: Progress) -> dict[str, float]:
        with run.evaluating(detector) as model:
            measured.update(evaluate(model, test, cfg, run.device))
        return dict(measured)

    def throughput() -> None:
        size = detection.CANVAS or detection.TEST_SIZE // 32 * 32
        measure_throughput(run, detector.backbone, size, cfg.TRAIN.BATCH_SIZE)

    task = Transfer(
        state=state,
        plan=plan,
        loader=loader,
        step=step,
        measure=measure,
        # again, if the run was complete before
        conclude=lambda: measured or measure(plan.progress(state.step)),
        throughput=throughput,
        draw=lambda: draw(run, detector, test, cfg),
        split=detection.TEST_SPLIT,
        num_images=len(train),
    )
    return run_transfer(run, task, args, network)


def open_state(cfg: CfgNode, run: Run, detector: Detector) -> TrainState:
    """Return the detector with its optimiser, ready for the engine."""
    optimizer = build_optimizer(
        cfg.OPTIM, parameter_groups(detector, cfg.OPTIM), fused=run.scaler() is None
    )
    return TrainState(detector, optimizer, run.wrap(detector), run.scaler())


def open_splits(cfg: CfgNode) -> tuple[DetectionData, DetectionData]:
    """Read and check the splits of training and test."""
    detection = cfg.DETECTION
    train, test = read(cfg, detection.TRAIN_SPLIT), read(cfg, detection.TEST_SPLIT)
    train = train.for_training()
    if test.classes != train.classes:
        raise ValueError(
            f"DETECTION.TEST_SPLIT: {detection.TEST_SPLIT} has other classes than "
            f"{detection.TRAIN_SPLIT}"
        )
    for data in (train, test):
        refuse_different(data.fingerprint, f"DATA.PATH (--data-path) {cfg.DATA.PATH!r}")
    return train, test


def read(cfg: CfgNode, split: str) -> DetectionData:
    """Read and check a split of the configured data set."""

    data = read_split(
        cfg.DATA.DATASET, cfg.DATA.PATH, split, cfg.DETECTION.CLASSES, cfg.MODEL.RCNN.MASKS
    )
    return replace(data, max_pixels=cfg.DATA.MAX_PIXELS)


def draw(run: Run, detector: nn.Module, data: DetectionData, cfg: CfgNode) -> None:
    """Write `detections.png`, what the final detector finds in the first test images."""

    count = cfg.LOG.PICTURES
    if not count:
        return
    with run.evaluating(detector) as model:
        run.write_extra(
            "detections.png",
            lambda path: draw_grid(
                data, list(detections(model, data, cfg, run.device, count)), count, path
            ),
        )


if __name__ == "__main__":
    run_main(main)
