"""Normal noise on any device as a pure function of a sample's key: no generator, no state, no host."""

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_MASK24 = (1 << 24) - 1


def mix(x: Tensor) -> Tensor:
    """Hash int64 values with the splitmix64 finaliser of `parameters.mix`, bit by bit the same."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ _shift_right(x, shift)).mul_(factor)
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift as unsigned: the sign does not come in from the left."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def keyed_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal float32 (N, *shape), a row per int64 key (N,), by Box and Muller's method."""
    count = math.prod(shape)
    pairs = torch.arange((count + 1) // 2, device=keys.device) * _GOLDEN
    bits = mix(keys[:, None] ^ mix(pairs))
    radius = _shift_right(bits, 40).add_(1).to(torch.float32).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = _shift_right(bits, 8).bitwise_and_(_MASK24).to(torch.float32).mul_(2.0 * math.pi * 2.0**-24)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :count].reshape(len(keys), *shape)
