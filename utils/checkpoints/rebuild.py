"""Build tensors and arrays from the values in a pickle; every size is checked.

Each function checks its arguments before it builds anything. It raises `ForeignFileError`, or
`TypeError` or `ValueError` for arguments that no honest file has.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SAVE_TENSORS = "save its tensors alone once: torch.save({'state_dict': tensors}, file)"  # a remedy
_MOST_DIMENSIONS = 64


class CheckpointError(ValueError):
    """Report a checkpoint that cannot be trusted, read or written, with the remedy."""


class ForeignFileError(CheckpointError):
    """Report a file of another program that cannot be read safely, with the reason."""


class Storage(NamedTuple):
    """The values of tensors: flat bytes in memory and their type."""

    flat: Tensor  # (bytes,) uint8
    dtype: torch.dtype


def _counts(numbers: object) -> tuple[int, ...]:
    """Return a shape or a stride; refuse one whose product or text would take long."""
    if isinstance(numbers, (tuple, list)) and len(numbers) <= _MOST_DIMENSIONS:
        if all(type(number) is int and 0 <= number < 2**48 for number in numbers):
            return tuple(numbers)
    raise ForeignFileError("holds a tensor or an array with an impossible shape")


def _tensor(storage: object, offset: object, shape: object, stride: object, *_: object) -> Tensor:
    if not isinstance(storage, Storage):
        raise ForeignFileError("holds a tensor without a storage")
    (start,), sizes, steps = _counts((offset,)), _counts(shape), _counts(stride)
    base = storage.flat.view(storage.dtype)
    count = math.prod(sizes)
    # an empty tensor has no last value
    if count == 0:
        return torch.empty(sizes, dtype=base.dtype)
    last = start + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    # A stride of 0 repeats values: few stored ones could become a tensor of any size.
    if last >= base.numel() or count > base.numel():
        raise ForeignFileError(f"holds a tensor of shape {sizes} without as many values")
    return base.as_strided(sizes, steps, start)


def _tensor_v3(storage: object, *arguments: object) -> Tensor:
    """Build a tensor whose storage is bytes: only the call knows the type of the values."""
    dtype = arguments[5]  # after offset, shape, stride, requires_grad and hooks
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ForeignFileError("holds a tensor without a storage or a type")
    return _tensor(Storage(storage.flat, dtype), *arguments)


def _parameter(data: object, *_: object) -> object:
    return data


def _size(shape: object) -> torch.Size:
    return torch.Size(_counts(shape))


def _device(name: object, *_: object) -> str:
    if type(name) is not str:
        raise TypeError
    return name


def _bytes(text: object = b"", encoding: object = "latin1") -> bytes:
    """Return what old protocols write as a call."""
    # Not a number: bytes(n) would take n bytes of memory.
    if encoding not in ("latin1", "latin-1") or not isinstance(text, (str, bytes)):
        raise TypeError
    return text.encode("latin1") if isinstance(text, str) else text


def _bytearray(*arguments: object) -> bytearray:
    return bytearray(_bytes(*arguments))


def _complex(real: object, imaginary: object) -> complex:
    # complex(text) would parse a text of any length
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise TypeError
    return complex(real, imaginary)


# ---- numpy ---------------------------------------------------------------------------------------


def _dtype(code: object, *_: object) -> np.dtype:
    if type(code) is not str or not re.fullmatch(r"[<>=|]?[biufcSU]?\d{0,9}", code):
        raise ForeignFileError("holds an array of objects; only numbers and text are read")
    return np.dtype(code, copy=True)  # a copy, since `set_order` changes it


def set_order(dtype: np.dtype, order: object) -> None:
    """Give a new type the byte order that the file says."""
    # In place: the pickle refers to the object that it made before it said the order.
    if order == ">":
        dtype.__setstate__(dtype.newbyteorder(">").__reduce__()[2])  # type: ignore[attr-defined]


def _array_bytes(shape: tuple[int, ...], dtype: object, raw: object) -> bytes:
    """Return the bytes of an array if they are as many as its shape says."""
    data = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(dtype, np.dtype) or not isinstance(data, (bytes, bytearray)):
        raise ForeignFileError("holds an array of objects; only numbers and text are read")
    if dtype.itemsize == 0 or len(data) != math.prod(shape) * dtype.itemsize:
        raise ForeignFileError(f"holds an array of shape {shape} but {len(data)} bytes for it")
    return bytes(data)


def _empty_array(*_: object) -> np.ndarray:
    return np.empty(0, np.uint8)


def fill_array(
    array: np.ndarray, _: object, shape: object, dtype: object, fortran: object, raw: object
) -> None:
    """Give an array that `_empty_array` made its shape and values."""
    sizes = _counts(shape)
    state = (1, sizes, dtype, bool(fortran), _array_bytes(sizes, dtype, raw))
    array.__setstate__(state)  # type: ignore[type-var, arg-type]


def _buffer_array(raw: object, dtype: np.dtype, shape: object, order: object) -> np.ndarray:
    sizes = _counts(shape)
    flat = np.frombuffer(bytearray(_array_bytes(sizes, dtype, raw)), dtype)
    return flat.reshape(sizes, order="F" if order == "F" else "C")


def _scalar(dtype: np.dtype, raw: object) -> np.generic:
    return np.frombuffer(_array_bytes((), dtype, raw), dtype)[0]


# ---- the list of names ---------------------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[..., object]] = {  # name in the file -> what is called in its place
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
    "builtins.complex": _complex,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _buffer_array,
}
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.UntypedStorage": torch.uint8,
}
_DTYPES = {f"torch.{name}": v for name, v in vars(torch).items() if isinstance(v, torch.dtype)}
KNOWN: dict[str, object] = {**_FUNCTIONS, **_STORAGES, **_DTYPES}
