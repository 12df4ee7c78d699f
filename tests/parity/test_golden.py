"""The published methods' own numbers: losses, gradients, averaged weights, queues over three steps."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hashed import Trunk, checksum, det, fill, grad_norm
from plain_loss import queue_contrast_plain
from torch import Tensor, nn

from models.byol import BYOL
from models.moby import MoBY
from models.moco import MoCoV2
from models.parts.losses import unit
from models.parts.momentum import MomentumFramework
from models.parts.negatives import SyntheticConfig
from models.synco import SynCo
from models.synco_v2 import SynCoV2
from utils.schedules import LearningRate, Progress

GOLDEN = Path(__file__).parent / "golden"
SINGLE_TYPES = [tuple(5 if i == kind else 0 for i in range(6)) for kind in range(6)]
# Losses of the types 5, 6 and all six in the code before October 2024, by that code.
LEGACY = {(0, 0, 0, 0, 5, 0): 0.99428189, (0, 0, 0, 0, 0, 5): 0.99428177, (5,) * 6: 1.83517289}


# ---- npz files: MoCo v2 and SynCo, float32 -------------------------------------------------------


def encoder_state(file: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    names = {
        name.removeprefix(prefix): value for name, value in file.items() if name.startswith(prefix)
    }

    def rename(name: str) -> str:
        if name.startswith("fc."):
            return name.replace("fc.", "projector.")
        return f"backbone.{name}"

    return {rename(name): torch.from_numpy(np.asarray(value)) for name, value in names.items()}


def moco_like(cls: type[MoCoV2], file: dict[str, np.ndarray], **options: object) -> MoCoV2:
    model = cls(Trunk(6), out_dim=16, queue_size=32, **options)
    model.online.load_state_dict(encoder_state(file, "q_sd/"))
    model.target.load_state_dict(encoder_state(file, "k_sd/"))
    queue = torch.from_numpy(file["queue_before"])
    model.queue.keys.copy_(queue if queue.shape == (32, 16) else queue.T)
    return model


def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / name))


def test_moco_v2_three_steps() -> None:
    file = load("moco_v2.npz")
    model = moco_like(MoCoV2, file)
    views = [torch.from_numpy(file["im_q"]), torch.from_numpy(file["im_k"])]
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.03, momentum=0.9, weight_decay=1e-4
    )
    torch.manual_seed(123)
    # the originals average before the first forward, and here target = online / 2
    model.update_target(0.999)
    for step in range(3):
        out = model(views, Progress(step, 10, 100))
        assert out["loss"].item() == pytest.approx(float(file["losses"][step]), abs=1e-5)
        optimizer.zero_grad()
        out["loss"].backward()
        if step == 0:
            assert grad_norm(model) == pytest.approx(float(file["gradnorm0"]), abs=1e-5)
            for name, value in encoder_state(file, "k_sd_after0/").items():
                torch.testing.assert_close(
                    model.target.state_dict()[name], value, atol=1e-6, rtol=1e-5
                )
        optimizer.step()
        model.after_step(Progress(step, 10, 100))
    for name, value in encoder_state(file, "q_sd_after3/").items():
        torch.testing.assert_close(model.online.state_dict()[name], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        model.queue.keys.T, torch.from_numpy(file["queue_after3"]), atol=1e-5, rtol=1e-5
    )
    assert model.queue.position == int(file["ptr"].item())


def synco_case(counts: tuple[int, ...]) -> str:
    return {(0,) * 6: "none", (5,) * 6: "all"}.get(counts) or f"type{counts.index(5) + 1}"


@pytest.mark.parametrize("counts", [(0,) * 6, *SINGLE_TYPES, (5,) * 6], ids=synco_case)
def test_synco(counts: tuple[int, ...]) -> None:
    file, case = load("synco.npz"), synco_case(counts)
    model = moco_like(SynCo, file, num_hard=8, num_synthetic=counts, warmup_epochs=0)
    model.update_target(0.999)
    torch.manual_seed(123)
    out = model(
        [torch.from_numpy(file["im_q"]), torch.from_numpy(file["im_k"])], Progress(0, 10, 100)
    )
    out["loss"].backward()
    assert out["loss"].item() == pytest.approx(float(file[f"{case}/loss"]), abs=1e-5)
    assert grad_norm(model) == pytest.approx(float(file[f"{case}/gradnorm"]), abs=1e-5)


@pytest.mark.parametrize("counts", LEGACY, ids=synco_case)
def test_synco_legacy_gradients(counts: tuple[int, ...]) -> None:
    file = load("synco.npz")
    model = moco_like(
        SynCo, file, num_hard=8, num_synthetic=counts, warmup_epochs=0, legacy_gradients=True
    )
    model.update_target(0.999)
    torch.manual_seed(123)
    out = model(
        [torch.from_numpy(file["im_q"]), torch.from_numpy(file["im_k"])], Progress(0, 10, 100)
    )
    assert out["loss"].item() == pytest.approx(LEGACY[counts], abs=1e-5)


# ---- SynCo-v2 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(0,) * 6, *SINGLE_TYPES, (5,) * 6], ids=synco_case)
def test_synco_v2_is_two_published_contrasts(counts: tuple[int, ...]) -> None:
    """Both directions as the papers write them; view 1's synthetics are drawn first, then view 2's.

    MoBY's skeleton is pinned by its golden values and each type by SynCo's; this pins how they are
    joined.
    """
    file = load("synco_v2.npz")
    views = [torch.from_numpy(file["im_1"]).double(), torch.from_numpy(file["im_2"]).double()]
    options = {
        "hidden_dim": 64,
        "queue_size": 32,
        "num_hard": 8,
        "num_synthetic": counts,
        "warmup_epochs": 0,
    }
    model = SynCoV2(Trunk(6), **options).double()
    torch.manual_seed(123)
    loss = model(views, Progress(0, 10, 100))["loss"]
    torch.manual_seed(123)
    queries = [unit(model.predictor(model.online(view))) for view in views]
    keys = [unit(model.target(view)) for view in views]
    config = SyntheticConfig(8, counts, sigma=0.1) if any(counts) else None
    first = queue_contrast_plain(queries[0], keys[1], model.queue2.keys, 0.2, config)
    second = queue_contrast_plain(queries[1], keys[0], model.queue1.keys, 0.2, config)
    assert loss.item() == pytest.approx((first.loss + second.loss).item(), rel=1e-12)


# ---- json files: MoBY and BYOL, float64 ----------------------------------------------------------


def filled(model: MomentumFramework) -> MomentumFramework:
    fill(model.online.backbone, 0)
    fill(model.online.projector, 100)
    fill(model.predictor, 200)
    model.target.load_state_dict(model.online.state_dict())
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["moby", "byol"])
def test_three_sgd_steps(name: str, dtype: torch.dtype) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    exact = dtype == torch.float64
    tolerance = 1e-9 if exact else 2e-5
    near = functools.partial(pytest.approx, rel=tolerance, abs=tolerance)
    torch.set_default_dtype(dtype)
    try:
        model = filled(MoBY(Trunk(8), queue_size=8) if name == "moby" else BYOL(Trunk(8)))
    finally:
        torch.set_default_dtype(torch.float32)
    if name == "moby":
        for queue, stream in ((model.queue1, 900), (model.queue2, 901)):
            queue.keys.copy_(nn.functional.normalize(det((256, 8), stream), dim=0).T)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(3):
        expected = golden[f"step{step}"]
        views = [det((4, 3, 8, 8), 1000 + 2 * step + i).to(dtype) for i in range(2)]
        assert checksum(model.target.backbone) == near(tuple(expected["encoder_k"]))
        assert checksum(model.target.projector) == near(tuple(expected["projector_k"]))
        out = model(views, Progress(step, 10, golden["K"]))
        assert out["loss"].item() == near(expected["loss"])
        optimizer.zero_grad()
        out["loss"].backward()
        assert grad_norm(model) == near(expected["grad_norm"])
        optimizer.step()
        assert checksum(model.online.backbone) == near(tuple(expected["encoder_after_sgd"]))
        model.after_step(Progress(step, 10, golden["K"]))
        if name == "moby":
            assert model.queue1.position == expected["ptr"]
            assert model.queue1.keys[:, 0].tolist() == near(expected["queue1_row0"])
            assert float(model.queue2.keys.double().sum()) == near(expected["queue2"][0])
            bn = expected["bn_k_running_mean"]
            assert model.target.backbone.bn.running_mean[: len(bn)].tolist() == near(bn)


# ---- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "base", "epochs", "warmup_start", "minimum"),
    [
        ("moby(base 1e-3, total batch 512)", 1e-3, 300, 5e-7, 5e-6),
        ("linear(lr 1.0, 100 epochs)", 1.0, 100, 5e-7, 5e-6),
    ],
)
def test_moby_schedules(
    table: str, base: float, epochs: int, warmup_start: float, minimum: float
) -> None:
    golden = json.loads((GOLDEN / "schedules.json").read_text())[table]
    rate = LearningRate("cosine", base, warmup_start, minimum, 50, epochs * 10, 10, lag=True)
    for step, value in golden.items():
        assert rate.at(int(step)) == pytest.approx(value, rel=1e-12)
    # without the published lag the same values come one step earlier
    exact = rate._replace(lag=False)
    assert exact.at(1) == pytest.approx(golden["2"], rel=1e-12)
