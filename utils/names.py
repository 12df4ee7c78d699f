"""Names as a person reads them: of metrics, and of files that strangers chose."""

import logging
import re

# The accuracy of the contrastive task is no accuracy of a classifier. The files keep the short
# name.
_CALLED = {"acc1": "contrastive acc1", "acc5": "contrastive acc5"}
# The group of a metric of pretraining in TensorBoard, by the beginning of its name.
_GROUPS = {
    "knn": "knn",
    "probe": "probe",
    "held_out": "held_out",
    "embedding": "health",
    "grad_norm": "health",
    "positive": "health",
    "negative": "health",
    "synthetic": "health",
    "queue": "health",
    "lr": "optim",
    "epoch": "optim",
    "images_per_second": "speed",
    "data_wait": "speed",
    "gpu_memory": "speed",
}


def shown_name(metric: str) -> str:
    """Return what a log line, TensorBoard or a report calls a metric of metrics.jsonl."""
    return _CALLED.get(metric, metric)


def board_tag(metric: str, task: str = "pretrain") -> str:
    """Return the tag of a metric in TensorBoard, whose first part is its group.

    Pretraining has several groups: `train/loss`, `knn/k20_top1`, `health/embedding_std`,
    `optim/lr`. All of another program are one group, the heads of a grid together:
    `linear/top1/lr0.3`.
    """
    if task != "pretrain":
        return "/".join([task, *reversed(metric.split("/"))])
    begins = (word for word in _GROUPS if metric.startswith(word))
    group = _GROUPS.get(next(begins, ""), "train")
    name = re.sub(r"^knn(?=\d)", "k", metric.removeprefix(f"{group}_"))
    return f"{group}/{shown_name(name).replace(' ', '_')}"


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
