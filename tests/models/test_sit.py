"""SiT: what it corrupts, that the fast corruption is the slow one, both variants, its refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import assemble_framework
from models.parts.backbones import build_backbone, map_geometry, summaries_and_map
from models.parts.corruption import (
    Corruption,
    corrupt,
    corrupt_at_once,
    corrupt_plain,
    draw_corruption,
    draw_group_mask,
    mask_groups,
)
from models.parts.losses import nt_xent
from models.sit import SiT, rotate
from utils.schedules import Progress

SMALL = {"out_dim": 16, "base_momentum": 0.9}
GMML = {**SMALL, "variant": "gmml", "hidden_dim": 32, "momentum_schedule": "cosine"}
RESNET = {"name": "resnet8", "stem": "cifar"}


def build(options: dict, backbone: dict | None = None, size: int = 32) -> SiT:
    framework = assemble_framework("sit", options, backbone or RESNET, img_size=size)
    assert isinstance(framework, SiT)
    return framework


def views(num: int = 4, size: int = 32) -> list[Tensor]:
    return [torch.randn(num, 3, size, size) for _ in range(2)]


# ---- corruption ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "size"), [(7, 8), (9, 32), (1, 48), (5, 96)])
def test_corruption_at_once_equals_the_loop_over_images(num: int, size: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        images, drawn = torch.randn(num, 3, size, size), draw_corruption(num, size, size)
        before, noise = images.clone(), torch.randn(num, 3, size, size)
        slow = corrupt_plain(images, drawn, noise)
        torch.testing.assert_close(
            corrupt_at_once(images, drawn, noise), slow, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(corrupt(images, drawn, noise), slow, atol=1e-5, rtol=1e-5)
        assert torch.equal(images, before)


def test_a_foreign_block_of_a_corrupted_image_is_corrupted_too() -> None:
    """A chain: image 2 copies from 1, which copies from 0, whose pixels are all noise."""
    torch.manual_seed(0)
    drawn = draw_corruption(3, 16, 16)
    whole = drawn.foreign._replace(
        top=torch.zeros(3, 1).long(), left=torch.zeros(3, 1).long(),
        bottom=torch.full((3, 1), 16), right=torch.full((3, 1), 16),
    )  # fmt: skip
    nothing = whole._replace(bottom=whole.top)
    noise_in_0 = whole._replace(bottom=torch.tensor([[16], [0], [0]]))
    drawn = Corruption(
        nothing, nothing, drawn.kernel, drawn.sigma, noise_in_0, whole, torch.tensor([0, 0, 1])
    )
    images, noise = torch.zeros(3, 3, 16, 16), torch.ones(3, 3, 16, 16)
    assert corrupt_at_once(images, drawn, noise).unique().tolist() == [1.0]
    assert corrupt_plain(images, drawn, noise).unique().tolist() == [1.0]
    later = drawn._replace(source=torch.tensor([1, 2, 2]))  # of higher index: clean
    assert corrupt_at_once(images, later, noise)[0].unique().tolist() == [0.0]


def test_the_drawn_amounts_follow_their_law() -> None:
    torch.manual_seed(0)
    drawn = draw_corruption(2000, 100, 100)
    assert drawn.kernel.unique().tolist() == [3, 5, 7, 9, 11, 13, 15]
    assert 0.1 <= drawn.sigma.min() < 0.2
    assert 5.0 < drawn.sigma.max() < 5.1
    sides = drawn.noise.bottom - drawn.noise.top
    assert sides[sides > 0].min() >= 5
    assert sides.max() == 24
    # blocks until a share U(0, .3): the sum overshoots it by less than one block
    shares = drawn.noise.area().sum(1) / 1e4
    assert shares.max() < 0.3 + 0.0576
    assert abs(shares.mean() - 0.15) < 0.03
    assert drawn.source.min() < 20
    assert drawn.source.max() > 1980


@pytest.mark.parametrize("align", [1, 4])
def test_group_masks_reach_their_share_with_the_fewest_blocks(align: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(40, 3, 32, 32)
    drawn = draw_group_mask(40, 32, 32, 0.5, 0.3, align)
    seen, mask = mask_groups(images, drawn, None)
    union = torch.zeros(40, 32, 32, dtype=torch.bool)
    for i in range(40):  # the slow way: one block after the other
        for top, left, bottom, right in zip(
            *(edge[i].tolist() for edge in drawn.blocks), strict=True
        ):
            if union[i].sum() >= drawn.pixels[i]:
                break
            union[i, top:bottom, left:right] = True
    assert torch.equal(mask[:, 0], union)
    assert set(drawn.pixels[:, 0].tolist()) == {512, 307}
    assert not (drawn.source == torch.arange(40)).any()
    for i in range(40):
        content = images[drawn.source[i]] if drawn.foreign[i] else torch.zeros(3, 32, 32)
        assert torch.equal(seen[i], torch.where(mask[i], content, images[i]))
    assert (
        mask[:, 0, ::align, ::align]
        .repeat_interleave(align, 1)
        .repeat_interleave(align, 2)
        .equal(mask[:, 0])
    )


# ---- the method ----------------------------------------------------------------------------------


def test_nt_xent_equals_its_definition() -> None:
    first, second = torch.randn(5, 8), torch.randn(5, 8)
    rows = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    terms = []
    for i in range(10):
        others = torch.stack([(rows[i] @ rows[j] / 0.5).exp() for j in range(10) if j != i])
        terms.append(-((rows[i] @ rows[(i + 5) % 10] / 0.5).exp() / others.sum()).log())
    torch.testing.assert_close(nt_xent(first, second, 0.5), torch.stack(terms).mean())


@pytest.mark.parametrize(
    "backbone",
    [RESNET, {"name": "swin_tiny"}, {"name": "deit_tiny", "patch_size": 8}],
    ids=lambda b: str(b["name"]),
)
def test_the_later_variant_over_all_families(backbone: dict) -> None:
    framework = build(GMML, backbone)
    trained = [p for p in framework.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    before = [p.clone() for p in framework.target.parameters()]
    for step in range(2):
        out = framework(views(), Progress(step, 2, 8))
        parts = out["loss_contrast"] + out["loss_reconstruction"]
        torch.testing.assert_close(out["loss"], parts)
        optimizer.zero_grad()
        out["loss"].backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
        optimizer.step()
        framework.after_step(Progress(step, 2, 8))
    moved = [
        not torch.equal(a, b) for a, b in zip(before, framework.target.parameters(), strict=True)
    ]
    assert any(moved)


def test_the_later_variant_restores_masked_pixels_only() -> None:
    """A reconstruction that is right inside the mask costs nothing, whatever it is outside."""
    framework = build(GMML).eval()
    images = views()
    torch.manual_seed(5)
    masks = [framework.corrupted(image)[1] for image in images]
    wrong = [
        torch.where(mask, image, image + 9.0) for image, mask in zip(images, masks, strict=True)
    ]
    online = framework.online.forward
    framework.online.forward = lambda *seen: online(*seen)._replace(pixels=torch.cat(wrong))  # type: ignore
    torch.manual_seed(5)
    assert framework(images, Progress(0, 2, 8))["loss_reconstruction"] == 0.0


def by_hand(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return embeddings and pixels of images as the later SiT defines its heads, from the tensors alone."""
    tensors = dict(encoder.projector.named_parameters())
    tokens = encoder.backbone.forward_features(images)

    def linear(index: int, rows: Tensor) -> Tensor:
        return rows @ tensors[f"contrast.{index}.weight"].T + tensors[f"contrast.{index}.bias"]

    def standard(rows: Tensor) -> Tensor:  # over all rows, those of both views
        return (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()

    rows = (
        standard(linear(0, tokens[:, 0])) * tensors["contrast.1.weight"]
        + tensors["contrast.1.bias"]
    )
    rows = (
        standard(linear(3, rows.relu())) * tensors["contrast.4.weight"] + tensors["contrast.4.bias"]
    )
    embedding = standard(linear(6, F.gelu(rows)))
    grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    for index in (0, 2, 4):
        weight, bias = (
            tensors[f"reconstruction.{index}.weight"],
            tensors[f"reconstruction.{index}.bias"],
        )
        grid = F.gelu(torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], grid) + bias[:, None, None])
    weight, bias = tensors["reconstruction.6.weight"], tensors["reconstruction.6.bias"]
    pixels = torch.einsum("nihw,iocd->nohcwd", grid, weight).flatten(4, 5).flatten(2, 3)
    return embedding, pixels + bias[:, None, None]


