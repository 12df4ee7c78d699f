"""The options of the methods, read from the signatures in `models/` without importing torch.

`queue_size: Count = 65536` in the signature of a class declares the option. The text of the
signature is read, so an answer that needs no torch does not wait seconds for it.
"""

import ast
import functools
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils.config import key
from utils.config.key import Key, Limits

_ROOT = Path(__file__).resolve().parents[2]
_METHODS = "models/__init__.py"


@functools.cache
def method_options() -> dict[str, dict[str, Key]]:
    """Return the options (name -> declaration) of each method; see `options_of`."""
    return options_of(_classes())


def options_of(classes: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Key]]:
    """Return the options (name -> declaration) of methods, each the (file, name) of a class.

    They become the sections `MODEL.<METHOD>`. The section `batchformer` is that of the module,
    which any method may hold. The method of that name has the options of MoCo v3.
    """
    sections = {name: dict(_options(file, found)) for name, (file, found) in classes.items()}
    attention = dict(_options("models/parts/batchformer.py", "BatchFormer"))
    return {**sections, "batchformer": {"enabled": Key(False), **attention}}


def method_titles() -> dict[str, str]:
    """Return the first line of the module of each method: its name, authors and paper."""
    return {
        name: (ast.get_docstring(_module(file)) or "").partition("\n")[0]
        for name, (file, _) in _classes().items()
    }


def backbone_names() -> list[str]:
    """Return the names of the backbones that have a short name here."""
    # Their text is read too: to import these modules would import torch and timm.
    places = (
        ("models/parts/backbones.py", "_RESNETS"),
        ("models/parts/backbones.py", "TIMM_NAMES"),
        ("models/parts/mocov3_vit.py", "MOCOV3_VITS"),
    )
    names = []
    for file, name in places:
        found = _constant(file, name)
        assert isinstance(found, (ast.Dict, ast.Tuple))
        texts = found.keys if isinstance(found, ast.Dict) else found.elts
        names += [text.value for text in texts if isinstance(text, ast.Constant)]
    return [str(name) for name in names]


def _classes() -> dict[str, tuple[str, str]]:
    """Return the file and the name of the class of each method."""
    registry = _constant(_METHODS, "FRAMEWORKS")
    assert isinstance(registry, ast.Dict)
    classes = {}
    for name, found in zip(registry.keys, registry.values, strict=True):
        assert isinstance(name, ast.Constant)
        assert isinstance(found, ast.Name)
        classes[str(name.value)] = (_imported(_METHODS, found.id), found.id)
    return classes


def _options(file: str, name: str) -> Iterator[tuple[str, Key]]:
    """Yield the keyword-only parameters of a class. `**rest`: those of its base too."""
    found = next(
        node for node in _module(file).body if isinstance(node, ast.ClassDef) and node.name == name
    )
    start = next(
        (
            node
            for node in found.body
            if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        ),
        None,
    )
    # `**moco` in a signature hands the options of the base class on.
    if start is None or start.args.kwarg:
        base = ast.unparse(found.bases[0])
        yield from _options(_imported(file, base), base)
    if start is None:
        return
    for parameter, default in zip(start.args.kwonlyargs, start.args.kw_defaults, strict=True):
        assert default is not None, f"{file}: {name}: {parameter.arg} has no default"
        value = ast.literal_eval(default)
        value = list(value) if isinstance(value, tuple) else value  # as yaml has it
        limits = _limits(file, parameter.annotation)
        yield parameter.arg, Key(value, programs=("pretrain",), **vars(limits))


def _limits(file: str, annotation: ast.expr | None) -> Limits:
    """Return what `Count` or `Annotated[str, Limits(choices=TASKS)]` allows."""
    if isinstance(annotation, ast.Name):
        # An alias of utils/config/key.py, such as `Count`.
        alias = getattr(key, annotation.id, None)
        return next((e for e in typing.get_args(alias) if isinstance(e, Limits)), Limits())
    if not isinstance(annotation, ast.Subscript) or ast.unparse(annotation.value) != "Annotated":
        return Limits()
    assert isinstance(annotation.slice, ast.Tuple)
    call = annotation.slice.elts[1]
    assert isinstance(call, ast.Call)
    given = {}
    for keyword in call.keywords:
        value = keyword.value
        if isinstance(value, ast.Name):
            # The choices may be a constant of the same file.
            value = _constant(file, value.id)
        given[str(keyword.arg)] = ast.literal_eval(value)
    return Limits(**given)


@functools.cache
def _module(file: str) -> ast.Module:
    return ast.parse((_ROOT / file).read_text(encoding="utf-8"))


def _constant(file: str, name: str) -> ast.expr:
    for node in _module(file).body:
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        elif isinstance(node, ast.AnnAssign):
            target = node.target
        else:
            continue
        if node.value is not None and ast.unparse(target) == name:
            return node.value
    raise LookupError(f"{file} does not assign {name}")


def _imported(file: str, name: str) -> str:
    """Return the file of the module from which `file` imports `name`."""
    for node in _module(file).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return f"{str(node.module).replace('.', '/')}.py"
    raise LookupError(f"{file} does not import {name}")
