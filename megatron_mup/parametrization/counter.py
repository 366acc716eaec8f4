"""Counter-based random bits: a hash of (key, index), so that a value depends on its name and place and on nothing else.

Elementwise integer arithmetic only: the same bits on every device, in eager mode and compiled. The hash is a 64-bit
multiply-xorshift mixer of the murmur family. The key enters twice, before and between the rounds, so that the streams
of two keys are not shifted copies of one sequence.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GAMMA = -0x61C8864680B583EB  # the golden ratio in 64 bits, as a signed number
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # Stafford's mixer 13


def derive_key(*parts: int | str) -> int:
    """A 63-bit key from numbers and names, e.g. ``derive_key(seed, "dropout", layer)``."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def hash_u64(key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits for each index, as int64.

    Args:
        key: names the stream; a Python number or a 0-d int64 tensor (for keys that change under ``torch.compile``).
        index: int64, any shape and sign.
    """
    z = index * _GAMMA + key
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIERS[1] + key
    z = (z ^ _shift_right(z, 31)) * _MULTIPLIERS[0]
    z = (z ^ _shift_right(z, 29)) * _MULTIPLIERS[1]
    return z ^ _shift_right(z, 32)


def hash_u32(key: int | Tensor, index: Tensor) -> Tensor:
    """32 random bits for each index, as int64 in [0, 2^32). Arguments as for :func:`hash_u64`."""
    return _shift_right(hash_u64(key, index), 32)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64's own shift copies the sign; the mask makes it the shift of an unsigned number.
    return torch.bitwise_and(x >> bits, (1 << (64 - bits)) - 1)