def test_the_later_variant_is_its_definition() -> None:
    """Both views in one pass through student and teacher, 2 T cross-entropy each way, L1 where masked."""
    torch.set_default_dtype(torch.float64)
    try:
        framework = build({**GMML, "temperature": 0.2}, {"name": "deit_tiny", "patch_size": 8})
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for network in (framework.online, framework.target):
            for parameter in network.parameters():
                # biases and norms matter, and they differ
                parameter += 0.1 * torch.randn_like(parameter)
    clean = [view.double() for view in views()]
    torch.manual_seed(7)
    seen, masks = zip(*(framework.corrupted(view) for view in clean), strict=True)
    torch.manual_seed(7)
    out = framework(clean, Progress(0, 2, 8))
    queries, pixels = by_hand(framework.online, torch.cat(seen))
    keys, _ = by_hand(framework.target, torch.cat(clean))
    contrast = 0.0
    for query, key in ((queries[:4], keys[4:]), (queries[4:], keys[:4])):
        cosines = F.cosine_similarity(query[:, None], key[None], dim=2)
        contrast += 2 * 0.2 * F.cross_entropy(cosines / 0.2, torch.arange(4))
    where = torch.cat(masks).expand_as(pixels)
    reconstruction = (pixels - torch.cat(clean)).abs()[where].mean()
    torch.testing.assert_close(out["loss_contrast"], contrast.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        out["loss_reconstruction"], reconstruction.detach(), rtol=1e-10, atol=0
    )


