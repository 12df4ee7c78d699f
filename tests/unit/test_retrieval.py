"""Retrieval: the revisited protocol against a slow walk down the ranking; the tool on images made here."""

import json
import pickle
import random
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.retrieval import read_ground_truth, retrieval_scores
from models.parts.backbones import build_backbone
from models.parts.resolution import at_size, dense_features, dense_swin, size_multiple
from tools import retrieval
from tools.retrieval import MULTI_SCALE, BoxedSource, photo_features, photos, scaled_features

TINY = """
NAME: tiny
MODEL: {NAME: moco_v2, BACKBONE: {NAME: resnet8, STEM: cifar_stride2}}
DATA: {IMG_SIZE: 16, NUM_WORKERS: 0}
LINEAR: {BATCH_SIZE: 4}
"""


def walked(
    order: list[int], positives: set[int], ignored: set[int], k: int
) -> tuple[float, float] | None:
    """Walk down a ranking: trapezoidal average precision and precision at k, slow and obvious."""
    if not positives:
        return None
    kept = [image for image in order if image not in ignored]
    found, area, places = 0, 0.0, []
    for seen, image in enumerate(kept):
        if image in positives:
            before = found / seen if seen else 1.0
            found += 1
            places.append(seen + 1)
            area += (before + found / (seen + 1)) / 2
    k = min(k, places[-1])
    return area / len(positives), sum(image in positives for image in kept[:k]) / k


LEVELS = {
    "easy": (["easy"], ["junk", "hard"]),
    "medium": (["easy", "hard"], ["junk"]),
    "hard": (["hard"], ["junk", "easy"]),
}


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_a_walk_down_the_ranking(seed: int) -> None:
    rng = random.Random(seed)
    images, queries = 40, 12
    lists, orders = [], []
    for _ in range(queries):
        chosen = rng.sample(range(images), rng.randint(0, 20))
        cuts = sorted(rng.choices(range(len(chosen) + 1), k=2))
        parts = chosen[: cuts[0]], chosen[cuts[0] : cuts[1]], chosen[cuts[1] :]
        arrays = [np.array(part, dtype=np.int64) for part in parts]
        lists.append(dict(zip(("easy", "hard", "junk"), arrays, strict=True)))
        orders.append(rng.sample(range(images), images))
    scores = retrieval_scores(np.array(orders).T, lists, ks=(1, 5, 10))
    for level, (positive, ignored) in LEVELS.items():
        for k in (1, 5, 10):
            rows = [
                walked(
                    order,
                    {int(i) for key in positive for i in entry[key]},
                    {int(i) for key in ignored for i in entry[key]},
                    k,
                )
                for order, entry in zip(orders, lists, strict=True)
            ]
            counted = [row for row in rows if row]
            assert 0 < len(counted) <= queries
            mean_ap, precision = np.mean(counted, axis=0) * 100
            assert scores[f"{level}/mAP"] == pytest.approx(mean_ap)
            assert scores[f"{level}/mP@{k}"] == pytest.approx(precision)


