"""Start processes, and exchange values between them.

Without a process group every helper returns its argument, so no caller needs a second code path.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

_host_group: dist.ProcessGroup | None = None  # a gloo group beside nccl
_counted: Counter[str] | None = None  # by `count_shared`
_START = 1800.0  # seconds that a rank may be behind while all load, list and compile
# A host that waits names who is missing, a device that waits is only killed: the host gives up
# so many seconds earlier.
_DEVICE_GRACE = 60.0


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
    """Return the rank on this machine, as every launcher exports it."""
    return _announced("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return the number of this run's processes on this machine, as torchrun exports it."""
    return max(1, _announced("LOCAL_WORLD_SIZE", 1))


def _announced(name: str, default: int) -> int:
    """Return a number of the launcher's environment."""
    # empty counts as not given
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} in the environment is no number; unset it")
    return int(text)


def init_processes(device: torch.device) -> None:
    """Join the process group that `torchrun` announced; plain `python` announces none."""
    if is_distributed() or _announced("WORLD_SIZE", 1) < 2:
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=_START)
    store, number, size = _rendezvous(timeout)
    # torchrun's store outlives a restart, and holds the addresses of the processes before it.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        backend,
        timeout=timeout,
        store=store,
        rank=number,
        world_size=size,
        device_id=device if backend == "nccl" else None,
    )
    if backend == "nccl":  # flags travel by the host: asking must not wait for the device
        global _host_group
        _host_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the launcher's store, this process's rank and the number of processes."""
    try:
        return next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(
            f"MASTER_PORT {os.environ.get('MASTER_PORT')} is in use, perhaps by another run on this"
            " machine; give the launcher another --master_port"
        ) from error


def limit_waits(seconds: float) -> None:
    """Let no process wait longer than `seconds` for another; at the start it is half an hour."""
    if not is_distributed():
        return
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=seconds + (_DEVICE_GRACE if _host_group else 0.0)))
    if _host_group:
        set_timeout(timedelta(seconds=seconds), _host_group)


def meet() -> None:
    """Wait on the host for all ranks."""
    # Before a wait for the device: there a time limit would not name the missing rank.
    if _host_group:
        any_rank(False)


def close_processes() -> None:
    """Leave the process group, if any."""
    if is_distributed():
        dist.destroy_process_group()


def broadcast_object(value: T, src: int = 0) -> T:
    """Return rank `src`'s `value` (picklable) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=src, group=_host_group)
    return box[0]


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` with rank 0's values and return it."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def broadcast_host(tensor: Tensor) -> Tensor:
    """Overwrite a `tensor` on the host with rank 0's values and return it."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0, group=_host_group)
    return tensor


def broadcast_module(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    for tensor in [*module.parameters(), *module.buffers()]:
        broadcast(tensor.detach())


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over ranks in place and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Tell on every rank whether `flag` holds on at least one."""
    if world_size() == 1:
        return flag
    box = torch.tensor(int(flag))
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_host_group)
    return bool(box)


def all_objects(value: T) -> list[T]:
    """Return every rank's `value` (picklable), in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value, group=_host_group)
    return values


def refuse_different(digest: Callable[[], str], what: str) -> None:
    """Raise `ValueError` on every rank unless all have the same `digest` of `what`."""
    if world_size() == 1:
        return
    values = all_objects(digest())
    other = next((number for number, found in enumerate(values) if found != values[0]), 0)
    if other:
        error = ValueError(
            f"{what}: rank 0 sees {values[0]}, rank {other} sees {values[other]}. Give all "
            "processes the same files, and start again when nothing is being copied"
        )
        error.reporter = 0  # type: ignore[attr-defined]  # all ranks know it, one says it
        raise error


def to_main(value: T, src: int) -> T | None:
    """Return rank `src`'s `value` (picklable) on rank 0, `None` on the others."""
    if rank() == src == 0:
        return value
    box = [value]
    if rank() == src:
        dist.send_object_list(box, dst=0, group=_host_group)
    elif is_main():
        dist.recv_object_list(box, src=src, group=_host_group)
    return box[0] if is_main() else None


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0; return its (picklable) result or raise its error on every rank."""
    if world_size() == 1:
        return action()
    # a rank that failed alone would leave the others waiting
    value, error = broadcast_object(_attempt(action) if is_main() else (None, None))
    if error is not None:
        raise error
    return cast(T, value)


def on_all(action: Callable[[], T]) -> T:
    """Run `action`, which waits for no other rank, on every rank and return each rank's own result.

    Where it fails, all ranks raise the error of the lowest rank that failed.
    """
    if world_size() == 1:
        return action()
    value, own = _attempt(action)
    for error in all_objects(own):
        if error is not None:
            raise error
    return cast(T, value)


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return (result, None) or (None, error)."""
    try:
        return action(), None
    except Exception as error:
        # pickled with the error; `utils.cli` reports an error on this rank only
        error.reporter = rank()  # type: ignore[attr-defined]
        return None, error


@contextmanager
def count_shared() -> Iterator[Counter[str]]:
    """Count the numbers that this process shares with the others, or would if there were any."""
    global _counted
    _counted = Counter()
    try:
        yield _counted
    finally:
        _counted = None


def note_shared(how: str, tensor: Tensor) -> None:
    """Count a tensor that is `gathered` or `shuffled`."""
    if _counted is not None:
        _counted[how] += tensor.numel()


@torch.no_grad()
def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate (N, ...) of every rank to (N*W, ...), without gradient; N must be equal."""
    note_shared("gathered", tensor)
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
    sizes = all_objects(tensor.shape[0])  # by the host: it is where a missing rank is noticed
    # a collective needs equal shapes
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = gather_rows(padded).chunk(world_size())
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@torch.no_grad()
def exchange_rows(tensor: Tensor, order: Tensor) -> Tensor:
    """Return this process's share of all rows in a common `order`; a row travels at most once.

    `tensor` is (N, ...), N equal on all ranks; `order` (N * W,), on the host and the same
    everywhere, numbers the rows in rank order. Rank r gets rows `order[r * N : (r + 1) * N]`, in
    that order and in the memory format of `tensor`.
    """
    note_shared("shuffled", tensor)
    channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    # indexing would give up the format
    rows = tensor.permute(0, 2, 3, 1) if channels_last else tensor
    wanted = order.view(world_size(), -1)
    owner = torch.div(wanted, tensor.shape[0], rounding_mode="floor")
    mine = owner == rank()
    # Without `non_blocking` the host would wait for all that the device has still to do.
    sent = rows[(wanted[mine] - rank() * tensor.shape[0]).to(tensor.device, non_blocking=True)]
    if world_size() > 1:
        arriving = owner[rank()].bincount(minlength=world_size()).tolist()
        received = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, sent.contiguous(), arriving, mine.sum(1).tolist())
        place = owner[rank()].argsort(stable=True)  # rows come sorted by their owner
        # the inverse permutation: back into the order of `wanted`
        sent = received[place.argsort().to(tensor.device, non_blocking=True)]
    return sent.permute(0, 3, 1, 2) if channels_last else sent