def test_batchformer_attends_over_each_view_by_itself() -> None:
    """Another second view changes nothing about the first, but through the batch norms of the heads."""
    framework = assemble_framework("sit", GMML, RESNET, batchformer={"enabled": True}, img_size=32)
    seen: list[Tensor] = []
    batchformer = framework.online.batchformer
    batchformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    embedding = framework.online(torch.cat(views()), 2).embedding
    assert [len(rows) for rows in seen] == [4, 4]
    assert embedding.shape == (16, 16)  # of each view a plain and an attended stream


def test_turned_images_are_told_apart_when_learnt() -> None:
    """The labels match the turns: a head that knows the turn of a marked image has no rotation loss."""
    marked = torch.zeros(8, 3, 32, 32)
    marked[:, :, :4] = 1.0  # a bar at the top: a quarter clockwise puts it to the right
    turned = rotate(marked, torch.arange(8) % 4)
    bars = [turned[:, 0, :4].mean((1, 2)), turned[:, 0, :, -4:].mean((1, 2))]
    bars += [turned[:, 0, -4:].mean((1, 2)), turned[:, 0, :, :4].mean((1, 2))]
    assert torch.stack(bars, 1).argmax(1).tolist() == [0, 1, 2, 3] * 2


def test_without_gradient_the_keys_repeat_and_the_uncertainties_do_not_decay() -> None:
    framework = build(SMALL)
    assert framework.uncertainty.ndim == 1  # OPTIM.EXCLUDE_1D exempts it
    assert framework.uncertainty.tolist() == [1.0] * 3
    one, other = (framework.eval().restore(views(size=32)[0] * 0, seed)[0] for seed in (3, 3))
    assert torch.equal(one, other)


def test_the_average_of_the_published_variant_is_a_whole_network() -> None:
    """Its running statistics follow too: it never sees an image itself, as in the published code."""
    framework = build({**SMALL, "base_momentum": 0.0})
    for step in range(2):
        framework(views(), Progress(step, 2, 8))["loss"].backward()
        framework.after_step(Progress(step, 2, 8))
    images = views()[0]
    ours, theirs = (part.eval().backbone(images) for part in (framework.online, framework.target))
    assert torch.equal(ours, theirs)
    teacher = build(GMML)
    before = teacher.target.backbone.bn1.running_mean.clone()
    teacher.after_step(Progress(0, 2, 8))
    # a teacher's own are its own
    assert torch.equal(teacher.target.backbone.bn1.running_mean, before)


