"""tools/convert.py: what is imported can be given to --pretrained, and comes out again bit by bit."""

import contextlib
import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from yacs.config import CfgNode

from models import pretrained_backbone
from models.parts.backbones import build_backbone
from models.weights.find import find_network
from models.weights.load import load_backbone
from tools import compare_checkpoints, convert
from tools.parts.export_hints import loading, pixels_note
from utils.checkpoints import file as checkpoint
from utils.checkpoints.foreign import read_pickle, read_torch
from utils.config.load import load_config, to_yaml
from utils.config.schema import declare

ROOT = Path(__file__).resolve().parents[2]
State = dict[str, Tensor]
YAML = "MODEL: {{NAME: moco_v2, BACKBONE: {{NAME: {name}}}}}\nDATA: {{IMG_SIZE: {size}}}\n"


def yaml_file(
    folder: Path, name: str = "resnet18", size: int = 64, method: str = "moco_v2", extra: str = ""
) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(YAML.format(method=method, name=name, size=size) + extra)
    return path


def run(*arguments: Any) -> None:
    args = convert.parse_args([str(argument) for argument in arguments])
    {"inspect": convert.inspect_file, "import": convert.import_file, "export": convert.export_file}[
        args.command
    ](args)


def fresh(name: str, size: int) -> Any:
    return shaken(build_backbone(name, img_size=size))


def shaken(backbone: Any) -> Any:
    backbone.eval()
    for key, tensor in backbone.state_dict().items():
        if tensor.is_floating_point():
            tensor += 0.02 * torch.rand_like(tensor)
        elif key.endswith("num_batches_tracked"):
            tensor += 5
    return backbone


def imported(path: Path) -> State:
    return find_network(read_torch(path)).state


def contents(path: Path) -> Any:
    return read_torch(path)


def identical(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


FORMATS = {
    "resnet18": ("timm", "torchvision", "detectron2", "mmdet", "huggingface", "moco", "plain"),
    "deit_tiny": ("timm", "torchvision", "huggingface", "plain"),
    "swin_tiny": ("timm", "torchvision", "mmdet", "swin", "huggingface"),
}


def small(name: str, **_: Any) -> Any:
    """Build a small network of the family of ``name``; real ones take seconds each."""
    if name == "deit_tiny":
        return VisionTransformer(img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    swin: dict[str, Any] = {
        "img_size": 64,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "num_heads": (1, 2, 4, 8),
    }
    return (
        ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0)
        if name == "resnet18"
        else SwinTransformer(**swin, num_classes=0)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_out_and_in_again_is_bit_identical_in_every_layout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "online_backbone", lambda cfg: small(cfg.MODEL.BACKBONE.NAME))
    cfg = yaml_file(tmp_path, name)
    original = shaken(small(name))
    torch.save({"state_dict": original.state_dict()}, tmp_path / "a.pth")
    run("import", tmp_path / "a.pth", "--cfg", cfg, "--output", tmp_path / "ours.pt")
    identical(imported(tmp_path / "ours.pt"), original.state_dict())
    first = (tmp_path / "ours.pt").read_bytes()
    for to in FORMATS[name]:
        out = tmp_path / f"out_{to}"
        run("export", tmp_path / "ours.pt", "--cfg", cfg, "--to", to, "--output", out)
        run("import", out, "--cfg", cfg, "--output", tmp_path / "again.pt")
        identical(imported(tmp_path / "again.pt"), original.state_dict())
    assert (tmp_path / "ours.pt").read_bytes() == first


def test_what_the_timm_export_says_is_true(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = yaml_file(tmp_path, "vit_small", 32)
    original = fresh("vit_small", 32)
    torch.save(original.state_dict(), tmp_path / "a.pth")
    run("export", tmp_path / "a.pth", "--cfg", cfg, "--to", "timm", "--output", tmp_path / "b.pth")
    hint = "timm.create_model('vit_small_patch16_224', num_classes=0, num_heads=12, img_size=32)"
    assert hint in capsys.readouterr().out
    model = timm.create_model(
        "vit_small_patch16_224", num_classes=0, num_heads=12, img_size=32
    ).eval()
    model.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), original(images), rtol=0, atol=1e-5)


