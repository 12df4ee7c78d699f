"""Run a detector over a test split and measure it: VOC's metrics here, COCO's by an evaluator."""

import contextlib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.worker_pool import fetch_in_order
from detection.loader import TestImage, batches_of_test
from detection.masks import Detection, ImageResult, MaskEncoder
from detection.metrics import Found, voc_metrics
from detection.sources.annotations import DetectionData
from detection.sources.coco import ground_truth
from utils import distributed

logger = logging.getLogger("synco")

_ENCODERS = 2  # processes: each encodes the masks of about 20 images of COCO a second


def coco_api() -> tuple[Any, Any, Any]:
    """Return (COCO, COCOeval, mask) of faster-coco-eval or pycocotools, or raise ImportError."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster, mask

        return COCO, COCOeval_faster, mask
    except ImportError:
        pass
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError(
            "COCO's metrics need an evaluator: pip install faster-coco-eval"
        ) from error
    return COCO, COCOeval, mask


def evaluate(
    model: nn.Module, data: DetectionData, cfg: CfgNode, device: torch.device
) -> dict[str, float]:
    """Return AP, AP50 and AP75 (and more) in percent on every rank; `model` is in eval mode.

    The images are shared out among the ranks, the detections gathered.
    """
    mine = distributed.on_all(lambda: list(detections(model, data, cfg, device)))
    everything = _gather(mine, device)
    match cfg.DATA.DATASET:
        case "coco":
            return distributed.on_main(lambda: _coco(everything, data, cfg.MODEL.RCNN.MASKS))
        case "voc":
            return distributed.on_main(lambda: _voc(everything, data))
    raise ValueError(f"DATA.DATASET: {cfg.DATA.DATASET!r} has no metric; use coco or voc")


def detections(
    model: nn.Module, data: DetectionData, cfg: CfgNode, device: torch.device, count: int = 0
) -> Iterator[Detection]:
    """Yield what `model` finds in this rank's (first `count`) test images, in original pixels."""
    masks = cfg.MODEL.RCNN.MASKS and not count
    found = _found(model, batches_of_test(data, cfg, device, count), masks)
    if not masks:
        for image in found:
            yield from image.rows
        return
    # The first image is asked for before the encoders start: they would take the processes that
    # load images, started after them, for their own and end them.
    first = list(islice(found, 1))
    encoder = MaskEncoder(coco_api()[2].encode)
    workers = min(cfg.DATA.NUM_WORKERS, _ENCODERS)
    with contextlib.closing(
        fetch_in_order(encoder, chain(first, found), workers, cfg.DATA.TIMEOUT, device)
    ) as encoded:
        for rows in encoded:
            yield from rows


def _found(
    model: nn.Module, batches: Iterable[list[TestImage]], masks: bool
) -> Iterator[ImageResult]:
    for batch in batches:
        results = model([image for _, _, image in batch])
        for (index, size, image), result in zip(batch, results, strict=True):
            boxes = to_original(result["boxes"].float(), tuple(image.shape[1:]), size)
            rows = []
            for label, score, box in zip(
                result["labels"].tolist(), result["scores"].tolist(), boxes.tolist(), strict=True
            ):
                rows.append({"index": index, "label": label, "score": score, "box": box})
            if masks:
                yield ImageResult.pack(rows, result["masks"].float(), boxes, size)
            else:
                yield ImageResult(rows)


def to_original(boxes: Tensor, resized: tuple[int, ...], original: tuple[int, int]) -> Tensor:
    """Scale boxes (n,4) from an image of (height, width) `resized` to `original`."""
    return boxes * boxes.new_tensor([original[1] / resized[1], original[0] / resized[0]] * 2)


def _gather(mine: list[Detection], device: torch.device) -> list[Detection]:
    """Return every rank's detections, by image."""
    # As text in a tensor: objects would be pickled, and a pickle may run code.
    text = "".join(json.dumps(item) + "\n" for item in mine).encode()
    rows = torch.frombuffer(bytearray(text or b"\n"), dtype=torch.uint8).to(device)
    lines = bytes(distributed.gather_uneven(rows).cpu().numpy()).splitlines()
    return sorted((json.loads(line) for line in lines if line), key=lambda item: item["index"])


# ---- metrics -------------------------------------------------------------------------------------


def _voc(found: list[Detection], data: DetectionData) -> dict[str, float]:
    rows: list[list[Detection]] = [[] for _ in range(len(data))]
    for item in found:
        rows[item["index"]].append(item)
    by_image = [
        Found(
            np.array([item["box"] for item in row], dtype=np.float64).reshape(-1, 4),
            np.array([item["label"] for item in row], dtype=np.int64),
            np.array([item["score"] for item in row], dtype=np.float64),
        )
        for row in rows
    ]
    # VOC 2007 averages precision over eleven recalls, later years over every one
    eleven_points = bool(data.years) and set(data.years) == {"2007"}
    return voc_metrics(by_image, data.objects, len(data.classes), eleven_points)


def coco_results(found: list[Detection], data: DetectionData) -> list[Detection]:
    """Return detections as entries of COCO's results file."""
    entries = []
    for item in found:
        # COCO's boxes are a corner and two sides
        x1, y1, x2, y2 = item["box"]
        entry = {
            "image_id": data.ids[item["index"]],
            "category_id": data.category_ids[item["label"] - 1],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": item["score"],
        }
        entries.append({**entry, "segmentation": item["rle"]} if "rle" in item else entry)
    return entries


def _coco(found: list[Detection], data: DetectionData, masks: bool) -> dict[str, float]:
    """Return AP, AP50, AP75 and AP by object size; with masks mask/AP and so on."""
    assert data.annotation_file is not None
    COCO, COCOeval, _ = coco_api()
    kinds = {"bbox": "", "segm": "mask/"} if masks else {"bbox": ""}
    names = ("AP", "AP50", "AP75", "AP/small", "AP/medium", "AP/large")
    # the evaluators fail on an empty list
    if not found:
        return {prefix + name: 0.0 for prefix in kinds.values() for name in names[:3]}
    values = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools speaks
        truth = COCO()
        truth.dataset = ground_truth(data.annotation_file, masks)
        truth.createIndex()
        for kind, prefix in kinds.items():
            entries = coco_results(found, data)
            if kind == "segm":  # or their areas would be the boxes'
                entries = [{k: v for k, v in entry.items() if k != "bbox"} for entry in entries]
            evaluation = COCOeval(truth, truth.loadRes(entries), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            numbers = 100.0 * np.asarray(evaluation.stats[:6], dtype=float)
            # COCO's -1: no such objects
            values.update(
                {prefix + n: float(v) for n, v in zip(names, numbers, strict=True) if v >= 0}
            )
    return values
