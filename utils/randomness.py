"""Keyed random numbers: every draw is a pure function of a key, and nothing is stored.

A draw depends neither on the workers nor on where a run was resumed. `keyed_seed` hashes words and
numbers to one seed. The other functions are a counter-based generator: a 64-bit key a sample, one
stream number a draw, and the splitmix64 finaliser (Steele et al. 2014, "Fast splittable
pseudorandom number generators") as the hash. So one sample in a worker draws what a whole batch
draws in the main process.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

# splitmix64: its step (2^64 divided by the golden ratio) and the factors of its finaliser.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def keyed_seed(*parts: int | str) -> int:
    """Hash `parts` to a 63-bit seed: the same on every rank, machine and Python version."""
    # The separator keeps ("a", 11) and ("a1", 1) apart.
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def splitmix(values: np.ndarray) -> np.ndarray:
    """Hash uint64 values one by one with the splitmix64 finaliser, a bijection."""
    x = values.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def hashed(indices: np.ndarray, *parts: int | str) -> np.ndarray:
    """Return one uint64 per index (any shape), keyed by `parts`; a bijection of the indices."""
    base = np.array([keyed_seed(*parts)], dtype=np.uint64)
    return splitmix(
        (np.asarray(indices).astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + base
    )


def stream_keys(keys: np.ndarray, stream: int | np.ndarray) -> np.ndarray:
    """Return a uint64 per key, the seed of another generator; `stream` is broadcast to `keys`."""
    counter = np.atleast_1d(np.asarray(stream, dtype=np.uint64)) * np.uint64(_GOLDEN)
    return splitmix(keys ^ splitmix(counter))


def uniform(keys: np.ndarray, stream: int | np.ndarray) -> np.ndarray:
    """Return float64 uniforms in [0, 1), one per key; `stream` is broadcast against `keys`."""
    # A float64 holds 53 bits: the lowest 11 of the 64 are dropped.
    return (stream_keys(keys, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_between(
    keys: np.ndarray, stream: int | np.ndarray, low: float, high: float
) -> np.ndarray:
    """Return float64 uniforms in [low, high), one per key; `stream` is broadcast against `keys`."""
    return low + uniform(keys, stream) * (high - low)


def splitmix_tensor(x: Tensor) -> Tensor:
    """Hash int64 values as `splitmix` hashes uint64 values, bit for bit, on any device."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ _shift_right(x, shift)).mul_(_signed(factor))
    return x.bitwise_xor_(_shift_right(x, 31))


def _signed(value: int) -> int:
    """Return the signed number that has the 64 bits of `value`."""
    # torch multiplies signed numbers only
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift as if `x` were unsigned."""
    # torch copies the sign into the free bits, the mask clears them
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def keyed_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal float32 (N, *shape), a row per int64 key (N,), by Box-Muller."""
    count = math.prod(shape)
    # Each hash makes a pair: 24 bits give the radius, 24 others the angle.
    pairs = torch.arange((count + 1) // 2, device=keys.device) * _signed(_GOLDEN)
    bits = splitmix_tensor(keys[:, None] ^ splitmix_tensor(pairs))
    # The added 1 keeps the logarithm away from 0.
    share = _shift_right(bits, 40).add_(1).to(torch.float32).mul_(2.0**-24)
    radius = share.log_().mul_(-2.0).sqrt_()
    turn = _shift_right(bits, 8).bitwise_and_((1 << 24) - 1).to(torch.float32)
    angle = turn.mul_(2.0 * math.pi * 2.0**-24)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :count].reshape(len(keys), *shape)
