"""Rebuild tensors, arrays and containers from stand-ins, by functions of our own that trust no size.

Every shape is checked against the bytes that are really in the file; the rest stays a ``StandIn``.
"""

import collections
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.checkpoints.inert import ForeignFileError, Name, Reference, StandIn

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


def storage_identities(value: Any) -> Iterator[tuple]:
    """Yield the checked persistent ids in a tree of stand-ins."""
    stack, seen = [value], set()
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Reference):
            yield checked_identity(node)
        elif isinstance(node, StandIn):
            stack += [*node.arguments, node.state, *node.items, *node.entries.values()]
        elif isinstance(node, dict):
            stack += node.values()
        elif isinstance(node, (list, tuple)):
            stack += node


def flat_tensor(raw: bytes, dtype: torch.dtype) -> Tensor:
    """Return a copy of little-endian bytes as a flat tensor."""
    return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def checked_identity(reference: Reference) -> tuple:
    """Return ('storage', type, key, location, count, ...) of a reference, or raise ``ForeignFileError``."""
    identity = reference.identity
    if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
        raise ForeignFileError("refers to something that is no storage of a tensor")
    _, kind, key, _, count = identity[:5]
    if not (
        isinstance(kind, Name) and kind.module in ("torch", "torch.storage") and kind.attribute in STORAGES
    ):
        raise ForeignFileError(f"has a storage of the unknown type {kind}")
    if not isinstance(key, str) or not isinstance(count, int):
        raise ForeignFileError("has a storage without a proper name or size")
    return identity


