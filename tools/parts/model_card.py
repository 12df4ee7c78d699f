"""Write a backbone as a Hugging Face folder: weights, configurations, a model card."""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import nn
from yacs.config import CfgNode

from data.pixels import BY_TYPE, pixels_of
from models.weights.export import to_huggingface
from utils.checkpoints.atomic import sync_folder, write_file, write_text

Result = dict[str, object]  # what a result.json holds
PAPERS = {
    "moco_v2": ("MoCo v2", "2003.04297"),
    "synco": ("SynCo", "2410.02401"),
    "synco_v2": ("SynCo-v2", "2410.02401"),
    "byol": ("BYOL", "2006.07733"),
    "moby": ("MoBY", "2105.04553"),
    "mocov3": ("MoCo v3", "2104.02057"),
    "batchformer": ("BatchFormer", "2203.01522"),
    "sit": ("SiT", "2104.03602"),
}

_LICENCE = "[CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/): no commercial use."
_FOREIGN = "A backbone that was trained elsewhere; how is not recorded in the file."


def write_huggingface(
    folder: Path,
    backbone: nn.Module,
    cfg: CfgNode,
    checkpoint: Mapping[str, object],
    args: argparse.Namespace,
    source: Path,
) -> None:
    """Write model.safetensors, config.json, preprocessor_config.json and README.md into `folder`.

    `source` is the file that holds the weights.
    """
    if folder.is_file():
        raise ValueError(f"--output: {folder} is a file; --to huggingface writes a folder")
    state, config = to_huggingface(backbone, cfg.DATA.IMG_SIZE)
    weights = save(
        {key: tensor.contiguous() for key, tensor in state.items()}, metadata={"format": "pt"}
    )
    # the results beside a run were measured with its online network
    averaged = args.which in ("target", "teacher")
    measured = {} if averaged and not args.results else found_results(source, args.results)
    card = model_card(cfg, checkpoint, config, args.which, measured)
    folder.mkdir(parents=True, exist_ok=True)
    # No library loads a folder without config.json. So it goes first and comes last: a kill in
    # between leaves a folder that is refused, never new weights beside an old configuration.
    (folder / "config.json").unlink(missing_ok=True)
    sync_folder(folder)
    write_file(folder / "model.safetensors", lambda file: file.write(weights))
    write_text(folder / "preprocessor_config.json", json.dumps(preprocessing(cfg), indent=2) + "\n")
    write_text(folder / "README.md", card)
    write_text(folder / "config.json", json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def preprocessing(cfg: CfgNode) -> dict[str, object]:
    """Return the configuration of transformers' image processor that gives our evaluation view."""
    size, pixels = cfg.DATA.IMG_SIZE, pixels_of(cfg.DATA)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size + 32 if size > 96 else size},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        # It would divide by 255. Other levels come in [0, 1], as the card says.
        "do_rescale": pixels.plain,
        "do_convert_rgb": pixels.plain,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }


def found_results(source: Path, given: Path | None) -> dict[str, Result]:
    """Return the results of a checkpoint beside it in its run, or those in the given file, by name.

    A sweep's searches are left out: they chose, the chosen run measured.
    """
    files = [given] if given else sorted(source.parent.glob("*/*/result.json"))
    results = {}
    for file in files:
        try:
            result = json.loads(file.read_bytes())
            if given or (
                result["weights"] == source.stem and not file.parent.name.startswith("search-")
            ):
                results["/".join(file.parts[-3:-1])] = result
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{file} is no result.json of ours ({error}); leave out --results"
            ) from error
    return results


def model_card(
    cfg: CfgNode,
    checkpoint: Mapping[str, object],
    config: Mapping[str, object],
    which: str,
    results: Mapping[str, Result],
) -> str:
    """Return the card: what it is, how it was trained, what we measured, the licence.

    Of weights that did not come from a run of ours it states only what the file says.
    """
    ours = "imported" not in checkpoint and "framework" in checkpoint
    rows = _training(cfg, checkpoint, which) if ours else _foreign(cfg, checkpoint, which)
    title, what = _title(cfg, checkpoint) if ours else (cfg.MODEL.BACKBONE.NAME, _FOREIGN)
    tags = ["self-supervised-learning"] if ours else []
    tags += [str(config["model_type"]), *([cfg.MODEL.NAME] if ours else [])]
    tag_lines = "\n".join(f"- {tag}" for tag in tags)
    no_pooler = ", add_pooling_layer=False" if config["model_type"] in ("vit", "deit") else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
license: {"cc-by-nc-4.0" if ours else "unknown"}
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
{tag_lines}
---

# {title}

{what}

