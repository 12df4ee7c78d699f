"""The batch that loaders make, steps read and error messages name the samples of."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch: normalised float32 `views` (N,3,S,S), int64 `labels` and `indices` (N,).

    A label of -1 is unknown. Views and labels are on the device, indices on the host.
    """

    views: list[Tensor]
    labels: Tensor
    indices: Tensor  # places in the data set
