"""What a run of another library says of itself while it trains."""

import json
from pathlib import Path

from utils.checkpoints.atomic import write_text


def note(folder: Path, step: int, total: int, epochs: float, loss: float, rate: float) -> None:
    """Write the status and a line of metrics, in the form of our own runs."""
    state = "done" if step == total else "running"
    status = {"state": state, "step": step, "total": total, "epochs": epochs}
    write_text(folder / "status.json", json.dumps(status))
    with (folder / "metrics.jsonl").open("a") as file:
        line = {"step": step, "loss": loss, "images_per_second": rate}
        file.write(json.dumps(line) + "\n")