| | |
|---|---|
{table}

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(FOLDER{no_pooler})
features = model(pixel_values).{_output(config)}
```

## Results

{_result_table(results)}

## Licence

{_LICENCE if ours else "That of the original weights, which the file does not name."}
"""


def _title(cfg: CfgNode, checkpoint: Mapping[str, object]) -> tuple[str, str]:
    """Return the heading of a run of ours, and a sentence about it."""
    name, _ = PAPERS.get(cfg.MODEL.NAME, (cfg.MODEL.NAME, ""))
    tuned = ", then fine-tuned with them" if _is_tuned(checkpoint) else ""
    return f"{name} {cfg.MODEL.BACKBONE.NAME}", f"A backbone pretrained without labels{tuned}."


def _foreign(cfg: CfgNode, checkpoint: Mapping[str, object], which: str) -> dict[str, str]:
    """Return the rows of the card's table for weights of others."""
    imported = checkpoint.get("imported")
    if isinstance(imported, Mapping):
        which = imported.get("which", which)
        origin = {"imported from": f"{imported['file']} ({imported['layout']})"}
    else:
        origin = {}
    # A file of one network does not say that it is an online one.
    return {**origin, **_network(cfg, "" if which == "online" else f"the {which} one, ")}


def _network(cfg: CfgNode, taken: str) -> dict[str, str]:
    eps = cfg.MODEL.BACKBONE.NORM_EPS
    norms = f"eps {eps:g}, but before the MLPs the model's own" if eps else "the model's own"
    rows = {
        "network": f"{cfg.MODEL.BACKBONE.NAME}, {taken}without heads",
        "layer norms": norms,
        "image size": f"{cfg.DATA.IMG_SIZE}",
    }
    if not pixels_of(cfg.DATA).plain:
        span = {"": "0,255", BY_TYPE: "those of the images' type"}
        levels = span.get(cfg.DATA.RANGE, cfg.DATA.RANGE)
        rows["channels"] = f"{cfg.DATA.CHANNELS}; levels {levels} become 0 to 1 before all else"
    return rows


def _is_tuned(checkpoint: Mapping[str, object]) -> bool:
    """Tell whether the weights come from main_semisup.py, whose model is a classifier."""
    framework = checkpoint.get("framework")
    keys = framework if isinstance(framework, Mapping) else ()
    return any(str(key).startswith("backbone.") for key in keys)


def _training(cfg: CfgNode, checkpoint: Mapping[str, object], which: str) -> dict[str, str]:
    """Return the rows of the card's table for a run of ours."""
    name, paper = PAPERS.get(cfg.MODEL.NAME, (cfg.MODEL.NAME, ""))
    link = f" ([arXiv:{paper}](https://arxiv.org/abs/{paper}))" if paper else ""
    place = f" ({Path(cfg.DATA.PATH).name})" if cfg.DATA.PATH else ""
    tuned = _is_tuned(checkpoint)
    if tuned:
        node, epochs = cfg.FINETUNE, cfg.FINETUNE.EPOCHS
        labels = f"{node.SUBSET or f'{node.TRAIN_PERCENT:g} %'} of the labels"
        rate = f"{node.LR_BACKBONE:g}, classifier {node.LR_CLASSIFIER:g}"
    else:
        node, epochs = cfg, cfg.TRAIN.EPOCHS
        if cfg.TRAIN.STEPS:
            epochs = f"{cfg.TRAIN.STEPS} steps"
        labels, rate = "no labels", f"{cfg.OPTIM.BASE_LR:g}"
    return {
        "method": f"{name}{link}",
        "data": f"{cfg.DATA.DATASET}{place}, {labels}",
        **_network(cfg, "fine-tuned, " if tuned else f"the {which} one, "),
        "epochs": f"{epochs}, {checkpoint.get('step', 'unknown')} steps done",
        "optimiser": f"{node.OPTIM.NAME}, weight decay {node.OPTIM.WEIGHT_DECAY:g}",
        "base learning rate": rate,
        "batch": f"{checkpoint.get('global_batch', 'unknown')} images a step",
    }


def _output(config: Mapping[str, object]) -> str:
    if config["model_type"] in ("vit", "deit"):
        return "last_hidden_state[:, 0]"
    return "pooler_output" + (".flatten(1)" if config["model_type"] == "resnet" else "")


def _result_table(results: Mapping[str, Result]) -> str:
    """Return one line an evaluation: those of its figures that are numbers, in percent."""
    if not results:
        return "None measured with these weights yet."
    lines = ["| evaluation | figures, percent |", "|---|---|"]
    for name, result in results.items():
        figures = [
            f"{key} {value:.2f}"
            for key, value in result.items()
            if isinstance(value, float) and re.search(r"top\d+$", key)
        ]
        lines.append(f"| {name} | {', '.join(figures)} |")
    return "\n".join(lines)
