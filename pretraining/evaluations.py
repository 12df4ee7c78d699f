"""What main_pretrain.py measures between epochs: k-NN, on-line probe, losses on held-out images."""

import logging
from dataclasses import replace

from yacs.config import CfgNode

from data import build_loader, evaluation_loader
from data.augment.base import Recipe
from data.loader import GlobalLoader
from data.sources import is_labelled, open_split
from data.sources.base import Source
from engine.plan import held_out_batch
from engine.run import Run
from evaluation.accuracy import held_out_losses
from evaluation.features import SharedFeatures, compute_features
from evaluation.knn import features_knn
from evaluation.online_probe import OnlineProbe
from models.parts.momentum import MomentumFramework
from utils.checkpoints.folder import require
from utils.distributed import on_all
from utils.schedules import Progress

logger = logging.getLogger("synco")

_PROJECTED = 500  # test images in TensorBoard's projector
_KNN_EVERY = 10  # epochs, of KNN.EVERY_EPOCHS -1: about 1 % of the time of a run


class Evaluations:
    """What is measured while a method trains: k-NN, and its own losses on held-out images.

    A split that is missing is refused when this is made, not after the first epochs. `at_once`:
    whatever is configured is due at every call.
    """

    def __init__(
        self,
        cfg: CfgNode,
        run: Run,
        framework: MomentumFramework,
        source: Source,
        recipe: Recipe,
        at_once: bool,
        probe: OnlineProbe | None = None,
    ) -> None:
        self.cfg, self.run, self.framework, self.probe = cfg, run, framework, probe
        self.at_once = at_once
        # opened now, so that a missing split ends the run before its first step
        self.held_out: GlobalLoader | None = None
        self.knn: dict[str, Source] = {}
        if cfg.HELD_OUT.EVERY_EPOCHS:
            unseen = open_split(cfg.DATA, "val")
            size = held_out_batch(len(unseen), cfg.TRAIN.BATCH_SIZE)
            # An evaluation replaces no image, so not one may be unreadable.
            self.held_out = build_loader(
                cfg,
                unseen,
                recipe,
                run.device,
                global_batch=size,
                max_bad_fraction=0.0,
                decode=cfg.DATA.DECODE,
            )
            seen = self.held_out.steps_per_epoch * size
            logger.info("held out: %d of %d images, in batches of %d", seen, len(unseen), size)
        every = cfg.KNN.EVERY_EPOCHS
        self.knn_by_default = every < 0
        self.knn_every = _KNN_EVERY if self.knn_by_default else every
        wanted = every > 0 or probe is not None or (at_once and not self.held_out)
        if wanted or (self.knn_by_default and not at_once):
            try:
                self.knn = on_all(lambda: labelled_splits(cfg.DATA, source))
            except (ValueError, OSError) as error:
                if probe:
                    raise ValueError(
                        f"PROBE.ONLINE: the probe is tested on labelled images of a split val; "
                        f"{error}; or set PROBE.ONLINE to False"
                    ) from error
                if wanted:
                    raise
                # Nobody asked for it, so a data set without labels or test images goes without.
                logger.info("no k-NN while this run trains: %s", str(error).partition(";")[0])
        if not cfg.CHECKPOINT.KEEP_BEST.startswith("held_out_" if self.held_out else "-"):
            names = [f"knn{k}_{top}" for k in cfg.KNN.K for top in ("top1", "top5")]
            names += ["probe_top1"] if probe else []
            require(cfg.CHECKPOINT.KEEP_BEST, names if self.knn else [])

    def __call__(self, progress: Progress) -> dict[str, float]:
        """Return the values that are due after an epoch."""
        values: dict[str, float] = {}
        if self.knn and self._due(self.knn_every, progress):
            values |= self._neighbours(progress)
        if self.held_out and self._due(self.cfg.HELD_OUT.EVERY_EPOCHS, progress):
            values |= self._losses(progress)
        return values

    def _due(self, every: int, progress: Progress) -> bool:
        return self.at_once or progress.epoch % every == 0 or _is_last(progress)

    def _neighbours(self, progress: Progress) -> dict[str, float]:
        knn, classes = self.cfg.KNN, self.knn["train"].num_classes
        try:
            bank, queries = self._features("train"), self._features("val").blocks()
            if _is_last(progress) and queries:
                features, labels = (part[:_PROJECTED] for part in queries[0])
                self.run.metrics.embedding(features, labels.tolist(), progress.step)
            accuracy = self.probe.accuracy(queries) if self.probe else {}
            return features_knn(bank, queries, classes, knn.K, knn.TEMPERATURE) | accuracy
        except ValueError as error:  # agreed by all processes, see compute_features
            if not self.knn_by_default:
                raise
            logger.warning("no k-NN after this epoch: %s", error)
            return {}

    def _features(self, split: str) -> SharedFeatures:
        # An unreadable test image must not end a run that did not ask to be tested.
        skip = split == "train" or self.knn_by_default
        size = self.cfg.TRAIN.BATCH_SIZE
        batches = evaluation_loader(self.cfg, self.knn[split], self.run.device, size, skip)
        with self.run.evaluating(self.framework.online.backbone) as backbone:
            return compute_features(backbone, batches)

    def _losses(self, progress: Progress) -> dict[str, float]:
        assert self.held_out is not None
        steps = self.held_out.from_step(0, self.held_out.steps_per_epoch)
        views = (
            [self.run.views(v) for v in batch.views] for _, batches in steps for batch in batches
        )
        # the loss of the epoch that ends here: SynCo's next one may have synthetic negatives
        last = replace(progress, step=max(progress.step - 1, 0))
        with self.run.evaluating(self.framework) as framework:
            return held_out_losses(lambda seen: framework(seen, last), views, self.cfg.SEED)


def labelled_splits(node: CfgNode, source: Source) -> dict[str, Source]:
    """Return the labelled images of `train`, `source` if it has labels, and those of `val`."""
    train = source if is_labelled(source) else open_split(node, "train", labelled=True)
    return {"train": train, "val": open_split(node, "val", labelled=True)}


def _is_last(progress: Progress) -> bool:
    return progress.step == progress.total_steps
