"""Which device a process uses, and in which precision it computes."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import distributed

logger = logging.getLogger("synco")

M = TypeVar("M", bound=nn.Module)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(name: str, device: torch.device) -> str:
    """Return `name`, or for `auto` the fastest precision that is native to the device."""
    if name == "fp16" and device.type == "cpu":
        logger.warning("TRAIN.PRECISION (--precision): fp16 is slow on a CPU; fp32 or auto is not")
    if name == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        logger.warning(
            "TRAIN.PRECISION (--precision): this processor emulates bf16; fp32 or auto is two to "
            "three times faster"
        )
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Tell whether the processor itself multiplies bf16."""
    # oneDNN emulates bf16 elsewhere, and training is then two to three times slower.
    # torch.ops.mkldnn._is_mkldnn_bf16_supported is no help: it is true of every AVX-512 processor.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def choose_device(name: str) -> torch.device:
    """Return this process's device for `auto`, `cpu` or `cuda`; refuse an absent GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise ValueError(
                f"--device {name}: no GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES, "
                "or use --device cpu"
            )
        if distributed.local_rank() >= count:
            raise ValueError(
                f"--device {name}: this process has local rank {distributed.local_rank()}, the "
                f"machine {count} GPU(s); lower --nproc_per_node, or use --device cpu"
            )
        device = torch.device("cuda", distributed.local_rank())
        torch.cuda.set_device(device)
    return device


def refuse_wrong_gradients(module: nn.Module) -> None:
    """Let each convolution of `module` refuse a map for which a CPU's bf16 gradients are wrong.

    Where the stride exceeds the map's width, the weight's gradient is what was in memory before
    (oneDNN, seen with torch 2.15). The `ValueError` comes in the forward.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d) and part.stride[1] > 1 and part.kernel_size[1] > 1:
            part.register_forward_pre_hook(_Refusal(name))


class _Refusal:
    """The hook of one convolution."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, conv: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(conv, nn.Conv2d)
        width, stride = inputs[0].shape[-1], conv.stride[1]
        if width < stride and torch.is_grad_enabled() and conv.weight.requires_grad:
            raise ValueError(
                f"TRAIN.PRECISION: bf16 on a CPU gives {self.name}, a convolution of stride "
                f"{stride} over a map {width} wide, wrong gradients; use --precision fp32, or a "
                "larger DATA.IMG_SIZE"
            )


class Precision:
    """Where and in which arithmetic a run computes: device, precision and memory format."""

    def __init__(self, precision: str, device: torch.device, channels_last: bool) -> None:
        self.device = device
        self.precision = resolve_precision(precision, device)
        self.channels_last = channels_last

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward in `TRAIN.PRECISION`."""
        dtype = DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return a gradient scaler for fp16, which needs one."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def prepare(self, module: M) -> M:
        """Move a module to the device, in the memory format of the run, equal on all ranks."""
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)
        module = module.to(self.device)
        distributed.broadcast_module(module)
        if self.device.type == "cpu" and self.precision == "bf16":
            refuse_wrong_gradients(module)
        return module

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap a prepared module in `DistributedDataParallel` if there are several processes."""
        if distributed.world_size() == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        # A compiled backbone stays one graph, as on one process: DDP would cut it at its buckets,
        # and refuses activation checkpointing inside of it.
        torch._dynamo.config.optimize_ddp = False
        model = DistributedDataParallel(
            module,
            # With this, buckets keep the order of registration. Without it, DDP lays them out anew
            # after the first backward. A sum over three or more processes depends, in its last
            # bits, on an element's place in its bucket: a resumed run would leave the course of one
            # that was not interrupted.
            find_unused_parameters=True,
            gradient_as_bucket_view=True,  # one copy of the gradients instead of two
            init_sync=False,  # `prepare` has made the ranks equal
        )
        # Each rank computes the same queue; running statistics of batch norm stay its own. Set as
        # an attribute, because later versions of torch warn about the argument of this name.
        model.broadcast_buffers = False
        return model

    def views(self, images: Tensor) -> Tensor:
        """Return images (N, 3, H, W) in the run's memory format."""
        return (
            images.contiguous(memory_format=torch.channels_last) if self.channels_last else images
        )

    @contextmanager
    def evaluating(self, module: M) -> Iterator[M]:
        """Evaluate a module under autocast, without gradients; then put each part's mode back."""
        # Parts are noted one by one: a frozen backbone stays in eval mode while its head trains.
        was_training = [(part, part.training) for part in module.modules()]
        # Running statistics may differ between ranks. A checkpoint holds those of rank 0.
        for buffer in module.buffers():
            distributed.broadcast(buffer)
        module.eval()
        try:
            with torch.no_grad(), self.autocast(), _uncompiled(module):
                yield module
        finally:
            for part, training in was_training:
                part.training = training


def _uncompiled(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which compiled parts run eagerly."""
    # The shapes of an evaluation would compile anew.
    compiled = any(part._compiled_call_impl is not None for part in module.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
