"""Mask propagation and its measures against slow oracles; the tool on a video made here."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation.propagation import (
    Measure,
    PropagationConfig,
    Quality,
    carry_labels,
    contour,
    contour_accuracy,
    enlarge_labels,
    propagate,
    region_similarity,
    shrink_mask,
    video_quality,
)
from models.parts.backbones import build_backbone
from tools import propagate as tool


def slow_carry(
    target: Tensor, sources: Tensor, labels: Tensor, config: PropagationConfig
) -> Tensor:
    """Carry labels cell by cell, as the text says it."""
    _, height, width = target.shape
    out = torch.zeros(labels.shape[1], height, width)
    for y in range(height):
        for x in range(width):
            near = []
            for t in range(len(sources)):
                for v in range(height):
                    for u in range(width):
                        if abs(v - y) <= config.radius and abs(u - x) <= config.radius:
                            cosine = float(target[:, y, x] @ sources[t, :, v, u])
                            near.append((math.exp(cosine / config.temperature), labels[t, :, v, u]))
            weakest = sorted((weight for weight, _ in near), reverse=True)[: config.topk][-1]
            best = [(weight, label) for weight, label in near if weight >= weakest]
            out[:, y, x] = sum(w * label for w, label in best) / sum(w for w, _ in best)
    return out


@pytest.mark.parametrize(
    "config",
    [PropagationConfig(7, 2, 5), PropagationConfig(7, 12, 3, 0.5), PropagationConfig(7, 1, 50)],
)
def test_labels_are_carried_as_by_the_slow_oracle(
    config: PropagationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = torch.nn.functional.normalize(torch.randn(3, 8, 5, 7), dim=1)
    target = torch.nn.functional.normalize(torch.randn(8, 5, 7), dim=0)
    labels = torch.rand(3, 4, 5, 7)
    expected = slow_carry(target, sources, labels, config)
    torch.testing.assert_close(
        carry_labels(target, sources, labels, config), expected, rtol=1e-4, atol=1e-5
    )
    # four cells at a time
    monkeypatch.setattr("evaluation.propagation._CHUNK_ELEMENTS", 3 * 35 * 4)
    torch.testing.assert_close(
        carry_labels(target, sources, labels, config), expected, rtol=1e-4, atol=1e-5
    )


def test_context_is_the_first_frame_and_the_last_few() -> None:
    frames = list(torch.randn(6, 4, 3, 3))
    first = torch.rand(2, 3, 3)
    config = PropagationConfig(context=2, radius=3, topk=4)
    carried = list(propagate(frames, first, config))
    assert len(carried) == 5
    maps = [torch.nn.functional.normalize(frame, dim=0) for frame in frames]
    everything = [first, *carried]
    for number in range(1, 6):
        context = [0, *range(max(1, number - 2), number)]
        expected = slow_carry(
            maps[number],
            torch.stack([maps[i] for i in context]),
            torch.stack([everything[i] for i in context]),
            config,
        )
        torch.testing.assert_close(carried[number - 1], expected, rtol=1e-4, atol=1e-5)


def test_masks_are_shrunk_to_cells_and_enlarged_again() -> None:
    mask = torch.zeros(8, 12, dtype=torch.uint8)
    mask[:4, :4], mask[4:, 8:] = 1, 2
    labels = shrink_mask(mask, (2, 3), 3)
    assert labels.argmax(0).tolist() == [[1, 0, 0], [0, 0, 2]]
    assert torch.equal(labels.sum(0), torch.ones(2, 3))
    back = enlarge_labels(labels, (8, 12), (16, 24))
    assert (back.shape, back.dtype) == ((16, 24), torch.uint8)
    assert (int(back[0, 0]), int(back[-1, -1]), int(back[0, -1])) == (1, 2, 0)
    # an object stretched to 1 wins its cell
    weak = torch.stack([torch.full((2, 3), 0.9), labels[1] * 0.2])
    assert enlarge_labels(weak, (2, 3), (2, 3)).tolist() == [[1, 0, 0], [0, 0, 0]]
    alone = torch.stack([torch.ones(2, 3), torch.zeros(2, 3)])
    assert not enlarge_labels(alone, (4, 6), (4, 6)).any()


def test_masks_that_cut_through_cells_are_not_shifted() -> None:
    mask = disk(120, 213, 50.0, 90.0, 31.0).to(torch.uint8)
    mask[80:111, 133:170] = 2
    cells = shrink_mask(mask, (15, 27), 3).argmax(0).to(torch.uint8)
    # sizes for which no cell's centre is a border of two pixels; PIL reads the pixel under a cell's centre, as the published code does
    assert torch.equal(cells, pil_nearest(mask, (15, 27)))
    labels = torch.nn.functional.one_hot(mask.long(), 3).permute(2, 0, 1).float()
    small = enlarge_labels(labels, (120, 213), (48, 95))
    assert torch.equal(small, pil_nearest(mask, (48, 95)))


def pil_nearest(mask: Tensor, size: tuple[int, int]) -> Tensor:
    image = Image.fromarray(mask.numpy()).resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image))


def disk(height: int, width: int, y: float, x: float, radius: float) -> Tensor:
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (rows - y) ** 2 + (cols - x) ** 2 <= radius**2


def slow_contour(mask: Tensor) -> set[tuple[int, int]]:
    height, width = mask.shape
    steps = ((0, 1), (1, 0), (1, 1))
    return {
        (y, x)
        for y in range(height)
        for x in range(width)
        for dy, dx in steps
        if y + dy < height and x + dx < width and bool(mask[y, x]) != bool(mask[y + dy, x + dx])
    }


def slow_f(mask: Tensor, truth: Tensor, tolerance: float) -> float:
    reach = math.ceil(tolerance * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2))
    drawn, real = slow_contour(mask), slow_contour(truth)

    def share(points: set, others: set) -> float:
        near = [
            p
            for p in points
            if any((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 <= reach**2 for q in others)
        ]
        return len(near) / len(points)

    precision, recall = share(drawn, real), share(real, drawn)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("shift", [0, 1, 3, 6])
def test_contour_accuracy_is_the_slow_oracles(shift: int) -> None:
    truth, mask = disk(40, 50, 20, 20, 9.3), disk(40, 50, 20, 20 + shift, 8 + shift / 4)
    assert {tuple(p) for p in contour(mask).nonzero().tolist()} == slow_contour(mask)
    for tolerance in (0.008, 0.05):
        assert contour_accuracy(mask, truth, tolerance) == pytest.approx(
            slow_f(mask, truth, tolerance)
        )
    both = {tuple(p) for p in mask.nonzero().tolist()}, {tuple(p) for p in truth.nonzero().tolist()}
    assert region_similarity(mask, truth) == pytest.approx(
        len(both[0] & both[1]) / len(both[0] | both[1])
    )


def test_empty_masks_have_their_agreed_quality() -> None:
    empty, full = torch.zeros(9, 9, dtype=torch.bool), disk(9, 9, 4, 4, 2)
    for measure in (region_similarity, contour_accuracy):
        assert [measure(empty, empty), measure(full, full)] == [1.0, 1.0]
        assert [measure(full, empty), measure(empty, full)] == [0.0, 0.0]


def test_quality_leaves_out_first_and_last_frames_and_void() -> None:
    truth = torch.zeros(4, 20, 20, dtype=torch.uint8)
    truth[:, 2:8, 2:8], truth[:, 12:18, 12:18] = 1, 5
    masks = truth.clone()
    masks[0], masks[3] = 0, 0
    perfect = Measure(1.0, 1.0, 0.0)
    assert video_quality(masks, truth) == {
        1: Quality(perfect, perfect),
        5: Quality(perfect, perfect),
    }
    masks[1][truth[1] == 5] = 0
    assert video_quality(masks, truth)[5].region == Measure(0.5, 0.5, -1.0)
    truth[1, 0, :], masks[1, 0, :] = 255, 1
    assert video_quality(masks, truth)[1].region == perfect
    # DAVIS's own evaluation: 36 right pixels and 20 that are no object's
    as_davis = video_quality(masks, truth, void="background")[1].region
    assert as_davis.mean == pytest.approx((36 / 56 + 1) / 2)


@pytest.mark.parametrize("frames", range(1, 40))
def test_recall_and_decay_are_the_benchmarks(frames: int) -> None:
    values = np.random.default_rng(frames).uniform(0, 1, frames)
    # the places of DAVIS's four bins, as its evaluation computes them
    ids = (np.round(np.linspace(1, frames, 5) + 1e-10) - 1).astype(int)
    first, *_, last = (values[ids[i] : ids[i + 1] + 1].mean() for i in range(4))
    found = Measure.of(values.tolist())
    assert found == pytest.approx((values.mean(), (values > 0.5).mean(), first - last))


def test_frames_as_in_dinos_code(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    found = tool.read_frame_of_dino(tmp_path / "frame.png", (20, 30))[0]
    # halving without antialiasing: the mean of the four pixels around a cell's centre
    blocks = pixels.reshape(20, 2, 30, 2, 3).mean((1, 3))
    for channel, (mean, std) in enumerate(((0.485, 0.228), (0.456, 0.224), (0.406, 0.225))):
        expected = (np.round(blocks[..., channel]) / 255 - mean) / std
        np.testing.assert_allclose(found[channel].numpy(), expected, atol=1e-5)
    small = tool.read_frame_of_dino(tmp_path / "frame.png", (8, 12))[0]
    assert small[0, 0, 0] == pytest.approx((pixels[2, 2, 0] / 255 - 0.485) / 0.228)


# ---- the tool ------------------------------------------------------------------------------------

PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """Give a DAVIS of one video: a red and a green square that move over a still background."""
    rng = np.random.default_rng(0)
    root = tmp_path / "DAVIS"
    frames, masks = root / "JPEGImages/480p/squares", root / "Annotations/480p/squares"
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("squares\n")
    background = rng.uniform(60, 120, (48, 64, 3)).repeat(2, 0).repeat(2, 1)
    for number in range(5):
        frame, mask = background.copy(), np.zeros((96, 128), dtype=np.uint8)
        for label, colour, (y, x) in ((1, (250, 20, 20), (16, 16)), (2, (20, 250, 20), (56, 80))):
            x += 6 * number * (1 if label == 1 else -1)
            frame[y : y + 24, x : x + 24], mask[y : y + 24, x : x + 24] = colour, label
        Image.fromarray(frame.astype(np.uint8)).save(frames / f"{number:05d}.jpg", quality=95)
        image = Image.fromarray(mask)
        image.putpalette(PALETTE)
        image.save(masks / f"{number:05d}.png")
    (tmp_path / "tiny.yaml").write_text(
        "NAME: tiny\nMODEL: {BACKBONE: {NAME: resnet8, STEM: cifar_stride2}}\nDATA: {IMG_SIZE: 32}\n"
    )
    return tmp_path


def run_tool(root: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    flags = [
        "--cfg",
        str(root / "tiny.yaml"),
        "--data-path",
        str(root / "DAVIS"),
        "--output",
        str(root / "out"),
    ]
    flags += ["--device", "cpu", "--pretrained", "none", *more]
    monkeypatch.setattr(sys, "argv", ["propagate.py", *flags])
    assert tool.main() == 0
    (folder,) = (root / "out/tiny/default/propagation").glob("random-*")
    return folder


@pytest.mark.parametrize("frames", ["smooth", "dino"])
def test_the_tool_follows_moving_squares(
    davis: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    frames: str,
) -> None:
    folder = run_tool(davis, monkeypatch, "--short-side", "192", "--frames", frames)
    assert folder.name.endswith("-dino") is (frames == "dino")
    quality = json.loads((folder / "quality.json").read_text())
    assert sorted(quality["objects"]) == ["squares/1", "squares/2"]
    assert quality["J mean"] > 60
    assert quality["J&F mean"] == pytest.approx((quality["J mean"] + quality["F mean"]) / 2)
    table = capsys.readouterr().out
    for key in ("J recall", "J decay", "F recall", "F decay"):
        values = [scores[key] for scores in quality["objects"].values()]
        assert quality[key] == pytest.approx(sum(values) / 2)
        assert f"{key:12}{quality[key]:7.2f}" in table
    names = sorted(path.name for path in (folder / "squares").iterdir())
    assert names == [f"{number:05d}.png" for number in range(5)]
    with Image.open(folder / "squares/00003.png") as image:
        assert (image.mode, image.size, image.getpalette()[:9]) == ("P", (128, 96), PALETTE[:9])
        assert set(np.unique(np.asarray(image))) == {0, 1, 2}
    given = Image.open(davis / "DAVIS/Annotations/480p/squares/00000.png")
    np.testing.assert_array_equal(
        np.asarray(Image.open(folder / "squares/00000.png")), np.asarray(given)
    )


def test_which_network_of_a_file_is_measured(
    davis: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states = {}
    for seed, word in enumerate(("online", "target")):
        torch.manual_seed(seed)
        states[word] = build_backbone("resnet8", stem="cifar_stride2").state_dict()
        torch.save(states[word], davis / f"{word}.pth")
    both = {f"{word}.backbone.{k}": t for word, state in states.items() for k, t in state.items()}
    torch.save({"framework": both}, davis / "run.pth")

    def measured(weights: str, *which: str) -> dict[str, Any]:
        run_tool(
            davis, monkeypatch, "--short-side", "64", "--pretrained", str(davis / weights), *which
        )
        name = "-".join((Path(weights).stem, *which[1:]))
        (folder,) = (davis / "out/tiny/default/propagation").glob(f"{name}-????????-480p-64-*")
        return json.loads((folder / "quality.json").read_text())

    run_tool(davis, monkeypatch, "--short-side", "64")  # what `run_tool` looks for
    online, target = measured("online.pth"), measured("target.pth")
    assert online != target
    assert measured("run.pth") == online
    assert measured("run.pth", "--which", "target") == target
    assert "took target, the file also holds: online (--which online)" in caplog.text
    with pytest.raises(
        ValueError, match=r"--which teacher: .*online\.pth keeps no teacher network"
    ):
        measured("online.pth", "--which", "teacher")


def test_without_later_annotations_masks_are_written_and_not_judged(
    davis: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted((davis / "DAVIS/Annotations/480p/squares").iterdir())[1:]:
        path.unlink()
    folder = run_tool(davis, monkeypatch, "--short-side", "64")
    assert len(list((folder / "squares").iterdir())) == 5
    assert "only first frames are annotated" in capsys.readouterr().out


def test_what_systems_leave_beside_the_frames_is_no_frame(
    davis: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (davis / "DAVIS/JPEGImages/480p/squares/._00000.jpg").write_bytes(b"\0\5\x16\7")
    with caplog.at_level("INFO", "synco"):
        folder = run_tool(davis, monkeypatch, "--short-side", "64")
    names = sorted(path.name for path in (folder / "squares").iterdir())
    assert names == [f"{number:05d}.png" for number in range(5)]
    assert "left out: hidden files and what systems leave behind: 1" in caplog.text


def test_frames_keep_their_shape_up_to_multiples_of_64() -> None:
    assert tool.frame_size(480, 854, 480) == (480, 832)
    assert tool.frame_size(1080, 1920, 480) == (480, 832)
    assert tool.frame_size(1920, 1080, 480) == (832, 480)
    assert tool.frame_size(500, 500, 480) == (480, 480)


def test_errors_name_the_file(davis: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"none.txt does not exist: --data-path must be the folder of DAVIS"
    ):
        run_tool(davis, monkeypatch, "--list", "none.txt")
    (davis / "DAVIS/ImageSets/2017/val.txt").write_text("circles")
    with pytest.raises(
        ValueError, match=r"a video needs frames in .*circles and the first one's mask"
    ):
        run_tool(davis, monkeypatch)
    (davis / "DAVIS/ImageSets/2017/val.txt").write_text("squares")
    flags = (
        "--opts",
        "MODEL.BACKBONE.NAME",
        "deit_tiny",
        "MODEL.BACKBONE.STEM",
        "imagenet",
        "--short-side",
        "40",
    )
    with pytest.raises(
        ValueError, match=r"--short-side 40: frames would be .*, not multiples of 16"
    ):
        run_tool(davis, monkeypatch, *flags)
    mask = davis / "DAVIS/Annotations/480p/squares/00000.png"
    Image.fromarray(np.asarray(Image.open(mask)).astype(bool).astype(np.uint8) * 255).save(mask)
    with pytest.raises(ValueError, match=r"squares/00000.png marks no object \(255 is void\)"):
        run_tool(davis, monkeypatch)
    Image.new("RGB", (128, 96)).save(mask)
    with pytest.raises(ValueError, match="is of mode RGB; a mask is an indexed or a grey PNG"):
        run_tool(davis, monkeypatch)


@pytest.mark.parametrize("name", ["../../evil", "..", "/evil"])
def test_a_list_that_names_another_place_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text(f"bear\n{name}\n")
    with pytest.raises(ValueError, match=r"val\.txt: .* is no name of a folder"):
        tool.read_list(tmp_path / "val.txt")


@pytest.mark.parametrize(
    "flag", ["--epochs", "--resume", "--use-checkpoint", "--precision", "--eval"]
)
def test_a_shared_flag_that_would_do_nothing_is_refused(
    flag: str, davis: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_tool(davis, monkeypatch, flag)
    assert f"unknown argument '{flag}'" in capsys.readouterr().err