def test_blocks_that_cannot_mask_an_image_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"MODEL.SIT.DROP_ALIGN: blocks of 16 .* 32; use at most 8"
    ):
        draw_group_mask(2, 32, 32, 0.5, 0.3, 16)


def test_a_map_of_another_width_than_the_pooled_feature() -> None:
    framework = build(SMALL, {"name": "timm/mobilenetv3_small_050"}, size=64)
    framework(views(size=64), Progress(0, 2, 8))["loss"].backward()


def test_a_vit_gives_two_tokens_and_others_their_pooled_feature() -> None:
    vit = build_backbone("deit_tiny", img_size=32, patch_size=8, num_tokens=2).eval()
    images = torch.randn(2, 3, 32, 32)
    summaries, features = summaries_and_map(vit, images)
    assert len(summaries) == 2
    assert features.shape == (2, 192, 4, 4)
    torch.testing.assert_close(summaries[0], vit(images))  # a probe reads the contrastive token
    assert map_geometry(vit) == (8, 192)
    for options, stride in (
        (RESNET, 4),
        ({"name": "swin_tiny", "img_size": 64}, 32),
        ({"name": "resnet18"}, 32),
    ):
        backbone = build_backbone(**options).eval()  # type: ignore[arg-type]
        images = torch.randn(1, 3, 64, 64)
        summaries, _ = summaries_and_map(backbone, images)
        torch.testing.assert_close(summaries, (backbone(images),))
        assert map_geometry(backbone)[0] == stride


@pytest.mark.parametrize(
    ("options", "backbone", "message"),
    [
        ({"variant": "both"}, RESNET, "MODEL.SIT.VARIANT: 'both'"),
        ({"drop_type": "black"}, RESNET, "MODEL.SIT.DROP_TYPE: 'black'"),
        ({}, {"name": "deit_tiny", "patch_size": 8}, "MODEL.BACKBONE.NUM_TOKENS.*set it to 2"),
        ({}, {"name": "resnet18", "num_tokens": 2}, "NUM_TOKENS: 2 does not apply to resnet18"),
        ({}, {"name": "swin_tiny", "num_tokens": 2}, "NUM_TOKENS: 2 does not apply to swin_tiny"),
        (
            {"size": 56},
            {"name": "swin_tiny"},
            "DATA.IMG_SIZE: 56 is not a multiple of the backbone's stride, 32",
        ),
    ],
)
def test_refusals(options: dict, backbone: dict, message: str) -> None:
    size = options.pop("size", 32)
    with pytest.raises(ValueError, match=message):
        build({**SMALL, **options}, backbone, size)


def test_an_image_that_the_map_does_not_divide_is_refused_at_the_first_step() -> None:
    framework = build(SMALL, {"name": "resnet18"})
    with pytest.raises(
        ValueError, match=r"DATA.IMG_SIZE: 40 is not a multiple of the backbone's stride, 32"
    ):
        framework(views(size=40), Progress(0, 2, 8))


# ---- MoCo v3's convolutional stem ----------------------------------------------------------------


def test_convolutional_stem() -> None:
    plain, conv = (
        build_backbone("vit_small", img_size=64),
        build_backbone("vit_conv_small", img_size=64),
    )
    assert (len(plain.blocks), len(conv.blocks)) == (12, 11)
    stem = [layer for layer in conv.patch_embed.stem if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in stem] == [48, 96, 192, 384, 384]
    assert [layer.stride[0] for layer in stem] == [2, 2, 2, 2, 1]
    assert conv(torch.randn(2, 3, 64, 64)).shape == (2, 384)
    assert not conv.pos_embed.requires_grad
    assert torch.equal(conv.pos_embed, plain.pos_embed)
    with pytest.raises(
        ValueError, match="FREEZE_PATCH_EMBED: vit_conv_small has no patch embedding"
    ):
        build_backbone("vit_conv_small", freeze_patch_embed=True)
    with pytest.raises(ValueError, match=r"DATA.IMG_SIZE: 40 is not a multiple of the stem's 16"):
        build_backbone("vit_conv_small", img_size=40)
    # its batch norms are not recomputed
    build_backbone("vit_conv_small", img_size=32, use_checkpoint=True)
    with pytest.raises(ValueError, match="PATCH_SIZE: 8"):
        build_backbone("vit_conv_small", patch_size=8)
