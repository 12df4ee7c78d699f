"""Interpret pickles as data: nothing that a pickle names is ever imported, called or instantiated.

A pickle is a program for a stack machine, and ``pickle.load`` runs it: it imports what the file names and
calls it with what the file gives. Here the machine's calls only build ``StandIn`` objects that remember what
was asked for; ``foreign.py`` turns those it knows (tensors, arrays) into values by functions of its own.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from utils.checkpoints.file import CheckpointError


class ForeignFileError(CheckpointError):
    """Report a file of another program that cannot be read safely, with the reason."""


class Name(NamedTuple):
    """Stand for what a pickle wanted to import; nothing is imported."""

    module: str
    attribute: str

    def __str__(self) -> str:
        """Return the dotted name."""
        return f"{self.module}.{self.attribute}"


class Reference(NamedTuple):
    """Stand for an object outside the pickle (a persistent id): in torch files, a storage."""

    identity: Any


@dataclass(eq=False, repr=False)
class StandIn:
    """Stand for an object that a pickle wanted built by calling ``target(*arguments)``."""

    target: Name
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the dotted name of what was to be called."""
        return str(self.target)


# A file of weights has no business with these: it is refused and says which, though nothing would have run.
_CODE = {
    "asyncio", "bdb", "code", "codeop", "commands", "ctypes", "functools", "importlib", "inspect",
    "io", "marshal", "multiprocessing", "nt", "operator", "os", "pdb", "pickle", "pip",
    "platform", "posix", "profile", "pty", "runpy", "shutil", "signal", "site", "socket",
    "subprocess", "sys", "tempfile", "threading", "timeit", "trace", "types", "urllib", "webbrowser",
}  # fmt: skip
_TORCH_CODE = {
    "torch.hub", "torch.jit", "torch.package", "torch.serialization", "torch.utils.cpp_extension",
}  # fmt: skip
_HARMLESS = {"types.SimpleNamespace", "multiprocessing.Value"}
_BUILTINS = {
    "set",
    "frozenset",
    "bytes",
    "bytearray",
    "dict",
    "list",
    "tuple",
    "slice",
    "range",
    "complex",
    "object",
    "int",
    "float",
    "str",
    "bool",
}

_MARK = object()
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))
_PUSHED = {  # opcodes whose decoded argument is the value
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


class _Machine:
    """The stack, the memo and one method for each group of opcodes that does more than push."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _PUSHED:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            method = getattr(self, f"op_{opcode.lower()}", None)
            if method is None:  # EXT*, PERSID, out-of-band buffers: no file of weights has them
                raise ForeignFileError(f"holds the unusual pickle operation {opcode}")
            method(argument)

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ForeignFileError("is a damaged pickle (a value is missing)")
        return value

    def _to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise ForeignFileError("is a damaged pickle (a mark is missing)")

    # stack and memo
    def op_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def op_pop(self, _: Any) -> None:
        self.stack.pop()

    def op_pop_mark(self, _: Any) -> None:
        self._to_mark()

    def op_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    op_binput = op_long_binput = op_put

    def op_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    op_binget = op_long_binget = op_get

    # containers
    def op_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._to_mark()))

    def _tuples(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def op_tuple1(self, _: Any) -> None:
        self._tuples(1)

    def op_tuple2(self, _: Any) -> None:
        self._tuples(2)

    def op_tuple3(self, _: Any) -> None:
        self._tuples(3)

    def op_list(self, _: Any) -> None:
        self.stack.append(self._to_mark())

    def op_append(self, _: Any) -> None:
        value = self._pop()
        self._extend([value])

    def op_appends(self, _: Any) -> None:
        self._extend(self._to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        _expect(target, (list, StandIn))
        (target.items if isinstance(target, StandIn) else target).extend(values)

    def op_dict(self, _: Any) -> None:
        values = self._to_mark()
        self.stack.append({})
        self._set(values)

    def op_setitem(self, _: Any) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def op_setitems(self, _: Any) -> None:
        self._set(self._to_mark())

    def _set(self, values: list[Any]) -> None:
        target = self.stack[-1]
        _expect(target, (dict, StandIn))
        entries = target.entries if isinstance(target, StandIn) else target
        for key, value in zip(values[::2], values[1::2], strict=True):
            entries[_checked_key(key)] = value

    def op_additems(self, _: Any) -> None:
        values = self._to_mark()
        _expect(self.stack[-1], set)
        self.stack[-1].update(_checked_key(value) for value in values)

    def op_frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(_checked_key(value) for value in self._to_mark()))

    # what would import and call
    def op_global(self, dotted: str) -> None:
        module, _, attribute = dotted.partition(" ")
        self.stack.append(_named(module, attribute))

    def op_stack_global(self, _: Any) -> None:
        attribute, module = self._pop(), self._pop()
        _expect(module, str)
        _expect(attribute, str)
        self.stack.append(_named(module, attribute))

    def _call(self, arguments: Any) -> None:
        target = self._pop()
        _expect(arguments, tuple)
        _expect(target, Name)  # what another call returned is never called
        self.stack.append(StandIn(target, arguments))

    def op_reduce(self, _: Any) -> None:
        self._call(self._pop())

    op_newobj = op_reduce

    def op_newobj_ex(self, _: Any) -> None:
        keywords, arguments = self._pop(), self._pop()
        _expect(arguments, tuple)
        self._call((*arguments, keywords))

    def op_inst(self, dotted: str) -> None:
        arguments = tuple(self._to_mark())
        self.op_global(dotted)
        self._call(arguments)

    def op_obj(self, _: Any) -> None:
        target, *arguments = self._to_mark()
        self.stack.append(target)
        self._call(tuple(arguments))

    def op_build(self, _: Any) -> None:
        state = self._pop()
        _expect(self.stack[-1], StandIn)  # a state for anything else would be an attribute set by the file
        self.stack[-1].state = state

    def op_binpersid(self, _: Any) -> None:
        self.stack.append(Reference(self._pop()))


def _named(module: str, attribute: str) -> Name:
    """Return a name unless it is of code: even a call whose result is thrown away tells what the file is."""
    name = Name(module, attribute)
    builtin = module in ("builtins", "__builtin__")
    code = module.split(".")[0] in _CODE or module in _TORCH_CODE
    if (code and str(name) not in _HARMLESS) or (builtin and attribute not in _BUILTINS):
        raise ForeignFileError(f"wants to call {name}, which no file of weights needs: do not trust it")
    return name


def _expect(value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or value is _MARK:
        raise ForeignFileError(f"is a damaged or hostile pickle (unexpected {type(value).__name__})")


def _checked_key(key: Any) -> Any:
    """Return a key that is cheap to hash; a nested tuple can take for ever."""
    flat = type(key) is tuple and all(isinstance(item, _PLAIN_KEYS) for item in key)
    if not flat and not isinstance(key, (*_PLAIN_KEYS, StandIn, Name)):
        raise ForeignFileError(f"has a {type(key).__name__} as the key of a dictionary")
    return key


def interpret(file: BinaryIO) -> Any:
    """Return the value of the next pickle of ``file``, with stand-ins for every object; leaves the position
    behind it.

    ``file`` must be memory (BytesIO, mmap), so that a huge declared length allocates nothing. Raises
    ``ForeignFileError`` for what is damaged or no pickle.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    except ForeignFileError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise ForeignFileError(
            f"is no file of weights, or damaged ({type(error).__name__}: {str(error)[:60]})"
        ) from error
    return value