def test_a_perfect_ranking_is_100_and_nothing_to_find_is_nan() -> None:
    lists = [
        {"easy": np.array([3, 1]), "hard": np.array([], dtype=np.int64), "junk": np.array([0])}
    ]
    scores = retrieval_scores(np.array([[0, 1, 3, 2]]).T, lists)
    # junk ranks first
    assert scores["easy/mAP"] == scores["medium/mAP"] == scores["medium/mP@10"] == 100.0
    assert np.isnan(scores["hard/mAP"])
    swapped = retrieval_scores(np.array([[2, 1, 3, 0]]).T, lists)
    assert swapped["easy/mAP"] == pytest.approx(100 * ((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert swapped["easy/mP@1"] == 0.0


@pytest.fixture
def oxford(tmp_path: Path) -> Path:
    """Give toxford with 4 scenes in 3 images each, noisier and noisier, and the scenes as queries in a black
    frame.
    """
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "toxford"
    (folder / "jpg").mkdir(parents=True)
    names, gnd = [], []
    for scene in range(4):
        clean = rng.uniform(0, 255, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        for copy in range(3):
            names.append(f"scene {scene}_{copy}")
            noisy = np.clip(clean + rng.normal(0, 5 + 10 * copy, clean.shape), 0, 255).astype(
                np.uint8
            )
            Image.fromarray(noisy).save(folder / "jpg" / f"{names[-1]}.jpg", quality=95)
        framed = np.zeros((96, 96, 3), dtype=np.uint8)
        framed[32:64, 32:64] = clean
        Image.fromarray(framed).save(folder / "jpg" / f"query {scene}.jpg", quality=95)
        gnd.append(
            {
                "easy": [3 * scene],
                "hard": [3 * scene + 1],
                "junk": [3 * scene + 2],
                "bbx": [32.0, 32, 64, 64],
            }
        )
    content = {"imlist": names, "qimlist": [f"query {scene}" for scene in range(4)], "gnd": gnd}
    (folder / "gnd_toxford.pkl").write_bytes(pickle.dumps(content))
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def run_tool(root: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, float]:
    flags = [
        "--cfg",
        str(root / "tiny.yaml"),
        "--data-path",
        str(root / "data"),
        "--output",
        str(root / "out"),
    ]
    flags += ["--device", "cpu", "--pretrained", "none", "--sets", "toxford", *more]
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *flags])
    assert retrieval.main() == 0
    files = (root / "out/tiny/default/retrieval").glob("random-*.json")
    return json.loads(max(files, key=lambda file: file.stat().st_mtime_ns).read_text())


@pytest.mark.parametrize("protocol", ["dino", "view"])
@pytest.mark.parametrize("scales", [[], ["--multi-scale"]])
def test_the_tool_finds_the_scenes_of_cropped_queries(
    oxford: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scales: list[str],
    protocol: str,
) -> None:
    flags = ["--protocol", protocol, *scales]
    result = run_tool(oxford, monkeypatch, "--crop-queries", *flags)
    assert result["sets"]["toxford"]["medium/mAP"] == 100.0
    assert result["scales"] == (list(MULTI_SCALE[protocol]) if scales else [1.0])
    assert result["imsize"] == (224 if protocol == "dino" else 16)
    assert "toxford  medium      100.00" in capsys.readouterr().out
    whole = run_tool(oxford, monkeypatch, *flags)
    assert whole["sets"]["toxford"]["medium/mAP"] < 100.0  # mostly frame


def two_networks(folder: Path) -> Path:
    """Write a file of a student and a teacher, as DINO's, and each network in a file of its own."""
    states = {}
    for seed, word in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        states[word] = build_backbone("resnet8", stem="cifar_stride2").state_dict()
        torch.save(states[word], folder / f"{word}.pth")
    wrapped = {
        word: {f"module.backbone.{key}": tensor for key, tensor in state.items()}
        for word, state in states.items()
    }
    torch.save(wrapped, folder / "dino.pth")
    return folder / "dino.pth"


def test_which_network_of_a_file_is_measured(
    oxford: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = two_networks(oxford)

    def measured(weights: Path, *which: str) -> dict[str, dict[str, float]]:
        run_tool(oxford, monkeypatch, "--pretrained", str(weights), *which)
        name = "-".join((weights.stem, *which[1:]))
        (made,) = (oxford / "out/tiny/default/retrieval").glob(
            f"{name}-????????-toxford-dino224.json"
        )
        return json.loads(made.read_text())["sets"]

    run_tool(oxford, monkeypatch)  # what `run_tool` reads back
    student, teacher = measured(oxford / "student.pth"), measured(oxford / "teacher.pth")
    assert student != teacher
    assert measured(file) == teacher  # what DINO evaluates
    assert measured(file, "--which", "student") == student
    assert "took student, the file also holds: teacher (--which teacher)" in caplog.text
    with pytest.raises(ValueError, match=r"--which target: .*student\.pth keeps no target network"):
        measured(oxford / "student.pth", "--which", "target")


def test_wrong_or_hostile_ground_truth_is_one_clear_error(
    oxford: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = oxford / "data/toxford/gnd_toxford.pkl"
    content = pickle.loads(path.read_bytes())
    assert read_ground_truth(path).boxes[0] == (32.0, 32.0, 64.0, 64.0)
    for change, message in (
        ({"gnd": [{"easy": [12], "hard": [], "junk": []}] * 4}, "image 12 of 12"),
        ({"gnd": content["gnd"][:3]}, "4 queries, but ground truth of 3"),
        ({"imlist": None}, "no ground truth of revisited Oxford"),
    ):
        path.write_bytes(pickle.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            read_ground_truth(path)
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(oxford / "owned").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match=r"gnd_toxford\.pkl"):
        read_ground_truth(path)
    assert not (oxford / "owned").exists()
    path.write_bytes(pickle.dumps(content | {"imlist": [*content["imlist"][:-1], "gone"]}))
    with pytest.raises(ValueError, match=r"lacks 1 images of its set, such as gone.jpg"):
        run_tool(oxford, monkeypatch)


def test_boxes_are_cut_and_clipped(oxford: Path) -> None:
    names = ["query 0"] * 3
    source = BoxedSource(
        oxford / "data/toxford/jpg", names, [None, (32.0, 30.4, 64.0, 64.0), (-5, 90, 10, 200)]
    )
    assert [tuple(source.load(i).shape) for i in range(3)] == [(3, 96, 96), (3, 34, 32), (3, 6, 10)]


# ---- other sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [("deit_tiny", (48, 80)), ("swin_tiny", (256, 320)), ("resnet8", (40, 72))]
)
@torch.no_grad()
def test_backbones_take_other_and_oblong_sizes(name: str, size: tuple[int, int]) -> None:
    backbone = build_backbone(name, img_size=224 if name == "swin_tiny" else 64).eval()
    step = size_multiple(backbone)
    assert {"deit_tiny": 16, "swin_tiny": 32, "resnet8": 1}[name] == step
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    other = at_size(backbone, size)
    images = torch.rand(2, 3, *size)
    stride = {"deit_tiny": 16, "swin_tiny": 32, "resnet8": 16}[name]
    grid = [-(-side // stride) for side in size]
    assert list(dense_features(other, images).shape) == [2, backbone.num_features, *grid]
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    tables = {k: v for k, v in other.state_dict().items() if "relative_position_bias_table" in k}
    assert all(torch.equal(v, before[k]) for k, v in tables.items())
    if name != "swin_tiny":  # the same pixels in the same cell, whatever the width of the image
        assert at_size(backbone, (64, 64)) is backbone


@torch.no_grad()
def test_oblong_tokens_keep_rows_and_columns() -> None:
    vit = at_size(
        build_backbone("deit_tiny", img_size=32).eval(), (32, 128)
    )  # 2 x 8 = 16 cells, a square number
    vit.blocks = torch.nn.Sequential()
    vit.pos_embed.zero_()
    images = torch.zeros(1, 3, 32, 128)
    images[..., 16:32, 48:64] = 1.0
    found = dense_features(vit, images)[0]
    assert found.shape[1:] == (2, 8)
    different = (found - found[:, :1, :1]).abs().sum(0) > 1e-3
    assert different.nonzero().tolist() == [[1, 3]]


def test_a_set_that_lies_elsewhere_is_refused_before_it_is_measured(
    oxford: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^--sets: '../toxford' is no name of a folder"):
        run_tool(oxford, monkeypatch, "--sets", "../toxford")
    assert not (oxford / "out/tiny/default/retrieval").exists()
    monkeypatch.setattr(retrieval, "evaluate_set", None)  # the first set is not measured either
    with pytest.raises((ValueError, OSError), match=r"gnd_other\.pkl"):
        run_tool(oxford, monkeypatch, "--sets", "toxford", "other")


@torch.no_grad()
def test_multi_scale_is_the_mean_over_sizes() -> None:
    backbone = build_backbone("resnet8", img_size=32).eval()
    images = torch.rand(2, 3, 32, 32)
    half = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear")
    expected = (backbone(images) + backbone(half)) / 2
    torch.testing.assert_close(scaled_features(backbone, 32, (1.0, 0.5))(images), expected)
    vit = build_backbone("deit_tiny", img_size=64).eval()
    found = scaled_features(vit, 64, MULTI_SCALE["view"])(torch.rand(1, 3, 64, 64))
    assert found.shape == (1, 192)
    assert found.isfinite().all()


# ---- the published image protocol ----------------------------------------------------------------


def published_photo(path: Path, imsize: int) -> torch.Tensor:
    """Read an image as DINO's `eval_image_retrieval.py` says: PIL's thumbnail, then normalised."""
    with Image.open(path) as image:
        photo = image.convert("RGB")
    photo.thumbnail((imsize, imsize), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 255
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (pixels - mean) / std


def test_photos_keep_their_shape_and_are_never_enlarged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"wide": (60, 97), "tall": (131, 40), "small": (20, 30)}
    for name, shape in shapes.items():
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg")
    source = BoxedSource(tmp_path, list(shapes), [None, None, (5.0, 2, 25, 18)])
    found = [batch.views[0][0] for batch in photos(source, 64, 0, torch.device("cpu"))]
    assert [tuple(x.shape) for x in found] == [(3, 40, 64), (3, 64, 20), (3, 16, 20)]
    for pixels, name in zip(found[:2], shapes, strict=False):
        expected = published_photo(tmp_path / f"{name}.jpg", 64)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_features_of_a_photo_are_those_of_its_whole_patches_over_three_scales() -> None:
    vit = build_backbone("deit_tiny", img_size=64).eval()
    image = torch.randn(1, 3, 61, 97)
    half = torch.zeros(1, 3, 30, 48)
    for row in range(30):  # bilinear at half the size: the mean of four pixels
        for col in range(48):
            corner = image[:, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            half[:, :, row, col] = corner.mean((2, 3))
    whole = at_size(vit, (48, 96))(image[:, :, :48, :96])
    halved = at_size(vit, (16, 48))(half[:, :, :16, :48])
    found = photo_features(vit, (1.0, 0.5))(image)
    torch.testing.assert_close(found, (whole + halved) / 2, rtol=1e-4, atol=1e-5)
    thin = photo_features(vit, MULTI_SCALE["dino"])(torch.randn(1, 3, 9, 200))
    assert thin.isfinite().all()


@torch.no_grad()
def test_a_swin_sees_the_whole_photo_by_one_network_at_every_size() -> None:
    swin = build_backbone("swin_tiny").eval()
    features = photo_features(swin, (1.0,))
    dense = dense_swin(deepcopy(swin))
    for shape in ((224, 224), (65, 90)):
        image = torch.randn(1, 3, *shape)
        torch.testing.assert_close(features(image), dense(image))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--protocol", "view", "--imsize", "224"], "--imsize 224: --protocol view crops to"),
        (["--imsize", "0"], "--imsize 0: give a number of pixels"),
    ],
)
def test_a_size_that_is_not_used_is_refused(
    flags: list[str], message: str, oxford: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message):
        run_tool(oxford, monkeypatch, *flags)


@pytest.mark.parametrize(
    "flag", ["--epochs", "--resume", "--use-checkpoint", "--precision", "--eval"]
)
def test_a_shared_flag_that_would_do_nothing_is_refused(
    flag: str, oxford: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_tool(oxford, monkeypatch, flag)
    assert f"unknown argument '{flag}'" in capsys.readouterr().err
