"""The fused CPU path: equal to the batched operations, and a sample's bits a function of the sample alone."""

import logging
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import data.augment.pipeline
from data.augment.base import IMAGENET_STD, Draws, View, device_ops, sample_keys
from data.augment.ops import (
    JITTER_OPS,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomErasing,
    Solarize,
)
from data.augment.pipeline import choose_backend, draw_photometric, photometric
from data.augment.recipes import RECIPES, build_recipe
from data.loader import GlobalLoader
from data.sources.base import ArraySource

pytest.importorskip("numba", reason="the fused path needs numba")

import data.augment.fused.cpu
from data.augment.fused.opcodes import WRITERS

ROOT = Path(__file__).resolve().parents[2]
COUNT = 24


@pytest.fixture(scope="module")
def crops(photos: np.ndarray) -> Tensor:
    """Give uint8 (24,3,80,96), not square, no multiple of anything."""
    return (
        torch.from_numpy(photos[:, 3:83, 5:101].copy())
        .permute(0, 3, 1, 2)
        .repeat(4, 1, 1, 1)
        .contiguous()
    )


def drawn(view: View, count: int = COUNT) -> Draws:
    """Return the draws of `view` for `count` samples."""
    return draw_photometric(view, sample_keys(2, 0, np.arange(count), 0))


def fused(images: Tensor, view: View, draws: Draws) -> Tensor:
    """Run the fused path."""
    return photometric(images, view, draws, "fused")


def assert_near(ours: Tensor, plain: Tensor, view: View) -> None:
    """Assert equality to 1e-4 in units of [0,1], but for single levels at the threshold of Solarize."""
    assert ours.is_contiguous()
    difference = (ours - plain).abs() * torch.tensor(IMAGENET_STD)[:, None, None]
    allowed = 1e-5 if any(isinstance(op, Solarize) for op in view) else 0.0
    assert (difference > 1e-4).float().mean() <= allowed
    assert difference.mean() < 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_near_the_batched_operations(crops: Tensor, name: str) -> None:
    for view in build_recipe(name, 80):
        draws = drawn(view)
        assert_near(fused(crops, view, draws), photometric(crops, view, draws, "torch"), view)


@pytest.mark.parametrize(
    "op",
    [
        HorizontalFlip(1.0),
        ColorJitter(0.9, 0.0, 0.0, 0.0, p=1.0),
        ColorJitter(0.0, 0.9, 0.0, 0.0, p=1.0),
        ColorJitter(0.0, 0.0, 0.9, 0.0, p=1.0),
        ColorJitter(0.0, 0.0, 0.0, 0.5, p=1.0),
        ColorJitter(0.9, 0.9, 0.9, 0.5, p=0.5),
        Grayscale(1.0),
        Solarize(128, 1.0),
        Solarize(37, 1.0),
        Solarize(254, 0.5),
        GaussianBlur((0.1, 0.1), p=1.0),
        GaussianBlur((2.0, 2.0), p=1.0),
        GaussianBlur((0.1, 4.3), p=0.7),
        GaussianBlur((0.05, 0.2), p=1.0),
    ],
    ids=str,
)
def test_every_operation_is_near_the_batched_one(crops: Tensor, op: object) -> None:
    draws = drawn((op,))
    ours, plain = fused(crops, (op,), draws), photometric(crops, (op,), draws, "torch")
    assert_near(ours, plain, ())  # one operation alone solarizes the same levels


def test_levels_at_the_threshold_are_inverted() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    for threshold in range(256):
        view = (Solarize(threshold, 1.0),)
        difference = fused(ramp, view, drawn(view, 1)) - photometric(
            ramp, view, drawn(view, 1), "torch"
        )
        assert difference.abs().max() < 1e-4


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (3, 1, 0, 2), (1, 2, 3, 0), (2, 3, 1, 0), (1, 0, 3, 2)]
)
def test_jitter_runs_in_the_order_of_the_sample_and_clamps_in_between(
    crops: Tensor, order: tuple[int, ...]
) -> None:
    view = (ColorJitter(0.9, 0.9, 0.9, 0.5, p=1.0),)
    draws = drawn(view) | {"order": np.tile(np.array(order), (COUNT, 1))}
    for name, value in zip(JITTER_OPS, (1.9, 0.2, 1.8, -0.4), strict=True):
        draws[name] = np.full(COUNT, value)
    ours = fused(crops, view, draws)
    assert_near(ours, photometric(crops, view, draws, "torch"), view)
    other = draws | {"order": draws["order"][:, ::-1]}
    assert (ours - fused(crops, view, other)).abs().max() > 0.1


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 40), (33, 7), (3, 1500)])
def test_images_of_any_shape(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (6, 3, *size), dtype=torch.uint8, generator=torch.manual_seed(1))
    view = (*build_recipe("byol", 8)[1][1:-2], GaussianBlur((0.5, 2.0), p=1.0))
    draws = drawn(view, 6)
    assert_near(fused(images, view, draws), photometric(images, view, draws, "torch"), view)


