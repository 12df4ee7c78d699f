"""Processes, collectives that also work on one process, and the one source of randomness.

Every helper is the identity when no process group is initialised, so no caller needs a second code path.
"""

import hashlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

_host_group: Any = None  # a gloo group beside nccl


def is_distributed() -> bool:
    """Tell whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank, 0 on a single process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes, 1 on a single process."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Tell whether this is the process that writes files."""
    return rank() == 0


def local_rank() -> int:
    """Return the rank on this machine, as every launcher exports it in ``LOCAL_RANK``."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def init_processes(device: torch.device, timeout_minutes: float = 10.0) -> None:
    """Join the process group that ``torchrun`` or ``torch.distributed.launch`` announced, if any.

    Without ``WORLD_SIZE`` in the environment (plain ``python``) this does nothing.
    """
    if is_distributed() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, timeout=timeout, device_id=device if backend == "nccl" else None)
    if backend == "nccl":  # flags travel by the host: asking must not wait for the device
        global _host_group
        _host_group = dist.new_group(backend="gloo", timeout=timeout)


def close_processes() -> None:
    """Leave the process group, if any."""
    if is_distributed():
        dist.destroy_process_group()


def keyed_seed(*parts: int | str) -> int:
    """Hash ``parts`` to a 63-bit seed: the same on every rank, machine and Python version.

    Randomness is keyed and never stored, so a run's draws depend neither on workers nor on where it was
    resumed.
    """
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def barrier() -> None:
    """Wait for every process."""
    if is_distributed():
        dist.barrier()


def broadcast_object(value: T, src: int = 0) -> T:
    """Return rank ``src``'s ``value`` (picklable) on every rank."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=src, group=_host_group)
    return box[0]


def broadcast(tensor: Tensor, src: int = 0) -> Tensor:
    """Overwrite ``tensor`` with rank ``src``'s values and return it."""
    if world_size() > 1:
        dist.broadcast(tensor, src=src)
    return tensor


def broadcast_module(module: nn.Module, src: int = 0) -> None:
    """Give every rank the parameters and buffers of rank ``src``, so that all start from one state."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=src)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over ranks in place and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Tell on every rank whether ``flag`` holds on at least one."""
    if world_size() == 1:
        return flag
    box = torch.tensor(int(flag))
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_host_group)
    return bool(box)


def on_main(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 only and return its (picklable) result on every rank.

    An error there is raised on every rank: a rank that fails alone would leave the others waiting.
    """
    if world_size() == 1:
        return action()
    value, error = broadcast_object(_attempt(action) if is_main() else (None, None))
    if error is not None:
        raise error
    return cast(T, value)


def on_all(action: Callable[[], T]) -> T:
    """Run ``action``, which waits for no other rank, on every rank and return each rank's own result.

    Where it fails on some, the lowest of these ranks' error is raised on all, which that rank reports.
    """
    if world_size() == 1:
        return action()
    value, error = _attempt(action)
    errors: list[Any] = [None] * world_size()
    dist.all_gather_object(errors, error, group=_host_group)
    for error in errors:
        if error is not None:
            raise error
    return cast(T, value)


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return (result, None) or (None, error); the error names this rank as the one to report it."""
    try:
        return action(), None
    except Exception as error:
        error.reporter = rank()  # type: ignore[attr-defined]  # pickled with the error, read in utils.cli
        return None, error


@torch.no_grad()
def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate (N, ...) of every rank in rank order to (N*W, ...), without gradient; N must be equal."""
    if world_size() == 1:
        return tensor.detach()
    tensor = tensor.detach().contiguous()
    out = tensor.new_empty((tensor.shape[0] * world_size(), *tensor.shape[1:]))
    dist.all_gather_into_tensor(out, tensor)
    return out


@torch.no_grad()
def gather_uneven(tensor: Tensor) -> Tensor:
    """Concatenate (N_r, ...) of every rank in rank order; the N_r may differ."""
    if world_size() == 1:
        return tensor.detach()
    sizes = gather_rows(torch.tensor([tensor.shape[0]], device=tensor.device)).tolist()
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = gather_rows(padded).chunk(world_size())
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
