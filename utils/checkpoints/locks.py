"""Locks of files between processes, also on file systems that have none."""

import errno
import fcntl
import logging
from typing import IO

logger = logging.getLogger("synco")

_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def try_lock(file: IO, place: object) -> bool:
    """Lock an open file until it is closed; return False if another process holds the lock.

    Where the file system of `place` has no locks (Lustre without flock, NFS without lockd), warn
    and return True: nothing stops a second process then. Raises `OSError` for any other failure.
    """
    try:
        # The kernel releases it with the process. Unlike flock's, loader workers do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning(
            "the file system of %s has no locks (%s): nothing stops a second job there",
            place,
            error,
        )
    return True
