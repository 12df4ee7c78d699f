"""Keep checkpoints that are a promise: what is found again is what was saved, or it is refused.

`ckpt_00001000.pt` is an ordinary torch file. `ckpt_00001000.json` beside it holds its sha256 and
size, and the JSON's rename is the commit: a `.pt` without JSON never happened. A kill at any
instant leaves the old or the new.
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
from utils.checkpoints.rebuild import CheckpointError
from utils.checkpoints.torch_file import read_file
from utils.logger import finite_json

logger = logging.getLogger("synco")

_NAME = re.compile(r"ckpt_(\d{8,})\.(pt|json)")
_RESERVED = ("sha256", "bytes", "step", "replaces", "seal")
_MOST_RECORD = 1 << 20  # bytes; ours have about a thousand
_PLAIN = (type(None), bool, int, float, str, bytes, torch.Size, torch.dtype)


@dataclass(frozen=True)
class Found:
    """Name a checkpoint that has verified."""

    path: Path
    step: int
    meta: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, step: int, state: dict[str, Any], *, meta: dict[str, Any]) -> Path:
    """Commit `state` as ckpt_{step:08d}.pt and .json and return the path of the former.

    `meta` (config digest, metrics, versions) goes into the JSON. CheckpointError: a tensor is not
    finite, or a type would not load with weights_only=True. OSError: the disk failed; older
    checkpoints are intact.
    """
    target = path_of(folder, step)
    if clash := set(meta) & set(_RESERVED):
        raise CheckpointError(f"meta may not use the reserved keys {sorted(clash)}")
    portable = _portable(state, "")
    folder.mkdir(parents=True, exist_ok=True)
    tmp = tmp_path(target)
    with removed_on_error(tmp):
        written = write_synced(tmp, lambda file: torch.save(portable, file))
        record = {**finite_json(meta), "step": step, **written}
        if current := _current(target):
            # The same step once more: the record accepts the old file too, so that no kill loses
            # both.
            _write_record(target, {**record, "replaces": current})
            os.replace(tmp, target)
        else:
            os.replace(tmp, target)
            # the commit below must not become durable before what it vouches for
            sync_folder(folder)
            with removed_on_error(target):
                _write_record(target, record)
    sync_folder(folder)
    return target


def _portable(value: Any, key: str) -> Any:
    """Return `value` with every tensor on the CPU; refuse what is not finite or would need unpickling."""
    if isinstance(value, Tensor):
        return _portable_tensor(value, key)
    if type(value) in (dict, OrderedDict):
        if odd := [k for k in value if type(k) not in (str, int)]:
            raise CheckpointError(
                f"{key or 'state'}: key {odd[0]!r} is neither str nor int; a checkpoint holds only those"
            )
        copy = type(value)(
            (k, _portable(v, f"{key}.{k}" if key else str(k))) for k, v in value.items()
        )
        if hasattr(value, "_metadata"):  # versions of a module's state_dict
            copy._metadata = value._metadata
        return copy
    if type(value) in (list, tuple, set):
        return type(value)(_portable(item, f"{key}[{i}]") for i, item in enumerate(value))
    if type(value) in _PLAIN:
        return value
    raise CheckpointError(
        f"{key or 'state'}: a {type(value).__module__}.{type(value).__qualname__} would not load with"
        " weights_only=True; save tensors, numbers, strings and their lists and dictionaries"
    )


def _portable_tensor(tensor: Tensor, key: str) -> Tensor:
    tensor = tensor.detach()
    if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{key}: {bad} of {tensor.numel()} values are not finite; refusing to save such a state"
        )
    tensor = tensor.cpu()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()  # a view would drag its whole storage into the file


def _write_record(target: Path, record: dict[str, Any]) -> None:
    try:
        record = json.loads(json.dumps(record, allow_nan=False))
    except TypeError as error:
        raise CheckpointError(f"meta must hold JSON values only: {error}") from error
    write_text(record_path(target), json.dumps({**record, "seal": _seal(record)}, indent=1))


def amend(path: Path, **meta: Any) -> None:
    """Replace entries of a checkpoint's record, e.g. with an evaluation that came after the save."""
    if clash := set(meta) & set(_RESERVED):
        raise CheckpointError(f"meta may not use the reserved keys {sorted(clash)}")
    _write_record(path, {**read_record(path), **finite_json(meta)})


def evaluation_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the evaluation in a record, {} if there is none; what is no number is left out."""
    noted = record.get("evaluated")
    values: dict[str, float] = {}
    for name, value in noted.items() if isinstance(noted, dict) else ():
        if value in ("nan", "inf", "-inf"):  # as `finite_json` writes them
            values[name] = float(value)
        elif type(value) in (int, float) and abs(value) < 1e300:
            values[name] = float(value)
    return values


def newest_valid(folder: Path) -> Found | None:
    """Return the newest checkpoint of `folder` that verifies, None if nothing was ever committed there.

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
            return Found(
                path, record["step"], {k: v for k, v in record.items() if k not in _RESERVED}
            )
    if rejected:
        raise CheckpointError(
            f"{folder} holds {len(rejected)} checkpoint(s), none valid; not starting afresh silently:\n  "
            + "\n  ".join(rejected)
            + "\nRestore one from a copy; or, to start from step 0, move them away or use another folder."
        )
    for path in uncommitted(folder):
        logger.warning(
            "%s has no .json beside it: its save was never finished, so it does not count", path
        )
    return None


