"""The batch that loaders make, steps read and error messages name the samples of."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `views`, each normalised float32 (N,3,S,S), `labels` and `indices` int64 (N,).

    A label of -1 is unknown. Views and labels are on the device, indices on the host.
    """

    views: list[Tensor]
    labels: Tensor
    indices: Tensor  # places in the data set
