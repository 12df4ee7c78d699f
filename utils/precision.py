"""Which arithmetic a forward runs in: ``TRAIN.PRECISION``, or what the device is fast at."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(name: str, device: torch.device) -> str:
    """Return ``name``, or for ``auto`` the fastest of fp32, bf16 and fp16 that is native to the device."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Tell whether the processor multiplies bf16; where oneDNN emulates it, training is two to three times
    slower.

    ``torch.ops.mkldnn._is_mkldnn_bf16_supported`` is no help: it is true of every AVX-512 processor.
    """
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
