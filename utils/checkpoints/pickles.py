"""Read pickles with Python's own unpickler, which finds only the names of a short list here.

A pickle is a program: it names functions and calls them with what it holds. The names that files of
weights need (tensors, arrays, ordered dictionaries) lead to our own functions, which check every
size before they build anything. Any other name becomes a `StandIn`, which does nothing. Nothing
that a file names is imported or called.
"""

import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from utils.checkpoints.rebuild import (
    KNOWN,
    SAVE_TENSORS,
    ForeignFileError,
    Storage,
    fill_array,
    set_order,
)


class StandIn:
    """Stand for an object of a class that is not on the list; keep only its dictionary entries."""

    target = ""  # the dotted name; each name has its own subclass
    is_module = False  # whether its state is that of a torch module, which is not kept

    def __init__(self, *arguments: object) -> None:
        self.entries: dict[object, object] = {}

    def append(self, item: object) -> None:
        """Take an item, as a list would."""

    def __str__(self) -> str:
        """Return the dotted name of the function that the file wants to call."""
        return self.target


# A file that names one of these is hostile: it is refused, although nothing of it would be called.
_CODE = set(
    "asyncio bdb code codeop commands ctypes functools importlib inspect io _io marshal"
    " multiprocessing nt operator _operator os pdb pickle _pickle cPickle pip platform posix"
    " profile pty runpy shutil signal site socket subprocess sys tempfile threading timeit trace"
    " types urllib webbrowser torch.hub torch.jit torch.package torch.serialization"
    " torch.utils.cpp_extension".split()
)
_HARMLESS = {"types.SimpleNamespace", "multiprocessing.Value"}
_TYPES = {"dict", "list", "tuple", "slice", "range", "object", "int", "float", "str", "bool"}
_SILENT = {"numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter"}  # said only if called
_SIZED = (str, bytes, bytearray, list, tuple, dict)
_SAME = {  # modules that are written under another name too
    "__builtin__": "builtins",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
    "torch.storage": "torch",
}

# EXT reads a registry of this process, PERSID and the buffers objects outside of the pickle. INST,
# OBJ and NEWOBJ_EX make objects in ways that no file of weights needs.
_UNUSUAL = set("EXT1 EXT2 EXT4 PERSID NEXT_BUFFER READONLY_BUFFER INST OBJ NEWOBJ_EX".split())
_MOST_OPERATIONS = 2_000_000  # a network of 1,000 tensors with its optimiser needs about 100,000
# Keys that are no text can be chosen to collide: the cost is the square of their number.
_MOST_KEYS = 30_000  # ImageNet-21k has 21,841 classes
_MOST_NAMES = 1_000

Locate = Callable[[str, int, int], Tensor]  # key of a storage, count, bytes a value -> flat bytes


def read_pickle_stream(file: BinaryIO, locate: Locate | None = None) -> tuple[object, list[str]]:
    """Return the value of the next pickle of `file` and the names of what became a `StandIn`.

    `file` must be memory (BytesIO, mmap): there a huge declared length allocates nothing. `locate`
    returns the storages of a torch file. The position is left behind the pickle.
    """
    unpickler = _Unpickler(file, _scan(file), locate)
    return unpickler.load(), sorted(unpickler.foreign)


