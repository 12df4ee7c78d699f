"""Self-made pictures of coloured shapes, annotated as COCO and as Pascal VOC."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("square", "disc", "triangle")
COLOURS = ((230, 60, 40), (40, 200, 70), (60, 90, 240))
CORNERS = 24  # of a disc's polygon


def draw(
    rng: np.random.Generator, width: int, height: int
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw one to three shapes apart from each other; return picture and objects."""
    noise = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    pen = ImageDraw.Draw(picture)
    objects: list[dict[str, Any]] = []
    for _ in range(int(rng.integers(1, 4))):
        side = float(rng.integers(min(width, height) // 4, min(width, height) // 2))
        x, y = float(rng.integers(0, width - int(side))), float(rng.integers(0, height - int(side)))
        box = (x, y, x + side, y + side)
        if any(overlap(box, other["box"]) for other in objects):
            continue
        label = int(rng.integers(len(CLASSES)))
        polygon = outline(label, x, y, side)
        pen.polygon(polygon, fill=COLOURS[label])
        objects.append(
            {"label": label, "box": box, "polygon": [v for corner in polygon for v in corner]}
        )
    return picture, objects


def outline(label: int, x: float, y: float, side: float) -> list[tuple[float, float]]:
    if label == 0:
        return [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
    if label == 2:
        return [(x + side / 2, y), (x + side, y + side), (x, y + side)]
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    return [
        (x + side / 2 * (1 + float(np.cos(a))), y + side / 2 * (1 + float(np.sin(a))))
        for a in angles
    ]


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def coco(root: Path, train: int = 8, val: int = 4, size: tuple[int, int] = (96, 80)) -> Path:
    """Write a COCO data set; category ids are 3, 5, 7, so that labels and ids differ."""
    rng = np.random.default_rng(0)
    for split, count in (("train2017", train), ("val2017", val)):
        (root / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for number in range(count):
            width, height = size if number % 2 else size[::-1]
            picture, objects = draw(rng, width, height)
            name = f"{number:012d}.png"
            picture.save(root / split / name)
            images.append({"id": 100 + number, "file_name": name, "width": width, "height": height})
            for item in objects:
                x1, y1, x2, y2 = item["box"]
                annotations.append(
                    {
                        **{"id": len(annotations) + 1, "image_id": 100 + number, "iscrowd": 0},
                        "category_id": 3 + 2 * item["label"],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "segmentation": [item["polygon"]],
                    }
                )
        categories = [{"id": 3 + 2 * label, "name": name} for label, name in enumerate(CLASSES)]
        tree = {"images": images, "annotations": annotations, "categories": categories}
        file = root / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(tree))
    return root


def voc(root: Path, train: int = 8, test: int = 4, size: tuple[int, int] = (96, 80)) -> Path:
    """Write a Pascal VOC data set."""
    rng = np.random.default_rng(1)
    home = root / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    for split, count in (("trainval", train), ("test", test)):
        names = [f"{split}{number}" for number in range(count)]
        (home / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            picture, objects = draw(rng, *size)
            picture.save(home / "JPEGImages" / f"{name}.jpg", quality=95)
            write_xml(home / "Annotations" / f"{name}.xml", objects)
    return root


def write_xml(path: Path, objects: list[dict[str, Any]]) -> None:
    """Write boxes as VOC counts them: from 1, both ends included."""
    tree = ElementTree.Element("annotation")
    for item in objects:
        entry = ElementTree.SubElement(tree, "object")
        ElementTree.SubElement(entry, "name").text = item.get("name", CLASSES[item["label"]])
        ElementTree.SubElement(entry, "difficult").text = str(int(item.get("difficult", False)))
        box = ElementTree.SubElement(entry, "bndbox")
        x1, y1, x2, y2 = item["box"]
        for key, value in zip(
            ("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True
        ):
            ElementTree.SubElement(box, key).text = f"{value:g}"
    ElementTree.ElementTree(tree).write(path)


TINY = {
    "MODEL.BACKBONE.NAME": "timm/test_resnet",
    "MODEL.RCNN.PYRAMID_WIDTH": 32,
    "MODEL.RCNN.HEAD_WIDTH": 64,
    "MODEL.RCNN.RPN_BATCH": 32,
    "MODEL.RCNN.ROI_BATCH": 32,
    "MODEL.RCNN.ANCHOR_SIZES": [12, 24, 32, 48, 64],
    "MODEL.RCNN.RPN_PRE_NMS": [100, 100],
    "MODEL.RCNN.RPN_POST_NMS": [100, 50],
    "DETECTION.MIN_SIZES": [64, 80],
    "DETECTION.TEST_SIZE": 80,
    "DETECTION.MAX_SIZE": 96,
    "DETECTION.WARMUP_ITERS": 2,
    "DETECTION.STEPS": [1000],
    "OPTIM.BASE_LR": 0.02,
    "OPTIM.WARMUP_LR": 0.002,
    "OPTIM.LR_BATCH": 0,
    "DATA.NUM_WORKERS": 0,
    "LOG.PRINT_FREQ": 2,
    "LOG.TENSORBOARD": False,
}


def opts(**changes: Any) -> list[str]:
    """Return `--opts` of a tiny detector; `changes` are DOTTED__KEY=value, None the default."""
    keys = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    chosen = {key: json.dumps(value).strip('"') for key, value in keys.items() if value is not None}
    return [part for pair in chosen.items() for part in pair]
