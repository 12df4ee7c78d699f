"""Read files that people and other systems wrote: images, lists of names, labels and classes."""

import codecs
import os
import stat
from pathlib import Path

# The mark of UTF-32 begins with that of UTF-16, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """Return what a regular file of at most `most` bytes holds; `OSError` for any other file."""
    # Without O_NONBLOCK already opening a pipe waits. Regular files do not know the flag.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        # A pipe would keep its reader waiting for ever, and a device may have no end.
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is a pipe, a socket or a device, not a regular file")
        if most is not None and status.st_size > most:
            raise OSError(f"{path} has {status.st_size} bytes, more than {most}")
        return file.read()


def read_text(path: str | Path, errors: str = "strict") -> str:
    """Return the text of a file in UTF-8 or as its byte order mark says; line ends are \\n.

    Raises ValueError with the remedy for another encoding. `errors` "surrogateescape" lets a list
    in UTF-8 name files whose names are not.
    """
    data, encoding = read_bytes(path), "utf-8"
    for mark, name in _MARKS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], name
            break
    try:
        text = data.decode(encoding, errors if encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in {encoding.upper()} ({error}): save it as UTF-8"
        ) from error
    if "\0" in text:  # such as UTF-16 without its mark
        raise ValueError(f"{path} is no text in UTF-8 (it holds zero bytes): save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")