_OPS = {
    "jitter": ColorJitter(0.6, 0.6, 0.6, 0.2, p=0.9),
    "blur": GaussianBlur((0.3, 2.0), p=0.8),
    "gray": Grayscale(0.3),
    "solarize": Solarize(100, 0.5),
    "flip": HorizontalFlip(0.5),
}


@pytest.mark.parametrize(
    "names",
    [
        "blur jitter solarize",
        "solarize blur gray jitter flip",
        "flip gray jitter blur",
        "blur flip gray",
    ],
)
def test_operations_run_in_the_order_of_the_view(crops: Tensor, names: str) -> None:
    view = tuple(_OPS[name] for name in names.split())
    draws = drawn(view)
    assert_near(fused(crops, view, draws), photometric(crops, view, draws, "torch"), view)


def test_extreme_colours() -> None:
    levels = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    images = (
        torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 12, 18).repeat(COUNT, 1, 1, 1)
    )
    view = (ColorJitter(0.9, 0.9, 0.9, 0.5, p=1.0), Grayscale())
    draws = drawn(view)
    assert_near(fused(images, view, draws), photometric(images, view, draws, "torch"), view)


@pytest.mark.parametrize("name", ["moco_v2", "byol", "sit"])
def test_bits_depend_on_the_sample_alone(
    crops: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = build_recipe(name, 80)[1]
    draws = drawn(view)
    whole = fused(crops, view, draws)
    for chosen in (slice(5, 6), slice(0, None, 2), slice(7, 20)):
        part = fused(crops[chosen].contiguous(), view, {key: v[chosen] for key, v in draws.items()})
        assert torch.equal(part, whole[chosen])
    assert torch.equal(
        fused(crops.contiguous(memory_format=torch.channels_last), view, draws), whole
    )
    assert torch.equal(fused(crops[:, :, :, ::1].flip(-1).flip(-1), view, draws), whole)
    monkeypatch.setattr("data.augment.fused.cpu._SMALL_BATCH", 0)
    for threads in (2, 3, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(fused(crops, view, draws), whole)


def test_the_input_is_not_changed(crops: Tensor) -> None:
    before, view = crops.clone(), build_recipe("byol", 80)[1]
    fused(crops, view, drawn(view))
    assert torch.equal(crops, before)


def test_erasing_follows_the_fused_operations(crops: Tensor) -> None:
    view = (*build_recipe("linear", 80)[0], RandomErasing(0.9))
    images = crops[:, :, :, :80].contiguous()
    draws = drawn(view)
    erased = fused(images, view, draws)
    assert_near(erased, photometric(images, view, draws, "torch"), view)
    touched = (erased != fused(images, view[:-1], draws)).flatten(1).any(1)
    assert touched.tolist() == draws["erase"].tolist()


def _in_child(connection: object, images: Tensor, view: View, draws: Draws) -> None:
    connection.send(fused(images, view, draws).numpy().tobytes())


def test_a_forked_process_gives_the_same_bits(
    crops: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.augment.fused.cpu._SMALL_BATCH", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    view = build_recipe("byol", 80)[1]
    draws = drawn(view)
    expected = fused(crops, view, draws).numpy().tobytes()  # threads have run here before the fork
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(there, crops, view, draws))
    child.start()
    assert here.poll(60)
    assert here.recv() == expected
    child.join()


def test_a_cache_that_cannot_be_used_costs_only_the_compilation(
    crops: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel, asked = data.augment.fused.cpu._kernel(), []

    def compiled(cache: bool) -> object:
        asked.append(cache)
        if cache:
            raise OSError("no space left on device")
        return kernel

    monkeypatch.setattr("data.augment.fused.cpu.compiled", compiled)
    data.augment.fused.cpu._kernel.cache_clear()
    view = build_recipe("cifar", 80)[0]
    try:
        with caplog.at_level(logging.INFO, logger="synco"):
            assert fused(crops, view, drawn(view)).isfinite().all()
            fused(crops, view, drawn(view))
    finally:
        data.augment.fused.cpu._kernel.cache_clear()
    assert asked == [True, False]
    assert caplog.text.count("cannot be kept on disk (no space left on device)") == 1


def test_a_long_compilation_is_logged_once(
    crops: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = data.augment.fused.cpu._kernel()
    noticed = []

    class Timer:
        def __init__(self, seconds: float, function: object, arguments: list[str]) -> None:
            noticed.append((function, arguments))

        def start(self) -> None:
            function, arguments = noticed[-1]
            function(*arguments)

        def cancel(self) -> None:
            noticed.append("cancelled")

    monkeypatch.setattr("data.augment.fused.cpu.threading.Timer", Timer)
    monkeypatch.setattr("data.augment.fused.cpu.compiled", lambda cache: kernel)
    data.augment.fused.cpu._kernel.cache_clear()
    view = build_recipe("cifar", 80)[0]
    try:
        with caplog.at_level(logging.INFO, logger="synco"):
            for _ in range(2):
                fused(crops, view, drawn(view))
    finally:
        data.augment.fused.cpu._kernel.cache_clear()
    assert caplog.text.count("compiling the fused augmentation, once") == 1
    assert noticed[-1] == "cancelled"


@pytest.mark.slow
def test_the_kernel_is_compiled_anew_where_nothing_can_be_written(tmp_path: Path) -> None:
    """As in a read-only installation without a home: all places of numba's cache are refused."""
    code = (
        "import tempfile\n"
        "def refuse(*a, **k): raise PermissionError('read-only')\n"
        "from numba.core import caching\n"
        "caching._CacheLocator.ensure_cache_path = refuse\n"
        "import torch, numpy as np\n"
        "from data.augment.pipeline import photometric\n"
        "from data.augment.ops import HorizontalFlip\n"
        "images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)\n"
        "flips = {'flip': np.array([True, False])}\n"
        "print(photometric(images, (HorizontalFlip(),), flips, 'fused').shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "torch.Size([2, 3, 4, 4])", done.stderr


def test_numba_is_imported_only_when_something_is_augmented() -> None:
    code = (
        "import sys, torch, numpy as np, data.loader, data.augment.preview\n"
        "from data.augment.pipeline import photometric\n"
        "photometric(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (), {})\n"
        "assert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_backends_are_chosen_by_device_and_by_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_backend(name, cpu) for name in ("auto", "fused", "torch")] == [
        "fused",
        "fused",
        "torch",
    ]
    assert [choose_backend(name, gpu) for name in ("auto", "torch")] == ["torch", "torch"]
    with pytest.raises(ValueError, match=r"AUG.BACKEND 'fused' runs on a CPU or a GPU, not on mps"):
        choose_backend("fused", torch.device("mps"))
    data.augment.pipeline._has.cache_clear()
    monkeypatch.setattr("data.augment.pipeline.importlib.util.find_spec", lambda name: None)
    try:
        with caplog.at_level(logging.INFO, logger="synco"):
            assert [choose_backend("auto", cpu) for _ in range(3)] == ["torch"] * 3
        assert caplog.text.count("numba is not installed") == 1
        with pytest.raises(ValueError, match=r"AUG.BACKEND 'fused' needs numba: pip install numba"):
            choose_backend("fused", cpu)
        with pytest.raises(
            ValueError, match=r"AUG.BACKEND 'fused' needs triton: pip install triton"
        ):
            choose_backend("fused", gpu)
        monkeypatch.setattr(
            "data.augment.pipeline.importlib.util.find_spec", lambda name: name == "triton"
        )
        data.augment.pipeline._has.cache_clear()
        assert choose_backend("fused", gpu) == "fused"
    finally:
        data.augment.pipeline._has.cache_clear()


def test_loaders_pass_their_backend_on() -> None:
    images = torch.randint(
        0, 256, (8, 3, 20, 20), dtype=torch.uint8, generator=torch.manual_seed(0)
    )
    source = ArraySource("toy", images, torch.zeros(8, dtype=torch.int64), ["0"])
    recipe = build_recipe("moco_v2", 16)
    for resident in (True, False):
        options = {
            "global_batch": 8,
            "seed": 1,
            "device": torch.device("cpu"),
            "resident": resident,
        }
        views = {
            name: next(GlobalLoader(source, recipe, backend=name, **options).from_step(0, 1))[1][
                0
            ].views[0]
            for name in ("auto", "fused", "torch")
        }
        assert torch.equal(views["auto"], views["fused"])
        assert not torch.equal(views["auto"], views["torch"])
        assert_near(views["fused"], views["torch"], recipe[0])


def test_all_operations_of_recipes_are_known() -> None:
    kinds = {
        type(op) for name in RECIPES for view in build_recipe(name, 80) for op in device_ops(view)
    }
    assert kinds == {HorizontalFlip, ColorJitter, Grayscale, GaussianBlur, Solarize}
    assert kinds <= set(WRITERS)
