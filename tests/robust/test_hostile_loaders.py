"""Twelve hostile files through every command that opens a checkpoint: refused, and nothing is executed."""

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch
from figures import figure
from test_foreign import hostile, write


def pretraining(file: Path, root: Path, tag: str) -> list[str]:
    return runs.arguments("moby", root, tag, "--resume", str(file))


def resuming(file: Path, root: Path, tag: str) -> list[str]:
    """Put the file into the run's folder as a checkpoint that has its record."""
    from utils.checkpoints import file as checkpoint

    folder = root / "moby" / tag
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "ckpt_00000003.pt"
    content = file.read_bytes()
    target.write_bytes(content)
    save = torch.save
    torch.save = lambda _state, stream: stream.write(content)  # our own writer seals the record
    try:
        checkpoint.save(folder, 3, {}, meta={})
    finally:
        torch.save = save
    assert target.read_bytes() == content
    return runs.arguments("moby", root, tag)


def probing(file: Path, root: Path, tag: str) -> list[str]:
    return runs.arguments("moby", root, tag, "--pretrained", str(file))


def probe_resuming(file: Path, root: Path, tag: str) -> list[str]:
    from models.parts.backbones import build_backbone

    torch.save(build_backbone("resnet8").state_dict(), root / "honest.pt")
    return runs.arguments(
        "moby", root, tag, "--pretrained", str(root / "honest.pt"), "--resume", str(file)
    )


def finetune_resuming(file: Path, root: Path, tag: str) -> list[str]:
    return runs.arguments("moby", root, tag, "--pretrained", "none", "--resume", str(file))


def evaluating(file: Path, root: Path, tag: str) -> list[str]:
    return runs.arguments("moby", root, tag, "--resume", str(file), "--eval")


def frozen(file: Path, root: Path, tag: str) -> list[str]:
    return runs.arguments("moby", root, tag, "--pretrained", str(file), DATA__PATH=str(root))


def detecting(file: Path, root: Path, tag: str, flag: str = "--pretrained") -> list[str]:
    sys.path.insert(0, str(forked.ROOT / "tests" / "detection"))
    import shapes

    data = root / "voc"
    if not data.exists():
        shapes.voc(data)
    keys = {"DATA__DATASET": "voc", "DETECTION__CLASSES": ",".join(shapes.CLASSES)}
    keys |= {"DETECTION__TRAIN_SPLIT": "2007_trainval", "DETECTION__TEST_SPLIT": "2007_test"}
    weights = (
        [flag, str(file)] if flag == "--pretrained" else ["--pretrained", "none", flag, str(file)]
    )
    place = ["--data-path", str(data), "--output", str(root), "--tag", tag, "--device", "cpu"]
    return [*place, *weights, "--batch-size", "2", "--opts", *shapes.opts(**keys)]


def replaying(file: Path, root: Path, tag: str) -> list[str]:
    return ["--replay", str(file), "--device", "cpu"]


def converting(file: Path, root: Path, tag: str, command: str) -> list[str]:
    (root / "run.yaml").write_text("MODEL: {NAME: moby, BACKBONE: {NAME: resnet8}}\n")
    form = ["--to", "torchvision"] if command == "export" else []
    return [
        command,
        str(file),
        "--cfg",
        str(root / "run.yaml"),
        *form,
        "--output",
        str(root / "out.pt"),
    ]


def ground_truth(file: Path, root: Path, tag: str) -> list[str]:
    (root / tag).mkdir(exist_ok=True)
    (root / tag / f"gnd_{tag}.pkl").write_bytes(file.read_bytes())
    return runs.arguments(
        "moby", root, tag, "--pretrained", "none", "--sets", tag, DATA__PATH=str(root)
    )


# the command, the arguments that lead it to the file
LOADERS: dict[str, tuple[str, Callable[[Path, Path, str], list[str]]]] = {
    "main_pretrain --resume": ("main_pretrain", pretraining),
    "main_pretrain, a sealed file in the run's folder": ("main_pretrain", resuming),
    "main_pretrain --resume --eval": ("main_pretrain", evaluating),
    "main_pretrain --replay": ("main_pretrain", replaying),
    "main_linear --pretrained": ("main_linear", probing),
    "main_linear --resume": ("main_linear", probe_resuming),
    "main_semisup --pretrained": ("main_semisup", probing),
    "main_semisup --resume": ("main_semisup", finetune_resuming),
    "tools/convert inspect": ("tools.convert", lambda file, root, tag: ["inspect", str(file)]),
    "tools/convert import": ("tools.convert", partial(converting, command="import")),
    "tools/convert export": ("tools.convert", partial(converting, command="export")),
    "tools/compare_checkpoints": (
        "tools.compare_checkpoints",
        lambda file, root, tag: [str(file), str(file)],
    ),
    "tools/propagate --pretrained": ("tools.propagate", frozen),
    "tools/retrieval --pretrained": ("tools.retrieval", frozen),
    "tools/retrieval, ground truth": ("tools.retrieval", ground_truth),
    "detection/main_detection --pretrained": ("detection.main_detection", detecting),
    "detection/main_detection --resume": (
        "detection.main_detection",
        partial(detecting, flag="--resume"),
    ),
    "detection/convert_to_detectron2": (
        "detection.convert_to_detectron2",
        lambda file, root, tag: [str(file), str(root / "out.pkl")],
    ),
}


def try_all(name: str, root: str, result: str) -> None:
    """Lead a command to each hostile file; write what it said, and which files were executed."""
    torch.set_num_threads(1)
    place = Path(root)
    canary = place / "executed"
    main, arguments = LOADERS[name]
    module = importlib.import_module(main)
    said: dict[str, str] = {}
    executed = []
    for number, (payload, content) in enumerate(hostile(canary).items()):
        for form in ("zip", "legacy"):
            file = place / f"hostile{number}{form}.pth"
            # a Python object where each reader looks: at the top and beside the weights
            write(form, {"model": {"w": torch.ones(2)}, "state_dict": {}, "config": content}, file)
            tag = f"t{number}{form}"
            sys.argv = [f"{main}.py", *arguments(file, place, tag)]
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    code = module.main()
                said[f"{payload}, {form}"] = f"accepted ({code})"
            except SystemExit as error:
                said[f"{payload}, {form}"] = f"exit {error.code}"
            except ValueError as error:
                named = (
                    file.name in str(error) or "ckpt_00000003" in str(error) or "gnd_" in str(error)
                )
                said[f"{payload}, {form}"] = "refused" if named else f"another reason: {error}"
            if canary.exists():
                executed.append(payload)
                canary.unlink()
    Path(result).write_text(json.dumps({"said": said, "executed": executed}))


@pytest.mark.parametrize("name", LOADERS)
def test_no_command_executes_a_hostile_file(name: str, tmp_path: Path) -> None:
    if "--replay" in name and "--replay" not in Path("main_pretrain.py").read_text():
        pytest.skip("no --replay yet")
    result = tmp_path / "result.json"
    process = forked.context().Process(target=try_all, args=(name, str(tmp_path), str(result)))
    process.start()
    process.join(forked.LIMIT)
    assert process.exitcode == 0
    found: dict[str, Any] = json.loads(result.read_text())
    figure(
        "executed / files, of each command", f"{len(found['executed'])}/{len(found['said'])} {name}"
    )
    assert found["executed"] == []
    # and by name: the file was reached
    assert set(found["said"].values()) == {"refused"}, found["said"]
    assert len(found["said"]) == 24
