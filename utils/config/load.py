"""Read the configuration from yaml files, `--opts` and flags; the keys are in `schema.py`.

Precedence: defaults < `_BASE_` files < yaml < `--opts` < explicit flags. The tree is frozen once;
numbers derived from it live in `engine.plan.Plan`.
"""

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from yacs.config import CfgNode

from utils.config import strict_yaml
from utils.config.flags import FLAGS
from utils.config.key import Key, Limits, Value
from utils.config.published import translated
from utils.config.schema import COMMON_SECTIONS, KEYS, Schema, key_class, plain
from utils.config.sections import method_section
from utils.reading import read_bytes

BASE_KEY = "_BASE_"
_RECIPES = Path(__file__).resolve().parents[2] / "configs"
_MAX_FILES = 256  # reads for one --cfg: bases that name two files each double at every level
_MAX_BYTES = 1 << 20  # of one file; ours have some hundred lines
_MAX_INT = 1 << 63
_FLAGS = "command line"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names key or file, value and remedy."""


def load_config(
    schema: Schema,
    files: Sequence[str | Path | None] = (),
    opts: Sequence[str] = (),
    flags: Mapping[str, Value] | None = None,
) -> CfgNode:
    """Merge yaml `files`, `opts` (key, value, key, ...) and `flags` (dotted key -> value); freeze.

    The first file names the run, unless `NAME` does; a `None` among them is passed over. Raises
    `ConfigError` for an unknown key, a value of a wrong type or out of range, a bad or cyclic file.
    """
    return load_with_origins(schema, files, opts, flags)[0]


def load_with_origins(
    schema: Schema,
    files: Sequence[str | Path | None] = (),
    opts: Sequence[str] = (),
    flags: Mapping[str, Value] | None = None,
) -> tuple[CfgNode, dict[str, str]]:
    """Return what `load_config` returns, and where the value of each key comes from."""
    paths = [Path(file) for file in files if file is not None]
    pairs = ((key, _parse_scalar(text, key)) for key, text in opts_pairs(opts))
    layers = [
        (source, _flatten(tree, source, schema))
        for path in paths
        for source, tree in _read_chain(path)
    ]
    layers += [("--opts", pairs), (_FLAGS, iter((flags or {}).items()))]
    values: dict[str, Value] = {}
    origins = dict.fromkeys(schema, "default")
    for source, found in layers:
        for key, value in _checked(found, source, schema):
            values[key] = value
            origins[key] = _flag_of(key) or source if source == _FLAGS else source
    return _merged(schema, values, paths[0].stem if paths else ""), origins


def written_values(file: str | Path) -> dict[str, object]:
    """Return dotted key -> value as a yaml file and its bases give them, without the defaults."""
    chain = _read_chain(Path(file))
    return {key: value for source, tree in chain for key, value in _flatten(tree, source)}


def opts_pairs(opts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of `KEY VALUE` and `KEY=VALUE`."""
    words = iter(opts)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise ConfigError(f"--opts: {word}: its value is missing; give KEY VALUE")
            text = following
        yield key, text


def load_saved(
    schema: Schema, text: str, source: str | Path, flags: Mapping[str, Value] | None = None
) -> CfgNode:
    """Rebuild the configuration whose YAML `text` the file `source` of ours holds; `flags` win."""
    name = str(source)
    values = dict(_checked(_flatten(_parse_yaml(text, name), name, schema), name, schema))
    values.update(_checked((flags or {}).items(), _FLAGS, schema))
    return _merged(schema, values)


def _merged(schema: Schema, values: Mapping[str, Value], name: str = "") -> CfgNode:
    """Return the frozen tree of defaults and checked `values`; `name` is the fallback of NAME."""
    merged = schema.defaults()
    for key, value in values.items():
        _set(merged, key, value)
    # the name of a run is the file's, unless the file says another
    merged.NAME = merged.NAME or name or merged.MODEL.NAME
    validate(merged, schema)
    merged.freeze()
    return merged