class Rebuilder:
    """Turn the stand-ins of tensors, arrays and containers into values, each object once."""

    def __init__(self, storage: Callable[[str], bytes] | None) -> None:
        self.storage = storage
        self.storages: dict[str, Tensor] = {}
        self.done: dict[int, Any] = {}
        self.kept: list[Any] = []  # keeps the ids of `done` valid
        self.foreign: set[str] = set()

    def finish(self, value: Any) -> tuple[Any, list[str]]:
        """Return the value and the names of what stayed a stand-in; ``storage(key)`` gives raw bytes."""
        return self._value(value), sorted(self.foreign)

    def _value(self, node: Any) -> Any:
        if id(node) in self.done:
            return self.done[id(node)]
        self.kept.append(node)
        if isinstance(node, StandIn):
            result = self._stand_in(node)
        elif isinstance(node, Reference):
            raise ForeignFileError("holds a bare storage; save tensors instead")
        elif isinstance(node, Name):
            result = self._name(node)
        elif type(node) is tuple:
            result = tuple(self._value(item) for item in node)
        elif type(node) is list:
            result = self.done[id(node)] = []
            result.extend(self._value(item) for item in node)
        elif type(node) is dict:
            result = self.done[id(node)] = {}
            self._fill(result, node)
        else:
            result = node
        self.done[id(node)] = result
        return result

    def _fill(self, target: dict, entries: Mapping[Any, Any]) -> None:
        for key, item in entries.items():
            plain = self._value(key) if isinstance(key, (StandIn, Name)) else key
            target[plain if isinstance(plain, (str, int, tuple)) else str(plain)] = self._value(item)

    def _name(self, node: Name) -> Any:
        """Keep what is named, not called: types and dtypes in configurations."""
        dtype = getattr(torch, node.attribute, None) if node.module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        self.foreign.add(str(node))
        return StandIn(node)

    def _stand_in(self, node: StandIn) -> Any:
        known = _REBUILD.get(str(node))
        if known is not None:
            return known(self, node)
        self.foreign.add(str(node))
        result = self.done[id(node)] = StandIn(node.target)
        result.arguments = tuple(self._value(item) for item in node.arguments)
        result.state = self._value(node.state)
        result.items = [self._value(item) for item in node.items]
        self._fill(result.entries, node.entries)
        return result

    # each returns the value of one known construction
    def _tensor(self, node: StandIn) -> Tensor:
        reference, offset, shape, stride, *_ = node.arguments
        base = self._base(reference)
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise ForeignFileError("holds a tensor with an impossible shape")
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=base.dtype)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if last >= base.numel() or math.prod(shape) > base.numel():
            raise ForeignFileError(f"holds a tensor of shape {shape} but only {base.numel()} values for it")
        return base.as_strided(shape, stride, offset)

    def _base(self, reference: Any) -> Tensor:
        """Return a storage as a flat tensor, its size checked against the bytes in the file."""
        if not isinstance(reference, Reference) or self.storage is None:
            raise ForeignFileError("holds a tensor without a storage")
        _, kind, key, _, count, *_ = checked_identity(reference)
        dtype = STORAGES[kind.attribute]
        if key not in self.storages:
            raw = self.storage(key)
            if len(raw) != count * dtype.itemsize:
                raise ForeignFileError(
                    f"declares {count} values in storage {key!r}, which has {len(raw)} bytes"
                )
            self.storages[key] = flat_tensor(raw, dtype)
        return self.storages[key].view(dtype)

    def _parameter(self, node: StandIn) -> Any:
        return self._value(node.arguments[0])

    def _mapping(self, node: StandIn) -> dict:
        result = self.done[id(node)] = collections.OrderedDict()
        pairs = node.arguments[-1] if node.arguments and isinstance(node.arguments[-1], (list, dict)) else []
        self._fill(result, dict(pairs) if isinstance(pairs, dict) else {pair[0]: pair[1] for pair in pairs})
        self._fill(result, node.entries)
        return result

    def _encoded(self, node: StandIn) -> bytes:
        text, encoding = node.arguments
        if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise ForeignFileError("holds bytes in an unusual encoding")
        return text.encode("latin-1")

    def _builtin(self, node: StandIn) -> Any:
        """Rebuild what old protocols write as calls: sets, and bytes without any."""
        kind = {"set": set, "frozenset": frozenset, "bytes": bytes, "bytearray": bytearray}[
            node.target.attribute
        ]
        items = self._value(node.arguments[0]) if node.arguments else []
        if not isinstance(items, (list, bytes)) or not all(isinstance(item, (str, int)) for item in items):
            raise ForeignFileError(f"holds a {kind.__name__} of more than numbers and text")
        return kind(items)

    def _dtype(self, node: StandIn) -> np.dtype:
        code = node.arguments[0]
        order = node.state[1] if isinstance(node.state, tuple) and len(node.state) > 1 else "<"
        if not isinstance(code, str) or not code or code[0] not in "biufcSU?" or not code[1:].isdigit():
            raise ForeignFileError(f"holds an array of the type {code!r}; only numbers and text are read")
        return np.dtype(code).newbyteorder(">" if order == ">" else "<")

    def _array(self, node: StandIn) -> np.ndarray:
        _, shape, dtype, fortran, raw = node.state
        return self._filled(raw, dtype, shape, "F" if fortran else "C")

    def _buffer_array(self, node: StandIn) -> np.ndarray:
        raw, dtype, shape, order = node.arguments
        return self._filled(raw, dtype, shape, order)

    def _scalar(self, node: StandIn) -> Any:
        dtype, raw = node.arguments
        return self._filled(raw, dtype, (), "C")[()]

    def _filled(self, raw: Any, dtype: Any, shape: tuple, order: str) -> np.ndarray:
        data, kind = self._value(raw), self._value(dtype)
        data = data.encode("latin-1") if isinstance(data, str) else data
        if not isinstance(kind, np.dtype) or not isinstance(data, (bytes, bytearray)):
            raise ForeignFileError("holds an array that is not made of numbers or text")
        if kind.itemsize == 0 or len(data) != math.prod(shape) * kind.itemsize:
            raise ForeignFileError(f"holds an array of shape {shape} but {len(data)} bytes for it")
        return np.frombuffer(bytearray(data), kind).reshape(shape, order="F" if order == "F" else "C")


_REBUILD: dict[str, Callable[[Rebuilder, StandIn], Any]] = {
    "torch._utils._rebuild_tensor": Rebuilder._tensor,
    "torch._utils._rebuild_tensor_v2": Rebuilder._tensor,
    "torch._utils._rebuild_parameter": Rebuilder._parameter,
    "torch._utils._rebuild_parameter_with_state": Rebuilder._parameter,
    "torch.Size": lambda rebuilder, node: torch.Size(rebuilder._value(node.arguments[0])),
    "torch.device": lambda rebuilder, node: str(node.arguments[0]),
    "collections.OrderedDict": Rebuilder._mapping,
    "collections.defaultdict": Rebuilder._mapping,
    "_codecs.encode": Rebuilder._encoded,
    **{
        f"{module}.{kind}": Rebuilder._builtin
        for module in ("builtins", "__builtin__")
        for kind in ("set", "frozenset", "bytes", "bytearray")
    },
    "numpy.dtype": Rebuilder._dtype,
    "numpy.core.multiarray._reconstruct": Rebuilder._array,
    "numpy._core.multiarray._reconstruct": Rebuilder._array,
    "numpy.core.multiarray.scalar": Rebuilder._scalar,
    "numpy._core.multiarray.scalar": Rebuilder._scalar,
    "numpy.core.numeric._frombuffer": Rebuilder._buffer_array,
    "numpy._core.numeric._frombuffer": Rebuilder._buffer_array,
}
