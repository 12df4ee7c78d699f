"""Whole images, windows, scales and mirroring against plain computations; sizes that do not divide."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation import inference
from segmentation.inference import Inference, at_least, in_bands, predict, predict_scales, slide

WHOLE = Inference((8, 8), (5, 5))
SLIDE = Inference((32, 32), (21, 21), slide=True)


class Net(nn.Module):
    """Logits at a quarter of the input."""

    def __init__(self, classes: int = 4, heads: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(
            nn.Conv2d(3, classes, 7, stride=4, padding=3) for _ in range(heads)
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([head(images) for head in self.heads])


def plainly(logits: Tensor, *sizes: tuple[int, int]) -> Tensor:
    for size in sizes:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return logits


@pytest.mark.parametrize("rows", [1, 3, 8, 1000])
@pytest.mark.parametrize(
    ("source", "sizes"),
    [((9, 11), [(33, 44), (71, 53)]), ((17, 13), [(40, 31), (20, 90)]), ((4, 4), [(4, 4)])],
)
def test_bands_equal_resizing_at_once(
    source: tuple[int, int],
    sizes: list[tuple[int, int]],
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "_ROWS_CPU", rows)
    torch.manual_seed(0)
    logits = torch.randn(2, 5, *source)
    bands = list(in_bands(logits, *sizes))
    assert [part.start for part, _ in bands] == list(range(0, sizes[-1][0], rows))
    whole = torch.cat([band for _, band in bands], dim=2)
    torch.testing.assert_close(whole, plainly(logits, *sizes), rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.argmax(1), plainly(logits, *sizes).argmax(1))


def test_bands_stay_float32_under_autocast() -> None:
    logits = torch.randn(1, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        whole = torch.cat([band for _, band in in_bands(logits, (20, 20))], dim=2)
    torch.testing.assert_close(whole, plainly(logits, (20, 20)), rtol=1e-5, atol=1e-5)


def test_labels_come_back_at_the_original_size() -> None:
    """A network that sees the colour finds a piecewise constant image again, at odd sizes."""
    truth = torch.zeros(333, 517, dtype=torch.int64)
    truth[100:, 200:] = 1
    truth[250:, :300] = 2
    image = F.one_hot(truth, 3).permute(2, 0, 1).float()
    small = F.interpolate(image[None], (151, 234), mode="bilinear", antialias=True)[0]
    labels = predict(lambda images: F.avg_pool2d(images, 4), small, (333, 517), WHOLE)
    assert labels.shape == (1, 333, 517)
    assert float((labels[0] == truth).double().mean()) > 0.97


def test_a_grid_of_heads_gets_a_map_each() -> None:
    image, net = torch.randn(3, 45, 61), Net(heads=2)
    both = predict(net, image, (30, 20), WHOLE)
    assert both.shape == (2, 30, 20)
    for number, head in enumerate(net.heads):
        assert torch.equal(predict(head, image, (30, 20), WHOLE)[0], both[number])
    slid = predict(net, image, (30, 20), SLIDE)
    assert torch.equal(predict(net.heads[1], image, (30, 20), SLIDE)[0], slid[1])


# ---- windows -------------------------------------------------------------------------------------


def test_windows_stand_where_the_published_code_has_them() -> None:
    assert inference.starts(683, 512, 341) == [0, 171]
    assert inference.starts(512, 512, 341) == [0]
    assert inference.starts(300, 512, 341) == [0]
    assert inference.starts(1200, 512, 341) == [0, 341, 682, 688]
    for side in range(1, 60):
        for crop, stride in ((16, 11), (16, 16), (7, 3)):
            seen = {
                pixel
                for start in inference.starts(side, crop, stride)
                for pixel in range(start, min(start + crop, side))
            }
            assert seen == set(range(side))


def test_an_image_of_the_crops_size_is_whole() -> None:
    image, net = torch.randn(3, 32, 32), Net()
    assert torch.equal(slide(net, image, (32, 32), (21, 21)), plainly(net(image[None]), (32, 32)))


@pytest.mark.parametrize("size", [(45, 61), (33, 32), (20, 70), (20, 24)])
def test_windows_equal_padded_maps(size: tuple[int, int]) -> None:
    """As mmsegmentation has it: each window's logits in a map of zeros, their sum over a count."""
    image, net = torch.randn(3, *size), Net()
    total, count = torch.zeros(1, 4, *size), torch.zeros(1, 1, *size)
    for top in inference.starts(size[0], 32, 21):
        for left in inference.starts(size[1], 32, 21):
            window = image[None, :, top : top + 32, left : left + 32]
            height, width = window.shape[2:]
            logits = plainly(net(window), (height, width))
            right, bottom = size[1] - left - width, size[0] - top - height
            total += F.pad(logits, (left, right, top, bottom))
            count[:, :, top : top + height, left : left + width] += 1
    assert float(count.min()) >= 1
    torch.testing.assert_close(slide(net, image, (32, 32), (21, 21)), total / count)