def test_moby_with_its_pickled_configuration_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = fresh("deit_tiny", 32).state_dict()
    other = {key: torch.zeros_like(tensor) for key, tensor in original.items()}
    model = {f"encoder.{key}": t for key, t in original.items()} | {
        f"encoder_k.{key}": t for key, t in other.items()
    }
    model |= {"queue1": torch.ones(256, 64), "projector.linear_out.bias": torch.ones(2)}
    torch.save({"model": model, "config": CfgNode({"A": 1}), "epoch": 299}, tmp_path / "moby.pth")
    cfg = yaml_file(tmp_path, "deit_tiny", 32)
    run("import", tmp_path / "moby.pth", "--cfg", cfg, "--output", tmp_path / "a.pt")
    out = capsys.readouterr().out
    assert "from model.encoder; took online, the file also holds: target (--which target)\n" in out
    assert "\nmatched: 150\nmissing: none\nleft out: projector, queue1\n" in out
    identical(imported(tmp_path / "a.pt"), original)
    run(
        "import",
        tmp_path / "moby.pth",
        "--cfg",
        cfg,
        "--output",
        tmp_path / "b.pt",
        "--which",
        "target",
    )
    identical(imported(tmp_path / "b.pt"), other)
    run("inspect", tmp_path / "moby.pth")
    out = capsys.readouterr().out
    assert "queue1 (256, 64)" in out
    assert "ViT, width 192, 12 blocks, 3 heads by its learned positions (5)" in out


