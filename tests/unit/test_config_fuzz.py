"""Whatever a person types, a configuration is read or refused: nothing but ConfigError escapes."""

import contextlib
import math
import random
from pathlib import Path

import pytest

from models import framework_defaults
from utils.config import ConfigError, compare_for_resume, default_config, leaves, load_config, to_yaml

DEFAULTS = default_config(framework_defaults())
CONFIGS = Path(__file__).parents[2] / "configs"
ALL_KEYS = [key for key, _ in leaves(DEFAULTS)]

_ODD = [
    *("[", "]", "{", "}", ":", "- ", "? ", "&a ", "*a", "!!", "!!bool ", "!!timestamp ", "!!float x", "! "),
    *(
        "'",
        '"',
        "\\",
        "\0",
        "\t",
        "\n",
        "\r",
        "#",
        "%",
        "@",
        "`",
        "|",
        ">",
        "---",
        "...",
        "<<: ",
        "~",
        "null",
    ),
    *("1e999", "-1", "0x10", "0o7", "1_000", "1:30", ".inf", ".nan", "9" * 5000, "9" * 300, "2001-01-01"),
    *("_BASE_: ", "_BASE_: x.yaml", "TRAIN", "OPTIM.", ".", "..", "é", "\ud800", "\ufeff", "[" * 400),
    "\x85",
    *('"\\ud800"', '"\\0"', "{a: " * 60, "true", "=", "!!set {a}", "!!binary x", "!!omap [a]", "\u2028"),
]


def mutated(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 6)):
        start, length = rng.randint(0, len(text)), rng.choice([0, 0, 1, 5, 40])
        piece = rng.choice([rng.choice(_ODD), text[start : start + length] * 2, ""])
        text = text[:start] + piece + text[start + length :]
    return text


def test_no_text_makes_anything_but_a_config_error_escape(tmp_path: Path) -> None:
    rng = random.Random(20240607)
    seeds = [path.read_text() for path in sorted(CONFIGS.rglob("*.yaml"))] + [to_yaml(DEFAULTS)[:600], ""]
    path = tmp_path / "fuzz.yaml"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(500):
        path.write_bytes(mutated(rng, rng.choice(seeds)).encode("utf-8", "surrogatepass"))
        opts = []
        if rng.random() < 0.3:
            opts = [mutated(rng, rng.choice(ALL_KEYS)) if rng.random() < 0.3 else rng.choice(ALL_KEYS)]
            opts += [mutated(rng, rng.choice(["0.1", "name", "[1, 2]", "True"]))] * rng.randint(0, 2)
        try:
            cfg = load_config(DEFAULTS, [path], opts)
        except ConfigError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert all(math.isfinite(v) for _, v in leaves(cfg) if isinstance(v, float))
            assert compare_for_resume(to_yaml(cfg), cfg) == []
    assert min(outcomes.values()) > 10, outcomes


@pytest.mark.parametrize("text", _ODD)
def test_odd_values_of_every_type_are_read_or_refused(text: str) -> None:
    for key in ("SEED", "OPTIM.BASE_LR", "TAG", "DATA.PATH", "OPTIM.NESTEROV", "KNN.K", text):
        for opts in ([key, text], [key, f"[{text}]"]):
            with contextlib.suppress(ConfigError):
                to_yaml(load_config(DEFAULTS, opts=opts))
