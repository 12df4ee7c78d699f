"""Features of a frozen network: shared among the processes, or whole."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.batch import Batch
from utils.distributed import any_rank, gather_rows, gather_uneven, rank, world_size
from utils.progress import Counter

_CHUNK_BYTES = 1 << 26  # of features on the device at a time
_TILE_ELEMENTS = 1 << 24  # of similarities, 64 MiB
_MOST_ROWS = 1 << 16


def chunk_rows(width: int) -> int:
    """Return how many features of `width` numbers a chunk holds: 64 MiB of them, at most 65536."""
    return max(1, min(_MOST_ROWS, _CHUNK_BYTES // (4 * width)))


def block_rows(width: int) -> int:
    """Return how many queries are compared with a chunk at a time."""
    # It depends only on the width, so that results are identical on every machine.
    return max(1, _TILE_ELEMENTS // chunk_rows(width))


@dataclass
class Features:
    """Features (M, F) float32 of labelled images, in the order of the data set."""

    rows: Tensor  # on the host: those that this process holds
    labels: Tensor  # (M,) int64 on the host, of all
    indices: Tensor  # (M,) int64 on the host: places in the data set
    device: torch.device

    def __len__(self) -> int:
        """Return the number of features of all processes."""
        return len(self.labels)

    @property
    def width(self) -> int:
        """Return F."""
        return self.rows.shape[1]

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return features `start` to `stop` on the device of every process, which all call it."""
        raise NotImplementedError

    def at(self, numbers: Tensor) -> Tensor:
        """Return features number (n,) on the device, in that order."""
        raise NotImplementedError

    def chunks(self, size: int | None = None) -> Iterator[Tensor]:
        """Yield all features in order, `size` (64 MiB) at a time; all processes do so together."""
        size = size or chunk_rows(self.width)
        for start in range(0, len(self), size):
            yield self.chunk(start, min(start + size, len(self)))

    def select(self, indices: Tensor) -> "Features":
        """Return those of the images at `indices` of the data set, as far as they could be read."""
        raise NotImplementedError

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """Return this process's blocks of (features, labels) on the device: every W-th one."""
        # A block holds the same rows whatever the number of processes, so that what is computed
        # from it is bit-identical.
        size, mine = block_rows(self.width), []
        for number, features in enumerate(self.chunks(size)):
            if number % world_size() == rank():
                labels = self.labels[number * size : number * size + len(features)]
                mine.append((features, labels.to(self.device)))
        return mine

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return all features (M, F) and labels (M,) on the device of every process."""
        return torch.cat(list(self.chunks())), self.labels.to(self.device)


@dataclass
class SharedFeatures(Features):
    """Features of which each process holds the rows that it computed."""

    places: Tensor  # (m,) ascending: which of the M are the rows held here

    def chunk(self, start: int, stop: int) -> Tensor:
        """Gather the chunk: beyond its share a process holds it for a moment, twice."""
        first, last = torch.searchsorted(self.places, torch.tensor([start, stop])).tolist()
        mine = self.rows[first:last].to(self.device)
        if world_size() == 1:
            return mine
        # Rows come in the order of the ranks; their places put them in that of the data set.
        places = gather_uneven((self.places[first:last] - start).to(self.device))
        gathered = gather_uneven(mine)
        return torch.empty_like(gathered).index_copy_(0, places, gathered)

    def select(self, indices: Tensor) -> "SharedFeatures":
        """Return those of the images at `indices` of the data set, as far as they could be read."""
        kept = torch.isin(self.indices, indices)
        mine = kept[self.places]
        places = (kept.cumsum(0) - 1)[self.places[mine]]
        return SharedFeatures(
            self.rows[mine], self.labels[kept], self.indices[kept], self.device, places
        )


def _in_memory() -> None:
    """Check nothing: the rows have no file."""


@dataclass
class WholeFeatures(Features):
    """Features that every process can read: a file mapped into memory, or a tensor."""

    chosen: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.int64)
    )  # (M,) of rows; none: all
    before_reading: Callable[[], None] = _in_memory  # raises if the file of the rows has been cut

    @classmethod
    def of(cls, rows: Tensor, labels: Tensor) -> "WholeFeatures":
        """Wrap features (M, F) and labels (M,)."""
        return cls(rows.float(), labels.cpu(), torch.arange(len(labels)), rows.device)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Read the chunk."""
        if len(self.chosen):
            return self.at(torch.arange(start, stop))
        self.before_reading()
        return self.rows[start:stop].to(self.device)

    def at(self, numbers: Tensor) -> Tensor:
        """Return features number (n,) on the device, in that order."""
        self.before_reading()
        rows = self.rows[self.chosen[numbers] if len(self.chosen) else numbers]
        return rows.to(self.device)

    def select(self, indices: Tensor) -> "WholeFeatures":
        """Return those of the images at `indices` of the data set, as far as they could be read."""
        # The rows stay where they are, in a file perhaps: only the choice is kept.
        chosen = torch.nonzero(torch.isin(self.indices, indices)).flatten()
        rows = self.chosen[chosen] if len(self.chosen) else chosen
        labels, indices = self.labels[chosen], self.indices[chosen]
        return WholeFeatures(self.rows, labels, indices, self.device, rows, self.before_reading)


def counted(title: str, batches: Iterable[Batch], total: int) -> Iterator[Batch]:
    """Yield the batches and say how many of their `total` images are done."""
    with Counter(title, total) as counter:
        for batch in batches:
            yield batch
            counter.update(counter.done + len(batch.indices))


def refuse_non_finite(features: Tensor) -> None:
    """Raise `ValueError` if features hold NaN or infinity."""
    if not torch.isfinite(features).all():
        raise ValueError(
            "the features hold NaN or infinity; the backbone has diverged or lacks weights"
        )


@torch.no_grad()
def compute_features(
    backbone: Callable[[Tensor], Tensor], batches: Iterable[Batch]
) -> SharedFeatures:
    """Return float32 features of all processes' batches; each keeps its own on the host.

    Samples that several processes got to fill up their shards count once. The caller sets the eval
    mode. Raises `ValueError` on all processes if one has no batch.
    """
    features, labels, indices = [], [], []
    for batch in batches:
        # On the host: the features of a whole data set need not fit on the device.
        features.append(backbone(batch.views[0]).float().cpu())
        labels.append(batch.labels)
        indices.append(batch.indices)
        device = batch.labels.device
    # Agreed: where only some processes raise, the others wait for them for ever.
    if any_rank(not features):
        raise ValueError(
            "a process has no image to evaluate; use at most as many processes as there are images "
            "that can be read"
        )
    return _in_order(torch.cat(features), torch.cat(labels), torch.cat(indices), device)


def _in_order(
    rows: Tensor, labels: Tensor, indices: Tensor, device: torch.device
) -> SharedFeatures:
    """Bring what each process computed into the order of the data set; each index counts once."""
    own = indices.to(device)
    # Processes may share samples that fill up their shards: of equal indices the first counts.
    order, origin = torch.sort(gather_uneven(own), stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = order[1:] != order[:-1]
    origin = origin[first]
    known = gather_uneven(labels.to(device))[origin]
    sizes = gather_rows(torch.tensor([len(own)], device=device)).tolist()
    # Where the samples of this process begin among those of all.
    begin = sum(sizes[: rank()])
    places = torch.nonzero((origin >= begin) & (origin < begin + len(own))).flatten()
    held = (origin[places] - begin).cpu()
    if not torch.equal(held, torch.arange(len(rows))):
        rows = rows[held]
    return SharedFeatures(rows, known.cpu(), order[first].cpu(), device, places.cpu())
