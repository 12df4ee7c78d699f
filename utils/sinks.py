"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

All three packages are optional and slow to import, so each is imported when its sink opens.
`utils.logger.Metrics` opens a sink with its first value and turns it off after its first error.
"""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor


class Sink:
    """One place for metrics. What a sink cannot show, it leaves out."""

    def __init__(self, folder: Path, first_step: int | None) -> None:
        """Open the sink of the run in `folder`; a resumed run goes on with `first_step`."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers by their tags."""

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text, such as the configuration."""

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Show a picture (H, W, 3) uint8."""

    def embedding(self, features: Tensor, labels: Sequence[int], step: int) -> None:
        """Show features (N, D) and their labels."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard(Sink):
    """Event files in the run's folder."""

    def __init__(self, folder: Path, first_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a run wrote after the checkpoint that it resumed from is dropped.
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers by their tags."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text as it is."""
        # indented by four it is code in Markdown
        code = "".join(f"    {line}\n" for line in text.splitlines())
        self._writer.add_text(name, code, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Show a picture (H, W, 3) uint8."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def embedding(self, features: Tensor, labels: Sequence[int], step: int) -> None:
        """Show features (N, D) in the projector, coloured by their labels."""
        self._writer.add_embedding(features, list(labels), None, step, "knn")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases(Sink):
    """A run of Weights & Biases; `WANDB_PROJECT`, `WANDB_MODE=offline` and the like hold."""

    def __init__(self, folder: Path, first_step: int | None) -> None:
        import wandb

        # The id is ours and kept in the folder, so that a resumed run goes on in the same place.
        kept = folder / "wandb_id.txt"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        name, number = "/".join(folder.parts[-2:]), kept.read_text(encoding="utf-8").strip()
        self._run = wandb.init(id=number, name=name, resume="allow", dir=str(folder))
        self._image = wandb.Image

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers by their tags."""
        # Steps that a killed run already sent come again; the service keeps the first, equal ones.
        self._run.log(dict(values), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Keep a text in the run's configuration."""
        self._run.config.update({name: text}, allow_val_change=True)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Show a picture (H, W, 3) uint8."""
        self._run.log({name: self._image(pixels)}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MLflow(Sink):
    """A run of MLflow; `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME` and the like hold."""

    def __init__(self, folder: Path, first_step: int | None) -> None:
        import mlflow

        kept = folder / "mlflow_id.txt"
        number = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
        run = mlflow.start_run(run_id=number, run_name="/".join(folder.parts[-2:]))
        kept.write_text(run.info.run_id, encoding="utf-8")
        self._mlflow = mlflow

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers by their tags."""
        self._mlflow.log_metrics(dict(values), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Keep a text as a file of the run."""
        self._mlflow.log_text(text, f"{name}.txt")

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


SINKS: dict[str, type[Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
