"""A set of 16-bit images of five channels goes through every program that reads such images."""

import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import runs
import timm
import torch
import yaml
from torch.nn.functional import interpolate

import utils.checkpoints.file as checkpoint
from detection.defaults import load_detection_config
from segmentation.defaults import load_segmentation_config
from tools import convert, embed, pack, propagate, report, retrieval
from tools.prepare import channel_statistics

STEPS = 12  # of two epochs
# no batch norm: the losses of two processes are those of one
KEYS: dict[str, Any] = {
    "DATA__DATASET": "imagefolder",
    "DATA__INDEX_CACHE": "off",
    "DATA__IMG_SIZE": 16,
    "AUG__RECIPE": "moco_v2",
    "MODEL__BACKBONE__NAME": "deit_tiny",
    "MODEL__BACKBONE__PATCH_SIZE": 8,
    "TRAIN__EPOCHS": 2,
    "LOG__PRINT_FREQ": 1,
    "KNN__EVERY_EPOCHS": 1,
    "KNN__K": [3],
    "MODEL__MOCO_V2__QUEUE_SIZE": 32,
    "LINEAR__EPOCHS": 1,
    "LINEAR__BATCH_SIZE": 8,
}


def draw(root: Path) -> None:
    """Write images of 12 bits in 16: classes differ in the fourth channel only."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for number in range(2 * count):
            levels = rng.integers(0, 2000, (20, 24, 5)).astype(np.uint16)
            levels[..., 3] += 2000 * (number % 2)
            file = root / split / "ab"[number % 2] / f"{number:02d}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, levels)


def tool(module: Any, *argv: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tool.py", *map(str, argv)])
        return module.main()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the images, `data`, and their statistics, `pixels.yaml`."""
    root = tmp_path_factory.mktemp("five")
    draw(root / "data")
    keys = ["--opts", "DATA.CHANNELS", "5", "DATA.RANGE", "0,4095", "DATA.INDEX_CACHE", "off"]
    place = ["--data-path", root / "data", "--output", root / "pixels.yaml", "--workers", 0]
    assert tool(channel_statistics, *place, *keys) == 0
    return root


def arguments(root: Path, tag: str, world: int = 1, **keys: Any) -> list[str]:
    found = yaml.safe_load((root / "pixels.yaml").read_text())["DATA"]
    pixels = {f"DATA__{name}": value for name, value in found.items()}
    batch = {"DATA__PATH": str(root / "data"), "TRAIN__BATCH_SIZE": 8 // world}
    return runs.arguments("moco_v2", root / "out", tag, **{**KEYS, **pixels, **batch, **keys})


def trained(root: Path, tag: str, world: int = 1, prepare: Any = None, **keys: Any) -> str:
    """Pretrain; return what the main process said."""
    argv = arguments(root, tag, world, **keys)
    jobs = forked.start("main_pretrain", argv, root / f"{tag}.log", world, prepare)
    codes = [job.wait() for job in jobs]
    killed = prepare is not None and -signal.SIGKILL in codes
    assert killed or codes == [0] * world, jobs[0].text()
    return jobs[0].text()


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """Return the folder of a run without a fault."""
    trained(root, "whole")
    return root / "out" / "moco_v2" / "whole"


def lines(folder: Path, name: str) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in rows if name in row}


def test_pretraining_learns_what_only_the_fourth_channel_shows(whole: Path) -> None:
    state = runs.final_state(whole)
    assert state["step"] == STEPS
    weight = state["framework"]["online.backbone.patch_embed.proj.weight"]
    assert weight.shape[1:] == (5, 8, 8)
    assert len(lines(whole, "loss")) == STEPS
    assert max(lines(whole, "knn3_top1").values()) == 100.0
    assert (whole / "views.png").is_file()


@pytest.mark.parametrize("main", ["main_linear", "main_semisup"])
def test_the_throughput_is_that_of_all_channels(main: str, root: Path, whole: Path) -> None:
    argv = ["--throughput", *arguments(root, "whole")]
    (job,) = forked.start(main, argv, root / f"{main}.log", prepare=short)
    assert job.wait() == 0, job.text()
    assert "images/s at batch size" in job.text()


def short(_rank: int) -> None:
    """Measure for a moment."""
    from evaluation import accuracy

    accuracy.measure_throughput.__defaults__ = (3, 0.1)  # type: ignore[attr-defined]


def test_a_killed_run_resumes_bit_identically(root: Path, whole: Path) -> None:
    trained(root, "killed", prepare=partial(runs.kill_at, step=8))
    assert runs.resumed_at(trained(root, "killed")) == 6
    assert runs.digest(root / "out/moco_v2/killed") == runs.digest(whole)


def test_two_processes_have_the_losses_of_one(root: Path, whole: Path) -> None:
    trained(root, "two", world=2)
    one, two = (lines(folder, "loss") for folder in (whole, whole.parent / "two"))
    assert one.keys() == two.keys()
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-4), step


def test_resume_refuses_another_range(root: Path, whole: Path) -> None:
    argv = arguments(root, "whole", DATA__RANGE="0,8191")
    (job,) = forked.start("main_pretrain", argv, root / "refused.log")
    assert job.wait() == 2
    assert "DATA.RANGE" in job.text()


