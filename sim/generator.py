"""Counter-based random numbers with one independent stream per member.

Every number is a pure function of (key, position): 64-bit integers from two rounds of the SplitMix64 finaliser
(Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195). A stream needs no state, so that a member draws the same
numbers alone or in a pack, after a restart, and on any device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden-ratio increment, as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch shifts signed integers arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _mix_number(number: int) -> int:
    """`_mix` of one number, modulo 2^64 and signed: a label known to the host is mixed there, without a copy."""
    z = number % (1 << 64)
    z = ((z ^ (z >> 30)) * _MIX_1) % (1 << 64)
    z = ((z ^ (z >> 27)) * _MIX_2) % (1 << 64)
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def key_of(*parts: object) -> int:
    """A signed 64-bit key from the text of `parts`: the same on every machine and in every Python process."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


@dataclass(frozen=True, slots=True)
class Generator:
    """Streams of random numbers, one per entry of `key`.

    key: int64 tensor `[*lead]`, lead = (S,) for a pack, () for one stream; a draw of shape s has shape `[*lead, *s]`.
    A draw does not advance anything: take another stream with `fold`.
    """

    key: Tensor

    @classmethod
    def of(cls, *parts: object, device: torch.device | str = "cpu") -> Generator:
        """One stream named by `parts`, for example `Generator.of("pool", seed)`."""
        return cls(torch.tensor(key_of(*parts), dtype=torch.int64, device=device))

    @classmethod
    def stack(cls, keys: Sequence[int], device: torch.device | str = "cpu") -> Generator:
        """One stream per key, stacked on a leading axis."""
        return cls(torch.tensor(list(keys), dtype=torch.int64, device=device))

    def fold(self, label: str | int | Tensor) -> Generator:
        """The streams named by `label` under these: another purpose (a string) or another step (an integer)."""
        if isinstance(label, Tensor):
            return Generator(_mix(self.key ^ _mix(label.to(torch.int64) * _GAMMA + _MIX_1)))
        number = key_of(label) if isinstance(label, str) else label
        return Generator(_mix(self.key ^ _mix_number(number * _GAMMA + _MIX_1)))

    def bits(self, *shape: int) -> Tensor:
        """Uniform int64 `[*lead, *shape]`."""
        count = math.prod(shape)
        counter = torch.arange(1, count + 1, dtype=torch.int64, device=self.key.device) * _GAMMA
        return _mix(_mix(self.key[..., None] + counter) ^ self.key[..., None]).reshape(*self.key.shape, *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform on 0..high-1, int64 `[*lead, *shape]`. The bias of the multiply-shift is at most high / 2^31."""
        if not 0 < high < 1 << 31:
            raise ValueError(f"high: {high} is not in 1..2^31-1")
        return (_shift(self.bits(*shape), 33) * high) >> 31

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform on (0, 1), never 0 nor 1: `[*lead, *shape]`, spacing 2^-23 (float32) or 2^-52 (float64)."""
        digits = 52 if dtype == torch.float64 else 23
        return (_shift(self.bits(*shape), 64 - digits).to(dtype) + 0.5) * 2.0**-digits

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal by Box-Muller: `[*lead, *shape]`."""
        radius = torch.sqrt(-2.0 * torch.log(self.fold("radius").uniform(*shape, dtype=dtype)))
        return radius * torch.cos(2.0 * math.pi * self.fold("angle").uniform(*shape, dtype=dtype))

    def permutation(self, n: int) -> Tensor:
        """A random order of 0..n-1, int64 `[*lead, n]`."""
        return torch.argsort(self.bits(n), dim=-1)