@pytest.mark.parametrize("to", ["timm", "swin"])
def test_the_eps_of_norms_comes_in_and_goes_out(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SynCo-v2's Swin: 1e-6 in every norm but norm2. The features stay the original's."""
    original = fresh("swin_tiny", 32)
    own_eps(original)
    recipe = [ROOT / "configs/synco_v2_swin_tiny.yaml", "--opts", "DATA.IMG_SIZE", "32"]
    torch.save({"model": prefixed("encoder.", original.state_dict())}, tmp_path / "theirs.pth")
    run("import", tmp_path / "theirs.pth", "--cfg", *recipe, "--output", tmp_path / "ours.pt")
    cfg = load_config(declare(convert_options()), [recipe[0]], ["DATA.IMG_SIZE", "32"], {})
    images = 0.01 * torch.randn(2, 3, 32, 32)  # of little variance, so that eps shows
    with torch.no_grad():
        backbone, _ = pretrained_backbone(cfg, tmp_path / "ours.pt", drop_path=0.0)
        assert torch.equal(backbone.eval()(images), original(images))
        cfg.defrost()
        cfg.MODEL.BACKBONE.NORM_EPS = 0.0
        with pytest.raises(
            ValueError, match=r"NORM_EPS: 0.0, but .*ours.pt was imported with 1e-06; add"
        ):
            pretrained_backbone(cfg, tmp_path / "ours.pt")
        out = tmp_path / "out.pth"
        capsys.readouterr()
        run("export", tmp_path / "ours.pt", "--cfg", *recipe, "--to", to, "--output", out)
        assert (
            "set eps to 1e-06 in every layer norm but those before the MLPs"
            in capsys.readouterr().out
        )
        plain = yaml_file(tmp_path, "swin_tiny", 32)
        with pytest.raises(ValueError, match="was imported with 1e-06"):
            run("export", tmp_path / "ours.pt", "--cfg", plain, "--to", to, "--output", out)
        again = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=32).eval()
        load_backbone(again, imported(out), "out.pth")
        assert not torch.equal(again(images), original(images))
        own_eps(again)  # what the export said
        assert torch.equal(again(images), original(images))


@torch.no_grad()
def test_a_transformers_swin_gets_the_eps_by_the_exported_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration has one eps for all blocks, and no layer but them follows it."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    original = shaken(small("swin_tiny"))
    own_eps(original)
    monkeypatch.setattr(convert, "online_backbone", lambda _: copy.deepcopy(original))
    torch.save({"state_dict": original.state_dict()}, tmp_path / "a.pth")
    cfg = yaml_file(tmp_path, "swin_tiny")
    eps = ("--opts", "MODEL.BACKBONE.NORM_EPS", "1e-6")
    out = tmp_path / "folder"
    run("export", tmp_path / "a.pth", "--cfg", cfg, *eps, "--to", "huggingface", "--output", out)
    assert "| layer norms | eps 1e-06, but before the MLPs" in (out / "README.md").read_text()
    model = transformers.AutoModel.from_pretrained(out).eval()
    for path, part in model.named_modules():
        if isinstance(part, torch.nn.LayerNorm) and not path.endswith("layernorm_after"):
            part.eps = 1e-6
    images = 0.01 * torch.randn(2, 3, 64, 64)
    found, expected = model(images).pooler_output, original(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def own_eps(swin: Any) -> None:
    """Set the eps of SynCo-v2's code in place."""
    for path, part in swin.named_modules():
        if isinstance(part, torch.nn.LayerNorm) and not path.endswith("norm2"):
            part.eps = 1e-6


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def our_run(folder: Path, extra: str = "TRAIN: {EPOCHS: 7}\n") -> Path:
    """Write what a pretraining run leaves: a configuration and a committed checkpoint of MoCo v2."""
    path = yaml_file(folder, extra=extra)
    cfg = load_config(declare(convert_options()), [path], [], {})
    run_folder = folder / "run"
    run_folder.mkdir()
    (run_folder / "config.yaml").write_text(to_yaml(cfg))
    online = fresh("resnet18", 64).state_dict()
    state = {f"online.backbone.{key}": tensor for key, tensor in online.items()}
    state |= {f"target.backbone.{key}": tensor + 1 for key, tensor in online.items()}
    for side in ("online", "target"):
        state |= {f"{side}.projector.{i}.weight": torch.ones(2, 2) for i in (0, 2)}
        state |= {f"{side}.projector.{i}.bias": torch.ones(2) for i in (0, 2)}
    checkpoint.save(run_folder, 42, {"framework": state, "step": 42, "global_batch": 64}, meta={})
    return run_folder


def convert_options() -> dict:
    from models import framework_options

    return framework_options()


def test_a_run_is_exported_with_its_own_configuration(tmp_path: Path) -> None:
    folder = our_run(tmp_path)
    run("export", folder, "--to", "detectron2", "--output", tmp_path / "d2.pkl")
    content = read_pickle(tmp_path / "d2.pkl")
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    assert len(content["model"]) == 120 + 4  # ResNet-18 and MoCo's head
    assert {"stem.fc.0.weight", "stem.fc.2.bias"} <= content["model"].keys()
    assert all(type(value) is np.ndarray for value in content["model"].values())
    pickle.loads((tmp_path / "d2.pkl").read_bytes())  # Detectron2 does just this
    run("export", folder, "--to", "plain", "--output", tmp_path / "t.pth", "--which", "target")
    online = contents(folder / "ckpt_00000042.pt")["framework"]
    exported = torch.load(tmp_path / "t.pth", weights_only=True)
    assert torch.equal(exported["conv1.weight"], online["target.backbone.conv1.weight"])


def test_export_takes_what_the_original_evaluates_or_the_network_that_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = yaml_file(tmp_path, "deit_tiny", 32)
    student, teacher = (fresh("deit_tiny", 32).state_dict() for _ in range(2))
    head = {"module.head.mlp.0.weight": torch.ones(2), "module.head.mlp.0.bias": torch.ones(2)}
    file = {
        "student": {**prefixed("module.backbone.", student), **head},
        "teacher": {**prefixed("module.backbone.", teacher), **head},
    }
    torch.save(file, tmp_path / "dino.pth")
    out = tmp_path / "out.pth"
    export = ("export", tmp_path / "dino.pth", "--cfg", cfg, "--to", "plain", "--output", out)
    for which, state, taken in (
        ((), teacher, "teacher"),
        (("--which", "student"), student, "student"),
        (("--which", "online"), student, "student"),
    ):
        run(*export, *which)
        identical(torch.load(out, weights_only=True), state)
        said = capsys.readouterr().out
        assert f"from {taken}.module.backbone; took {taken}, the file also holds" in said
        assert said.count("left out: head (2 tensors)") == 1
    del file["teacher"]
    torch.save(file, tmp_path / "dino.pth")
    with pytest.raises(ValueError, match=r"dino\.pth keeps no teacher network; use student"):
        run(*export, "--which", "teacher")


@pytest.mark.parametrize("through", ["import", "export alone"])
def test_the_card_of_weights_of_others_claims_no_history(through: str, tmp_path: Path) -> None:
    source, cfg = tmp_path / "resnet18-f37072fd.pth", yaml_file(tmp_path)
    torch.save(fresh("resnet18", 64).state_dict(), source)
    if through == "import":
        run("import", source, "--cfg", cfg, "--output", tmp_path / "ours.pt")
        source = tmp_path / "ours.pt"
    run("export", source, "--cfg", cfg, "--to", "huggingface", "--output", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\n")
    assert "# resnet18" in card
    assert ("imported from | resnet18-f37072fd.pth" in card) == (through == "import")
    for invented in ("MoCo", "self-supervised", "epochs", "optimiser", "CC BY-NC", "no labels"):
        assert invented not in card


def test_the_model_card_says_what_was_done_and_measured(tmp_path: Path) -> None:
    folder = our_run(tmp_path)
    (folder / "linear" / "ckpt_00000042").mkdir(parents=True)
    result = {"weights": "ckpt_00000042", "lr": 30.0, "final_top1": 71.25, "knn20_top1": 60.5}
    (folder / "linear" / "ckpt_00000042" / "result.json").write_text(json.dumps(result))
    run("export", folder, "--to", "huggingface", "--output", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n")
    for fact in (
        "MoCo v2 ([arXiv:2003.04297]",
        "| epochs | 7, 42 steps done |",
        "| base learning rate | 0.03 |",
    ):
        assert fact in card
    assert "final_top1 71.25, knn20_top1 60.50 |" in card
    assert "lr 30" not in card, "a rate is no accuracy"
    # of other weights, of a search, and of the online network these figures say nothing
    (folder / "linear" / "random").mkdir()
    (folder / "linear" / "random" / "result.json").write_text(
        json.dumps({**result, "weights": "random"})
    )
    search = folder / "semisup" / "search-x"
    search.mkdir(parents=True)
    (search / "result.json").write_text(json.dumps({**result, "last_val_top1": 1.5}))
    run("export", folder, "--to", "huggingface", "--output", tmp_path / "hf")
    assert (tmp_path / "hf" / "README.md").read_text() == card
    run(
        "export",
        folder,
        "--to",
        "huggingface",
        "--output",
        tmp_path / "target",
        "--which",
        "target",
    )
    assert "None measured" in (tmp_path / "target" / "README.md").read_text()
    assert "| linear/ckpt_00000042 | final_top1 71.25, knn20_top1 60.50 |" in card
    assert {file.name for file in (tmp_path / "hf").iterdir()} == {
        *("model.safetensors", "config.json", "preprocessor_config.json", "README.md")
    }
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    backbone = build_backbone("resnet18", img_size=64).eval()
    load_backbone(backbone, imported(folder / "ckpt_00000042.pt"), "run")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images).pooler_output.flatten(1), backbone(images), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("renames", range(5))
def test_a_killed_export_leaves_no_folder_that_loads_but_mixes_two_models(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = our_run(tmp_path), tmp_path / "hf"
    run("export", folder, "--to", "huggingface", "--output", out)
    old = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(os, "replace", KilledAfter(renames, os.replace))
    killed = pytest.raises(KeyboardInterrupt) if renames < 4 else contextlib.nullcontext()
    with killed:
        run("export", folder, "--to", "huggingface", "--output", out, "--which", "target")
    assert (out / "config.json").exists() == (renames == 4)
    if renames == 4:
        assert (out / "model.safetensors").read_bytes() != old
        assert "the target one" in (out / "README.md").read_text()


class KilledAfter:
    """Let some calls of a function pass, then stop as a kill would."""

    def __init__(self, calls: int, function: Callable[..., Any]) -> None:
        self.left, self.function = calls, function

    def __call__(self, *arguments: Any) -> Any:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.function(*arguments)


def test_checkpoints_without_a_step_are_compared_and_files_without_state_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(first: str, second: str) -> int:
        names = [str(tmp_path / first), str(tmp_path / second)]
        monkeypatch.setattr(sys, "argv", ["compare_checkpoints.py", *names])
        return compare_checkpoints.main()

    torch.save({"framework": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    torch.save({"framework": {"w": torch.zeros(2)}}, tmp_path / "b.pt")
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "c.pt")
    assert compare("a.pt", "a.pt") == 0
    assert "at step unknown" in capsys.readouterr().out
    assert compare("a.pt", "b.pt") == 1
    with pytest.raises(ValueError, match=r"c\.pt holds none of framework"):
        compare("c.pt", "c.pt")


def test_a_whole_moco_state_is_imported_for_its_framework(tmp_path: Path) -> None:
    cfg = yaml_file(tmp_path, extra="")
    options = ["MODEL.MOCO_V2.QUEUE_SIZE", "64", "MODEL.MOCO_V2.OUT_DIM", "16"]
    backbone = fresh("resnet18", 64).state_dict()
    head = {"fc.0.weight": torch.ones(512, 512), "fc.0.bias": torch.ones(512)}
    head |= {"fc.2.weight": torch.ones(16, 512), "fc.2.bias": torch.ones(16)}
    state = {
        f"module.{side}.{k}": t
        for side in ("encoder_q", "encoder_k")
        for k, t in {**backbone, **head}.items()
    }
    queue = torch.nn.functional.normalize(torch.randn(16, 64), dim=0)
    state |= {"module.queue": queue, "module.queue_ptr": torch.tensor([32])}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth")
    run(
        "import",
        tmp_path / "moco.pth",
        "--cfg",
        cfg,
        "--full",
        "--output",
        tmp_path / "a.pt",
        "--opts",
        *options,
    )
    framework = contents(tmp_path / "a.pt")["framework"]
    assert torch.equal(framework["queue.keys"], queue.T)
    assert int(framework["queue._extra_state"]) == 32
    identical(imported(tmp_path / "a.pt"), backbone)


CFG = ("--cfg", "resnet18.yaml")


def fails(*arguments: Any) -> str:
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_errors_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    cfg = yaml_file(tmp_path)
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}}, tmp_path / "half.pth")
    line = fails("import", tmp_path / "half.pth", "--cfg", cfg, "--output", tmp_path / "a.pt")
    assert line.startswith("error: ")
    assert "half.pth does not fit the backbone: 0 of 120 tensors match" in line
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "no.pth", "--output", "a.pt"], "--cfg: is needed to know the backbone"),
        (
            ["export", "a.pth", "--cfg", "resnet18.yaml", "--to", "swin", "--output", "b"],
            "takes swin here, not",
        ),
        (
            ["export", "a.pth", "--cfg", "resnet18.yaml", "--to", "plain", "--output", "."],
            "is a folder; name a file",
        ),
        (
            [
                "export",
                "a.pth",
                "--cfg",
                "resnet18.yaml",
                "--to",
                "huggingface",
                "--output",
                "a.pth",
            ],
            "is a file",
        ),
        (["inspect", "empty"], "holds no checkpoint"),
        (
            ["import", "a.pth", "--output", "b.pth", "--full", "--which", "target"],
            "--which: 'target' has no effect with --full",
        ),
        (
            ["export", "a.pth", "--output", "b.pth", "--to", "timm", "--results", "r.json"],
            "--results: has no effect with --to timm",
        ),
        (
            ["export", "a.pth", "--output", "b.pth", "--to", "mmseg", "--which", "online"],
            "--which: has no effect with --to mmseg",
        ),
    ],
)
def test_wrong_uses_are_explained(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    yaml_file(tmp_path)
    (tmp_path / "empty").mkdir()
    torch.save(fresh("resnet18", 64).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        run(*arguments)


def test_inspect_says_what_a_checkpoint_of_ours_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (
        "NAME: demo\nTAG: t\nMODEL: {NAME: byol}\nDATA: {DATASET: digits}\nTRAIN: {EPOCHS: 40}\n"
    )
    framework = {
        f"{role}.backbone.{key}": tensor
        for role in ("online", "target")
        for key, tensor in fresh("resnet18", 64).state_dict().items()
    }
    state = {"framework": framework, "step": 70, "config": config, "best": {}, "global_batch": 100}
    meta = {"best": {"knn20_top1": 81.2345}}
    checkpoint.save(tmp_path, 70, {**state, "dataset": "1050:abc"}, meta=meta)
    run("inspect", tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert re.search(r"ckpt_00000070.pt: \d+\.\d MiB, written 20\d\d-\d\d-\d\d \d\d:\d\d$", said[0])
    assert said[1:] == [
        "run: demo/t",
        "method: byol",
        "data: digits, 1050 images",
        "trained: 7 of 40 epochs, step 70, batch 100",
        "best: knn20_top1 81.23",
        "backbone: resnet18, ResNet, basic blocks 2/2/2/2, width 512",
        "size: 120 tensors, 11,186,132 values, the head included",
        "networks: --which online (the default), --which target",
        "layout: our names (of timm), at framework.online.backbone",
    ]


def test_the_model_card_of_a_run_that_counts_steps_names_them(tmp_path: Path) -> None:
    folder = our_run(tmp_path, extra="TRAIN: {EPOCHS: 7, STEPS: 50}\n")
    run("export", folder, "--to", "huggingface", "--output", tmp_path / "hf")
    assert "| epochs | 50 steps, 42 steps done |" in (tmp_path / "hf" / "README.md").read_text()


def test_inspect_says_the_length_of_a_run_that_counts_steps() -> None:
    state = {"step": 70, "global_batch": 100, "dataset": "1050:abc"}
    counted = state | {"config": "TRAIN: {EPOCHS: 40, STEPS: 75}\n"}
    assert convert.facts_of(counted, {})["trained"] == "7 epochs of 75 steps, step 70, batch 100"
    whole = state | {"config": "TRAIN: {EPOCHS: 40, STEPS: 0}\n"}
    assert convert.facts_of(whole, {})["trained"] == "7 of 40 epochs, step 70, batch 100"


def test_inspect_says_what_a_published_file_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"module.encoder_q.{k}": t for k, t in fresh("resnet18", 64).state_dict().items()}
    state["module.queue"] = torch.ones(16, 32)
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth.tar")
    run("inspect", tmp_path / "moco.pth.tar")
    said = capsys.readouterr().out
    for line in (
        "epoch: 200",
        'arch: "resnet18"',
        "state_dict: 121 tensors, module.queue (16, 32)",
    ):
        assert f"\n{line}\n" in said
    assert "at state_dict.module.encoder_q" in said


@pytest.mark.parametrize("config", ["{", "a: 1", "[1, 2]", "MODEL: 3"])
def test_a_strange_configuration_does_not_stop_inspect(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"config": config, "step": 3, "model": fresh("resnet18", 64).state_dict()}
    torch.save(state, tmp_path / "a.pth")
    run("inspect", tmp_path / "a.pth")
    assert "method: ?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 96),
        ("timm/efficientnet_b0", 96),
        ("timm/convnext_atto", 96),
        ("vit_small", 96),
        ("swin_tiny", 256),
        ("timm/test_vit", 96),
        ("timm/vit_tiny_patch16_384", 224),
    ],
)
def test_the_command_that_export_prints_makes_the_model(name: str, size: int) -> None:
    opts = ["MODEL.BACKBONE.NAME", name, "DATA.IMG_SIZE", str(size)]
    cfg = load_config(declare(convert_options()), [], ["NAME", "n", *opts], {})
    hint = loading("timm", cfg)
    made = eval(hint.partition(".load_state_dict")[0], {"timm": timm})
    ours = build_backbone(name, img_size=size)
    assert {key: value.shape for key, value in made.state_dict().items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }


def test_export_names_no_timm_model_for_a_backbone_that_timm_lacks() -> None:
    for name in ("resnet8", "vit_conv_small"):
        opts = ["NAME", "n", "MODEL.BACKBONE.NAME", name]
        cfg = load_config(declare(convert_options()), [], opts, {})
        assert "timm has no model of this kind by name" in loading("timm", cfg)


@pytest.mark.parametrize(
    ("name", "opts", "expected"),
    [
        ("resnet18", [], "mean 0.485 0.456 0.406 and deviation 0.229 0.224 0.225"),
        (
            "vit_small",
            [],
            "mean 0.485 0.456 0.406 and deviation 0.229 0.224 0.225, not with mean 0.5 and "
            "deviation 0.5 as timm would for vit_small_patch16_224",
        ),
        (
            "vit_small",
            ["DATA.MEAN", "[0.5,0.5,0.5]", "DATA.STD", "[0.5,0.5,0.5]"],
            "mean 0.5 and deviation 0.5",
        ),
    ],
)
def test_export_says_how_pixels_are_normalised(name: str, opts: list[str], expected: str) -> None:
    opts = ["NAME", "n", "MODEL.BACKBONE.NAME", name, *opts]
    cfg = load_config(declare(convert_options()), [], opts, {})
    assert pixels_note("timm", cfg) == f"normalise pixels of 0 to 1 with {expected}"
    if name == "resnet18":
        assert pixels_note("mmdet", cfg) == (
            "normalise levels of 0 to 255 with mean 123.675 116.28 103.53 and deviation 58.395 "
            "57.12 57.375"
        )


def test_a_relative_of_the_resnet_is_exported_for_timm_only(tmp_path: Path) -> None:
    cfg = tmp_path / "blur.yaml"
    cfg.write_text(YAML.format(method="moco_v2", name="timm/resnetblur18", size=64))
    torch.save(fresh("timm/resnetblur18", 64).state_dict(), tmp_path / "a.pth")
    words = ["export", tmp_path / "a.pth", "--cfg", cfg, "--output", tmp_path / "b.pth", "--to"]
    for to in ("torchvision", "mmdet", "detectron2", "huggingface"):
        with pytest.raises(ValueError, match="as the plain one, which has other features"):
            run(*words, to)
        assert not (tmp_path / "b.pth").exists()
    run(*words, "timm")
