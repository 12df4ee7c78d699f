"""Save and load checkpoints. A file whose sha256 does not match its record is refused.

`ckpt_00001000.pt` is an ordinary torch file. Its record `ckpt_00001000.json` holds its sha256 and
size. The rename of the record is the commit: a `.pt` without a record does not count. A kill at
any instant leaves the old checkpoint or the new one.
"""

import hashlib
import json
import logging
import os
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoints.atomic import (
    removed_on_error,
    sha256_of,
    sync_folder,
    tmp_path,
    write_synced,
    write_text,
)
from utils.checkpoints.pickles import StandIn
from utils.checkpoints.rebuild import SAVE_TENSORS, CheckpointError
from utils.checkpoints.torch_file import read_file
from utils.logger import finite_json

logger = logging.getLogger("synco")

_NAME = re.compile(r"ckpt_(\d{8,})\.(pt|json)")
_RESERVED = ("sha256", "bytes", "step", "replaces", "seal")
_MOST_RECORD = 1 << 20  # bytes; ours have about a thousand
Contents = dict[str, Any]  # of a torch file
Record = dict[str, Any]  # of a checkpoint: what its JSON holds

_PLAIN = (type(None), bool, int, float, str, bytes, torch.Size, torch.dtype)


@dataclass(frozen=True)
class Found:
    """Name a checkpoint that has verified."""

    path: Path
    step: int
    meta: Record = field(default_factory=dict)


def save(folder: Path, step: int, state: Contents, *, meta: Record) -> Path:
    """Commit `state` as ckpt_{step:08d}.pt with its record and return the path of the former.

    `meta` (config digest, metrics, versions) goes into the record. CheckpointError: a tensor is
    not finite, or a type would not load with weights_only=True. OSError: the disk failed; older
    checkpoints are intact.
    """
    target = path_of(folder, step)
    _refuse_reserved(meta)
    portable = _portable(state, "")
    folder.mkdir(parents=True, exist_ok=True)
    tmp = tmp_path(target)
    with removed_on_error(tmp):
        written = write_synced(tmp, lambda file: torch.save(portable, file))
        record = {**finite_json(meta), "step": step, **written}
        if current := _current(target):
            # The same step once more: the record accepts the old file too. A kill loses neither.
            _write_record(target, {**record, "replaces": current})
            os.replace(tmp, target)
        else:
            os.replace(tmp, target)
            # the file must be on the disk before the commit below, which says that it is whole
            sync_folder(folder)
            with removed_on_error(target):
                _write_record(target, record)
    sync_folder(folder)
    return target


def _refuse_reserved(meta: Record) -> None:
    if clash := set(meta) & set(_RESERVED):
        raise CheckpointError(f"meta may not use the reserved keys {sorted(clash)}")


def _portable(value: Any, key: str) -> Any:
    """Return `value` with tensors on the CPU; refuse what is not finite or would not load."""
    if isinstance(value, Tensor):
        return _portable_tensor(value, key)
    if type(value) in (dict, OrderedDict):
        if odd := [k for k in value if type(k) not in (str, int)]:
            raise CheckpointError(f"{key or 'state'}: key {odd[0]!r} must be a str or an int")
        prefix = f"{key}." if key else ""
        copy = type(value)((k, _portable(v, f"{prefix}{k}")) for k, v in value.items())
        if hasattr(value, "_metadata"):  # versions of a module's state_dict
            copy._metadata = value._metadata
        return copy
    if type(value) in (list, tuple, set):
        return type(value)(_portable(item, f"{key}[{i}]") for i, item in enumerate(value))
    if type(value) in _PLAIN:
        return value
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(
        f"{key or 'state'}: a {kind} would not load with weights_only=True; save tensors, numbers,"
        " strings and their lists and dictionaries"
    )


