"""Let the processes of a driver end with the driver."""

import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
# Loaded here: between fork and exec of a process with threads, loading may wait for a lock forever.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def ending_with_this_process() -> Callable[[], None]:
    """Return a `preexec_fn` for `Popen`: when this process dies, the child gets SIGTERM.

    A run that gets SIGTERM saves its state and ends. Also after `kill -9` of this process; on Linux
    only.
    """
    return functools.partial(end_with_parent, os.getpid())


def end_with_parent(parent: int) -> None:
    """Ask the kernel, in a new process, to send SIGTERM when the process `parent` dies."""
    # the parent's own handler would lose the signal before exec
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before the kernel was asked
        os._exit(1)