def test_a_constant_network_stays_constant() -> None:
    out = slide(
        lambda images: torch.full((1, 2, 8, 8), 3.0), torch.randn(3, 50, 70), (32, 32), (21, 21)
    )
    torch.testing.assert_close(out, torch.full((1, 2, 50, 70), 3.0))


def test_a_network_of_one_size_gets_no_other() -> None:
    seen = []

    def network(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[2:]))
        return images.new_zeros(1, 2, 8, 8)

    how = Inference((32, 32), (21, 21), slide=True, fixed=True)
    for size in ((20, 24), (10, 90), (32, 32), (200, 33)):
        predict(network, torch.randn(3, *size), size, how)
    assert set(seen) == {(32, 32)}
    assert at_least(torch.randn(3, 10, 90), (32, 32)).shape == (3, 32, 288)


# ---- scales and mirroring ------------------------------------------------------------------------


def test_one_scale_without_mirroring_is_the_single_scale() -> None:
    image, net = torch.randn(3, 45, 61), Net()
    for how in (WHOLE, SLIDE):
        single = predict(net, image, (50, 40), how)
        assert torch.equal(predict_scales(net, [image], (50, 40), how, flip=False), single)


def test_a_network_that_mirrors_gives_the_same_with_mirroring() -> None:
    image = torch.randn(3, 48, 64)
    how = Inference((32, 32), (16, 16), slide=True)
    pool = lambda images: F.avg_pool2d(images, 4)  # noqa: E731
    for way in (WHOLE, how):
        plain = predict_scales(pool, [image], (50, 40), way, flip=False)
        assert torch.equal(predict_scales(pool, [image], (50, 40), way), plain)


def test_probabilities_are_averaged_not_logits() -> None:
    """Two sure votes for class 0 and a very sure one for class 1: the mean of logits is for 1."""
    votes = iter([torch.tensor([4.0, 0.0]), torch.tensor([4.0, 0.0]), torch.tensor([0.0, 40.0])])
    images = [torch.zeros(3, 4, 4)] * 3
    network = lambda _: next(votes).view(1, 2, 1, 1).expand(1, 2, 2, 2)  # noqa: E731
    assert not predict_scales(network, images, (5, 5), WHOLE, flip=False).any()


def test_scales_equal_the_plain_mean() -> None:
    net, image = Net(), torch.randn(3, 40, 56)
    images = [plainly(image[None], (30, 42))[0], image, plainly(image[None], (60, 84))[0]]
    total = torch.zeros(1, 4, 37, 51)
    for scaled in images:
        size = (int(scaled.shape[1]), int(scaled.shape[2]))
        total += plainly(net(scaled[None]), size, (37, 51)).softmax(1)
        mirrored = plainly(net(scaled.flip(2)[None]), size, (37, 51))
        total += mirrored.softmax(1).flip(3)
    assert torch.equal(predict_scales(net, images, (37, 51), WHOLE), total.argmax(1))
