"""SiT: self-supervised vision transformer (Atito, Awais and Kittler 2021, arXiv:2104.03602)."""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.backbones import Backbone, map_geometry, summaries_and_map
from models.parts.corruption import corrupt, draw_corruption, draw_group_mask, mask_groups, send
from models.parts.heads import Encoder
from models.parts.losses import batch_contrast, contrast_metrics, full_precision, nt_xent
from models.parts.momentum import MomentumFramework
from utils.config.key import Count, Fraction, Limits, Rise, Temperature
from utils.schedules import Progress, momentum_at

TASKS = ("rotation", "contrast", "reconstruction")


class Outputs(NamedTuple):
    """Outputs for N images: rotation logits (N, 4), embeddings (N, D), pixels (N, 3, H, W)."""

    rotation: Tensor
    embedding: Tensor
    pixels: Tensor


class Heads(nn.Module):
    """Three heads on summaries, (N, F) each, and on the last feature map (N, F, h, w)."""

    def __init__(self, width: int, out_dim: int, stride: int, map_width: int) -> None:
        super().__init__()
        self.rotation = nn.Linear(width, 4)
        self.contrast: nn.Module = nn.Linear(width, out_dim)
        self.reconstruction: nn.Module = nn.ConvTranspose2d(
            map_width, 3, kernel_size=stride, stride=stride
        )
        _truncated_normal(self)

    def forward(self, summaries: tuple[Tensor, ...], features: Tensor, num: int) -> Outputs:
        """Read the rotation from the last summary and the embedding from the first."""
        return Outputs(
            self.rotation(summaries[-1][:num]),
            self.contrast(summaries[0]),
            self.reconstruction(features),
        )


class StudentHeads(Heads):
    """Heads of the later variant: three layers each for embedding and pixels, no rotation."""

    def __init__(
        self, width: int, hidden_dim: int, out_dim: int, stride: int, map_width: int
    ) -> None:
        super().__init__(width, out_dim, stride, map_width)
        # keeps the shape of `Outputs`; nobody reads it
        self.rotation = nn.Identity()  # type: ignore[assignment]
        self.contrast = nn.Sequential(
            nn.Linear(width, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, out_dim),
            nn.BatchNorm1d(out_dim, affine=False),
        )
        layers = [
            layer for _ in range(3) for layer in (nn.Conv2d(map_width, map_width, 1), nn.GELU())
        ]
        self.reconstruction = nn.Sequential(*layers, self.reconstruction)
        _truncated_normal(self)


def _truncated_normal(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear) or (
            isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)
        ):
            nn.init.trunc_normal_(part.weight, std=0.02)
            assert part.bias is not None
            nn.init.zeros_(part.bias)


class SiTEncoder(Encoder):
    """Backbone and heads; under BatchFormer the embeddings are (2N, D) while training."""

    backbone: Backbone
    projector: Heads

    def forward(self, images: Tensor, num_views: int = 1) -> Outputs:  # type: ignore[override]
        """Return the three heads' outputs of images (N, 3, H, W) of `num_views` stacked views."""
        summaries, features = summaries_and_map(self.backbone, images)
        self._kept(summaries[0])
        if self.batchformer is not None:
            # Each view by itself: over both, attention would see the positive of each query.
            attended = torch.cat([self.batchformer(view) for view in summaries[0].chunk(num_views)])
            # the rotation is read from the plain summary, also where there is only one
            summaries = (attended, *(summaries[1:] or summaries))
        outputs = self.projector(summaries, features, len(images))
        if outputs.pixels.shape != images.shape:
            raise ValueError(
                f"DATA.IMG_SIZE: {images.shape[-1]} is not a multiple of the backbone's stride, "
                f"{map_geometry(self.backbone)[0]}, so SiT cannot reconstruct the image"
            )
        return outputs


