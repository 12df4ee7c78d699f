"""A probe sits on the weights that were asked for, or it does not start; heads of a grid are independent."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classifier import LinearHeads, grid_loss
from models.weights.find import find_network
from models.weights.load import load_backbone

State = dict[str, Tensor]


def make_backbone(width: int = 4, depth: int = 2) -> nn.Module:
    """Return a backbone with parameters, buffers and nested names."""
    layers = [
        nn.Sequential(nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width))
        for _ in range(depth)
    ]
    return nn.ModuleDict({"stem": nn.Conv2d(3, width, 3), "layers": nn.Sequential(*layers)})


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def head(name: str = "fc") -> State:
    return {f"{name}.weight": torch.zeros(5, 4), f"{name}.bias": torch.zeros(5)}


def assert_loads(state: State, published: State) -> None:
    backbone = make_backbone()
    report = load_backbone(backbone, state, "file.pt")
    assert report.matched == len(published)
    assert report.missing == ()
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in published.items())


LAYOUTS: dict[str, Callable[[State], dict]] = {
    "synco pretraining": lambda s: {
        "framework": {
            **prefixed(s, "online.backbone."),
            **prefixed(other(s), "target.backbone."),
            "online.projector.0.weight": torch.zeros(2, 2),
            "queue": torch.zeros(4, 8),
        },
        "optimizer": {},
        "step": 3,
    },
    "moco": lambda s: {
        "epoch": 200,
        "state_dict": {
            **prefixed(
                {**s, "fc.0.weight": torch.zeros(4, 4), **head("fc.2")}, "module.encoder_q."
            ),
            **prefixed(other(s), "module.encoder_k."),
            "module.queue": torch.zeros(8, 16),
        },
    },
    "moco-v3": lambda s: {
        "state_dict": {
            **prefixed({**s, **head("head")}, "module.base_encoder."),
            **prefixed(other(s), "module.momentum_encoder."),
        }
    },
    "moby / synco-v2": lambda s: {
        "model": {
            **prefixed(other(s), "encoder_k."),
            **prefixed({**s, "layers.0.attn_mask": torch.zeros(2)}, "encoder."),
            "projector.linear1.weight": torch.zeros(2, 2),
        },
        "max_accuracy": 0.0,
    },
    "state_dict": lambda s: {"state_dict": prefixed({**s, **head()}, "module.")},
    "model": lambda s: {"model": {**s, **head("head")}},
    "plain": lambda s: {**s, **head("fc")},
}


PLACES = {
    "synco pretraining": "framework.online.backbone",
    "moco": "state_dict.module.encoder_q",
    "moco-v3": "state_dict.module.base_encoder",
    "moby / synco-v2": "model.encoder",
    "state_dict": "state_dict.module",
    "model": "model",
    "plain": "",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_online_backbone(name: str) -> None:
    published = make_backbone().state_dict()
    network = find_network(LAYOUTS[name](published), own=published)
    assert network.place == PLACES[name]
    assert_loads(network.state, published)


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_timm_models_with_their_classifiers_fit_their_backbones(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        keys = timm.create_model(name).state_dict()
    backbone = timm.create_model(name, num_classes=0)
    network = find_network(
        {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in keys.items()}
    )
    report = load_backbone(backbone, network.state, "timm")
    assert str(network) == "from the top"
    assert report.matched == len(backbone.state_dict())
    assert len(report.unexpected) == 2
    assert all(key.startswith(("fc.", "head.")) for key in report.unexpected)


@pytest.mark.parametrize(
    "checkpoint", [{}, {"epoch": 3}, {"state_dict": {}}, {"framework": {"step": 1}}]
)
def test_files_without_tensors_are_refused(checkpoint: dict) -> None:
    with pytest.raises(
        ValueError, match=r"no backbone found: no tensors in the entries .*file of weights"
    ):
        find_network(checkpoint)


def drop(key: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("stem.weight"), r"13 of 14 tensors match; 1 missing \(stem\.weight\)"),
        (drop("layers.1.1.running_var"), r"1 missing \(layers\.1\.1\.running_var\)"),
        (
            lambda s: {**s, "layers.2.0.weight": s["layers.0.0.weight"]},
            r"1 that the backbone does not have \(layers\.2\.0\.weight\)",
        ),
        (lambda s: prefixed(s, "target.backbone."), r"0 of 14 tensors match"),
        (lambda s: {"a.weight": torch.zeros(1)}, r"0 of 14 tensors match; 12 missing"),
        (lambda s: {}, "0 of 14"),
        (
            lambda s: make_backbone(width=6).state_dict(),
            r"of another shape or type \(layers.*\(6, 6, 3, 3\) for \(4, 4, 3, 3\)",
        ),
        (lambda s: make_backbone(depth=1).state_dict(), "another architecture, depth"),
        (lambda s: make_backbone(depth=3).state_dict(), "a deeper network"),
        (
            lambda s: {**s, "stem.bias": torch.zeros(4, dtype=torch.int64)},
            "of another shape or type",
        ),
        (
            lambda s: {**s, "stem.bias": torch.tensor([1, 2, 3, torch.nan])},
            r"not finite \(stem\.bias\)",
        ),
    ],
)
def test_poor_matches_are_refused_and_change_nothing(
    spoil: Callable[[State], State], message: str
) -> None:
    backbone = make_backbone()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=r"^runs/a\.pt.*" + message):
        load_backbone(backbone, spoil(make_backbone().state_dict()), "runs/a.pt")
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_every_single_missing_tensor_is_noticed() -> None:
    state = make_backbone().state_dict()
    accepted = []
    for key in state:
        try:
            load_backbone(make_backbone(), drop(key)(state), "file.pt")
        except ValueError:
            continue
        accepted.append(key)
    assert accepted == ["layers.0.1.num_batches_tracked", "layers.1.1.num_batches_tracked"]


def test_report_accounts_for_heads_and_counters() -> None:
    state = drop("layers.0.1.num_batches_tracked")({**make_backbone().state_dict(), **head()})
    report = load_backbone(make_backbone(), state, "file.pt")
    assert report.missing == ("layers.0.1.num_batches_tracked",)
    assert report.unexpected == ("fc.bias", "fc.weight")
    assert str(report) == "loaded 13 tensors of the backbone from file.pt; left out: fc (2 tensors)"


def test_half_precision_files_load() -> None:
    published = {
        k: v.half() if v.is_floating_point() else v for k, v in make_backbone().state_dict().items()
    }
    backbone = make_backbone()
    load_backbone(backbone, published, "file.pt")
    assert backbone.state_dict()["stem.weight"].dtype == torch.float32


@pytest.mark.parametrize(("init", "std", "bound"), [("normal", 0.01, 0.1), ("trunc", 0.02, 2.0)])
def test_heads_start_equal_with_the_published_scale(init: str, std: float, bound: float) -> None:
    heads = LinearHeads(64, 100, 3, init)
    weight, bias = heads.pairs()[0]
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert weight.abs().max().item() <= bound
    assert bias.abs().max().item() == 0
    for other_weight, other_bias in heads.pairs()[1:]:
        assert torch.equal(other_weight, weight)
        assert torch.equal(other_bias, bias)
        assert other_weight.data_ptr() != weight.data_ptr()


def test_unknown_init_is_refused() -> None:
    with pytest.raises(ValueError, match="'zeros' is unknown"):
        LinearHeads(4, 3, 1, "zeros")


def distinct_heads() -> LinearHeads:
    heads = LinearHeads(8, 5, 3)
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    return heads


def test_one_product_equals_separate_heads() -> None:
    heads, x = distinct_heads(), torch.randn(7, 8)
    logits = heads(x)
    assert logits.shape == (3, 7, 5)
    for i in range(3):
        torch.testing.assert_close(logits[i], heads.head(i)(x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_summed_loss_gives_each_head_its_own_gradient(smoothing: float) -> None:
    heads, x, y = distinct_heads(), torch.randn(7, 8), torch.randint(5, (7,))
    losses = grid_loss(heads(x), y, smoothing)
    losses.sum().backward()
    for i, (weight, bias) in enumerate(heads.pairs()):
        alone = heads.head(i)
        loss = F.cross_entropy(alone(x), y, label_smoothing=smoothing)
        loss.backward()
        torch.testing.assert_close(losses[i], loss)
        torch.testing.assert_close(weight.grad, alone.weight.grad)
        torch.testing.assert_close(bias.grad, alone.bias.grad)


def test_smoothed_loss_is_the_formula() -> None:
    logits, y = torch.randn(2, 6, 4), torch.randint(4, (6,))
    log_p = logits.log_softmax(-1)
    for head_index in range(2):
        nll = torch.stack([-log_p[head_index, i, y[i]] for i in range(6)]).mean()
        expected = 0.9 * nll - 0.1 * log_p[head_index].mean()
        torch.testing.assert_close(grid_loss(logits, y, 0.1)[head_index], expected)


def test_learning_rates_of_heads_are_independent() -> None:
    heads, x, y = LinearHeads(8, 5, 2), torch.randn(7, 8), torch.randint(5, (7,))
    optimizer = torch.optim.SGD(
        [{"params": pair, "lr": lr} for pair, lr in zip(heads.pairs(), (0.0, 1.0), strict=True)]
    )
    before = heads.head(0).weight.clone()
    grid_loss(heads(x), y).sum().backward()
    optimizer.step()
    assert torch.equal(heads.head(0).weight, before)
    assert not torch.equal(heads.head(1).weight, before)


def test_our_own_checkpoint_round_trip(tmp_path: Path) -> None:
    published = make_backbone().state_dict()
    torch.save(LAYOUTS["synco pretraining"](published), tmp_path / "run.pt")
    read = torch.load(tmp_path / "run.pt", weights_only=True)
    assert_loads(find_network(read, own=published).state, published)