def test_a_run_from_a_pack_is_bit_identical(root: Path, whole: Path) -> None:
    for split in ("train", "val"):
        place = ["--data-path", root / "data", "--output", root / f"packs/{split}.pack"]
        flags = ["--split", split, "--channels", 5, "--range", "0,4095", "--workers", 0]
        assert pack.main([str(word) for word in (*place, *flags)]) == 0
    trained(root, "packed", DATA__DATASET="packed", DATA__PATH=str(root / "packs"))
    assert runs.digest(root / "out/moco_v2/packed") == runs.digest(whole)


def test_the_probe_reads_them(root: Path, whole: Path) -> None:
    argv = arguments(root, "whole", LINEAR__CACHED_FEATURES=True)
    (job,) = forked.start("main_linear", argv, root / "probe.log")
    assert job.wait() == 0, job.text()
    (result,) = whole.glob("linear/*/result.json")
    assert json.loads(result.read_text())["knn3_top1"] == 100.0
    kept = list(whole.rglob("features_*.json"))
    assert len(kept) == 2
    for file in kept:  # features of another range are others
        assert "range=(0.0, 4095.0)" in json.loads(file.read_text())["key"]["pixels"]


def test_features_are_those_of_the_exported_weights(
    root: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--output", root / "features.npz", "--split", "val", "--workers", 0]
    data = ["--data-path", root / "data", "--dataset", "imagefolder"]
    assert tool(embed, "--pretrained", whole, *place, *data) == 0
    features = np.load(root / "features.npz")["features"]
    argv = ["export", whole, "--to", "timm", "--output", root / "w.pth"]
    assert tool(convert, *argv) == 0
    assert "in_chans=5" in capsys.readouterr().out
    model = timm.create_model(
        "deit_tiny_patch16_224", num_classes=0, in_chans=5, img_size=16, patch_size=8
    ).eval()
    model.load_state_dict(torch.load(root / "w.pth", weights_only=True))
    # the evaluation view by hand: the shorter side to 16, then the central window
    levels = torch.from_numpy(np.load(root / "data/val/a/00.npy").astype(np.float32) / 4095)
    image = interpolate(levels.permute(2, 0, 1)[None], (16, 19), mode="bilinear", antialias=True)
    found = yaml.safe_load((root / "pixels.yaml").read_text())["DATA"]
    mean, std = (torch.tensor(found[key])[:, None, None] for key in ("MEAN", "STD"))
    with torch.no_grad():
        (row,) = model((image[..., 2:18] - mean) / std)
    torch.testing.assert_close(torch.from_numpy(features[0]), row, rtol=1e-4, atol=1e-4)


def test_the_huggingface_folder_names_channels_mean_and_levels(root: Path, whole: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = root / "hf"
    argv = ["export", whole, "--to", "huggingface", "--output", out]
    assert tool(convert, *argv) == 0
    found = yaml.safe_load((root / "pixels.yaml").read_text())["DATA"]
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == found["MEAN"]
    assert processor["image_std"] == found["STD"]
    assert processor["do_rescale"] is False
    assert "| channels | 5; levels 0,4095 become 0 to 1" in (out / "README.md").read_text()
    model = transformers.AutoModel.from_pretrained(out, add_pooling_layer=False).eval()
    state = checkpoint.load(checkpoint.newest_valid(whole).path)["framework"]
    weight = state["online.backbone.patch_embed.proj.weight"]
    assert torch.equal(model.embeddings.patch_embeddings.projection.weight, weight)


def test_libraries_of_three_channels_are_refused(whole: Path, tmp_path: Path) -> None:
    argv = ["export", whole, "--to", "torchvision", "--output", tmp_path / "w.pth"]
    with pytest.raises(ValueError, match="for 3 channels, this one takes 5; use --to timm"):
        tool(convert, *argv)


def test_fine_tuning_reads_them(root: Path, whole: Path) -> None:
    keys = {"FINETUNE__EPOCHS": 1, "FINETUNE__BATCH_SIZE": 8, "FINETUNE__TRAIN_PERCENT": 50}
    (job,) = forked.start("main_semisup", arguments(root, "whole", **keys), root / "tuned.log")
    assert job.wait() == 0, job.text()
    assert list(whole.glob("semisup/**/result.json"))


def test_programs_of_8_bit_rgb_refuse_the_run(root: Path, whole: Path) -> None:
    reads = "this program reads 8-bit RGB with ImageNet's mean"
    with pytest.raises(ValueError, match=reads):
        tool(report, whole)
    given = ["--cfg", whole / "config.yaml", "--pretrained", whole, "--data-path", root / "data"]
    with pytest.raises(ValueError, match=reads):
        tool(propagate, *given)
    with pytest.raises(ValueError, match=reads):
        tool(retrieval, *given)
    for load in (load_detection_config, load_segmentation_config):
        with pytest.raises(ValueError, match=r"no key 'DATA\.CHANNELS'"):
            load([None], ["DATA.CHANNELS", "5"], {})
