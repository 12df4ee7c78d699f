"""Build tensors and arrays from what a pickle says of them: functions of ours that trust no size.

Each one checks its arguments before it builds anything, and raises `ForeignFileError`, or
`TypeError` for arguments that no such file has.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_MOST_DIMENSIONS = 64


class CheckpointError(ValueError):
    """Report a checkpoint that cannot be trusted, read or written, with the remedy."""


class ForeignFileError(CheckpointError):
    """Report a file of another program that cannot be read safely, with the reason."""


class Storage(NamedTuple):
    """The values of tensors: flat bytes in memory and their type."""

    flat: Tensor  # (bytes,) uint8
    dtype: torch.dtype


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
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


def _check_shape(numbers: Any) -> None:
    """Refuse sizes whose product or text would take long."""
    proper = isinstance(numbers, (tuple, list)) and len(numbers) <= _MOST_DIMENSIONS
    if not proper or not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise ForeignFileError("holds a tensor or an array with an impossible shape")


def _array_bytes(shape: Any, dtype: Any, raw: Any) -> bytes:
    """Return the bytes of an array if they are as many as its shape says."""
    _check_shape(shape)
    data = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(dtype, np.dtype) or not isinstance(data, (bytes, bytearray)):
        raise ForeignFileError("holds an array of objects; only numbers and text are read")
    if dtype.itemsize == 0 or len(data) != math.prod(shape) * dtype.itemsize:
        raise ForeignFileError(
            f"holds an array of shape {tuple(shape)} but {len(data)} bytes for it"
        )
    return bytes(data)


def _tensor(storage: Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ForeignFileError("holds a tensor without a storage")
    _check_shape((offset,))
    _check_shape(shape)
    _check_shape(stride)
    base = storage.flat.view(storage.dtype)
    if len(shape) != len(stride):
        raise ForeignFileError("holds a tensor with an impossible shape")
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=base.dtype)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if last >= base.numel() or math.prod(shape) > base.numel():
        raise ForeignFileError(f"holds a tensor of shape {tuple(shape)} without as many values")
    return base.as_strided(shape, stride, offset)


def _tensor_v3(
    storage: Storage,
    offset: int,
    shape: tuple,
    stride: tuple,
    grad: bool,
    hooks: Any,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    return _tensor(Storage(storage.flat, dtype), offset, shape, stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _size(shape: tuple) -> torch.Size:
    _check_shape(shape)
    return torch.Size(shape)


def _device(name: str, index: int | None = None) -> str:
    if type(name) is not str or type(index) not in (int, type(None)):
        raise ForeignFileError("holds a device without a name")
    return name if index is None else f"{name}:{index % 1000}"


def _bytes(text: Any = b"", encoding: str = "latin1") -> bytes:
    """Return what old protocols write as a call; a number would be a length."""
    if encoding not in ("latin1", "latin-1") or not isinstance(text, (str, bytes, list)):
        raise ForeignFileError("holds bytes that are no text in latin1")
    return text.encode("latin1") if isinstance(text, str) else bytes(text)


def _bytearray(*arguments: Any) -> bytearray:
    return bytearray(_bytes(*arguments))


def _dtype(code: str, *_: Any) -> np.dtype:
    if type(code) is not str or not re.fullmatch(r"[<>=|]?[biufcSU?]\d{0,9}", code):
        raise ForeignFileError("holds an array of objects; only numbers and text are read")
    return np.dtype(code, copy=True)  # a copy, since set_order changes it


def set_order(dtype: np.dtype, order: Any) -> None:
    """Give a new type the byte order that the file says."""
    if order == ">":
        dtype.__setstate__(dtype.newbyteorder(">").__reduce__()[2])  # type: ignore[attr-defined]


def _empty_array(*_: Any) -> np.ndarray:
    return np.empty(0, np.uint8)


def fill_array(
    array: np.ndarray, _: int, shape: tuple, dtype: np.dtype, fortran: bool, raw: Any
) -> None:
    """Give an array that `_empty_array` made its shape and values."""
    data = _array_bytes(shape, dtype, raw)
    array.__setstate__((1, tuple(shape), dtype, bool(fortran), data))  # type: ignore[arg-type]


def _buffer_array(raw: Any, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    data = _array_bytes(shape, dtype, raw)
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: np.dtype, raw: Any) -> Any:
    return np.frombuffer(_array_bytes((), dtype, raw), dtype)[0]


FUNCTIONS: dict[str, Callable[..., Any]] = {  # name in the file -> what is called in its place
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _bytes,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytearray,
    "__builtin__.bytes": _bytes,
    "__builtin__.bytearray": _bytearray,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _buffer_array,
    "numpy._core.numeric._frombuffer": _buffer_array,
}
