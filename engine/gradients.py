"""Gradients averaged over processes, added in an order that a resumed run repeats."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# large enough for the network's bandwidth, small enough to leave during backward
_BUCKET_BYTES = 25 << 20


class _Bucket:
    """Parameters whose gradients travel together."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        first = parameters[0]
        self.flat = torch.zeros(
            sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device
        )
        parts = self.flat.split([p.numel() for p in parameters])
        self.views = [_shaped_as(p, part) for p, part in zip(parameters, parts, strict=True)]
        self.missing = 0
        self.work: Any = None

    def send(self) -> None:
        """Start to average, beside the rest of the backward pass."""
        torch._foreach_copy_(self.views, [p.grad for p in self.parameters if p.grad is not None])
        self.flat.div_(dist.get_world_size())
        self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self) -> None:
        """Wait, and make the averages the parameters' gradients."""
        self.work.wait()
        self.work = None
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view


def _shaped_as(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """View a slice with a parameter's strides (channels last): multi-tensor optimisers want them equal."""
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    if not dense:
        return part.view_as(parameter)
    return part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())


class AveragedGradients(nn.Module):
    """A module whose gradients are averages over all processes once ``backward`` returns.

    ``DistributedDataParallel`` does the same, but lays its buckets out anew after the first step,
    when it has seen the order of arrival. A sum over three or more processes depends, in its last
    bits, on an element's place in its bucket, so a run that was resumed would leave the course of
    one that was not. Here places are fixed: the reverse of the order of registration, about that of
    the backward pass.
    """

    def __init__(self, module: nn.Module, bucket_bytes: int = _BUCKET_BYTES) -> None:
        super().__init__()
        self.module = module
        self._averaging = True
        self._begun, self._sent = False, 0
        self._names = {p: name for name, p in module.named_parameters() if p.requires_grad}
        self._buckets = _pack(list(self._names)[::-1], bucket_bytes)
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(
                    lambda _, bucket=bucket: self._arrived(bucket)
                )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        self._begun, self._sent = False, 0  # whatever a backward pass that failed has left
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave the gradients of a block's backward passes to this process: they travel with a later one."""
        self._averaging = False
        try:
            yield
        finally:
            self._averaging = True

    def _arrived(self, bucket: _Bucket) -> None:
        """Note a gradient; send every bucket that is whole, in the same order on all processes."""
        if not self._averaging:
            return
        if not self._begun:
            self._begun = True
            for each in self._buckets:
                each.missing = len(each.parameters)
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        bucket.missing -= 1
        while self._sent < len(self._buckets) and self._buckets[self._sent].missing == 0:
            self._buckets[self._sent].send()
            self._sent += 1

    def _finish(self) -> None:
        """Wait for all averages; called when the backward pass ends."""
        without = [
            self._names[p] for bucket in self._buckets for p in bucket.parameters if p.grad is None
        ]
        if without:
            raise RuntimeError(
                f"no gradient reached {len(without)} trained parameters, e.g. {without[0]}: on several "
                "processes every parameter must take part in the loss, or be frozen"
            )
        self._begun, self._sent = False, 0
        for bucket in self._buckets:
            bucket.receive()


def _pack(parameters: list[nn.Parameter], bucket_bytes: int) -> list[_Bucket]:
    """Cut a list of parameters into buckets of one data type and device and about ``bucket_bytes``."""
    groups: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        last = groups[-1][-1] if groups else None
        same = last is not None and (last.dtype, last.device) == (parameter.dtype, parameter.device)
        if not same or size > room:
            groups.append([])
            room = bucket_bytes
        groups[-1].append(parameter)
        room -= size
    return [_Bucket(group) for group in groups]