class SiT(MomentumFramework):
    """Tell the rotation, recognise the other view and restore the pixels of corrupted images.

    `variant` "rotation" is the published method. The three losses are weighted by learned
    uncertainties, and the target is a running average of the weights, as in DeiT. `variant` "gmml"
    is the authors' later code (GMML: arXiv:2205.14986): a student sees group-masked views, a
    teacher clean ones, without rotation. `legacy_weighting` weighs the losses as the published code
    did before July 2021.
    """

    restores_images = True
    lower_is_better = ("loss", *(f"loss_{task}" for task in TASKS))

    def __init__(
        self,
        backbone: Backbone,
        target_backbone: Backbone | None = None,
        *,
        variant: Annotated[str, Limits(choices=("rotation", "gmml"))] = "rotation",
        hidden_dim: Count = 4096,
        out_dim: Count = 512,
        temperature: Temperature = 0.5,
        base_momentum: Fraction = 0.99996,
        momentum_schedule: Rise = "constant",
        legacy_weighting: bool = False,
        drop_fraction: Fraction = 0.5,
        replace_fraction: Fraction = 0.3,
        drop_align: Count = 1,
        drop_type: Annotated[str, Limits(choices=("zeros", "noise"))] = "zeros",
        reconstruction_weight: float = 1.0,
    ) -> None:
        _check(backbone, variant, drop_type)
        width, geometry = backbone.num_features, map_geometry(backbone)
        gmml = variant == "gmml"
        heads = (
            StudentHeads(width, hidden_dim, out_dim, *geometry)
            if gmml
            else Heads(width, out_dim, *geometry)
        )
        super().__init__(SiTEncoder(backbone, heads), target_backbone)
        # learned together with the weights (Kendall et al. 2018, arXiv:1705.07115)
        if not gmml:  # one each of TASKS
            self.uncertainty = nn.Parameter(torch.ones(3))
        self.variant = variant
        self.sync_batch_norm = gmml
        self.temperature = temperature
        self.base_momentum = base_momentum
        self.momentum_schedule = momentum_schedule
        self.legacy_weighting = legacy_weighting
        self.drop_fraction = drop_fraction
        self.replace_fraction = replace_fraction
        self.drop_align = drop_align
        self.drop_type = drop_type
        self.reconstruction_weight = reconstruction_weight

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """Return the loss and its parts."""
        return (
            self._student_and_teacher(views) if self.variant == "gmml" else self._three_tasks(views)
        )

    def compile_backbones(self, backend: str = "inductor", cuda_graphs: bool = False) -> None:
        """Raise ValueError: only a pooled output can be compiled, and SiT reads tokens and map."""
        raise ValueError(
            "TRAIN.COMPILE, TRAIN.CUDA_GRAPHS: SiT cannot be compiled; set them to False"
        )

    def after_step(self, progress: Progress) -> None:
        """Average the target with this step's momentum, as published.

        A teacher has its own batch-norm statistics. A target that sees no images copies the online
        network's.
        """
        momentum = momentum_at(progress.fraction, self.base_momentum, self.momentum_schedule)
        self.update_target(momentum, buffers=self.variant == "rotation")

    # ---- the published method --------------------------------------------------------------------

    def _three_tasks(self, views: list[Tensor]) -> dict[str, Tensor]:
        # on the host: how many images get which turn is known without a wait for the GPU
        turns = [torch.randint(4, (len(view),)) for view in views]
        clean = [rotate(view, turn) for view, turn in zip(views, turns, strict=True)]
        outputs = [self.online(self.corrupted(view)[0]) for view in clean]
        return self.three_losses(clean, outputs, send(torch.cat(turns), clean[0].device))

    def three_losses(
        self, clean: list[Tensor], outputs: list[Outputs], turns: Tensor
    ) -> dict[str, Tensor]:
        """Weigh the three losses of two views, turned clockwise by `turns` (2N,) quarters."""
        num = len(clean[0])
        logits = full_precision(torch.cat([output.rotation for output in outputs]))
        pairs = self.stream_pairs(outputs[0].embedding, outputs[1].embedding, num)
        losses = {
            "rotation": F.cross_entropy(logits, turns),
            "contrast": torch.stack([nt_xent(*pair, self.temperature) for pair in pairs]).mean(),
            "reconstruction": F.l1_loss(
                full_precision(torch.cat([output.pixels for output in outputs])), torch.cat(clean)
            ),
        }
        terms = [
            uncertainty_weighted(losses[task], self.uncertainty[i], scale, self.legacy_weighting)
            for i, (task, scale) in enumerate(zip(TASKS, (1.0, 1.0, 0.5), strict=True))
        ]
        with torch.no_grad():
            accuracy = (logits.argmax(1) == turns).float().mean() * 100.0
        parts = {f"loss_{task}": value.detach() for task, value in losses.items()}
        return {
            "loss": torch.stack(terms).sum(),
            "embedding": outputs[0].embedding[:num].detach(),
            "rotation_acc": accuracy,
        } | parts

    # ---- the later variant -----------------------------------------------------------------------

    def _student_and_teacher(self, views: list[Tensor]) -> dict[str, Tensor]:
        num = len(views[0])
        corrupted, masks = zip(*(self.corrupted(view) for view in views), strict=True)
        # Both views go through a network in one pass, as published: the batch norms of the heads
        # see both.
        student = self.online(torch.cat(corrupted), len(views))
        with torch.no_grad():
            keys = self.target(torch.cat(views), len(views)).embedding.chunk(len(views))
        queries = student.embedding.chunk(len(views))
        pairs = self.crossed_pairs(queries, keys, num)
        contrasts = [batch_contrast(*pair, self.temperature) for pair in pairs]
        contrast = torch.stack([each.loss for each in contrasts]).sum() * (2.0 / len(pairs))
        error = (student.pixels - torch.cat(views)).abs()
        mask = torch.cat(masks)
        # an image without a mask divides by 1, not by 0
        reconstruction = (error * mask).sum() / (mask.sum().clamp(min=1) * error.shape[1])
        return {
            "loss": contrast + self.reconstruction_weight * reconstruction,
            "embedding": keys[0][:num],
            "loss_contrast": contrast.detach(),
            "loss_reconstruction": reconstruction.detach(),
            **contrast_metrics(*contrasts),
            **self.health(*contrasts),
        }

    # ---- pixels ----------------------------------------------------------------------------------

    def corrupted(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return corrupted copies of images (N, 3, H, W), and where they differ (N, 1, H, W)."""
        num, _, height, width = images.shape
        if self.variant == "gmml":
            drawn = draw_group_mask(
                num, height, width, self.drop_fraction, self.replace_fraction, self.drop_align
            )
            return mask_groups(
                images, drawn, torch.randn_like(images) if self.drop_type == "noise" else None
            )
        out = corrupt(images, draw_corruption(num, height, width), torch.randn_like(images))
        return out, (out != images).any(1, keepdim=True)

    @torch.no_grad()
    def restore(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return corrupted copies of images (N, 3, H, W) and their reconstructions."""
        # The same corruption for the same seed: pictures of different epochs can be compared.
        torch.manual_seed(seed)
        seen, _ = self.corrupted(images)
        return seen, self.online(seen).pixels.float()


def uncertainty_weighted(
    loss: Tensor, uncertainty: Tensor, scale: float, legacy: bool = False
) -> Tensor:
    """Weigh a loss L by its learned uncertainty s: exp(-a s) L + s/2; legacy a exp(-s) L + s/2."""
    weight = scale * torch.exp(-uncertainty) if legacy else torch.exp(-scale * uncertainty)
    return weight * loss + 0.5 * uncertainty


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Turn square images (N, 3, S, S) clockwise by `turns` (N,) quarters, a CPU tensor."""
    out = torch.empty_like(images)
    for quarter in range(4):
        chosen = send(torch.nonzero(turns == quarter)[:, 0], images.device)
        out[chosen] = torch.rot90(images[chosen], -quarter, (2, 3))
    return out


def _check(backbone: Backbone, variant: str, drop_type: str) -> None:
    if variant not in ("rotation", "gmml"):
        raise ValueError(f"MODEL.SIT.VARIANT: {variant!r} is not one of rotation, gmml")
    if drop_type not in ("zeros", "noise"):
        raise ValueError(f"MODEL.SIT.DROP_TYPE: {drop_type!r} is not one of zeros, noise")
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    levels = getattr(backbone, "feature_info", None)
    # Swin would pad its map, whose cells would then not lie on their pixels.
    if size and levels and size[-1] % levels[-1]["reduction"]:
        raise ValueError(
            f"DATA.IMG_SIZE: {size[-1]} is not a multiple of the backbone's stride, "
            f"{levels[-1]['reduction']}, so SiT cannot reconstruct the image"
        )
    tokens = getattr(backbone, "num_prefix_tokens", None)
    if variant == "rotation" and tokens not in (None, 2):
        raise ValueError(
            f"MODEL.BACKBONE.NUM_TOKENS: SiT reads a contrastive and a rotation token, and the "
            f"backbone has {tokens}; set it to 2"
        )
