"""Limits of the machine: which one an error met, and the remedy."""

import errno
import os
import re

_FILES = "too many open files: raise `ulimit -n`, or lower DATA.NUM_WORKERS"
LIMITS = {  # of the machine, by errno; a loader worker that meets one ends with it as exit code
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EAGAIN: "no further process or thread may start: raise `ulimit -u` or the container's"
    " limit of processes, or lower DATA.NUM_WORKERS",
    errno.ENOMEM: "memory ran out: lower DATA.NUM_WORKERS or the batch size",
    errno.ENOSPC: "/dev/shm is full: enlarge it (docker run --shm-size=8g or --ipc=host), or lower"
    " DATA.NUM_WORKERS (0 needs none) or the batch size",
}


def error_number(error: BaseException) -> int:
    """Return the errno of a limit of the machine behind an error of Python or torch, else 0."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    text = str(error)
    if "can't start new thread" in text:
        return errno.EAGAIN
    if "received 0 items of ancdata" in text:  # a file that a worker sent could not be opened
        return errno.EMFILE
    return next((number for number in LIMITS if os.strerror(number) in text), 0)


def worker_failure(text: str, code: int = 0) -> str:
    """Say why a loader worker died, from its exit code or torch's `text`."""
    told = re.search(r"exit code:? (\d+)", text)
    reason = LIMITS.get(code or (int(told[1]) if told else 0))
    killed = f"{first_line(text)}; if it was killed, memory ran out: lower DATA.NUM_WORKERS"
    return f"a data loader worker failed: {reason or killed}"


def first_line(text: str) -> str:
    """Return the first line of `text`, cut to 200 characters."""
    return (text.splitlines() or [""])[0][:200]
