"""A grid of heads is its heads one by one: training, names, accuracies, results, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from yacs.config import CfgNode

from data.augment.recipes import build_recipe
from data.features import FeatureLoader, refuse_missing
from data.loader import GlobalLoader
from data.sources.base import ArraySource
from data.worker import BadImagesError
from engine.loop import clip_gradient
from engine.optim import build_optimizer
from evaluation.accuracy import topk_correct
from evaluation.features import WholeFeatures
from evaluation.probe import (
    GridPoint,
    check_linear,
    grid_points,
    head_accuracies,
    head_groups,
    probe_folder,
    show_probes,
    warn_of_other_pixels,
    write_result,
)
from models import framework_options
from models.classifier import LinearHeads, grid_loss
from utils.config.load import load_config, to_yaml
from utils.config.schema import declare

SCHEMA = declare(framework_options())


def section(**keys: Any) -> CfgNode:
    flags = {f"LINEAR.{key.replace('__', '.')}": value for key, value in keys.items()}
    return load_config(SCHEMA, flags={"NAME": "n", **flags}).LINEAR


def names(**keys: Any) -> list[str]:
    return [point.name for point in grid_points(section(**keys))]


def test_one_weight_decay_keeps_the_names_of_learning_rates() -> None:
    assert names(LRS=[0.1, 30.0]) == ["lr0.1", "lr30"]
    assert names(LRS=[0.1, 30.0], WEIGHT_DECAYS=[0.5]) == ["lr0.1", "lr30"]
    assert [p.weight_decay for p in grid_points(section(OPTIM__WEIGHT_DECAY=0.25))] == [0.25]
    assert [p.weight_decay for p in grid_points(section(WEIGHT_DECAYS=[0.5]))] == [0.5]


def test_the_grid_is_every_rate_with_every_decay() -> None:
    points = grid_points(section(LRS=[0.1, 30.0], WEIGHT_DECAYS=[0.0, 1e-4]))
    assert [p.name for p in points] == ["lr0.1_wd0", "lr30_wd0", "lr0.1_wd0.0001", "lr30_wd0.0001"]
    assert [(p.lr, p.weight_decay, p.rate) for p in points[1:3]] == [(30.0, 0.0, 1), (0.1, 1e-4, 0)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"LRS": [1.0, 1.0]}, r"--lr.*lr1 is given twice"),
        ({"LRS": [1.0, 1.0000001]}, r"lr1 is given twice"),
        ({"WEIGHT_DECAYS": [0.1, 0.1]}, r"--weight-decay.*lr30_wd0\.1 is given twice"),
        (
            {"WEIGHT_DECAYS": [0.1], "OPTIM__WEIGHT_DECAY_END": 0.4},
            r"WEIGHT_DECAY_END to 0 instead of 0\.4",
        ),
    ],
)
def test_a_grid_that_says_two_things_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"LABEL_PERCENTS": [100.0, 1.0]},
            r"--labels\): 1 needs --cached-features; .*--train-percent 1",
        ),
        ({"CACHED_FEATURES": True, "DROP_PATH": 0.2}, r"0\.2 cannot act .*--drop-path-rate 0"),
    ],
)
def test_features_and_labels_that_do_not_fit_are_refused(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_linear(section(**keys))
    check_linear(section(CACHED_FEATURES=True, LABEL_PERCENTS=[1.0, 100.0]))


def test_heads_that_an_optimiser_would_clip_together_are_refused() -> None:
    """The norm of one head's gradient would scale the steps of the others."""
    grid = {"LRS": [0.1, 1.0], "OPTIM__NAME": "timm/lamb"}
    with pytest.raises(ValueError, match=r"LINEAR\.OPTIM\.NAME: 'timm/lamb' clips .* of a grid"):
        check_linear(section(**grid))
    check_linear(section(**{**grid, "LRS": [0.1]}))
    with pytest.raises(ValueError, match=r"LINEAR\.OPTIM\.NAME: 'timm/lambs' is not in timm"):
        check_linear(section(**{**grid, "OPTIM__NAME": "timm/lambs"}))
    for name in ("timm/adamw", "timm/lion", "sgd", "lars"):
        check_linear(section(**{**grid, "OPTIM__NAME": name}))


@pytest.mark.parametrize("percents", [[], [0.0], [101.0]])
def test_percentages_have_a_range(percents: list[float]) -> None:
    with pytest.raises(ValueError, match=r"LINEAR\.LABEL_PERCENTS"):
        section(LABEL_PERCENTS=percents)


