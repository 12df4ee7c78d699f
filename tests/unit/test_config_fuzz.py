"""Whatever a person types, a configuration is read or refused: nothing but ConfigError escapes."""

import contextlib
import math
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from figures import figure

from models import framework_options
from utils.config.load import ConfigError, compare_for_resume, leaves, load_config, to_yaml
from utils.config.schema import declare

SCHEMA = declare(framework_options())
DEFAULTS = SCHEMA.defaults()
CONFIGS = Path(__file__).parents[2] / "configs"
ALL_KEYS = [key for key, _ in leaves(DEFAULTS)]

_ODD = [
    *(
        "[",
        "]",
        "{",
        "}",
        ":",
        "- ",
        "? ",
        "&a ",
        "*a",
        "!!",
        "!!bool ",
        "!!timestamp ",
        "!!float x",
        "! ",
    ),
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
    *(
        "1e999",
        "-1",
        "0x10",
        "0o7",
        "1_000",
        "1:30",
        ".inf",
        ".nan",
        "9" * 5000,
        "9" * 300,
        "2001-01-01",
    ),
    *(
        "_BASE_: ",
        "_BASE_: x.yaml",
        "TRAIN",
        "OPTIM.",
        ".",
        "..",
        "é",
        "\ud800",
        "\ufeff",
        "[" * 400,
    ),
    "\x85",
    *(
        '"\\ud800"',
        '"\\0"',
        "{a: " * 60,
        "true",
        "=",
        "!!set {a}",
        "!!binary x",
        "!!omap [a]",
        "\u2028",
    ),
]


def mutated(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 6)):
        start, length = rng.randint(0, len(text)), rng.choice([0, 0, 1, 5, 40])
        piece = rng.choice([rng.choice(_ODD), text[start : start + length] * 2, ""])
        text = text[:start] + piece + text[start + length :]
    return text


def override(rng: random.Random) -> list[str]:
    """Draw a KEY VALUE pair of ``--opts``, one of them or both spoilt, or without a value."""
    key = rng.choice(ALL_KEYS)
    key = mutated(rng, key) if rng.random() < 0.3 else key
    values = ["0.1", "name", "[1, 2]", "True", "{a: 1}", "1e-3", "", "10", "[0.9, 0.999]"]
    value = rng.choice(values) if rng.random() < 0.3 else mutated(rng, rng.choice(values))
    return [key, value] if rng.random() < 0.97 else [key]


@dataclass
class Fuzz:
    """Read or refuse many inputs; anything but ConfigError fails the test."""

    outcomes: dict[str, int] = field(default_factory=lambda: {"read": 0, "refused": 0})
    worst: float = 0.0

    def load(self, files: list[Path], opts: list[str]) -> None:
        start = time.perf_counter()
        try:
            cfg = load_config(SCHEMA, files, opts)
        except ConfigError:
            cfg = None
        self.worst = max(self.worst, time.perf_counter() - start)
        self.outcomes["read" if cfg else "refused"] += 1
        if cfg is not None:
            assert all(math.isfinite(v) for _, v in leaves(cfg) if isinstance(v, float))
        if cfg is not None and self.outcomes["read"] % 10 == 1:
            assert compare_for_resume(to_yaml(cfg), cfg) == []

    def report(self, what: str) -> None:
        count = sum(self.outcomes.values())
        figure(f"{count:,} {what}: exceptions other than ConfigError", 0)
        figure(
            f"{count:,} {what}: read / refused",
            f"{self.outcomes['read']} / {self.outcomes['refused']}",
        )
        figure(f"{count:,} {what}: longest", f"{1000 * self.worst:.0f}", "ms")
        assert min(self.outcomes.values()) > 0.02 * count, self.outcomes


def fuzz_files(path: Path, count: int) -> None:
    rng, fuzz = random.Random(20240607), Fuzz()
    seeds = [file.read_text() for file in sorted(CONFIGS.rglob("*.yaml"))] + [
        to_yaml(DEFAULTS)[:600],
        "",
    ]
    for _ in range(count):
        path.write_bytes(mutated(rng, rng.choice(seeds)).encode("utf-8", "surrogatepass"))
        fuzz.load([path], [])
    fuzz.report("mutated yaml files")