def leaves(tree: CfgNode, prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Yield every (dotted key, value) of the tree."""
    for key, value in tree.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_yaml(tree: CfgNode) -> str:
    """Return the tree as YAML text that `load_config` and `yaml.safe_load` read back unchanged."""
    return strict_yaml.dump(_nested(tree))


def compare_for_resume(saved_yaml: str, tree: CfgNode, task: str = "pretrain") -> list[str]:
    """Return the tunable changes against the saved configuration.

    Raises `ConfigError` naming each identity key of the `task` with its old and new value. Options
    of methods that are not selected are no part of a run.
    """
    current = dict(leaves(tree))
    # A key that the code did not have when it saved had its default: what a key adds is off then.
    saved = {name: plain(key.default) for name, key in KEYS.items() if name in current}
    saved |= _flatten(_parse_yaml(saved_yaml, "the checkpoint's configuration"), "checkpoint")
    # All differences are gathered first, so that one message names them all.
    tunable: list[str] = []
    fatal: list[str] = []
    for key in dict.fromkeys([*current, *saved]):
        old, new = saved.get(key, "absent"), current.get(key, "absent")
        kind = key_class(key, task)
        if old == new or kind == "local" or _of_another_method(key, tree.MODEL.NAME):
            continue
        kind = "tunable" if old == "absent" else kind  # an option that the method did not have then
        (fatal if kind == "identity" else tunable).append(f"{key}: {old!r} -> {new!r}")
    if fatal:
        raise ConfigError(
            f"the checkpoint belongs to another configuration ({'; '.join(fatal)}); restore these"
            " values, or start a new run with another --tag"
        )
    return tunable


def _of_another_method(key: str, method: str) -> bool:
    sections = key.split(".")
    if len(sections) != 3 or sections[0] != "MODEL":
        return False
    return sections[1] not in (*COMMON_SECTIONS, method_section(method))


# ---- values --------------------------------------------------------------------------------------


def validate(tree: CfgNode, schema: Schema) -> None:
    """Refuse values that no run can use: ranges, choices, folder names."""
    for key in ("TAG", "NAME"):
        if not _NAME.fullmatch(tree[key]):
            raise ConfigError(
                f"{key}: {tree[key]!r} is no folder name; use letters, digits, '.', '_' and '-'"
            )
    for key, value in leaves(tree):
        _check_limits(key, value, schema[key])
    # each section of MODEL is a method's, but for that of the backbone
    methods = [name.lower() for name, node in tree.MODEL.items() if isinstance(node, CfgNode)]
    methods.remove("backbone")
    if tree.MODEL.NAME not in methods:
        raise ConfigError(f"MODEL.NAME: {tree.MODEL.NAME!r} is not one of {', '.join(methods)}")


def _check_limits(key: str, value: Value, limits: Limits) -> None:
    of_library = limits.library and str(value).startswith(limits.library)
    if limits.choices and value not in limits.choices and not of_library:
        raise ConfigError(f"{_named(key)}: {value!r} is not one of {', '.join(limits.spelled())}")
    entries = value if isinstance(value, list) else [value]
    fewest, most = limits.entries
    if isinstance(value, list) and not fewest <= len(value) <= most:
        wanted = fewest if fewest == most else f"{fewest} to {most}"
        raise ConfigError(f"{key}: {value} has {len(value)} entries; give {wanted}")
    low, high = limits.least, limits.most
    for number in entries:
        if isinstance(number, (int, float)) and not low <= number <= high:
            span = f"of at least {low:g}" if number < low else f"between {low:g} and {high:g}"
            raise ConfigError(f"{_named(key)}: {number} is out of range; use a value {span}")


def _named(key: str) -> str:
    """Return the key with the flag that sets it, where there is one."""
    flag = _flag_of(key)
    return f"{key} ({flag})" if flag else key


def _flag_of(key: str) -> str:
    section, _, name = key.partition(".")
    # the probes have other keys for these two flags
    key = f"TRAIN.{name}" if section in ("LINEAR", "FINETUNE") else key
    flags = {flag.key: name for name, flag in FLAGS.items() if flag.constant in (None, True)}
    return flags.get(key, "")


def _checked(
    pairs: Iterable[tuple[str, object]], source: str, known: Mapping[str, Key]
) -> Iterator[tuple[str, Value]]:
    """Coerce every value to its default's type; refuse what is no leaf."""
    for key, value in pairs:
        if key not in known:
            raise ConfigError(f"{source}: {_no_leaf(key, known)}")
        yield key, _coerce(known[key].default, value, key, source)


def _coerce(default: Value, value: object, key: str, source: str) -> Value:
    """Return the value in the type of the default; a whole number may be a float or a text."""
    # Python takes True for a 1
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not -_MAX_INT <= value < _MAX_INT:
            raise ConfigError(f"{source}: {key}: {str(value)[:40]} is not a finite 64-bit number")
        if isinstance(default, float):
            return float(value)
        if isinstance(default, str) and isinstance(value, int):
            return str(value)  # --opts TAG 42
    if isinstance(default, list) and isinstance(value, (list, tuple)):
        entry = default[0] if default else 0.0  # a list that may be empty is one of numbers
        return [_coerce(entry, item, key, source) for item in value]
    if type(value) is type(default):
        return cast(Value, value)
    raise ConfigError(
        f"{source}: {key}: {value!r} is a {type(value).__name__}; "
        f"give a {type(default).__name__} such as {default!r}"
    )


def _no_leaf(key: str, known: Mapping[str, Key]) -> str:
    for task, model in (("detection", "RCNN"), ("segmentation", "SEGMENTER")):
        own = any(name.startswith(f"{task.upper()}.") for name in known)
        if key.startswith((f"{task.upper()}.", f"MODEL.{model}.")) and not own:
            return f"{key} is a key of {task}; use {task}/main_{task}.py with this --cfg"
    inside = next((name for name in known if name.startswith(f"{key}.")), None)
    if inside:
        return f"{key} is a section; set a key of it, e.g. {inside}"
    close = difflib.get_close_matches(key.upper(), known, n=2, cutoff=0.5)
    if not close:  # the right name in the wrong section
        leaf = key.rpartition(".")[2].upper()
        close = [name for name in known if name.rpartition(".")[2] == leaf][:2]
    if not close:
        return f"there is no key {key!r}; see utils/config/schema.py for all keys"
    return f"there is no key {key!r}; did you mean {' or '.join(close)}?"


def _set(tree: CfgNode, key: str, value: Value) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[name] = value


def _nested(tree: CfgNode) -> dict[str, object]:
    return {
        key: _nested(value) if isinstance(value, CfgNode) else plain(value)
        for key, value in tree.items()
    }


# ---- files ---------------------------------------------------------------------------------------


def _read_chain(
    file: Path, seen: tuple[Path, ...] = (), count: Iterator[int] | None = None
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (file name, values) of the bases first, then of the file; `count` numbers the reads."""
    count = count or itertools.count(1)
    if next(count) > _MAX_FILES:
        raise ConfigError(f"{file}: more than {_MAX_FILES} {BASE_KEY} files are read; flatten them")
    try:
        values = translated(_read_yaml(file), file)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # by its real path: a link is no way out of a cycle
    path = file.resolve()
    if path in seen:
        raise ConfigError(f"{file}: {BASE_KEY} comes back to {path.name}; remove the cycle")
    bases = values.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{file}: {BASE_KEY} must be a path or a list of paths, not {bases!r}")
    for base in bases:
        yield from _read_chain(file.parent / base, (*seen, path), count)
    yield str(file), values


def _read_yaml(file: Path) -> dict[str, object]:
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file}: a configuration is a .yaml file, and none is executed")
    try:
        text = read_bytes(file, _MAX_BYTES).decode()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        remedy = f"check the path of --cfg or {BASE_KEY}"
        if isinstance(error, FileNotFoundError):
            recipes = {path.name: path for path in _RECIPES.rglob("*.yaml")}
            near = difflib.get_close_matches(file.name, recipes, n=1, cutoff=0.6)
            meant = f"did you mean {os.path.relpath(recipes[near[0]])}? " if near else ""
            remedy = f"{meant}--list recipes shows all"
        raise ConfigError(f"{file}: cannot be read ({error}); {remedy}") from error
    return _parse_yaml(text, str(file))


def _flatten(
    values: Mapping[str, object],
    source: str,
    known: Mapping[str, Key] | None = None,
    prefix: str = "",
) -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value); refuse a key that is given twice, dotted and nested."""
    seen: set[str] = set()
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        pairs: Iterable[tuple[str, object]] = [(dotted, value)]
        if isinstance(value, Mapping) and (value or (known and _is_section(dotted, known))):
            pairs = _flatten(value, source, known, f"{dotted}.")
        for leaf, item in pairs:
            if leaf in seen:
                raise ConfigError(f"{source}: duplicate key {leaf!r}; remove one")
            seen.add(leaf)
            yield leaf, item


def _is_section(key: str, known: Mapping[str, Key]) -> bool:
    return any(name.startswith(f"{key}.") for name in known)


def _parse_yaml(text: str, source: str) -> dict[str, object]:
    try:
        values = strict_yaml.load(text)
    except ValueError as error:
        raise ConfigError(f"{source}: is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: holds a {type(values).__name__}, not KEY: value lines")
    return values


def _parse_scalar(text: str, key: str) -> object:
    try:
        return strict_yaml.load(text)
    except ValueError as error:
        raise ConfigError(f"--opts: {key}: {text!r} is no value: {error}") from error
