"""AUG.VIEW_SIZE: networks learn from views of another size than evaluation looks at."""

import logging
from pathlib import Path

import pytest
import torch
from training import SMALL

from data import build_views
from data.augment.base import view_size
from models import assemble_framework, build_framework, framework_options, pretrained_backbone
from models.parts.resolution import _say_cut
from utils.config.load import load_config
from utils.config.schema import declare
from utils.schedules import Progress

START = Progress(0, 2, 8)
FAMILIES = {
    "resnet": {"name": "resnet8"},
    "vit": {"name": "vit_small", "patch_size": 8},
    "swin": {"name": "swin_tiny"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_networks_take_views_and_images(family: str) -> None:
    torch.manual_seed(0)
    method = assemble_framework("moby", SMALL["moby"], FAMILIES[family], img_size=64, view_size=48)
    plain = assemble_framework("moby", SMALL["moby"], FAMILIES[family], img_size=64)
    assert method.state_dict().keys() == plain.state_dict().keys()
    views = [torch.randn(4, 3, 48, 48) for _ in range(2)]
    method(views, START)["loss"].backward()
    for encoder in (method.online, method.target):
        width = encoder.backbone.num_features
        assert encoder.backbone.eval()(torch.randn(2, 3, 64, 64)).shape == (2, width)


def test_the_configuration_gives_them() -> None:
    opts = ["DATA.IMG_SIZE=32", "AUG.RECIPE=cifar", "AUG.VIEW_SIZE=24", "MODEL.NAME=byol"]
    opts += ["MODEL.BACKBONE.NAME=timm/test_vit", "MODEL.BACKBONE.PATCH_SIZE=4"]
    cfg = load_config(declare(framework_options()), [], opts)
    assert [view_size(view) for view in build_views(cfg)] == [24, 24]
    views = [torch.randn(4, 3, 24, 24) for _ in range(2)]
    assert torch.isfinite(build_framework(cfg)(views, START)["loss"])
    cfg = load_config(declare(framework_options()), [], [*opts, "AUG.VIEW_SIZE=0"])
    assert [view_size(view) for view in build_views(cfg)] == [32, 32]


@pytest.mark.parametrize(
    ("name", "backbone", "message"),
    [
        ("sit", {"name": "resnet8"}, "AUG.VIEW_SIZE: SiT restores images of DATA.IMG_SIZE; set"),
        ("byol", {"name": "vit_small"}, r"AUG.VIEW_SIZE: .* cannot take images of 8 pixels"),
    ],
)
def test_what_cannot_take_them_says_so(name: str, backbone: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble_framework(name, SMALL.get(name, {}), backbone, img_size=32, view_size=8)


@pytest.mark.parametrize("size", [56, 64])
def test_a_probe_sees_the_swin_that_was_trained(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opts = [f"DATA.IMG_SIZE={size}", "AUG.VIEW_SIZE=48", "MODEL.NAME=byol"]
    opts += ["MODEL.BACKBONE.NAME=swin_tiny", "MODEL.BYOL.HIDDEN_DIM=8"]
    cfg = load_config(declare(framework_options()), [], opts)
    _say_cut.cache_clear()
    with caplog.at_level(logging.WARNING, logger="synco"):
        trained = build_framework(cfg).online.backbone.eval()
    # 64 pixels: a map of 16 x 16 and windows of 7 x 7
    assert caplog.text.count("whole windows of 7 x 7") == (size == 64)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    probed, _ = pretrained_backbone(cfg, tmp_path / "weights.pt")
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(probed.eval()(images), trained(images))
    cfg = load_config(declare(framework_options()), [], [*opts, "AUG.VIEW_SIZE=0"])
    timms, _ = pretrained_backbone(cfg, tmp_path / "weights.pt")
    same = torch.allclose(timms.eval()(images), trained(images), atol=1e-5)
    assert same == (size == 56)
