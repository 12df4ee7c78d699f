"""Which device a process uses, and which arithmetic: what the configuration says, or what is fast there."""

import torch

from utils import distributed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(name: str, device: torch.device) -> str:
    """Return ``name``, or for ``auto`` the fastest of fp32, bf16 and fp16 that is native to the device."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Tell whether the processor multiplies bf16: emulated by oneDNN, it trains two to three times slower.

    ``torch.ops.mkldnn._is_mkldnn_bf16_supported`` is no help: it is true of every AVX-512 processor.
    """
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def choose_device(name: str) -> torch.device:
    """Return this process's device for ``auto``, ``cpu`` or ``cuda``; an absent GPU is refused by name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if distributed.local_rank() >= count:
            raise ValueError(
                f"--device {name}: this process has local rank {distributed.local_rank()}, the machine "
                f"{count} GPU(s); lower --nproc_per_node, or use --device cpu"
            )
        device = torch.device("cuda", distributed.local_rank())
        torch.cuda.set_device(device)
    return device
