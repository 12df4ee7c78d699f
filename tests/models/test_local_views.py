"""Local views: queries of the online network that meet every global key, and nothing else."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_models import small_swin, small_vit
from torch import Tensor, nn
from training import SMALL, LayerNormBackbone

from models import FRAMEWORKS, assemble_framework
from models.parts.backbones import build_backbone
from models.parts.batchformer import BatchFormer
from models.parts.losses import queue_contrast, sum_over_views
from models.parts.momentum import MomentumFramework
from models.parts.resolution import take_sizes
from utils.schedules import Progress

NUM = 4
START = Progress(0, 2, 8)
# every method that has them; the synthetics are drawn query by query, so those methods get one view
CASES = [
    ("byol", {}, 3),
    ("mocov3", {}, 3),
    ("moby", {}, 3),
    ("moco_v2", {}, 3),
    ("moco_v2", {"symmetric": True}, 3),
    ("synco", {}, 1),
    ("synco_v2", {}, 1),
]
FAMILIES = {
    "resnet": {"name": "resnet18", "stem": "cifar"},
    "deit": {"name": "deit_tiny", "patch_size": 8, "drop_path": 0.1},
    "vit": {"name": "vit_small", "patch_size": 8},
    "vit_conv": {"name": "vit_conv_small"},
    "swin": {"name": "swin_tiny", "drop_path": 0.2},
}


def views(num_local: int, size: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = [32, 32] + [size] * num_local
    return [torch.randn(NUM, 3, side, side, generator=generator) for side in sides]


def framework(method: str, options: dict | None = None) -> MomentumFramework:
    torch.manual_seed(7)
    return FRAMEWORKS[method](LayerNormBackbone(), **{**SMALL[method], **(options or {})})


def info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(query) @ F.normalize(key).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(query)))


def pair_loss(method: MomentumFramework) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return the loss of one query view and the keys of global view `number`, as the papers say."""
    name = type(method).__name__

    def loss(query: Tensor, key: Tensor, number: int) -> Tensor:
        if name == "BYOL":
            return 1 - F.cosine_similarity(query, key).mean()
        if name == "MoCoV3":
            return info_nce(query, key, method.temperature)
        queue = getattr(method, "queue", None) or getattr(method, f"queue{number + 1}")
        rows = F.normalize(query), F.normalize(key), queue.keys
        return queue_contrast(*rows, method.temperature, method.synthetics(START)).loss

    return loss


@pytest.mark.parametrize(("name", "options", "num_local"), CASES)
def test_the_loss_is_the_mean_over_all_pairs(name: str, options: dict, num_local: int) -> None:
    """In eval mode, where batch norms make a row independent of those beside it."""
    method = framework(name, options).eval()
    seen = views(num_local)
    predictor = getattr(method, "predictor", nn.Identity())
    queries = [predictor(method.online(view)) for view in seen]
    keys = [method.target(view) for view in seen[:2]]
    one_way = name in ("moco_v2", "synco") and not options.get("symmetric")
    pairs = [(0, 1)] if one_way else [(0, 1), (1, 0)]
    num_global = len(pairs)
    pairs += [(2 + n, key) for key in ((1,) if one_way else (1, 0)) for n in range(num_local)]
    if options.get("symmetric"):
        num_global = 1  # MoCo v2 has the mean of both ways, the others have the sum
    loss = pair_loss(method)
    torch.manual_seed(3)
    if name == "synco":
        torch.randperm(NUM)  # MoCo v2 draws the order of its keys before the synthetics
    losses = [loss(queries[query], keys[key], key) for query, key in pairs]
    torch.manual_seed(3)
    found = method(seen, START)["loss"]
    torch.testing.assert_close(found, num_global * torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["mean", "joint", "sum"])
