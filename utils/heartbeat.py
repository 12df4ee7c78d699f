"""Name the process that the others wait for: each notes in the common store what it is doing.

A note is one small message to the store, and nobody waits for it. When a collective fails, each
process that noticed says so. A process that stays silent hangs or is gone.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from utils import distributed
from utils.randomness import keyed_seed

T = TypeVar("T")

_ERROR = "synco/error"  # in the store: what a process said before it ended
_GRACE = 1.0  # seconds that the others have to notice too
# seconds for the store to answer: the process that holds it may be the one that hangs
_PATIENCE = 3.0

_count = 0  # notes so far; alike on all ranks at the same line of the program
_latest = ("", time.monotonic())  # the newest note of this process, and when
_told = ""  # the answer of the first question: a second one would wait again


def beat(doing: str) -> None:
    """Note what this process begins to do (`step 120`)."""
    global _count, _latest
    _latest = (doing, time.monotonic())
    if distributed.world_size() > 1:
        _count += 1
        _store().set(f"synco/beat/{distributed.rank()}", f"{_count} {time.time()} {doing}")


def latest() -> tuple[str, float]:
    """Return this process's newest note, and the seconds since."""
    doing, moment = _latest
    return doing, time.monotonic() - moment


def missing() -> str:
    """Return which process does not answer after a failed collective, and since when; else ""."""
    global _told
    if not _told and distributed.world_size() > 1:
        silent = "the process that holds the common store, rank 0, does not answer"
        _told = _within(_GRACE + _PATIENCE, _ask, silent)
    return _told


def first_to_say(message: str) -> bool:
    """Tell whether no other process has said this `message`, or the store does not answer."""
    if distributed.world_size() == 1:
        return True
    first = _within(_PATIENCE, lambda: _mark(message), True)
    if distributed.rank() == 0:
        time.sleep(_GRACE)  # this process may hold the store, and the others ask it too
    return first


def error_of_another() -> str:
    """Return the error that another process has said, "" if there is none or no answer."""
    if distributed.world_size() == 1:
        return ""
    return _within(_PATIENCE, _read_error, "")


def _read_error() -> str:
    try:
        store = _store()
        return store.get(_ERROR).decode() if store.check([_ERROR]) else ""
    except Exception:  # the store is gone with the process that held it
        return ""


def _mark(message: str) -> bool:
    try:
        _store().set(_ERROR, message)
        return _store().add(f"synco/said/{keyed_seed(message)}", 1) == 1
    except Exception:  # the store is gone with the process that held it
        return True


def _within(seconds: float, ask: Callable[[], T], otherwise: T) -> T:
    """Return what `ask` answers, or `otherwise` if it takes longer than `seconds`."""
    answer: list[T] = []
    thread = threading.Thread(target=lambda: answer.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else otherwise


def _ask() -> str:
    try:
        store = _store()
        store.set(f"synco/noticed/{distributed.rank()}", "")
        time.sleep(_GRACE)
        ranks = range(distributed.world_size())
        silent = [r for r in ranks if not store.check([f"synco/noticed/{r}"])]
        notes = {r: _note(store, r) for r in ranks}
    except Exception:  # the store is gone with the process that held it
        return ""
    behind = min((notes[r][0] for r in silent), default=0)
    named = [_describe(r, notes[r]) for r in silent if notes[r][0] == behind]
    ahead = max(notes.values())
    return "; ".join(named) + (f"; the furthest is at {ahead[2]}" if named and ahead[2] else "")


def _note(store: dist.Store, rank: int) -> tuple[int, float, str]:
    """Return (number, time, what) of a process's last note."""
    key = f"synco/beat/{rank}"
    if not store.check([key]):
        return 0, time.time(), ""
    number, moment, doing = store.get(key).decode().split(" ", 2)
    return int(number), float(moment), doing


def _describe(rank: int, note: tuple[int, float, str]) -> str:
    _, moment, doing = note
    since = f", which began {doing} {max(0.0, time.time() - moment):.0f} s ago" if doing else ""
    return f"no answer from rank {rank}{since}"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
