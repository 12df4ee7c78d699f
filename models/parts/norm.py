"""Batch norms with the statistics of all processes, or of parts of one batch; layer norms' eps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from utils.distributed import all_reduce_sum, world_size

_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(_BatchNorm):
    """`nn.SyncBatchNorm` that also works on a CPU, where torch's own refuses to run."""

    # Not a subclass of torch's: `DistributedDataParallel` refuses those on a CPU.
    process_group = None  # all processes; read by torch's forward, as are the two checks
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...) by the statistics of every process's batch."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        if input.is_cuda:
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        return self._forward_cpu(input)

    def _forward_cpu(self, input: Tensor) -> Tensor:
        axes = [0, *range(2, input.dim())]
        count = input.numel() / input.shape[1]
        # a sum over a batch in half precision would lose most digits
        dtype, input = input.dtype, input.to(torch.promote_types(input.dtype, torch.float32))
        # the count travels along: batches may differ in size between processes
        local = torch.cat([input.sum(axes), input.new_tensor([count])])
        total = _SumOverRanks.apply(local)
        mean = total[:-1] / total[-1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        centred = input - mean.view(shape)
        # Deviations from the common mean: sum of squares minus squared mean would lose precision.
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / total[-1]
        self._track(mean.detach(), variance.detach(), total[-1].detach())
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        out = out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = (
            self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        )
        self.running_mean.lerp_(mean, momentum)
        # torch's running variance is the unbiased one, over n - 1
        self.running_var.lerp_(variance * count / (count - 1).clamp_min(1), momentum)


class _SumOverRanks(torch.autograd.Function):
    """Sum over processes. All losses depend on every summand, so gradients are summed too."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        # a copy: the sum is in place, and the caller's tensor must not change
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone())


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of each of `num_splits` groups; sample n is in group n mod num_splits.

    One process then has the statistics that MoCo's shuffling needs (He et al. 2020, section 3.3):
    those of several GPUs. Running statistics are the mean over the groups.
    """

    def __init__(
        self, num_features: int, num_splits: int, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.num_splits = num_splits

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, H, W); N must be a multiple of the number of groups in training."""
        splits = self.num_splits
        if not self.training:
            return super().forward(input)
        if input.shape[0] % splits:
            raise ValueError(
                f"BN_GROUPS: a batch of {input.shape[0]} does not divide into {splits} groups; "
                "choose BN_GROUPS as a divisor of TRAIN.BATCH_SIZE"
            )
        if input.numel() == splits * self.num_features:
            raise ValueError(
                f"BN_GROUPS: {splits} groups of a batch of {splits} have one image each, too few "
                "for a batch norm; choose a smaller BN_GROUPS, or raise TRAIN.BATCH_SIZE"
            )
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        mean, var = self.running_mean.repeat(splits), self.running_var.repeat(splits)
        out = nn.functional.batch_norm(
            # a group's channels are channels apart, so one call normalises all groups
            input.reshape(-1, self.num_features * splits, *input.shape[2:]),
            mean,
            var,
            self.weight.repeat(splits),
            self.bias.repeat(splits),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        self.running_mean.copy_(mean.view(splits, -1).mean(0))
        self.running_var.copy_(var.view(splits, -1).mean(0))
        return out.reshape(input.shape)


def convert_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every plain batch norm by `SyncBatchNorm`, keeping weights and statistics."""
    _refuse_fused_norms(module)
    return _replace(
        module, lambda norm: SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine)
    )


def convert_split_batch_norm(module: nn.Module, num_splits: int) -> nn.Module:
    """Replace every 2-D batch norm by `SplitBatchNorm2d`, keeping weights and statistics."""
    _refuse_fused_norms(module)

    def split(norm: nn.Module) -> nn.Module:
        if not isinstance(norm, nn.BatchNorm2d):
            return norm
        return SplitBatchNorm2d(norm.num_features, num_splits, norm.eps, norm.momentum)

    return _replace(module, split)


def freeze_batch_norms(module: nn.Module) -> None:
    """Replace every batch norm by a fixed scale and shift that no longer move."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(frozen, key).copy_(getattr(child, key).detach())
            setattr(module, name, frozen)
        else:
            freeze_batch_norms(child)


def _refuse_fused_norms(module: nn.Module) -> None:
    """Raise for norms with an activation inside (BatchNormAct2d), which would be lost."""
    for name, child in module.named_modules():
        if isinstance(child, _BatchNorm) and type(child) not in _PLAIN_NORMS:
            raise ValueError(
                f"MODEL.BACKBONE.NAME: {name} is a {type(child).__name__}, which can neither be "
                "synchronised nor split; use a ResNet, a transformer, or one process"
            )


def _replace(module: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    if isinstance(module, _BatchNorm) and type(module) in _PLAIN_NORMS:
        new = make(module)
        if new is not module:
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(new, name, getattr(module, name))  # what is frozen stays frozen
            new.train(module.training)
        return new
    for name, child in module.named_children():
        setattr(module, name, _replace(child, make))
    return module


def set_norm_eps(backbone: nn.Module, name: str, eps: float) -> None:
    """Set the eps of all layer norms but those before the MLPs, as in SynCo-v2's Swin."""
    norms = [
        (path, part) for path, part in backbone.named_modules() if isinstance(part, nn.LayerNorm)
    ]
    if not norms:
        raise ValueError(
            f"MODEL.BACKBONE.NORM_EPS: {eps} does not apply to {name}, which has no layer norm"
        )
    for path, norm in norms:
        if not path.endswith("norm2"):
            norm.eps = eps
