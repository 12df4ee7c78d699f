"""Write docs/configuration.md, the page of all configuration keys, from their declarations.

Example: python docs/key_page.py

A test fails while the page is out of date; `make docs` runs this program.
"""

import argparse
import inspect
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.cli import Parser, answer_at_once, run_main

PAGE = ROOT / "docs" / "configuration.md"


def _parser() -> Parser:
    return Parser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

from data.augment.recipes import RECIPES
from data.sources import SOURCES
from detection.defaults import detection_schema
from models import FRAMEWORKS, framework_options
from models.parts.batchformer import BatchFormer
from segmentation.defaults import segmentation_schema
from utils.config.key import Key
from utils.config.schema import declare

HEAD = """# Configuration

*Written by `make docs` from the declarations of the keys
([schema.py](../utils/config/schema.py), the signatures of the methods,
[detection](../detection/defaults.py) and [segmentation](../segmentation/defaults.py)).*

A yaml states what differs from the defaults below; `--opts KEY VALUE` sets any key. Later wins:
defaults, `_BASE_` files, yaml, `--opts`, flags. An unknown key is an error that names the nearest
one.

The last column says what a changed value means when a run continues. **fixed**: it would be another
run, so it is refused. **free**: allowed and logged. **local**: allowed (paths, workers, logging). A
fixed key concerns only the named programs, if there are any.
"""
# What options of several methods mean. One that is not here is explained above its table.
MEANINGS = {
    "out_dim": "width of the embedding",
    "hidden_dim": "width of the hidden layers of projector and predictor",
    "num_mlp_layers": "layers of the head",
    "proj_num_layers": "layers of the projector",
    "pred_num_layers": "layers of the predictor",
    "pred_last_batch_norm": "a batch norm at the end of the predictor",
    "queue_size": "keys in the queue: negatives of each query",
    "temperature": "divisor of the logits",
    "base_momentum": "m of `target <- m target + (1 - m) online`, at the start",
    "momentum_schedule": "m stays (constant) or rises to 1 (cosine)",
    "symmetric": "contrast both ways and average",
    "batch_norm": "shuffle, sync or local",
    "bn_groups": "groups that batch norms treat alone, to emulate processes",
    "num_hard": "most similar keys from which synthetics are made",
    "num_synthetic": "synthetics of each of the six kinds",
    "sigma": "noise of kind 4",
    "delta": "step of kind 5, along the gradient",
    "eta": "step of kind 6, along its sign",
    "warmup_epochs": "first epoch with synthetics",
    "cooldown_epochs": "last epoch with synthetics",
    "legacy_gradients": "kinds 5 and 6 as before October 2024",
    "enabled": "put BatchFormer before the projector of the method",
    "num_layers": "transformer layers",
    "num_heads": "attention heads",
    "dropout": "in the transformer layers",
    "variant": "rotation or gmml",
    "drop_fraction": "share of a view that is corrupted",
    "replace_fraction": "share of a view that takes pixels of another image",
    "drop_align": "corrupted blocks start at multiples of this many pixels",
    "drop_type": "what corrupted pixels become: zeros, noise, ...",
    "reconstruction_weight": "weight of the restoration (gmml)",
}
_ROLES = {"identity": "fixed", "tunable": "free", "local": "local"}


def main() -> int:
    """Write the page; return 0."""
    _parser().parse_strictly(None)
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


def render() -> str:
    """Return the text of the page."""
    return "\n".join([HEAD, *_shared(), *_methods(), *_transfer()]).rstrip() + "\n"


def _shared() -> Iterator[str]:
    """Yield a table for each top-level section of the shared keys."""
    sections: dict[str, dict[str, Key]] = {}
    for name, key in declare({}).items():
        section = name.split(".")[0] if "." in name else "The run"
        sections.setdefault(section, {})[name] = key
    for section, keys in sections.items():
        yield f"## {section}\n"
        yield from _table(keys.items())
        if section == "DATA":
            yield f"`DATA.DATASET` is one of {_listed(SOURCES)}. [What each holds](data.md).\n"
        if section == "AUG":
            yield f"`AUG.RECIPE` is one of {_listed(RECIPES)}. [More](augmentation.md).\n"


def _methods() -> Iterator[str]:
    """Yield the options of each method, with the text of its class."""
    yield "## Methods\n\nEach has a page: [methods](methods/README.md).\n"
    for method, options in framework_options().items():
        framework = BatchFormer if method == "batchformer" else FRAMEWORKS[method]
        yield f"### MODEL.{method.upper()}\n\n{inspect.cleandoc(framework.__doc__ or '')}\n"
        named = ((f"MODEL.{method.upper()}.{name.upper()}", key) for name, key in options.items())
        yield from _table(named)


def _transfer() -> Iterator[str]:
    """Yield the keys that only detection and segmentation have."""
    shared = declare({})
    schemas = {"detection": detection_schema(), "segmentation": segmentation_schema()}
    for task, schema in schemas.items():
        yield f"## {task.capitalize()}\n"
        yield f"Keys of `{task}/main_{task}.py` beside the shared ones.\n"
        yield from _table((name, key) for name, key in schema.items() if name not in shared)


def _table(keys: Iterable[tuple[str, Key]]) -> Iterator[str]:
    yield "| key | default | meaning | values | on resume |\n|---|---|---|---|---|"
    for name, key in keys:
        meaning = key.meaning or MEANINGS.get(name.rpartition(".")[2].lower(), "")
        cells = [f"`{name}`", f"`{key.default}`" if key.default != "" else "empty", meaning]
        cells += [_values(key), _resume(key)]
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
    yield ""


def _values(key: Key) -> str:
    """Return the limits of a key in words."""
    if key.choices:
        return ", ".join(key.spelled())
    if isinstance(key.default, bool) or isinstance(key.default, str):
        return ""
    if key.most < math.inf:
        return f"{key.least:g} to {key.most:g}"
    return f"at least {key.least:g}"


def _resume(key: Key) -> str:
    if key.role != "identity" or len(key.programs) > 3:
        return _ROLES[key.role]
    return f"fixed ({', '.join(key.programs)})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    run_main(main)