def test_each_probe_has_its_folder() -> None:
    cached = section(CACHED_FEATURES=True)
    assert probe_folder(section(), "w", 100.0) == "linear/w"
    assert [probe_folder(cached, "w", p) for p in (100.0, 0.5)] == [
        "linear/w-cached",
        "linear/w-cached-0.5pct",
    ]


# ---- training ------------------------------------------------------------------------------------


def train(
    points: list[GridPoint], optimizer_name: str, clip: float, smoothing: float
) -> list[Tensor]:
    """Train heads on eight batches the way main_linear.py does; return what each has become."""
    torch.manual_seed(1)
    heads = LinearHeads(16, 7, len(points))
    node = section(OPTIM__NAME=optimizer_name, OPTIM__NESTEROV=True).OPTIM
    optimizer = build_optimizer(node, head_groups(node, heads.pairs(), points))
    rates = {point.rate: point.lr for point in points}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["rate"]]
    data = torch.Generator().manual_seed(2)
    for _ in range(8):
        x, y = torch.randn(32, 16, generator=data), torch.randint(7, (32,), generator=data)
        grid_loss(heads(x), y, smoothing).sum().backward()
        for pair in heads.pairs():
            clip_gradient(pair, clip)
        optimizer.step()
        optimizer.zero_grad()
    return [torch.cat([weight.flatten(), bias]).detach() for weight, bias in heads.pairs()]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize(("clip", "smoothing"), [(0.0, 0.0), (0.05, 0.1)])
def test_each_head_of_a_grid_trains_as_if_it_were_alone(
    optimizer: str, clip: float, smoothing: float
) -> None:
    decay = 20.0 if optimizer == "lars" else 0.05  # where the trust ratio hides little of it
    points = grid_points(section(LRS=[0.01, 0.3, 3.0], WEIGHT_DECAYS=[0.0, decay]))
    together = train(points, optimizer, clip, smoothing)
    for head, point in zip(together, points, strict=True):
        (alone,) = train([point], optimizer, clip, smoothing)
        assert torch.equal(head, alone)
    distances = [float((a - b).abs().max()) for i, a in enumerate(together) for b in together[:i]]
    assert min(distances) > 1e-6


def test_lars_exempts_the_biases_of_heads() -> None:
    heads = LinearHeads(16, 7, 2)
    points = grid_points(section(LRS=[0.01, 0.3], WEIGHT_DECAYS=[0.1]))
    node = section(OPTIM__NAME="lars").OPTIM
    found = build_optimizer(node, head_groups(node, heads.pairs(), points)).param_groups
    weights, biases = found[::2], found[1::2]
    assert [group["params"] for group in biases] == [[bias] for bias in heads.biases]
    assert [(group["weight_decay"], group["adapt"]) for group in biases] == [(0.0, False)] * 2
    assert [(group["weight_decay"], group["adapt"]) for group in weights] == [(0.1, True)] * 2
    assert [group["rate"] for group in found] == [0, 0, 1, 1]


def test_weights_of_images_of_another_size_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = load_config(SCHEMA, flags={"NAME": "n", "DATA.IMG_SIZE": 64, "DATA.MEAN": [0.5] * 3})
    warn_of_other_pixels(cfg, None)
    warn_of_other_pixels(cfg, tmp_path / "w.pt")  # of somebody else
    (tmp_path / "config.yaml").write_text("a: [")
    warn_of_other_pixels(cfg, tmp_path / "w.pt")
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    warn_of_other_pixels(cfg, tmp_path / "w.pt")
    assert not caplog.messages
    other = load_config(SCHEMA, flags={"NAME": "n", "DATA.IMG_SIZE": 32})
    warn_of_other_pixels(other, tmp_path / "w.pt")
    assert [text.partition(";")[0] for text in caplog.messages] == [
        "DATA.IMG_SIZE: the weights were trained with 64, now it is 32",
        "DATA.MEAN: the weights were trained with [0.5, 0.5, 0.5], now it is []",
    ]


# ---- accuracies and results ----------------------------------------------------------------------


def test_accuracies_are_exact_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, x, y = LinearHeads(8, 6, 3), torch.randn(50, 8), torch.randint(6, (50,))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    points = grid_points(section(LRS=[1.0, 2.0, 3.0]))
    whole = head_accuracies(heads, [(x, y)], dict(enumerate(points)))
    for i, point in enumerate(points):
        counts = topk_correct(heads.head(i)(x), y, (1, 5)).tolist()
        assert [whole[f"{point.name}/top{k}"] for k in (1, 5)] == [2.0 * count for count in counts]
    assert whole["top1"] == max(whole[f"{point.name}/top1"] for point in points)
    monkeypatch.setattr("evaluation.probe._LOGITS", 3 * 6 * 4)
    assert (
        head_accuracies(heads, [(x[:20], y[:20]), (x[20:], y[20:])], dict(enumerate(points)))
        == whole
    )


