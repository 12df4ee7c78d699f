"""Record where a run comes from: command, commit, machine, versions, one entry a start."""

import json
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from utils.checkpoints.atomic import write_text
from utils.cli.version import commit
from utils.distributed import world_size

RUN_FILE = "run.json"


def record_start(path: Path, step: int, device: torch.device) -> None:
    """Append this start, which goes on from `step`, to the file `path` of a run's folder."""
    try:
        starts = list(json.loads(path.read_bytes())["starts"])
    except (OSError, ValueError, KeyError, TypeError):  # absent, or of another kind
        starts = []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    starts.append(
        {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": step,
            "command": sys.argv,
            "commit": commit(),
            "host": platform.node(),
            "device": f"{device.type} {name}".strip(),
            "processes": world_size(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
    )
    write_text(path, json.dumps({"starts": starts}, indent=1))
