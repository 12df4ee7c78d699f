"""Read pickles with Python's own unpickler, which finds only the names of a short list here.

A pickle is a program: it names functions and calls them with what it holds. The names that files of
weights need (tensors, arrays, ordered dictionaries) lead to our own functions, which check every
size before they build anything. Any other name becomes a `StandIn`, which only remembers. Nothing
that a file names is imported or called.
"""

import pickle
import pickletools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from utils.checkpoints.rebuild import (
    FUNCTIONS,
    STORAGES,
    ForeignFileError,
    Storage,
    fill_array,
    set_order,
)


class StandIn:
    """Stand for an object of a class that is not on the list: remember what the file says of it."""

    target = ""  # the dotted name; each name has its own subclass

    def __new__(cls, *arguments: Any, **keywords: Any) -> "StandIn":
        """Keep the arguments of the call."""
        self = super().__new__(cls)
        self.arguments, self.keywords, self.state = arguments, keywords, None
        self.items, self.entries = [], {}
        return self

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    state: Any
    items: list[Any]
    entries: dict[Any, Any]

    def append(self, item: Any) -> None:
        """Keep an item, as a list would."""
        self.items.append(item)

    def __str__(self) -> str:
        """Return the dotted name of what was to be called."""
        return self.target


# A file that names one of these is hostile: it is refused, although nothing of it would be called.
_CODE = set(
    "asyncio bdb code codeop commands ctypes functools importlib inspect io _io marshal multiprocessing"
    " nt operator _operator os pdb pickle _pickle cPickle pip platform posix profile pty runpy shutil"
    " signal site socket subprocess sys tempfile threading timeit trace types urllib webbrowser".split()
)
_TORCH_CODE = (
    "torch.hub",
    "torch.jit",
    "torch.package",
    "torch.serialization",
    "torch.utils.cpp_extension",
)
_HARMLESS = {"types.SimpleNamespace", "multiprocessing.Value"}
_TYPES = {"dict", "list", "tuple", "slice", "range", "object", "int", "float", "str", "bool"}
_SILENT = {"numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter"}  # said only if called

