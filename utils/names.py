"""Names that strangers chose: show them without harm, refuse those that lead to other folders."""

import logging


def visible(text: str, keep: str = "") -> str:
    r"""Return `text` with each character that is not printable, and not in `keep`, as an escape."""
    # A file's name can then neither steer a terminal nor begin a line. Bytes that are no UTF-8 can
    # be written anywhere.
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


class OneLine(logging.Formatter):
    """Show a record on one line and without control characters, whatever a file is called."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        record.message = visible(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: "logging._SysExcInfoType") -> str:
        """Return the lines of a traceback."""
        return visible(super().formatException(ei), keep="\n")


def folder_name(name: str, origin: str) -> str:
    """Return `name` if it is the name of one folder; else raise ValueError that names `origin`."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{origin}: {name!r} is no name of a folder; use one without '/'")
    return name
