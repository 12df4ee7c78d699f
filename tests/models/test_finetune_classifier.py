"""Class heads on one token and on two, the loss they share, and how layers are counted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.classifier import Classifier, freeze, grid_loss, layer_ids, soft_loss
from models.parts.backbones import build_backbone

SMALL = {
    "resnet8": {},
    "deit_tiny": {"img_size": 16, "patch_size": 8},
    "swin_tiny": {"img_size": 32},
}


def vit(num_tokens: int) -> nn.Module:
    return build_backbone("deit_tiny", num_tokens=num_tokens, **SMALL["deit_tiny"])


@pytest.mark.parametrize("name", SMALL)
def test_one_token_has_one_head_on_the_feature(name: str) -> None:
    backbone = build_backbone(name, **SMALL[name])
    model = Classifier(backbone, 5).eval()
    images = torch.randn(2, 3, SMALL[name].get("img_size", 16), SMALL[name].get("img_size", 16))
    logits = model(images)
    assert logits.shape == (1, 2, 5)
    assert torch.equal(logits[0], model.heads[0](backbone(images)))
    assert torch.equal(model.predict(images), logits[0])


def test_two_tokens_have_a_head_each_and_are_averaged() -> None:
    model = Classifier(vit(2), 5).eval()
    images = torch.randn(3, 3, 16, 16)
    tokens = model.backbone.forward_features(images)
    assert tokens.shape[1] == 2 + 4
    by_hand = torch.stack([model.heads[0](tokens[:, 0]), model.heads[1](tokens[:, 1])])
    assert torch.equal(model(images), by_hand)
    assert torch.equal(model.predict(images), by_hand.mean(0))
    assert not torch.equal(by_hand[0], by_hand[1])


def test_both_heads_and_both_tokens_learn() -> None:
    model = Classifier(vit(2), 5)
    soft_loss(model(torch.randn(3, 3, 16, 16)), torch.eye(5)[[0, 1, 2]]).sum().backward()
    for parameter in (
        *model.heads.parameters(),
        model.backbone.cls_token,
        model.backbone.reg_token,
    ):
        assert parameter.grad.abs().sum() > 0


def test_a_representation_puts_tanh_before_each_head() -> None:
    model = Classifier(vit(2), 5, representation_size=7).eval()
    assert [tuple(part.weight.shape) for part in model.heads[0] if isinstance(part, nn.Linear)] == [
        (7, 192),
        (5, 7),
    ]
    features = torch.randn(2, 192)
    hidden = torch.tanh(model.heads[1][0](features))
    assert torch.equal(model.heads[1](features), model.heads[1][2](hidden))
    assert len(Classifier(vit(1), 5, representation_size=7).heads) == 1


@pytest.mark.parametrize(("init", "std"), [("normal", 0.01), ("trunc", 0.02)])
def test_heads_start_as_asked(init: str, std: float) -> None:
    head = Classifier(vit(1), 200, init=init).heads[0][0]
    assert float(head.weight.detach().std()) == pytest.approx(std, rel=0.1)
    assert not head.bias.any()


def test_the_loss_is_the_cross_entropy_of_each_head() -> None:
    logits, labels = torch.randn(2, 6, 4, dtype=torch.double), torch.tensor([0, 1, 2, 3, 0, 1])
    shares = torch.rand(6, 4, dtype=torch.double).softmax(1)
    expected = [F.cross_entropy(part.float(), shares.float()) for part in logits]
    torch.testing.assert_close(soft_loss(logits, shares.float()), torch.stack(expected))
    smooth = F.one_hot(labels, 4) * 0.9 + 0.1 / 4
    torch.testing.assert_close(soft_loss(logits, smooth), grid_loss(logits, labels, 0.1))


@pytest.mark.parametrize("name", SMALL)
def test_layers_are_counted_from_the_stem(name: str) -> None:
    backbone = build_backbone(name, **SMALL[name])
    layers = layer_ids(backbone)
    assert set(layers) == {key for key, _ in backbone.named_parameters()}
    names = {
        "resnet8": "conv1.weight",
        "deit_tiny": "pos_embed",
        "swin_tiny": "patch_embed.proj.weight",
    }
    assert layers[names[name]] == 0
    assert sorted(set(layers.values())) == list(
        range({"resnet8": 4, "deit_tiny": 13, "swin_tiny": 13}[name])
    )
    if name == "deit_tiny":
        assert [layers[f"blocks.{i}.attn.qkv.weight"] for i in range(12)] == list(range(1, 13))
        assert layers["norm.weight"] == 12


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="LAYER_DECAY"):
        layer_ids(nn.Linear(2, 2))


def test_a_frozen_backbone_keeps_its_mode_and_gets_no_gradient() -> None:
    model = Classifier(freeze(build_backbone("resnet8")), 3)
    soft_loss(model(torch.randn(2, 3, 16, 16)), torch.eye(3)[:2]).sum().backward()
    assert not model.backbone.training
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())