def _portable_tensor(tensor: Tensor, key: str) -> Tensor:
    tensor = tensor.detach()
    if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{key}: {bad} of {tensor.numel()} values are not finite; refusing to save such a state"
        )
    tensor = tensor.cpu()
    # a view would drag its whole storage into the file
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def _write_record(target: Path, record: Record) -> None:
    try:
        # the seal is over what a reader will get: a tuple becomes a list
        record = json.loads(json.dumps(record, allow_nan=False))
    except TypeError as error:
        raise CheckpointError(f"meta must hold JSON values only: {error}") from error
    write_text(record_path(target), json.dumps({**record, "seal": _seal(record)}, indent=1))


def amend(path: Path, **meta: object) -> None:
    """Replace entries of a checkpoint's record, e.g. with an evaluation that came later."""
    _refuse_reserved(meta)
    _write_record(path, {**read_record(path), **finite_json(meta)})


def evaluation_of(record: Record) -> dict[str, float]:
    """Return the numbers of the evaluation in a record, {} if there is none."""
    noted = record.get("evaluated")
    values: dict[str, float] = {}
    for name, value in noted.items() if isinstance(noted, dict) else ():
        if value in ("nan", "inf", "-inf"):  # as `finite_json` writes them
            values[name] = float(value)
        elif type(value) in (int, float) and abs(value) < 1e300:
            values[name] = float(value)
    return values


def newest_valid(folder: Path) -> Found | None:
    """Return the newest checkpoint of `folder` that verifies, None if none was ever committed.

    Each one passed over is logged with its reason. CheckpointError: there are checkpoints but none
    verifies. Changes nothing in the folder.
    """
    rejected = []
    for path in committed(folder):
        try:
            record = _verify(path)
        except (CheckpointError, OSError) as reason:
            logger.warning("checkpoint passed over: %s", reason)
            rejected.append(str(reason))
        else:
            meta = {key: value for key, value in record.items() if key not in _RESERVED}
            return Found(path, record["step"], meta)
    if rejected:
        raise CheckpointError(
            f"{folder} holds {len(rejected)} checkpoint(s), none valid; not starting afresh "
            "silently:\n  "
            + "\n  ".join(rejected)
            + "\nRestore one from a copy, or move them away to start from step 0."
        )
    for path in uncommitted(folder):
        logger.warning("%s has no .json: its save was never finished, so it does not count", path)
    return None


def load(path: Path) -> Contents:
    """Return the dictionary of a torch file, on the CPU, after a check of its sha256 or checksums.

    CheckpointError: missing, a folder, damaged, not a torch file, or a file that needs unpickling.
    """
    value, stand_ins = read(path)
    if stand_ins:
        raise CheckpointError(
            f"{path} needs unpickling ({', '.join(stand_ins)}), which can execute code: not loaded."
            f" Where you trust it, {SAVE_TENSORS}"
        )
    return value


def read(path: Path) -> tuple[Contents, list[str]]:
    """Return what `load` does and the names of the objects that are only a `StandIn` in it."""
    if path.is_dir():
        files = [item for item in path.iterdir() if item.suffix in (".pt", ".pth", ".tar")]
        inside = sorted(item.name for item in files)
        example = f", e.g. {inside[-1]}" if inside else ""
        raise CheckpointError(f"{path} is a folder; name a checkpoint file in it{example}")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; check the path of the checkpoint")
    recorded = _has_record(path)
    if recorded:
        _verify(path)
    # a sha256 that fits makes the checksums inside the file needless
    value, stand_ins = read_file(path, checksums=not recorded)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {_no_dictionary(value)}")
    return value, stand_ins


def _no_dictionary(value: object) -> str:
    """Say what a file holds in place of a dictionary of tensors, and what to do."""
    if not isinstance(value, StandIn):
        return f"a {type(value).__name__}, not a dictionary of tensors"
    if value.is_module:  # what torch.save(model, FILE) writes
        return (
            f"a whole pickled module ({value.target}), which only its code can read: save its "
            "weights once, where that code is: torch.save(model.state_dict(), FILE)"
        )
    return f"a pickled {value.target}, not a dictionary of tensors"


