"""The house rules that a reader would otherwise have to trust."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("models", "data", "engine", "evaluation", "utils")
ROOMS = (*LIBRARY, "pretraining", "tools", "benchmarks", "detection", "segmentation")
PRODUCT = [
    path
    for pattern in ("*.py", *(f"{room}/**/*.py" for room in ROOMS))
    for path in sorted(ROOT.glob(pattern))
]
PROGRAMS = {"pretraining", "tools", "benchmarks", "detection", "segmentation"}
FORBIDDEN_ROOMS = {
    "utils": {"models", "data", "engine", "evaluation"} | PROGRAMS,
    "data": {"models", "engine", "evaluation"} | PROGRAMS,
    "models": {"data", "engine", "evaluation"} | PROGRAMS,
    "engine": {"models", "data", "evaluation"} | PROGRAMS,
    "evaluation": {"models", "data"} | PROGRAMS,
    "tools": {"pretraining", "detection", "segmentation", "benchmarks"},
    "detection": {"pretraining", "tools", "benchmarks", "segmentation"},
    "segmentation": {"pretraining", "tools", "benchmarks", "detection"},
    "benchmarks": set(),
}
FORBIDDEN_FILES = {"tools", "benchmarks"}  # of the main programs and their parts
ALLOWED_UTILS = {
    "data": {
        "utils.batch",
        "utils.config.datasets",
        "utils.distributed",
        "utils.randomness",
        "utils.checkpoints.atomic",
        "utils.reading",
        "utils.limits",
    },
    "models": {
        "utils.distributed",
        "utils.randomness",
        "utils.schedules",
        "utils.config.key",
        "utils.config.methods",
        "utils.config.sections",
        "utils.checkpoints.foreign",
    },
}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def wrong_imports(room: str, tree: ast.AST) -> list[str]:
    wrong = []
    for name in imports(tree):
        head = name.split(".")[0]
        outside_utils = head == "utils" and not any(
            name.startswith(a) for a in ALLOWED_UTILS.get(room, {"utils"})
        )
        if head in FORBIDDEN_ROOMS.get(room, FORBIDDEN_FILES) or outside_utils:
            wrong.append(name)
    return wrong


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return which of the modules each module imports, anywhere in it and for types only too."""
    graph = {}
    for module, source in sources.items():
        found = set()
        for name in imports(ast.parse(source)):
            # `from data import loader` names a module, `from data.loader import Batch` a part of it
            target = name if name in sources else name.rpartition(".")[0]
            found |= {target} & sources.keys() - {module}
        graph[module] = found
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import each other in a circle, or wait for such; [] if there are none."""
    left = dict(graph)
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def unsafe_calls(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        literal = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name == "torch.load" and literal.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        strict = any(
            ast.unparse(k.value) == "_StrictLoader" for k in node.keywords if k.arg == "Loader"
        )
        if name == "yaml.load" and not strict:
            found.append("yaml.load with a loader that may build objects")
        if name in (
            "eval",
            "exec",
            "pickle.load",
            "pickle.loads",
            "yaml.unsafe_load",
            "yaml.full_load",
        ):
            found.append(name)
        if name.endswith("Image.open") and not any(k.arg == "formats" for k in node.keywords):
            found.append("Image.open without formats: an EPS would start Ghostscript")
        if name.endswith(".cuda"):
            found.append(f"{name}(): the device is a variable")
        if name == "extractall" or name.endswith(".extractall"):
            found.append("extractall may write outside its target")
    return found


def prints(tree: ast.AST) -> list[int]:
    return [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"
    ]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_rules(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    room = path.relative_to(ROOT).parts[0]
    assert wrong_imports(room, tree) == []
    assert unsafe_calls(tree) == []
    # their output is their result; the rest uses the logger
    if room not in ("tools", "benchmarks"):
        assert prints(tree) == []
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 360, (
        "split it: a file is read in one go"
    )


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("utils", "from models import build_framework", ["models.build_framework"]),
        ("data", "from utils.config.load import x", ["utils.config.load.x"]),
        ("data", "from utils import distributed", []),
        ("models", "from utils.schedules import Progress", []),
        ("models", "import engine.loop", ["engine.loop"]),
        ("engine", "from utils.batch import Batch", []),
        ("engine", "from data.loader import GlobalLoader", ["data.loader.GlobalLoader"]),
        ("main_pretrain.py", "from tools.parts import a", ["tools.parts.a"]),
    ],
)
def test_the_import_rule_can_fail(room: str, source: str, expected: list[str]) -> None:
    assert wrong_imports(room, ast.parse(source)) == expected


def test_no_folder_is_too_full_to_read() -> None:
    rooms = [path.parent for path in PRODUCT if path.name != "__init__.py"]
    full = {folder.name: rooms.count(folder) for folder in rooms if rooms.count(folder) > 11}
    assert full == {}


def test_no_files_import_each_other_in_a_circle() -> None:
    names = (path.relative_to(ROOT).with_suffix("").parts for path in PRODUCT)
    modules = [".".join(name[:-1] if name[-1] == "__init__" else name) for name in names]
    texts = [path.read_text(encoding="utf-8") for path in PRODUCT]
    assert circle(import_graph(dict(zip(modules, texts, strict=True)))) == []


def test_the_rule_of_circles_can_fail() -> None:
    sources = {
        "data.a": "def f():\n    from data.b import g",
        "data.b": "from data import c",
        "data.c": "if TYPE_CHECKING:\n    from data.a import f",
        "data.d": "import numpy",
    }
    assert circle(import_graph(sources)) == ["data.a", "data.b", "data.c"]
    assert circle(import_graph({**sources, "data.c": "from data.d import x"})) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "eval(x)",
        "pickle.loads(b)",
        "x.cuda()",
        "yaml.load(t)",
        "Image.open(f)",
    ],
)
def test_the_safety_rule_can_fail(source: str) -> None:
    assert len(unsafe_calls(ast.parse(source))) == 1


def test_mains_are_not_copies_of_each_other() -> None:
    """Less than a fifth of the smaller main in runs of four lines shared with another."""
    texts = {
        path.name: [line.strip() for line in path.read_text().splitlines() if len(line.strip()) > 3]
        for path in ROOT.glob("main_*.py")
    }
    assert len(texts) >= 2
    for name, lines in texts.items():
        for other, theirs in texts.items():
            if name < other:
                runs = {tuple(theirs[i : i + 4]) for i in range(len(theirs) - 3)}
                shared = {
                    j
                    for i in range(len(lines) - 3)
                    if tuple(lines[i : i + 4]) in runs
                    for j in range(i, i + 4)
                }
                assert len(shared) <= 0.2 * min(len(lines), len(theirs)), (name, other)