@pytest.mark.parametrize("name", ["mocov3", "moby"])
def test_batchformer_attends_over_each_local_view_by_itself(name: str, loss: str) -> None:
    if (name, loss) == ("moby", "sum"):
        pytest.skip("MoCo v3's")
    no_norms = {"proj_num_layers": 1, "pred_num_layers": 1} if name == "moby" else {}
    method = framework(name, no_norms)
    method.attach_batchformer(BatchFormer(12, num_heads=2, dropout=0.0, loss=loss))
    seen = views(2)
    attended = method.online.batchformer
    assert attended is not None
    features = [attended(method.online.backbone(view)) for view in seen[2:]]
    local = method.predictor(method.online.projector(torch.cat(features)))
    queries = [method.predictor(rows) for rows in method.online.each(seen[:2])] + [local]
    keys = method.target.each(seen[:2])
    plain_loss, total, weight = pair_loss(method), torch.zeros(()), 0.0
    blocks = [queries[0], queries[1], *local.chunk(2)]
    for view, number in [(0, 1), (1, 0), (2, 1), (2, 0), (3, 1), (3, 0)]:
        asked, known = blocks[view], keys[number]
        if loss == "joint":
            total, weight = total + plain_loss(asked, known, number), weight + 1
            continue
        for query in asked.chunk(2):
            for key in known.chunk(2):
                total, weight = total + plain_loss(query, key, number), weight + 1
    expected = 2 * total / weight * (4 if loss == "sum" else 1)
    torch.testing.assert_close(method(seen, START)["loss"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_local_views_never_reach_target_or_queue(name: str) -> None:
    method = framework(name)
    passed: dict[str, list[tuple[int, ...]]] = {"online": [], "target": []}
    for which, shapes in passed.items():
        backbone = getattr(method, which).backbone
        backbone.register_forward_pre_hook(lambda _, args, s=shapes: s.append(tuple(args[0].shape)))
    held: list[int] = []
    for module in method.modules():
        if hasattr(module, "hold"):
            module.hold = lambda keys: held.append(len(keys))
    out = method(views(3), START)
    assert all(shape[-1] == 32 for shape in passed["target"])
    # one pass for all of them
    assert passed["online"].count((3 * NUM, 3, 16, 16)) == 1
    assert len(passed["online"]) == (2 if name in ("moco_v2", "synco") else 3)
    assert all(count == NUM for count in held)
    assert len(out["embedding"]) == NUM


def test_the_metrics_are_those_of_the_global_views() -> None:
    for name in SMALL:
        method = framework(name)
        torch.manual_seed(0)
        with_local = method(views(3), START)
        method = framework(name)
        torch.manual_seed(0)
        without = method(views(0), START)
        shared = set(without) - {"loss", "synthetic_share", "acc1", "acc5"}  # the rest is not drawn
        assert shared
        for key in shared:
            assert torch.equal(with_local[key], without[key]), (name, key)


def test_without_local_views_the_losses_are_only_summed() -> None:
    first, second = torch.rand(2).unbind()
    assert torch.equal(sum_over_views([first, second], 0), first + second)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["byol", "moco_v2"])
def test_gradients_reach_all_parameters(name: str, family: str) -> None:
    method = assemble_framework(name, SMALL[name], FAMILIES[family], img_size=32, local_size=16)
    before = copy.deepcopy(method.state_dict())
    out = method(views(2), START)
    out["loss"].backward()
    for key, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
    plain = assemble_framework(name, SMALL[name], FAMILIES[family], img_size=32)
    assert before.keys() == plain.state_dict().keys()


def test_positions_learn_from_local_views() -> None:
    vit = small_vit()
    take_sizes(vit, {"AUG.LOCAL_CROPS.SIZE": 16, "DATA.IMG_SIZE": 32})
    (vit(torch.randn(2, 3, 16, 16)) ** 2).sum().backward()
    assert (vit.pos_embed.grad.abs().sum(2) > 0).all()  # a small grid is made of all positions


@pytest.mark.parametrize(
    ("build", "own", "local"),
    [(small_vit, 32, 16), (small_swin, 64, 24), (lambda: build_backbone("resnet8"), 32, 20)],
    ids=["vit", "swin", "resnet"],
)
@pytest.mark.parametrize("training", [False, True])
def test_images_of_the_own_size_give_what_they_gave(
    build: Callable[[], nn.Module], own: int, local: int, training: bool
) -> None:
    torch.manual_seed(0)
    backbone = build().train(training)
    other = copy.deepcopy(backbone)
    take_sizes(other, {"AUG.LOCAL_CROPS.SIZE": local, "DATA.IMG_SIZE": own})
    assert other.training == training
    images = torch.randn(3, 3, own, own)
    outputs = []
    for network in (other, backbone):
        torch.manual_seed(1)  # timm's Swin drops paths
        outputs.append(network(images))
    assert torch.equal(*outputs)
    state = backbone.state_dict()
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert other(torch.randn(3, 3, local, local)).shape == (3, backbone.num_features)


def test_a_vit_on_local_views_is_timms_at_that_size() -> None:
    torch.manual_seed(0)
    vit = small_vit().eval()
    nn.init.normal_(vit.pos_embed)
    images = torch.randn(2, 3, 16, 16)
    resized = copy.deepcopy(vit)
    resized.set_input_size(img_size=(16, 16))
    take_sizes(vit, {"AUG.LOCAL_CROPS.SIZE": 16, "DATA.IMG_SIZE": 32})
    torch.testing.assert_close(vit(images), resized(images))


@pytest.mark.parametrize(
    ("name", "backbone", "size", "local", "message"),
    [
        ("sit", {"name": "resnet8"}, 32, 16, "AUG.LOCAL_CROPS.NUMBER: SiT has no local views"),
        ("byol", {"name": "vit_small"}, 32, 20, "AUG.LOCAL_CROPS.SIZE: .*20.*patch size \\(16\\)"),
        ("byol", {"name": "deit_tiny"}, 40, 16, "DATA.IMG_SIZE: .*40.*patch size \\(16\\)"),
    ],
)
def test_what_cannot_take_local_views_says_so(
    name: str, backbone: dict, size: int, local: int, message: str
) -> None:
    options = SMALL.get(name, {})
    with pytest.raises(ValueError, match=message):
        assemble_framework(name, options, backbone, img_size=size, local_size=local)


class FixedSize(LayerNormBackbone):
    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == 32, "32 pixels only"
        return super().forward(images)


def test_a_backbone_of_one_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SIZE: .* FixedSize cannot take .* 16 .*32 pixels only"):
        take_sizes(FixedSize(), {"AUG.LOCAL_CROPS.SIZE": 16})