def fuzz_overrides(count: int) -> None:
    rng, fuzz = random.Random(7), Fuzz()
    for _ in range(count):
        fuzz.load([], override(rng))
    fuzz.report("override strings")


def test_no_file_makes_anything_but_a_config_error_escape(tmp_path: Path) -> None:
    fuzz_files(tmp_path / "fuzz.yaml", 400)


def test_no_override_makes_anything_but_a_config_error_escape() -> None:
    fuzz_overrides(400)


@pytest.mark.slow
def test_ten_thousand_files(tmp_path: Path) -> None:
    fuzz_files(tmp_path / "fuzz.yaml", 10_000)


@pytest.mark.slow
def test_ten_thousand_overrides() -> None:
    fuzz_overrides(10_000)


def chain(folder: Path, *bases: str) -> Path:
    """Write 0.yaml, 1.yaml, ..., each with its base; return the first."""
    for number, base in enumerate(bases):
        (folder / f"{number}.yaml").write_text(f"_BASE_: {base}\nSEED: {number}\n")
    return folder / "0.yaml"


def refused_files(folder: Path) -> dict[str, Path]:
    """Return files that try to loop, to explode or to run code."""
    (folder / "evil.py").write_text(f"open({str(folder / 'executed')!r}, 'w').close()\n")
    texts = {
        "itself": "_BASE_: itself.yaml\n",
        "alias bomb": "a: &a [x, x]\n"
        + "".join(
            f"{c}: &{c} [*{chr(ord(c) - 1)}, *{chr(ord(c) - 1)}]\n"
            for c in "bcdefghijklmnopqrstuvwxyz"
        ),
        "merge bomb": "a: &a {SEED: 1}\nTRAIN: {<<: [*a, *a]}\n",
        "5,000 lists": "SEED: " + "[" * 5000 + "]" * 5000,
        "5,000 mappings": "SEED: " + "{a: " * 5000 + "1" + "}" * 5000,
        "5,000 indents": "".join(" " * n + f"k{n}:\n" for n in range(5000)),
        "python object": "SEED: !!python/object/apply:os.mkdir [executed]\n",
        "python base": "_BASE_: evil.py\n",
        "base outside": "_BASE_: ../../../../../../etc/passwd\n",
        "folder as base": "_BASE_: .\n",
        "many digits": "SEED: " + "9" * 100_000,
    }
    files = {name: folder / f"{name.replace(' ', '_')}.yaml" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text)
    return {
        **files,
        "python file": folder / "evil.py",
        "cycle of three": chain(folder, "1.yaml", "2.yaml", "0.yaml"),
    }


def test_cycles_bombs_and_code_are_refused(tmp_path: Path) -> None:
    files, worst = refused_files(tmp_path), 0.0
    for path in files.values():
        start = time.perf_counter()
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
            load_config(SCHEMA, [path])
        worst = max(worst, time.perf_counter() - start)
    figure(f"{len(files)} files with cycles, bombs, deep nesting or code: refused", len(files))
    figure("longest of them", f"{1000 * worst:.0f}", "ms")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key", ["TAG", "NAME"])
def test_no_tag_or_name_leaves_the_output_folder(key: str) -> None:
    names = [
        "..",
        ".",
        "../x",
        "a/b",
        "/tmp/x",
        "a\\b",
        "a\0b",
        "-x",
        "",
        " ",
        "a b",
        "é",
        "x" * 200,
        "~",
        "$HOME",
    ]
    names += ["..%2f", "a\n", "con:", "*", ".hidden"]
    refused = 0
    for name in names:
        if key == "NAME" and not name:  # an empty name means the file's
            continue
        with pytest.raises(ConfigError, match=key):
            load_config(SCHEMA, flags={"NAME": "n", key: name})
        refused += 1
    figure(f"{key}: names that are no plain folder name refused", f"{refused}/{refused}")


@pytest.mark.parametrize("text", _ODD)
def test_odd_values_of_every_type_are_read_or_refused(text: str) -> None:
    for key in ("SEED", "OPTIM.BASE_LR", "TAG", "DATA.PATH", "OPTIM.NESTEROV", "KNN.K", text):
        for opts in ([key, text], [key, f"[{text}]"]):
            with contextlib.suppress(ConfigError):
                to_yaml(load_config(SCHEMA, opts=opts))
