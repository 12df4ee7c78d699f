"""Which process of a run reports an error that all of them meet, and the time that it needs."""

import os
import signal
import time

_SECONDS = 5.0  # more than the start of one process lags behind that of another


def first_of_machine() -> bool:
    """Tell whether this process reports what all of this machine read: a command line or a file."""
    number = os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or "0"
    return number == "0"


def let_another_report() -> None:
    """Wait before this process fails in silence, so that the reporter fails first.

    torchrun and mpirun end all processes, this wait too, as soon as one has failed: were this one
    the first, nobody would say why.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of a run would call it preempted
    time.sleep(_SECONDS)
