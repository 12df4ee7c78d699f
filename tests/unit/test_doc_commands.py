"""Every command of README and docs is known: its program, its flags, its recipe and its keys."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

from detection.defaults import load_detection_config
from models import framework_options
from segmentation.defaults import load_segmentation_config
from tests.unit.test_docs import FOREIGN, PAGES, ROOT
from utils.cli import add_which, make_parser, parse
from utils.config.load import load_config
from utils.config.schema import declare

RUN = "--cfg configs/moby_swin_tiny.yaml --data-path D --output O --tag T"
MAINS = ("main_pretrain.py", "main_linear.py", "main_semisup.py")
TRANSFER = {
    "detection/main_detection.py": (load_detection_config, "detection/configs/mini_bccd.yaml"),
    "segmentation/main_segmentation.py": (
        load_segmentation_config,
        "segmentation/configs/mini_pets.yaml",
    ),
}
# Detectron2's program has other flags, the demo passes its flags on.
UNPARSED = (
    "detection/train_net.py",
    "detection/convert_to_detectron2.py",
    "tests/reliability/driver.py",
    "tools/demo.py",
)


def commands(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks, and those that stand in backticks."""
    text, found = page.read_text(), []
    for block in re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL):
        # what stands between <<'END' and END is a script, not a command
        block = re.sub(r"^python - <<'(\w+)'.*?^\1$", "", block, flags=re.DOTALL | re.MULTILINE)
        found += [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    if page.relative_to(ROOT).as_posix() in FOREIGN:
        # What stands in the first column of a migration page is a foreign command.
        rows = [line for line in text.splitlines() if line.startswith("| ")]
        text = "\n".join(row.split("|", 2)[2] for row in rows)
    found += re.findall(r"`((?:[A-Z_]+=\S+ )*(?:torchrun|python|make|bash) [^`]+)`", text)
    return [" ".join(line.split("  #")[0].split()) for line in found]


def words_of(line: str) -> list[str]:
    words = shlex.split(re.sub(r"\s\.\.\.", "", line.replace("--cfg ...", "--cfg FILE")))
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    for start, word in enumerate(words):
        if word.endswith(".py"):
            words = words[start:]
            break
    expanded: list[str] = []
    for word in words:
        expanded += shlex.split(RUN) if word == "C" else [word]
    # `--cfg FILE` of a page is any recipe.
    return [
        "configs/moby_swin_tiny.yaml"
        if expanded[i - 1] == "--cfg" and word in ("FILE", "C")
        else word
        for i, word in enumerate(expanded)
    ]


def parse_program(program: str, words: list[str]) -> None:
    """Parse the words as the program does, and load the configuration that they name."""
    assert (ROOT / program).is_file(), program
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    if program == "tools/sweep.py":
        words = words[: words.index("--")] if "--" in words else words
    if hasattr(module, "_parser"):
        parser = module._parser()
    else:  # detection, which builds it in its main
        parser = make_parser(module.__doc__)
        parser.add_argument("--pretrained")
        add_which(parser)
    if program not in MAINS and program not in TRANSFER:
        parser.parse_args(words)
        return
    try:
        args, flags = parse(parser, words)
    except SystemExit as end:  # --list and --version answer and stop
        if end.code == 0:
            return
        raise AssertionError(words) from end
    if program in MAINS:
        load_config(declare(framework_options()), [args.cfg], args.opts, flags)
    else:
        # A page of a task without a recipe means any.
        load, any_recipe = TRANSFER[program]
        room = program.partition("/")[0]
        load([args.cfg if f"{room}/" in args.cfg else any_recipe], args.opts, flags)


CASES = sorted(
    {
        (page.relative_to(ROOT).as_posix(), line)
        for page in [*PAGES, ROOT / "detection/README.md", ROOT / "segmentation/README.md"]
        for line in commands(page)
        if re.match(r"(?:[A-Z_]+=\S* )*(?:python|torchrun|make|bash|sbatch) ", line)
    }
)


@pytest.mark.parametrize(("page", "line"), CASES)
def test_a_command_of_a_page_is_understood(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = words_of(line)
    if words[:2] == ["python", "-c"]:
        compile(words[2], line, "exec")
    elif words[0] == "sbatch":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[:3] == ["python", "-m", "benchmarks"]:
        # its parser knows the options of the command that stands on the command line
        with mock.patch.object(sys, "argv", words):
            importlib.import_module("benchmarks.__main__")._parser().parse_args(words[3:])
    elif words[0].endswith(".py"):
        if words[0] in UNPARSED:
            assert (ROOT / words[0]).is_file()
        else:
            parse_program(words[0], words[1:])
    else:
        assert words[:3] in (
            ["python", "-m", "pytest"],
            ["python", "-m", "torch.distributed.launch"],
        ), line


def test_there_are_commands_to_check_and_wrong_ones_are_noticed() -> None:
    assert len(CASES) > 60
    for line in (
        "main_pretrain.py C --learning-speed 3",
        "main_pretrain.py C --opts OPTIM.BASE_LRR 3",
    ):
        program, *words = words_of(line)
        with pytest.raises((AssertionError, ValueError)):
            parse_program(program, words)