def test_accuracies_record_no_graph() -> None:
    heads, recorded = LinearHeads(6, 3, 1), []
    heads.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    block = torch.randn(8, 6), torch.arange(8) % 3
    head_accuracies(heads, [block], dict(enumerate(grid_points(section(LRS=[1.0])))))
    assert recorded == [False]


def result_of(folder: Path, **keys: Any) -> dict[str, Any]:
    points = grid_points(section(**keys))
    final = {f"{p.name}/top{k}": 10.0 * i + k for i, p in enumerate(points) for k in (1, 5)} | {
        "top1": 0.0
    }
    best = {f"{points[1].name}/top1": 90.0, "top1": 90.0}
    run: Any = SimpleNamespace(folder=folder, close=lambda: None)
    what = {"weights": "w", "labels": "100pct", "images": 9}
    result = write_result(run, what, best, final, {"knn5_top1": 1.0}, points)
    assert json.loads((folder / "result.json").read_text()) == result
    return result


def test_results_name_the_weight_decay_where_it_varies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = result_of(tmp_path, LRS=[0.1, 30.0])
    assert one["lr"] == 30.0
    assert one["final_by_lr"] == {"0.1": [1.0, 5.0], "30": [11.0, 15.0]}
    assert "weight_decay" not in one
    several = result_of(tmp_path, LRS=[0.1, 30.0], WEIGHT_DECAYS=[0.0, 0.5])
    assert (several["lr"], several["weight_decay"], several["final_top1"]) == (30.0, 0.0, 11.0)
    assert several["final_by_point"]["lr30_wd0.5"] == [31.0, 35.0]
    with caplog.at_level("INFO", logger="synco"):
        show_probes([several, {**several, "labels": "1pct"}])
    assert "labels" in caplog.text
    assert "weight_decay" in caplog.text


# ---- batches -------------------------------------------------------------------------------------


def test_batches_of_features_come_in_the_order_of_images() -> None:
    labels = torch.randint(4, (50,))
    source = ArraySource("x", torch.zeros(50, 3, 8, 8, dtype=torch.uint8), labels, list("abcd"))
    rows = torch.arange(50.0).unsqueeze(1)
    batches: dict[str, Any] = {"global_batch": 16, "accumulation": 2, "seed": 3}
    images = GlobalLoader(
        source, build_recipe("eval", 8), drop_last=False, device=torch.device("cpu"), **batches
    )
    whole = WholeFeatures.of(rows, labels)
    features = FeatureLoader(whole.at, whole.labels, whole.indices, **batches)
    assert features.steps_per_epoch == images.steps_per_epoch == 4
    pairs = zip(images.from_step(2, 9), features.from_step(2, 9), strict=True)
    for (step, ours), (other, theirs) in pairs:
        assert step == other
        for mine, its in zip(ours, theirs, strict=True):
            assert torch.equal(mine.indices, its.indices)
            assert torch.equal(mine.labels, its.labels)
            assert torch.equal(its.views[0].flatten().long(), its.indices)


def test_few_features_make_smaller_batches() -> None:
    whole = WholeFeatures.of(torch.zeros(11, 2), torch.zeros(11))
    loader = FeatureLoader(
        whole.at, whole.labels, whole.indices, global_batch=64, accumulation=2, seed=0
    )
    assert (loader.plan.global_batch, loader.steps_per_epoch) == (10, 2)
    with pytest.raises(ValueError, match=r"LINEAR.BATCH_SIZE"):
        FeatureLoader(whole.at, whole.labels, whole.indices, global_batch=3, accumulation=2, seed=0)


def test_too_many_unreadable_images_stop_a_probe() -> None:
    source: Any = np.zeros(1000)
    refuse_missing(source, torch.arange(990), 1e-4)
    with pytest.raises(BadImagesError, match=r"11 of 1000 .*DATA\.MAX_BAD_FRACTION"):
        refuse_missing(source, torch.arange(989), 1e-4)
    with pytest.raises(BadImagesError, match="1 of 1000"):
        refuse_missing(source, torch.arange(999), 0.0)


def test_a_file_of_weights_whose_name_leads_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="--pretrained"):
        probe_folder(section(), "..", 100.0)  # the stem of ...pt
