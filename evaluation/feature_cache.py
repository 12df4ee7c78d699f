"""Features on the disk: computed once for the same weights and images, then read again.

`features_train_<digest>.npy` holds the float32 rows, mapped into memory when read. The JSON
beside it names what they are features of and the sha256 of the file; its rename is the commit.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor

from evaluation.features import Features, SharedFeatures, WholeFeatures, refuse_non_finite
from utils.checkpoints.atomic import (
    removed_on_error,
    sha256_of,
    sync_folder,
    tmp_path,
    write_synced,
    write_text,
)
from utils.checkpoints.locks import try_lock
from utils.distributed import is_main, on_all, on_main

logger = logging.getLogger("synco")

Key: TypeAlias = Mapping[str, object]  # JSON values: what features are a function of

_VERSION = 1  # of the file and of what the features are a function of
_POLL = 1.0  # seconds between two looks at another run's lock


def cached_features(
    folder: Path,
    split: str,
    key: Key,
    labels: Tensor,
    device: torch.device,
    compute: Callable[[], SharedFeatures],
    write: bool = True,
) -> Features:
    """Return the features of a split from `folder`, or `compute` them and keep them there.

    Without `write` nothing is kept. `key` is all that they are a function of, `labels` (N,) are
    those of the data set. Raises `OSError` on all processes if the disk fails.
    """
    key = json.loads(json.dumps({"version": _VERSION, "split": split, **key}, sort_keys=True))
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"features_{split}_{digest}.npy"
    with _alone(folder) if write else contextlib.nullcontext():
        problem = on_main(lambda: _problem(path, key))
        if not problem:
            logger.info("features of %s: %s", split, path)
        elif not write:
            return compute()
        else:
            logger.info("features of %s are computed for %s: %s", split, path, problem)
            _store(path, key, compute(), len(labels))
    return on_all(lambda: _open(path, labels, device))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one run at a time fill `folder`; the next finds what it left."""
    held: list[IO[str]] = []

    def locked() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "features.lock").open("a+")
        if not try_lock(file, folder):
            file.close()
            return False
        held.append(file)
        return True

    waiting = False
    # short collectives: none of them waits as long as the other run computes
    while not on_main(locked):
        if not waiting:
            logger.info("another run is writing features to %s: waiting for it", folder)
        waiting = True
        time.sleep(_POLL)
    try:
        yield
    finally:
        for file in held:
            file.close()


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _problem(path: Path, key: Key) -> str:
    """Say why the file cannot be used; nothing if it can."""
    if not _record_path(path).exists():
        return "there are none yet"
    try:
        record = json.loads(_record_path(path).read_bytes())
        if record["key"] != key:
            return "those there are of something else"
        if path.stat().st_size != record["bytes"] or sha256_of(path) != record["sha256"]:
            return "those there are damaged (size or sha256)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"those there cannot be read ({type(error).__name__}: {error})"
    return ""


def _store(path: Path, key: Key, features: SharedFeatures, images: int) -> None:
    """Write what all processes hold; rank 0 has the file, the others hand over their rows."""
    chunks, error, written = features.chunks(), None, {}
    if is_main():
        try:
            with removed_on_error(tmp_path(path)):
                written = write_synced(tmp_path(path), lambda file: _fill(file, features, chunks))
        except (OSError, ValueError) as reason:
            error = reason
    for _ in chunks:  # a process that failed still takes part, since the others wait in each chunk
        pass
    missing = np.setdiff1d(np.arange(images), features.indices.numpy()).tolist()
    shape = {"rows": len(features), "width": features.width, "missing": missing}
    record = {"key": key, **shape, **written, "torch": torch.__version__}
    on_main(lambda: _commit(path, record, error))


def _fill(file: BinaryIO, features: Features, chunks: Iterator[Tensor]) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(features), features.width)}
    np.lib.format.write_array_header_1_0(file, header)
    for chunk in chunks:
        refuse_non_finite(chunk)
        file.write(np.ascontiguousarray(chunk.cpu().numpy(), dtype="<f4").data)


def _commit(path: Path, record: dict[str, object], error: Exception | None) -> None:
    if error is not None:
        raise error
    os.replace(tmp_path(path), path)
    sync_folder(path.parent)
    write_text(_record_path(path), json.dumps(record, indent=1))


def _open(path: Path, labels: Tensor, device: torch.device) -> WholeFeatures:
    """Map a file that has been verified."""
    record = json.loads(_record_path(path).read_bytes())
    indices = torch.from_numpy(np.setdiff1d(np.arange(len(labels)), record["missing"]))
    file = path.open("rb")
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    _check_size(file, path, record["bytes"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rows are read-only, and nobody writes to them
        rows = torch.from_numpy(np.memmap(file, dtype, mode="r", offset=file.tell(), shape=shape))
    if rows.shape != (len(indices), record["width"]):
        raise ValueError(
            f"{path} holds features {tuple(rows.shape)} of {len(indices)} images; remove it"
        )
    check = functools.partial(_check_size, file, path, record["bytes"])
    return WholeFeatures(rows, labels[indices], indices, device, before_reading=check)


def _check_size(file: BinaryIO, path: Path, expected: int) -> None:
    """Raise `ValueError` if the file was cut."""
    # To read a mapped page that is gone would end the process (SIGBUS).
    size = os.fstat(file.fileno()).st_size
    if size < expected:
        raise ValueError(
            f"{path} was cut while it was in use, from {expected} bytes to {size}: start again, "
            "and the features are computed anew"
        )