def _scan(file: BinaryIO) -> int:
    """Return the bytes of the next pickle, each declared length within them; leave the position."""
    start = file.tell()
    for count, (opcode, _, _) in enumerate(pickletools.genops(file)):
        if opcode.name in _UNUSUAL:
            raise ForeignFileError(f"is no file of weights: it holds a pickle {opcode.name}")
        if count > _MOST_OPERATIONS:
            raise ForeignFileError(f"needs more than {_MOST_OPERATIONS:,} pickle operations")
    size = file.tell() - start
    file.seek(start)
    return size


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with a list of names, checked keys and checked calls."""

    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[object]]

    def __init__(self, file: BinaryIO, size: int, locate: Locate | None) -> None:
        super().__init__(file, encoding="latin1")  # text of Python 2 may be raw bytes
        self.locate = locate
        self.foreign: set[str] = set()
        self.classes: dict[str, type[StandIn]] = {}
        self.keys_left = _MOST_KEYS
        self.values_left = 8 * size + 1000  # that calls may copy: a file can pass one value often
        self.known = KNOWN | {
            "torch._tensor._rebuild_from_type_v2": self._with_attributes,
            "collections.OrderedDict": self._mapping,
            "collections.defaultdict": self._mapping,
            "collections.Counter": self._mapping,
            "builtins.set": self._make_set,
            "builtins.frozenset": self._make_frozenset,
        }

    # ---- names and calls ----------------------------------------------------------------------

    def find_class(self, module: str, name: str) -> object:
        """Return our function, type or stand-in for a name; nothing is imported."""
        dotted = f"{module}.{name}"
        if not re.fullmatch(r"[\w.]{1,200}", dotted):
            raise ForeignFileError("names something that is no Python name: do not trust it")
        module = _SAME.get(module, module)
        if (known := self.known.get(f"{module}.{name}")) is not None:
            return known
        _refuse_code(module, name)
        if module != "builtins" and dotted not in _SILENT:
            self.foreign.add(dotted)
        if dotted not in self.classes:
            if len(self.classes) == _MOST_NAMES:
                raise ForeignFileError(f"names more than {_MOST_NAMES:,} classes")
            self.classes[dotted] = type("StandIn", (StandIn,), {"target": dotted})
        return self.classes[dotted]

    def _call(self, target: object, arguments: object) -> object:
        if not isinstance(arguments, (tuple, list)):
            raise TypeError
        if isinstance(target, type) and issubclass(target, StandIn):
            self.foreign.add(target.target)
            # the call copies them, and a file can repeat a call in five bytes
            self._spend(arguments)
            return target(*arguments)
        if not isinstance(target, (FunctionType, MethodType)):  # `find_class` gives only ours
            raise TypeError
        for argument in arguments:
            self._spend(argument)
        return target(*arguments)

    def _spend(self, value: object) -> None:
        # also an empty value costs one, for it is passed too
        self.values_left -= 1 + (len(value) if isinstance(value, _SIZED) else 0)
        if self.values_left < 0:
            raise ForeignFileError("would grow to many times its size")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    load_newobj = load_reduce

    def load_build(self) -> None:
        """Give the object on the stack its state; attributes are never set, except the one here."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, np.ndarray):
            self._spend(state[4])
            fill_array(target, *state)
        elif isinstance(target, np.dtype):
            set_order(target, state[1])
        elif isinstance(target, OrderedDict):
            if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]  # of a state_dict
        elif isinstance(target, StandIn):
            parts = {"_parameters", "_modules"}  # that every module has
            target.is_module = isinstance(state, dict) and parts <= state.keys()
        else:
            raise TypeError

    # ---- containers ---------------------------------------------------------------------------

    def _key(self, key: object) -> object:
        """Return a key that is cheap to hash: a nested tuple can take for ever."""
        if type(key) is str:
            return key
        # the hashes of tuples are easily made equal
        self.keys_left -= 10 if isinstance(key, tuple) else 1
        if self.keys_left < 0:
            raise ForeignFileError(f"has more than {_MOST_KEYS:,} keys that are no text")
        if isinstance(key, (StandIn, type, torch.dtype, np.generic)):
            return str(key)
        items = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
        for item in items:
            small = isinstance(item, int) and abs(item) < 2**64
            if not small and not isinstance(item, (str, bytes, float, type(None))):
                raise ForeignFileError(f"has a {type(key).__name__} as the key of a dictionary")
        return key

    def _fill(self, values: list[object]) -> None:
        """Put key, value, key, ... into the dictionary on the stack."""
        target = self.stack[-1]
        entries = target.entries if isinstance(target, StandIn) else target
        if not isinstance(entries, dict):
            raise TypeError
        for key, value in zip(values[::2], values[1::2], strict=True):
            entries[self._key(key)] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def load_setitems(self) -> None:
        self._fill(self.pop_mark())

    def load_dict(self) -> None:
        values = self.pop_mark()  # first, since it changes `append`
        self.append({})
        self._fill(values)

    def load_additems(self) -> None:
        values = self.pop_mark()
        set.update(self.stack[-1], self._make_set(values))  # TypeError for another type

    def load_frozenset(self) -> None:
        values = self.pop_mark()
        self.append(self._make_frozenset(values))

    def _mapping(self, *arguments: object) -> dict:
        """Return an ordered dictionary, also where the file says defaultdict or Counter."""
        last = arguments[-1] if arguments else []
        if isinstance(last, list):  # pairs, as Python 2 wrote them
            return OrderedDict((self._key(key), value) for key, value in last)
        return OrderedDict(last if isinstance(last, dict) else {})

    def _make_set(self, values: list | tuple = ()) -> set[object]:
        return {self._key(value) for value in values}

    def _make_frozenset(self, values: list | tuple = ()) -> frozenset[object]:
        return frozenset(self._make_set(values))

    # ---- tensors ------------------------------------------------------------------------------

    def persistent_load(self, identity: object) -> object:
        """Return the storage that ("storage", type, key, place, count, ...) names.

        Torch before 1.6 names the class of a module so too: ("module", class, file, source).
        """
        if not isinstance(identity, tuple) or len(identity) > 6 or self.locate is None:
            raise ForeignFileError("refers to something that is no storage of a tensor")
        first, *rest = identity or (None,)
        # a stand-in, as `find_class` returns it, and nothing else
        if type(first) is str and first == "module" and len(rest) == 3:
            if isinstance(rest[0], type) and issubclass(rest[0], StandIn):
                return rest[0]
        mark, dtype, key, _, count, *view = identity
        # type before value: comparing or printing a hostile value can take for ever
        if type(mark) is not str or mark != "storage" or not isinstance(dtype, torch.dtype):
            raise ForeignFileError("has a storage of an unknown type")
        if type(key) is not str or type(count) is not int or not 0 <= count < 2**48:
            raise ForeignFileError("has a storage without a proper name or size")
        if view and view[0] is not None:
            raise ForeignFileError("was written by torch before 0.4; save it with a newer torch")
        flat = self.locate(key, count, dtype.itemsize)
        if flat.numel() != count * dtype.itemsize:
            raise ForeignFileError(f"declares {count} values in a storage of other size")
        return Storage(flat, dtype)

    def _with_attributes(
        self, build: object, _kind: object, arguments: object, *_: object
    ) -> object:
        return self._call(build, arguments)


# The parent looks its methods up in a table. This one has the methods above in it.
_Unpickler.dispatch = {
    operation: getattr(_Unpickler, method.__name__)
    for operation, method in pickle._Unpickler.dispatch.items()
}


def _refuse_code(module: str, name: str) -> None:
    """Refuse names that can execute code, and tensors of kinds that are not read."""
    builtin = module == "builtins" and name not in _TYPES
    listed = module in _CODE or module.split(".")[0] in _CODE
    if (builtin or listed) and f"{module}.{name}" not in _HARMLESS:
        raise ForeignFileError(
            f"wants to call {module}.{name}, which can execute code and which no file of weights"
            f" needs: do not trust it. Where you do, {SAVE_TENSORS}"
        )
    if module == "torch._utils":
        raise ForeignFileError("holds a sparse, quantised or empty-shell tensor; save dense ones")