def _verify(path: Path) -> Record:
    """Return the record of a checkpoint whose size and sha256 are as written, else raise."""
    record = read_record(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file")
    if not path.exists():
        raise CheckpointError(f"{path} is missing although its .json is there")
    name = _NAME.fullmatch(path.name)
    step, size = record["step"], path.stat().st_size
    if name and (named := int(name[1])) != step:
        raise CheckpointError(f"{path} is named after step {named}, its .json says step {step}")
    accepted = [entry for entry in (record, record.get("replaces")) if entry]
    if size not in [entry["bytes"] for entry in accepted]:
        raise CheckpointError(
            f"{path} has {size} bytes, its .json says {record['bytes']}: truncated or swapped"
        )
    # the size first: it costs nothing, the hash reads the whole file
    if (size, sha256_of(path)) not in [(entry["bytes"], entry["sha256"]) for entry in accepted]:
        raise CheckpointError(f"{path} does not have the sha256 of its .json: damaged or swapped")
    return record


def read_record(path: Path) -> Record:
    """Return the record of a checkpoint, its seal checked; `CheckpointError` if it is damaged."""
    source = record_path(path)
    try:
        with source.open("rb") as file:
            data = file.read(_MOST_RECORD + 1)
        if len(data) > _MOST_RECORD:
            raise ValueError("too large")
        record = json.loads(data)
        seal = record.pop("seal")
        entries = [entry for entry in (record, record.get("replaces")) if entry]
        counts = [record["step"], *(entry["bytes"] for entry in entries)]
        # a step of 1e999 or "7" is a number for nobody
        if any(type(count) is not int or not 0 <= count < 1 << 63 for count in counts):
            raise ValueError("a step or size that is no count")
        if any(type(entry["sha256"]) is not str for entry in entries):
            raise ValueError("a sha256 that is no text")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{source} is not a record of a checkpoint ({type(error).__name__})"
        ) from error
    if seal != _seal(record):
        raise CheckpointError(f"{source} was damaged or edited: its seal does not match")
    return record


def _seal(record: Record) -> str:
    """Return the sha256 of the record itself."""
    # the file's own sha256 does not cover it: a flipped bit in a metric would go unnoticed
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _has_record(path: Path) -> bool:
    if not record_path(path).is_file():
        return False
    # an unrelated x.json beside some x.pth is no record
    return bool(_NAME.fullmatch(path.name)) or b'"sha256"' in record_path(path).read_bytes()


def is_valid(path: Path) -> bool:
    """Tell whether a checkpoint verifies, which reads it whole."""
    try:
        _verify(path)
    except (CheckpointError, OSError):
        return False
    return True


def _current(target: Path) -> Record | None:
    """Return size and sha256 of the committed file that a save will replace, None without one."""
    if not is_valid(target):
        return None
    return {"bytes": target.stat().st_size, "sha256": sha256_of(target)}


def record_path(path: Path) -> Path:
    """Return the path of a checkpoint's JSON."""
    return path.with_suffix(".json")


def path_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"ckpt_{step:08d}.pt"


def step_of(path: Path) -> int:
    """Return the step after which a checkpoint is named."""
    name = _NAME.fullmatch(path.name)
    assert name is not None
    return int(name[1])


def _listed(folder: Path, suffix: str) -> list[Path]:
    """Return the .pt paths of the checkpoints that have a file with `suffix`, newest first."""
    names = [_NAME.fullmatch(path.name) for path in folder.glob("ckpt_*")]
    digits = [name[1] for name in names if name and name[2] == suffix]
    return [folder / f"ckpt_{number}.pt" for number in sorted(digits, key=int, reverse=True)]


def committed(folder: Path) -> list[Path]:
    """Return the .pt paths of the checkpoints whose JSON exists, newest first."""
    return _listed(folder, "json")


def uncommitted(folder: Path) -> list[Path]:
    """Return the .pt files without a JSON, oldest first."""
    return sorted(set(_listed(folder, "pt")) - set(committed(folder)))
