"""Read weights and ground truth that other programs wrote; nothing of a file is executed."""

import logging
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from utils.checkpoints import file as checkpoint
from utils.checkpoints.rebuild import ForeignFileError
from utils.checkpoints.torch_file import guarded, read_file

logger = logging.getLogger("synco")


def read_torch(path: Path) -> checkpoint.Contents:
    """Return the dictionary of a torch file, pickle or safetensors file, tensors on the CPU.

    Objects other than tensors, arrays, containers and numbers come as `StandIn` and are named in
    the log. Raises `CheckpointError` for a file that is missing, damaged, compressed or asks for
    code.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return dict(guarded(path, _read_safetensors))
    value, stand_ins = checkpoint.read(path)
    if stand_ins:
        logger.warning("%s: left out as data only: %s", path, ", ".join(stand_ins))
    return value


def read_pickle(path: Path) -> Any:
    """Return a plain pickle: containers, text, numbers and numpy arrays; refuse anything else."""
    value, stand_ins = read_file(path)
    if stand_ins:
        raise ForeignFileError(f"{path} asks for {', '.join(stand_ins)}; only plain data is read")
    return value


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; the library refuses offsets that overlap or leave it."""
    with safe_open(str(path), framework="pt") as file:
        # The library may return views of the mapped file. Copies stay valid when the file changes.
        return {name: file.get_tensor(name).clone() for name in file.keys()}
