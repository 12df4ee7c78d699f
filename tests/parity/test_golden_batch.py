"""The published numbers of the methods without a queue: MoCo v3, BatchFormer, SiT (float64, to 1e-9)."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hashed import Trunk, checksum, det, fill, grad_norm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from engine.optim import LARS
from models.mocov3 import MoCoV3
from models.parts.batchformer import BatchFormer
from models.parts.corruption import Blocks, Corruption, corrupt, corrupt_plain
from models.sit import Outputs, SiT, rotate, uncertainty_weighted
from utils.schedules import LearningRate, Progress

GOLDEN = Path(__file__).parent / "golden"


def near(value: object) -> object:
    return pytest.approx(value, rel=1e-9, abs=1e-11)


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


@pytest.fixture(autouse=True)
def double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def step_views(step: int) -> list[Tensor]:
    return [det((4, 3, 8, 8), 1000 + 2 * step + i) for i in range(2)]


# ---- MoCo v3 -------------------------------------------------------------------------------------


def test_moco_v3_three_lars_steps() -> None:
    """Epoch 1 of 2, four steps each, warm-up 1 epoch: rates, momenta, losses, weights."""
    expected = golden("mocov3_resnet.json")
    model = MoCoV3(Trunk(8), hidden_dim=16, out_dim=8, temperature=0.2, base_momentum=0.99)
    fill(model.online, 0)
    fill(model.predictor, 100)
    model.target.load_state_dict(model.online.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, "adapt": False},
    ]
    optimizer = LARS(groups, weight_decay=0.01)
    rate = LearningRate("cosine", 0.6, 0.0, 0.0, 4, 8, 4, shifted=True)
    for step in range(3):
        # the originals average before the forward, with the momentum of this step
        progress, previous = Progress(step + 4, 4, 8), Progress(step + 3, 4, 8)
        model.after_step(previous)
        out = model(step_views(step), progress)
        assert out["loss"].item() == near(expected[f"step{step}"]["loss"])
        optimizer.zero_grad()
        out["loss"].backward()
        assert grad_norm(model) == near(expected[f"step{step}"]["grad_norm"])
        assert checksum(model.target) == near(tuple(expected[f"step{step}"]["momentum_encoder"]))
        for group in optimizer.param_groups:
            group["lr"] = rate.at(progress.step)
        assert rate.at(progress.step) == near(expected[f"step{step}"]["lr"])
        optimizer.step()
        assert checksum(model.online) == near(tuple(expected[f"step{step}"]["base_encoder_after"]))
        assert checksum(model.predictor) == near(tuple(expected[f"step{step}"]["predictor_after"]))


# ---- BatchFormer ---------------------------------------------------------------------------------


def batchformer_model(kind: str, loss: str | None) -> MoCoV3:
    transformer = {"proj_num_layers": 3, "pred_last_batch_norm": True} if kind == "head" else {}
    model = MoCoV3(Trunk(8), hidden_dim=16, out_dim=8, temperature=0.2, **transformer)
    fill(model.online.backbone, 0)
    fill(model.online.projector, 50)
    fill(model.predictor, 100)
    model.target.load_state_dict(model.online.state_dict())
    if loss is not None:
        module = BatchFormer(8, dropout=0.0, trained=False, loss=loss)
        fill(module, 300)
        model.attach_batchformer(module)
    return model


@pytest.mark.parametrize("kind", ["fc", "head"])
@pytest.mark.parametrize(("value", "loss"), [(0, None), (1, "sum"), (2, "joint"), (36, "mean")])
def test_batchformer(kind: str, value: int, loss: str | None) -> None:
    expected = golden("batchformer.json")[f"{kind}.add_bf{value}.dropout0"]
    assert len(batchformer_model(kind, loss).online(step_views(0)[0])) == expected["rows"][0]
    model = batchformer_model(kind, loss)
    out = model(step_views(0), Progress(0, 10, 100))
    assert out["loss"].item() == near(expected["loss"])
    out["loss"].backward()
    assert grad_norm(model) == near(expected["grad_norm"])
    assert not any(
        "batchformer" in name for name, p in model.named_parameters() if p.grad is not None
    )


# ---- SiT -----------------------------------------------------------------------------------------


def sit() -> SiT:
    """Image 32, patch 8, width 24, two blocks, three heads, filled in the published order of parameters."""
    vit = VisionTransformer(
        32, 8, num_classes=0, embed_dim=24, depth=2, num_heads=3, reg_tokens=1,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    model = SiT(vit)
    model.uncertainty.data.fill_(1.0)
    ours = dict(model.online.named_parameters())
    for stream, name in enumerate(golden("sit.json")["param_names"]):
        if name in ("rot_w", "contrastive_w", "recons_w"):
            continue
        parameter = ours[our_name(name)]
        value = det(tuple(parameter.shape), stream)
        if parameter.ndim > 1:
            value = value / np.sqrt(np.prod(parameter.shape[1:]))
        else:
            value = 1 + 0.1 * value if name.endswith("weight") else 0.1 * value
        if name == "pos_embed":  # rotation, contrast, patches; ours: contrast, rotation, patches
            value = value[:, [1, 0, *range(2, value.shape[1])]]
        parameter.data.copy_(value)
    return model


def our_name(name: str) -> str:
    heads = {
        "rot_head": "projector.rotation",
        "contrastive_head": "projector.contrast",
        "convTrans": "projector.reconstruction",
    }
    tokens = {"rot_token": "backbone.reg_token", "contrastive_token": "backbone.cls_token"}
    head, _, rest = name.partition(".")
    return f"{heads[head]}.{rest}" if head in heads else tokens.get(name, f"backbone.{name}")


def sit_batch() -> tuple[list[Tensor], Tensor]:
    clean = [det((4, 3, 32, 32), 1000), det((4, 3, 32, 32), 1001)]
    return clean, torch.tensor([0, 1, 2, 3, 3, 3, 0, 1])


def test_sit_losses_and_gradients() -> None:
    expected, model = golden("sit.json"), sit()
    clean, turns = sit_batch()
    outputs: list[Outputs] = [model.online(view) for view in clean]
    assert outputs[0].rotation[0].tolist() == near(expected["rot1_row0"])
    for ours, name in ((outputs[0].embedding, "contrastive1"), (outputs[0].pixels, "recon1")):
        assert [ours.sum().item(), ours.square().sum().item()] == near(expected[name])
    out = model.three_losses(clean, outputs, turns)
    published = expected["losses_1aacd6a.weights_1"]
    assert out["loss"].item() == near(published["total"])
    assert out["loss_rotation"].item() == near(published["rotation_ce"])
    assert out["loss_contrast"].item() == near(published["contrastive"])
    assert out["loss_reconstruction"].item() == near(published["recon_l1"])
    out["loss"].backward()
    grads = expected["grads(weights 1, 1aacd6a)"]
    wanted = [grads["rot_w"], grads["contrastive_w"], grads["recons_w"]]
    assert model.uncertainty.grad.tolist() == near(wanted)
    assert grad_norm(model) == near(grads["grad_norm"])


@pytest.mark.parametrize(("commit", "legacy"), [("1aacd6a", False), ("1767b91", True)])
def test_sit_weighting(commit: str, legacy: bool) -> None:
    expected = golden("sit.json")
    for values, key in (
        (torch.ones(3), "weights_1"),
        (torch.tensor([0.3, -0.2, 0.7]), "weights_.3_-.2_.7"),
    ):
        losses = expected[f"losses_{commit}.{key}"]
        parts = [losses[name] for name in ("rotation_ce", "contrastive", "recon_l1")]
        total = sum(
            uncertainty_weighted(torch.tensor(loss), s, scale, legacy)
            for loss, s, scale in zip(parts, values, (1.0, 1.0, 0.5), strict=True)
        )
        assert total.item() == near(losses["total"])


def test_rotations() -> None:
    square = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).expand(4, 1, 2, 2)
    expected = golden("sit.json")["rotations_of_[[0,1],[2,3]]"]
    turned = rotate(square, torch.arange(4))
    assert {str(i): turned[i, 0].tolist() for i in range(4)} == expected


class Published:
    """The originals' draws for images of 224 pixels, from numpy's global generator."""

    side, low = 224, 11

    def __init__(self, seed: int) -> None:
        self.random = np.random.RandomState(seed)

    def block(self, high: int) -> list[int]:
        r, c = (
            self.random.randint(0, self.side - self.low),
            self.random.randint(0, self.side - self.low),
        )
        h, w = self.random.randint(self.low, high), self.random.randint(self.low, high)
        return [r, c, min(r + h, self.side), min(c + w, self.side)]

    def blocks(self) -> list[list[int]]:
        wanted, found = self.random.uniform(0, 0.3) * self.side**2, []
        while sum((y - r) * (x - c) for r, c, y, x in found) < wanted:
            found.append(self.block(self.side // 4))
        return found

    def corruption(self, num: int) -> Corruption:
        rows = []
        for _ in range(num):
            grey = self.block(self.side)
            kernel, sigma = 2 * (self.random.randint(3, 16) // 2) + 1, 5 * self.random.rand() + 0.1
            blur, noise = self.block(self.side), self.blocks()
            source = self.random.randint(0, num)
            rows.append(
                (
                    grey,
                    kernel,
                    sigma,
                    blur,
                    noise,
                    source,
                    self.blocks() if source != len(rows) else [],
                )
            )
        single = lambda part: as_blocks([[row[part]] for row in rows])  # noqa: E731
        several = lambda part: as_blocks([row[part] for row in rows])  # noqa: E731
        kernel, sigma, source = (torch.tensor([row[i] for row in rows]) for i in (1, 2, 5))
        return Corruption(single(0), single(3), kernel, sigma, several(4), several(6), source)


def as_blocks(rows: list[list[list[int]]]) -> Blocks:
    longest = max(map(len, rows))
    edges = torch.tensor([row + [[0, 0, 0, 0]] * (longest - len(row)) for row in rows])
    return Blocks(*edges.view(len(rows), longest, 4).unbind(-1))


def test_corruption_of_the_published_draws() -> None:
    expected = golden("sit.json")["corruption_seed0"]
    images = torch.randn(2, 3, 224, 224)
    before = images.clone()
    for function in (corrupt, corrupt_plain):
        out = function(images, Published(0).corruption(2), torch.randn_like(images))
        changed = (out != images).any(1).sum((1, 2)).tolist()
        assert changed == expected["distortImages"]["changed_pixels_per_image"]
        assert torch.equal(images, before)
    noise = as_blocks([Published(0).blocks()])
    nothing = as_blocks([[[0, 0, 0, 0]]])
    only = Corruption(
        nothing, nothing, torch.tensor([3]), torch.ones(1), noise, nothing, torch.zeros(1).long()
    )
    out = corrupt(images[:1], only, torch.randn(1, 3, 224, 224))
    rows, columns = torch.nonzero((out != images[:1]).any(1)[0], as_tuple=True)
    box = [rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()]
    assert box == expected["drop_rand_patches_noise(box only)"]["box"]
    assert len(rows) == expected["drop_rand_patches_noise(box only)"]["changed_pixels"]
