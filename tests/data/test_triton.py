"""The GPU's kernels without a GPU: interpreted they equal the batched operations; they compile for one."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_cases import BLOCK, CASES, COUNT, HEIGHT, WIDTH, drawn, images

from data.augment.base import IMAGENET_STD
from data.augment.fused.opcodes import programs
from data.augment.ops import JITTER_OPS, ColorJitter, GaussianBlur, Solarize
from data.augment.pipeline import photometric

triton = pytest.importorskip("triton", reason="the GPU's kernels need Triton")

ROOT = Path(__file__).resolve().parents[2]
POINTERS = {"images": "*u8", "ints": "*i32"}  # all others float32


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Give what the interpreter made of each case; it has to be asked for before Triton is imported."""
    file = tmp_path_factory.mktemp("triton") / "made.pt"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests" / "data" / "triton_cases.py"
    subprocess.run([sys.executable, str(script), str(file)], env=env, check=True, timeout=300)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_equal_the_batched_operations(
    case: str, interpreted: dict[str, Tensor]
) -> None:
    ours, plain = interpreted[case], photometric(images(case), CASES[case], drawn(case), "torch")
    assert ours.is_contiguous()
    difference = (ours - plain).abs() * torch.tensor(IMAGENET_STD)[:, None, None]
    at_threshold = 6 if any(isinstance(op, Solarize) for op in CASES[case]) else 0
    assert (difference > 1e-4).sum() <= at_threshold  # blurs are cut at four sigma of their own


def test_the_cases_reach_what_they_are_for(interpreted: dict[str, Tensor]) -> None:
    """Blocks that are not full, samples with and without a blur, every operation at every place."""
    assert HEIGHT * WIDTH > BLOCK
    assert HEIGHT * WIDTH % BLOCK
    assert 0 < drawn("blur beyond the border")["blur"].sum() < COUNT
    orders = np.concatenate([drawn(case)["order"] for case in CASES if "order" in drawn(case)])
    assert all(set(place) == set(range(len(JITTER_OPS))) for place in orders.T)
    first, other = interpreted["jitter, all contrast last"], interpreted["jitter, all hue first"]
    assert (first - other).abs().max() > 0.1


def test_numbers_of_the_operations_are_those_of_the_programs() -> None:
    pytest.importorskip("numba", reason="data.augment.fused.numba_kernels needs numba")
    import data.augment.fused.numba_kernels
    import data.augment.fused.opcodes
    import data.augment.fused.triton_kernels

    names = (
        "BRIGHTNESS",
        "CONTRAST",
        "SATURATION",
        "HUE",
        "GRAY",
        "SOLARIZE",
        "BLUR",
        "NOTHING",
        "END",
    )
    for name in names:
        number = getattr(data.augment.fused.opcodes, name)
        assert getattr(data.augment.fused.numba_kernels, name) == number
        assert getattr(data.augment.fused.triton_kernels, name).value == number
    assert names[: len(JITTER_OPS)] == tuple(name.upper() for name in JITTER_OPS)
    assert data.augment.fused.numba_kernels.PAIR == data.augment.fused.opcodes.PAIR


def test_a_blur_before_a_contrast_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import data.augment.pipeline
    from data.augment.fused.gpu import tables
    from data.augment.fused.opcodes import can_run

    jitter, blur = ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0), GaussianBlur(p=1.0)
    assert can_run((jitter, blur), "cuda")
    assert can_run((blur, Solarize()), "cuda")
    assert can_run((blur, Solarize(), jitter), "cpu")
    assert not can_run((blur, Solarize(), jitter), "cuda")
    asked = []
    monkeypatch.setattr("data.augment.fused.gpu.run_on_gpu", lambda *_: asked.append("fused"))
    monkeypatch.setattr("data.augment.pipeline._in_chunks", lambda *_: asked.append("torch"))
    on_gpu = torch.empty(1, 3, 4, 4, dtype=torch.uint8, device="meta")
    for ops in ((jitter, blur), (blur, jitter)):
        data.augment.pipeline._fused(on_gpu, ops, {})
    assert asked == ["fused", "torch"]
    plan = programs(CASES["moco_v2 1"], drawn("moco_v2 1"), COUNT)
    assert tables(plan)[2] == drawn("moco_v2 1")["blur"].sum()


@pytest.mark.parametrize("name", ["grey_sums", "points", "blur_rows", "blur_columns"])
def test_the_kernels_compile_for_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code of an H100, by the assembler that Triton brings along."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import data.augment.fused.triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(data.augment.fused.triton_kernels, name)
    sizes = {"K": 8, "INTS": 14, "FLOATS": 18, "BLOCKS": 64, "BLOCK": 1024}
    parameters = list(inspect.signature(kernel.fn).parameters)
    pointers = {*POINTERS, "floats", "sums", "constants", "out", "between"}
    types = {p: "constexpr" if p in sizes else "i32" for p in parameters}
    types |= {p: POINTERS.get(p, "*fp32") for p in parameters if p in pointers}
    source = ASTSource(kernel, types, {p: sizes[p] for p in parameters if p in sizes})
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True}
    )
    assert len(made.asm["cubin"]) > 1000
