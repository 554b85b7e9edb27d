"""Random numbers that depend on seeds and images alone, not on batch, order, device or default type.

A counter is hashed with a key of the image's content and a seed (splitmix64: Steele et al. 2014, doi
10.1145/2714064.2660195). Any number of any image's stream can be computed directly, for all images at once.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as signed 64-bit numbers; products wrap around


def float32_noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 whatever torch's default type is: other types would give other numbers."""
    return torch.rand(shape, generator=generator, dtype=torch.float32)


def numpy_generator(seed: int) -> np.random.Generator:
    """A generator of NumPy from any seed that `check_seed` takes; NumPy alone refuses negative ones."""
    return np.random.default_rng(int(seed) % 2**64)


def mixed_seed(*parts: int) -> int:
    """One seed from several integers; neighboring integers give unrelated seeds.

    >>> mixed_seed(0, 1) != mixed_seed(1, 0)
    True
    """
    digest = hashlib.blake2b(repr(tuple(map(int, parts))).encode(), digest_size=8).digest()
    # 63 bits, so that the seed fits a signed integer.
    return int.from_bytes(digest) >> 1


def keys(images: Tensor, seed: int) -> Tensor:
    """One key (N,) for each of the images (N, C, H, W), from its 8-bit content and the seed."""
    levels = (images * 255).round().byte().cpu().flatten(1).numpy()
    # The seed is the key of the hash, so that other seeds give unrelated numbers for the same image.
    digests = [
        hashlib.blake2b(pixels.tobytes(), digest_size=8, key=str(seed).encode()).digest() for pixels in levels
    ]
    numbers = [int.from_bytes(digest, signed=True) for digest in digests]
    return torch.tensor(numbers, dtype=torch.int64, device=images.device)


def uniform(keys: Tensor, stream: int, *shape: int) -> Tensor:
    """Uniform numbers (N, *shape) in (0, 1), float32 with 2^23 distinct values; streams are independent."""
    # The stream's start is computed in Python integers and wrapped to a signed 64-bit number.
    counter = torch.arange(math.prod(shape), device=keys.device)
    start = mixed(keys + ((stream * GOLDEN + 2**63) % 2**64 - 2**63))
    # The n-th number of splitmix64 is the hash of start + n * GOLDEN, whatever came before.
    bits = mixed(start[:, None] + (counter + 1) * GOLDEN)
    # The upper 23 bits, at the centers of 2^23 equal intervals: never exactly 0 or 1.
    return ((_shifted(bits, 41).float() + 0.5) / 2**23).view(-1, *shape)


def normal(keys: Tensor, stream: int, *shape: int) -> Tensor:
    """Standard normal numbers (N, *shape), float32, by the inverse of the error function."""
    # Never infinite: uniform numbers are strictly inside (0, 1), and float32 holds twice them less 1 exactly.
    return torch.erfinv(uniform(keys, stream, *shape) * 2 - 1).mul(2**0.5)


def mixed(numbers: Tensor) -> Tensor:
    """Hash 64-bit numbers of any shape (the finalizer of splitmix64)."""
    numbers = (numbers ^ _shifted(numbers, 30)) * FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * SECOND
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, places: int) -> Tensor:
    """Logical shift to the right: the sign bit is not extended."""
    shifted: Tensor = (numbers >> places) & (2 ** (64 - places) - 1)
    return shifted
