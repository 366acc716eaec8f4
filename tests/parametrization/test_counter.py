from __future__ import annotations

import pytest
import torch

from megatron_mup.parametrization.counter import derive_key, hash_u32, hash_u64

KEY = derive_key(1, "test")


def bits_of(x: torch.Tensor, count: int) -> torch.Tensor:
    return (x[..., None] >> torch.arange(count)) & 1


def test_hash_is_the_stated_mixer():
    """Against the same arithmetic in Python's unbounded integers."""
    mask = (1 << 64) - 1

    def reference(key: int, index: int) -> int:
        z = (index * 0x9E3779B97F4A7C15 + key) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB + key) & mask
        z = ((z ^ z >> 31) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 29) * 0x94D049BB133111EB) & mask
        return z ^ z >> 32

    indices = [0, 1, 2, 12345, (1 << 40) + 7, (1 << 63) - 1, -1, -(1 << 63)]
    for key in (0, 1, KEY, -5):
        got = hash_u64(key, torch.tensor(indices)).tolist()
        assert [g & mask for g in got] == [reference(key, i) for i in indices]
        assert hash_u32(key, torch.tensor(indices)).tolist() == [reference(key, i) >> 32 for i in indices]


def test_range_and_key_as_a_tensor():
    index = torch.arange(1 << 16)
    values = hash_u32(KEY, index)
    assert values.dtype is torch.int64
    assert 0 <= values.min() < 1 << 20
    assert (1 << 32) - (1 << 20) < values.max() < 1 << 32
    assert torch.equal(values, hash_u32(torch.tensor(KEY), index))
    keys = torch.tensor([3, KEY])
    assert torch.equal(hash_u32(keys[:, None], index)[1], values)


def test_avalanche():
    """Flipping any bit of index or key flips each output bit half of the time."""
    index = torch.arange(1 << 12)
    flips = 1 << torch.arange(63)
    by_index = hash_u64(KEY, index) ^ hash_u64(KEY, index ^ flips[:, None])
    by_key = hash_u64(KEY, index) ^ hash_u64(KEY ^ flips[:, None], index)
    for changed in (by_index, by_key):
        share = bits_of(changed, 64).double().mean(1)
        assert (share - 0.5).abs().max() < 5.5 * 0.5 / 4096**0.5


def test_bytes_are_uniform_and_neighbours_and_keys_independent():
    n = 1 << 20
    index = torch.arange(n)
    values = hash_u64(KEY, index)
    streams = {
        "alone": values,
        "neighbours": values ^ values.roll(1),
        "stride": hash_u64(KEY, index * 1024),
        "keys": values ^ hash_u64(derive_key(2, "test"), index),
        "near keys": values ^ hash_u64(KEY + 1, index),
    }
    for name, stream in streams.items():
        for shift in range(0, 64, 8):
            counts = torch.bincount((stream >> shift) & 255, minlength=256).double()
            chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
            assert 255 - 5.5 * 510**0.5 < chi2 < 255 + 5.5 * 510**0.5, (name, shift)
    assert values.unique().numel() == n


def test_keys_tell_parts_apart():
    parts = [(1, "a"), (1, "b"), (2, "a"), ("1", "a"), ("1a",), (1, "a", 0), (11, "a"), (1, "1", "a"), ("a", 1)]
    keys = {derive_key(*p) for p in parts}
    assert len(keys) == len(parts)
    assert all(0 <= k < 1 << 63 for k in keys)


@pytest.mark.long
def test_compiled_equals_eager():
    compiled = torch.compile(hash_u32, fullgraph=True, dynamic=True)
    for key, n in ((KEY, 1000), (7, 4097)):
        index = torch.arange(n) * 12345678901
        assert torch.equal(compiled(torch.tensor(key), index), hash_u32(key, index))
