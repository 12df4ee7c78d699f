"""Mixup and Cutmix of a batch on the device, by timm, with keyed draws."""

from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from data.augment.randaugment import seeded_numpy
from utils.distributed import rank
from utils.randomness import keyed_seed


class Mixing:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412) and Cutmix (Yun et al. 2019, arXiv:1905.04899).

    Draws are a pure function of (seed, step, rank, the batch's first sample). With both strengths 0
    images stay as they are and labels are only smoothed.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.active = (mixup > 0 or cutmix > 0) and prob > 0
        self.num_classes, self.smoothing, self.seed = num_classes, smoothing, seed
        self._mixup = Mixup(
            mixup,
            cutmix,
            None,
            prob,
            switch_prob,
            mode,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Tensor, labels: Tensor, indices: Tensor, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return mixed images (N, 3, H, W) and class shares (N, C); to be mixed, N must be even."""
        if not self.active:
            return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        # timm draws from NumPy's global generator alone
        seed = keyed_seed("mixing", self.seed, step, rank(), int(indices[0]))
        with seeded_numpy(seed % 2**32):
            return self._mixup(images.clone(), labels)  # timm works in place