# EXT reads a registry of this process, PERSID and the buffers objects outside of the pickle.
_UNUSUAL = {"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
_MOST_OPERATIONS = 2_000_000  # a network of 1,000 tensors with its optimiser needs about 100,000
# Keys that are no text can be chosen to collide, which costs their square. ImageNet-21k has 21,841
# numbers.
_MOST_KEYS = 30_000
_MOST_NAMES = 1_000

Locate = Callable[[str, int, int], Tensor]  # key of a storage, count, bytes a value -> flat bytes


def read_pickle_stream(file: BinaryIO, locate: Locate | None = None) -> tuple[Any, list[str]]:
    """Return the value of the next pickle of `file` and the names of what became a `StandIn`.

    `file` must be memory (BytesIO, mmap): there a huge declared length allocates nothing. `locate`
    returns the storages of a torch file. The position is left behind the pickle.
    """
    try:
        size = _scan(file)
        unpickler = _Unpickler(file, size, locate)
        return unpickler.load(), sorted(unpickler.foreign)
    except ForeignFileError:
        raise
    except Exception as error:  # str(error) may be the repr of a hostile value, which has no end
        raise ForeignFileError(
            f"is no file of weights, or damaged or truncated ({type(error).__name__})"
        ) from error


def _scan(file: BinaryIO) -> int:
    """Return how many bytes the next pickle has, each declared length within them; leave the position."""
    start = file.tell()
    for count, (opcode, _, _) in enumerate(pickletools.genops(file)):
        if opcode.name in _UNUSUAL:
            raise ForeignFileError(f"holds the unusual pickle operation {opcode.name}")
        if count > _MOST_OPERATIONS:
            raise ForeignFileError(f"needs more than {_MOST_OPERATIONS:,} pickle operations")
    size = file.tell() - start
    file.seek(start)
    return size


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with a list of names, checked keys and checked calls."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: BinaryIO, size: int, locate: Locate | None) -> None:
        super().__init__(file, encoding="latin1")  # text of Python 2 may be raw bytes
        self.locate = locate
        self.foreign: set[str] = set()
        self.classes: dict[str, type[StandIn]] = {}
        self.keys_left = _MOST_KEYS
        self.values_left = 8 * size + 1000  # that calls may copy: a file can pass one value often

    # ---- names and calls ----------------------------------------------------------------------

    def find_class(self, module: str, name: str) -> Any:
        """Return our function, type or stand-in for a name; nothing is imported."""
        dotted = f"{module}.{name}"
        if not re.fullmatch(r"[\w.]{1,200}", dotted):
            raise ForeignFileError("names something that is no Python name: do not trust it")
        if dotted in _METHODS:
            return getattr(self, _METHODS[dotted])
        if dotted in FUNCTIONS:
            return FUNCTIONS[dotted]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        self._refuse(module, name)
        if module not in ("builtins", "__builtin__") and dotted not in _SILENT:
            self.foreign.add(dotted)
        if dotted not in self.classes:
            if len(self.classes) == _MOST_NAMES:
                raise ForeignFileError(f"names more than {_MOST_NAMES:,} classes")
            # a class for each name, since pickles make objects by `cls.__new__(cls)`
            self.classes[dotted] = type("StandIn", (StandIn,), {"target": dotted})
        return self.classes[dotted]

    def _refuse(self, module: str, name: str) -> None:
        builtin = module in ("builtins", "__builtin__") and name not in _TYPES
        code = module.split(".")[0] in _CODE or module in _TORCH_CODE or builtin
        if code and f"{module}.{name}" not in _HARMLESS:
            raise ForeignFileError(
                f"wants to call {module}.{name}, which can execute code and which no file of weights"
                " needs: do not trust it. Where you do, save its tensors alone once:"
                " torch.save({'state_dict': tensors}, file)"
            )
        if module == "torch._utils":
            raise ForeignFileError(
                "holds a sparse, quantised or empty-shell tensor; save dense ones"
            )

    def _call(self, target: Any, arguments: Any) -> Any:
        known = isinstance(target, (FunctionType, MethodType))  # find_class gives only ours
        stand_in = isinstance(target, type) and issubclass(target, StandIn)
        if not isinstance(arguments, (tuple, list)) or not (known or stand_in):
            raise ForeignFileError("is a damaged or hostile pickle (it calls what is no function)")
        if stand_in:
            self.foreign.add(target.target)
        for argument in arguments if known else ():
            self._spend(argument)
        if stand_in:
            # the call copies them, and a file can repeat a call in five bytes
            self._spend(arguments)
        return target(*arguments)

    def _spend(self, value: Any) -> None:
        self.values_left -= (
            len(value) if isinstance(value, (str, bytes, bytearray, list, tuple, dict)) else 1
        )
        if self.values_left < 0:
            raise ForeignFileError("would grow to many times its size")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        """Call with the keywords as one more argument: passed on as keywords they would be copied."""
        keywords = self.stack.pop()
        arguments = self.stack.pop()
        if not isinstance(arguments, tuple):
            raise ForeignFileError("is a damaged or hostile pickle (arguments that are no tuple)")
        self._spend(arguments)
        self.stack[-1] = self._call(self.stack[-1], (*arguments, keywords))

    def _instantiate(self, target: Any, arguments: Any) -> None:
        self.append(self._call(target, arguments))

    def load_build(self) -> None:
        """Give the object on the stack its state; attributes are never set, except those named here."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target.state = state
        elif isinstance(target, np.ndarray):
            self._spend(state[4])
            fill_array(target, *state)
        elif isinstance(target, np.dtype):
            set_order(target, state[1])
        elif isinstance(target, OrderedDict):
            if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]  # of a state_dict
        else:
            raise ForeignFileError("is a damaged or hostile pickle (state for what has none)")

    # ---- containers ---------------------------------------------------------------------------

    def _key(self, key: Any) -> Any:
        """Return a key that is cheap to hash: a nested tuple can take for ever."""
        if type(key) is str:
            return key
        # the hashes of tuples are easily made equal
        self.keys_left -= 10 if isinstance(key, tuple) else 1
        if self.keys_left < 0:
            raise ForeignFileError(f"has more than {_MOST_KEYS:,} keys that are no text")
        if isinstance(key, (StandIn, torch.dtype, np.generic)):
            return str(key)
        if isinstance(key, type) and issubclass(key, StandIn):
            return key.target
        items = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
        for item in items:
            small = isinstance(item, int) and abs(item) < 2**64
            if not small and not isinstance(item, (str, bytes, float, type(None))):
                raise ForeignFileError(f"has a {type(key).__name__} as the key of a dictionary")
        return key

    def _set(self, target: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
        entries = target.entries if isinstance(target, StandIn) else target
        if not isinstance(entries, dict):
            raise ForeignFileError(
                "is a damaged or hostile pickle (an entry for what is no dictionary)"
            )
        for key, value in pairs:
            entries[self._key(key)] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        values = self.pop_mark()
        self._set(self.stack[-1], zip(values[::2], values[1::2], strict=True))

    def load_dict(self) -> None:
        values = self.pop_mark()
        self.append({})
        self._set(self.stack[-1], zip(values[::2], values[1::2], strict=True))

    def load_additems(self) -> None:
        values = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise ForeignFileError("is a damaged or hostile pickle (items for what is no set)")
        self.stack[-1].update([self._key(value) for value in values])

    def load_frozenset(self) -> None:
        values = self.pop_mark()  # first, since it changes `append`
        self.append(frozenset([self._key(value) for value in values]))

    def _mapping(self, *arguments: Any) -> dict:
        result: dict = OrderedDict()
        last = arguments[-1] if arguments else None
        if isinstance(last, (dict, list)):
            pairs = last.items() if isinstance(last, dict) else last
            self._set(result, [(key, value) for key, value in pairs])
        return result

    def _counter(self, counts: dict | None = None) -> Counter:
        return Counter(self._mapping(counts))

    def _make_set(self, values: list | tuple = ()) -> set:
        return {self._key(value) for value in values}

    def _make_frozenset(self, values: list | tuple = ()) -> frozenset:
        return frozenset(self._make_set(values))

    def _complex(self, real: float, imaginary: float) -> complex:
        if not isinstance(real, float) or not isinstance(imaginary, float):
            raise ForeignFileError("holds a complex number that is not made of two numbers")
        return complex(real, imaginary)

    # ---- tensors ------------------------------------------------------------------------------

    def persistent_load(self, identity: Any) -> Storage:
        """Return the storage that ("storage", type, key, place, count, ...) names."""
        if not isinstance(identity, tuple) or len(identity) < 5 or self.locate is None:
            raise ForeignFileError("refers to something that is no storage of a tensor")
        mark, dtype, key, _, count, *view = identity
        if type(mark) is not str or mark != "storage" or not isinstance(dtype, torch.dtype):
            raise ForeignFileError("has a storage of an unknown type")
        if type(key) is not str or type(count) is not int or not 0 <= count < 2**48:
            raise ForeignFileError("has a storage without a proper name or size")
        if view and view[0] is not None:
            raise ForeignFileError("was written by torch before 0.4; save it with a newer torch")
        return Storage(self.locate(key, count, dtype.itemsize), dtype)

    def _with_attributes(self, build: Any, kind: Any, arguments: Any, *_: Any) -> Any:
        return self._call(build, arguments)


_METHODS = {  # name in the file -> method of the unpickler
    "torch._tensor._rebuild_from_type_v2": "_with_attributes",
    "collections.OrderedDict": "_mapping",
    "collections.defaultdict": "_mapping",
    "collections.Counter": "_counter",
    "builtins.complex": "_complex",
    "__builtin__.complex": "_complex",
    "builtins.set": "_make_set",
    "__builtin__.set": "_make_set",
    "builtins.frozenset": "_make_frozenset",
    "__builtin__.frozenset": "_make_frozenset",
}
for _operation, _method in (
    (pickle.REDUCE, _Unpickler.load_reduce),
    (pickle.NEWOBJ, _Unpickler.load_reduce),
    (pickle.NEWOBJ_EX, _Unpickler.load_newobj_ex),
    (pickle.BUILD, _Unpickler.load_build),
    (pickle.SETITEM, _Unpickler.load_setitem),
    (pickle.SETITEMS, _Unpickler.load_setitems),
    (pickle.DICT, _Unpickler.load_dict),
    (pickle.ADDITEMS, _Unpickler.load_additems),
    (pickle.FROZENSET, _Unpickler.load_frozenset),
):
    _Unpickler.dispatch[_operation[0]] = _method
