"""What only a GPU can show; skipped elsewhere. Run by tools/gpu_check.sh."""

import copy
from pathlib import Path

import pytest
import torch
from plain_loss import queue_contrast_plain

from data.augment.recipes import build_recipe
from data.device_decode import _decode_jpegs
from data.loader import GlobalLoader
from data.sources import ArraySource
from data.sources.folder import imagefolder
from models import FRAMEWORKS, assemble_framework
from models.parts.corruption import corrupt, corrupt_plain, draw_corruption
from models.parts.losses import queue_contrast
from models.parts.negatives import SyntheticConfig
from utils.schedules import Progress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OPTIONS = {
    "queue_size": 64,
    "num_hard": 16,
    "num_synthetic": [8] * 6,
    "warmup_epochs": 0,
    "hidden_dim": 64,
}


def small_source() -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ArraySource("noise", images, torch.arange(64) % 4, list("abcd"))


@pytest.mark.parametrize("counts", [None, (7, 6, 5, 4, 3, 2)])
def test_closed_form_equals_plain(counts: tuple[int, ...] | None) -> None:
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, device="cuda"), dim=1)  # noqa: E731
    queries, keys, queue = unit(32, 64).requires_grad_(), unit(32, 64), unit(512, 64)
    config = SyntheticConfig(32, counts) if counts else None
    results = []
    for function in (queue_contrast, queue_contrast_plain):
        torch.manual_seed(0)
        loss = function(queries, keys, queue, 0.2, config).loss
        results.append((loss.detach(), torch.autograd.grad(loss, queries)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["moco_v2", "byol"])
def test_views_equal_those_of_the_cpu(recipe: str) -> None:
    views = []
    for device in ("cpu", "cuda"):
        loader = GlobalLoader(
            small_source(),
            build_recipe(recipe, 32),
            global_batch=32,
            seed=0,
            device=torch.device(device),
        )
        views.append([view.cpu() for view in next(iter(loader.from_step(0, 1)))[1][0].views])
    for ours, theirs in zip(*views, strict=True):
        assert (ours - theirs).abs().mean() < 1e-3  # a crop may round to the neighbouring level


@pytest.mark.parametrize("recipe", ["moco_v2", "byol", "moco_v1"])
def test_views_of_the_four_kernels_equal_those_of_the_batched_operations(recipe: str) -> None:
    views = []
    for backend in ("torch", "fused"):
        loader = GlobalLoader(
            small_source(),
            build_recipe(recipe, 224),
            global_batch=32,
            seed=0,
            device=torch.device("cuda"),
            backend=backend,
        )
        views.append(next(iter(loader.from_step(0, 1)))[1][0].views)
    for ours, theirs in zip(*views, strict=True):
        # levels at the threshold of Solarize
        assert ((ours - theirs).abs() > 1e-3).float().mean() < 1e-5


def test_corruption_at_once_equals_the_loop_over_images() -> None:
    images, drawn = torch.randn(9, 3, 96, 96, device="cuda"), draw_corruption(9, 96, 96)
    noise = torch.randn_like(images)
    found, expected = (function(images, drawn, noise) for function in (corrupt, corrupt_plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("method", FRAMEWORKS)
def test_three_steps_repeat(method: str, precision: torch.dtype | None) -> None:
    known = {name: value for name, value in OPTIONS.items() if name in _options(method)}
    start = assemble_framework(
        method, known, {"name": "resnet18", "stem": "cifar"}, img_size=32
    ).cuda()
    states = []
    for _ in range(2):
        framework = copy.deepcopy(start)
        optimizer = torch.optim.SGD(
            [p for p in framework.parameters() if p.requires_grad], 0.05, fused=True
        )
        for step in range(3):
            torch.manual_seed(step)
            images = [torch.randn(16, 3, 32, 32, device="cuda") for _ in range(2)]
            with torch.autocast("cuda", precision or torch.float16, enabled=precision is not None):
                loss = framework(images, Progress(step, 4, 8))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            framework.after_step(Progress(step, 4, 8))
        states.append([p.detach().clone() for p in framework.parameters()])
    assert all(torch.isfinite(p).all() for p in states[0])
    torch.testing.assert_close(states[0], states[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_steps_train_as_plain_ones(cuda_graphs: bool) -> None:
    start = assemble_framework(
        "moco_v2", {"queue_size": 64}, {"name": "resnet18", "stem": "cifar"}
    ).cuda()
    losses = {}
    for compiled in (False, True):
        framework = copy.deepcopy(start)
        if compiled:
            framework.compile_backbones(cuda_graphs=cuda_graphs)
        optimizer = torch.optim.SGD(
            [p for p in framework.parameters() if p.requires_grad], 0.05, fused=True
        )
        losses[compiled] = []
        for step in range(6):  # graphs are warmed up, recorded, replayed
            torch.manual_seed(step)
            images = [torch.randn(16, 3, 32, 32, device="cuda") for _ in range(2)]
            loss = framework(images, Progress(step, 4, 8))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            framework.after_step(Progress(step, 4, 8))
            losses[compiled].append(float(loss))
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


def test_jpegs_decoded_on_the_device_give_nearly_the_same_views(tmp_path: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(8):
        coarse = torch.rand((1, 3, 12, 15), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (240, 300 + number), mode="bicubic").clamp(
            0, 1
        )
        pixels = (smooth[0].permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "train" / "a" / f"{number}.jpg", quality=95)
    views = []
    for decode in ("worker", "device"):
        loader = GlobalLoader(
            imagefolder(str(tmp_path), "train"),
            build_recipe("linear", 64),
            global_batch=8,
            seed=0,
            device=torch.device("cuda"),
            decode=decode,
        )
        views.append(next(iter(loader.from_step(0, 1)))[1][0].views[0])
    assert (views[0] - views[1]).abs().mean() < 0.02


def test_decoding_does_not_write_where_a_running_step_reads() -> None:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (224, 224), (9, 90, 200)).save(buffer, "JPEG")
    files = [torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)] * 16
    device = torch.device("cuda", torch.cuda.current_device())
    for _ in range(10):
        read = [torch.full((3, 224, 224), 7, dtype=torch.uint8, device=device) for _ in files]
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)  # the step is still running
        sums = [image.sum() for image in read]
        del read  # its memory is free for the host
        decoded = _decode_jpegs(files, device)
        assert [int(total) for total in sums] == [7 * 3 * 224 * 224] * len(files)
        assert all(abs(float(image[0].float().mean()) - 9) < 3 for image in decoded)


def _options(method: str) -> dict[str, object]:
    from models import framework_options

    return framework_options()[method]