def load(path: Path) -> dict[str, Any]:
    """Return the dictionary of a torch file, on the CPU, after verifying its sha256 or its zip checksums.

    CheckpointError: missing, a folder, truncated, damaged, not a torch file, or a file that needs
    unpickling.
    """
    value, stand_ins = read(path)
    if stand_ins:
        raise CheckpointError(
            f"{path} needs unpickling ({', '.join(stand_ins)}), which can execute code, so it is not loaded."
            " Where you trust it, save its tensors alone once: torch.save({'state_dict': tensors}, file)"
        )
    return value


def read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what `load` does and the names of objects of other kinds, which stand there as data only."""
    if path.is_dir():
        inside = sorted(
            item.name for item in path.iterdir() if item.suffix in (".pt", ".pth", ".tar")
        )
        example = f", e.g. {inside[-1]}" if inside else ""
        raise CheckpointError(f"{path} is a folder; name a checkpoint file in it{example}")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; check the path of the checkpoint")
    recorded = _has_record(path)
    if recorded:
        _verify(path)
    value, stand_ins = read_file(path, checksums=not recorded)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a dictionary of tensors")
    return value, stand_ins


def digest(path: Path) -> str:
    """Return the sha256 of a file, the same that its record holds if it has one."""
    return sha256_of(path)


def _verify(path: Path) -> dict[str, Any]:
    """Return the record of a checkpoint whose size and sha256 are as written, else raise with the reason."""
    record = read_record(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file")
    if not path.exists():
        raise CheckpointError(f"{path} is missing although its .json is there")
    name = _NAME.fullmatch(path.name)
    if name and int(name[1]) != record["step"]:
        raise CheckpointError(
            f"{path} is named after step {int(name[1])}, its .json says step {record['step']}"
        )
    accepted = [
        (entry["bytes"], entry["sha256"]) for entry in (record, record.get("replaces")) if entry
    ]
    size = path.stat().st_size
    if size not in [entry[0] for entry in accepted]:
        raise CheckpointError(
            f"{path} has {size} bytes, its .json says {record['bytes']}: truncated or swapped"
        )
    if (size, sha256_of(path)) not in accepted:
        raise CheckpointError(f"{path} does not have the sha256 of its .json: damaged or swapped")
    return record


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON of a checkpoint, its seal checked; ``CheckpointError`` if it is damaged."""
    source = record_path(path)
    try:
        with source.open("rb") as file:
            data = file.read(_MOST_RECORD + 1)
        if len(data) > _MOST_RECORD:
            raise ValueError("too large")
        record = json.loads(data)
        seal = record.pop("seal")
        entries = [record, *([record["replaces"]] if record.get("replaces") else [])]
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


def _seal(record: dict[str, Any]) -> str:
    """Digest the record itself, so that a flipped bit in a metric is noticed too."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _has_record(path: Path) -> bool:
    """Tell whether a JSON beside `path` vouches for it; an unrelated x.json beside some x.pth does not."""
    if not record_path(path).is_file():
        return False
    return bool(_NAME.fullmatch(path.name)) or b'"sha256"' in record_path(path).read_bytes()


def is_valid(path: Path) -> bool:
    """Tell whether a checkpoint verifies, which reads it whole."""
    try:
        _verify(path)
    except (CheckpointError, OSError):
        return False
    return True


def _current(target: Path) -> dict[str, Any] | None:
    """Return size and sha256 of the committed file that a save is about to replace, None if there is none."""
    return (
        {"bytes": target.stat().st_size, "sha256": sha256_of(target)} if is_valid(target) else None
    )


def record_path(path: Path) -> Path:
    """Return the JSON that vouches for a checkpoint."""
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
    """Return the .pt paths of the checkpoints of which a file with `suffix` exists, newest first."""
    names = [
        name
        for path in folder.glob("ckpt_*")
        if (name := _NAME.fullmatch(path.name)) and name[2] == suffix
    ]
    return [
        folder / f"ckpt_{name[1]}.pt"
        for name in sorted(names, key=lambda name: int(name[1]), reverse=True)
    ]


def committed(folder: Path) -> list[Path]:
    """Return the .pt paths of the checkpoints whose JSON exists, newest first."""
    return _listed(folder, "json")


def uncommitted(folder: Path) -> list[Path]:
    """Return the .pt files without a JSON, oldest first."""
    return sorted(set(_listed(folder, "pt")) - set(committed(folder)))
