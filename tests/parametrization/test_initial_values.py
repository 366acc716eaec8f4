from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from megatron_mup.parametrization import init
from megatron_mup.parametrization.counter import hash_u64
from megatron_mup.parametrization.init import fill_, initial_values, normal
from megatron_mup.parametrization.meta import ParamMeta, Role


def matrix(*shape: int, name: str = "weight", role: Role = Role.MLP_IN, **facts) -> ParamMeta:
    return ParamMeta(name=name, role=role, shape=shape, fan_in=1, fan_out=1, base_fan_in=1, base_fan_out=1, **facts)


def whole(meta: ParamMeta, std: float | None = 1.0, seed: int = 1, **kwargs) -> torch.Tensor:
    return initial_values(meta, std, seed, [0] * len(meta.shape), meta.shape, **kwargs)


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return whole(matrix(1024, 2048)).double().flatten()


def test_moments(sample):
    n = sample.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((sample**power).mean().item() - mean) < 4.5 * (variance / n) ** 0.5, power


def test_law_is_normal_by_kolmogorov_and_smirnov(sample):
    n = sample.numel()
    law = torch.special.ndtr(sample.sort().values)
    rank = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((law - rank / n).max(), ((rank + 1) / n - law).max())
    assert distance * n**0.5 < 1.95  # 0.1 % level


@pytest.mark.parametrize("bound", [3.0, 4.0, 4.5])
def test_tails(sample, bound):
    expected = sample.numel() * math.erfc(bound / 2**0.5) / 2
    for side in (sample > bound, sample < -bound):
        assert abs(side.sum().item() - expected) < 5 * expected**0.5


def test_extreme_counters_stay_finite():
    """The hash values at which radius or angle are largest and smallest."""
    low, high = (1 << 40) - 1, 1 << 40
    for radius in (0, 1, low - 1, low, (1 << 39) - 1, 1 << 39):
        for angle in (0, 1, (1 << 23) - 1, -(1 << 23), -1):
            bits = torch.tensor([angle * high + radius])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(init, "hash_u64", lambda key, index, bits=bits: bits)
                got = normal(0, bits).item()
            u, t = (radius + 0.5) / 2**40, (angle + 0.5) / 2**23
            assert got == pytest.approx((-2 * math.log(u)) ** 0.5 * math.sin(math.pi / 2 * t), rel=1e-9, abs=2e-8)
            assert abs(got) < 7.6


def test_normal_against_the_library():
    index = torch.arange(1 << 16)
    bits = hash_u64(5, index)
    u = ((bits & ((1 << 40) - 1)).double() + 0.5) / 2**40
    t = ((bits >> 40).double() + 0.5) / 2**23
    torch.testing.assert_close(normal(5, index), (-2 * u.log()).sqrt() * torch.sin(math.pi / 2 * t), rtol=0, atol=1e-10)


def test_names_seeds_and_neighbours_are_independent(sample):
    n = sample.numel()
    others = {
        "name": whole(matrix(1024, 2048, name="weighs")),
        "seed": whole(matrix(1024, 2048), seed=2),
        **{f"lag {lag}": sample.roll(lag) for lag in (1, 2, 64, 2048)},
    }
    for name, other in others.items():
        other = other.reshape(-1).double()
        for f, variance in ((lambda x: x, 1), (lambda x: x * x - 1, 4), (torch.sign, 1)):
            assert abs((f(sample) * f(other)).mean().item()) < 5 * (variance / n) ** 0.5, name


@pytest.mark.parametrize("shape", [(97,), (1, 1), (61, 37), (16, 512), (5, 7, 11), (3, 4, 5, 6)])
def test_any_rectangle_is_the_slice_of_the_whole(shape):
    meta, draw = matrix(*shape), random.Random(0)
    full = whole(meta, 0.02)
    for _ in range(200):
        low = [draw.randint(0, s) for s in shape]
        size = [draw.choice([s - o, draw.randint(0, s - o)]) for s, o in zip(shape, low, strict=True)]
        part = initial_values(meta, 0.02, 1, low, size)
        assert torch.equal(part, full[tuple(slice(o, o + n) for o, n in zip(low, size, strict=True))])


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 10])
def test_chunks_change_nothing(monkeypatch, chunk):
    meta = matrix(50, 70)
    full, part = whole(meta), initial_values(meta, 1.0, 1, (3, 5), (40, 60))
    monkeypatch.setattr(init, "_CHUNK_CPU", chunk)
    assert torch.equal(whole(meta), full)
    assert torch.equal(initial_values(meta, 1.0, 1, (3, 5), (40, 60)), part)


def test_large_shards_cross_chunks_alike():
    meta = matrix(300, 1111)
    full = whole(meta)
    columns = [initial_values(meta, 1.0, 1, (0, c), (300, min(100, 1111 - c))) for c in range(0, 1111, 100)]
    assert torch.equal(torch.cat(columns, 1), full)
    assert torch.equal(full.view(-1), whole(matrix(300 * 1111)))


def test_strided_tensors_and_parameters_are_filled_in_place():
    meta = matrix(8, 6)
    parameter = torch.nn.Parameter(torch.empty(6, 8).T)
    assert fill_(parameter, meta, 0.5, 1, (0, 0)) is parameter
    assert torch.equal(parameter.detach(), whole(meta, 0.5))


def test_narrow_types_round_the_fp32_values():
    meta = matrix(64, 64)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(whole(meta, 0.02, dtype=dtype), whole(meta, 0.02).to(dtype))


def test_std_scales(sample):
    assert torch.equal(whole(matrix(1024, 2048), 0.25).flatten().double(), sample * 0.25)
    assert not whole(matrix(9, 9), 0.0).any()


@pytest.mark.parametrize(("role", "value"), [(Role.NORM, 1.0), (Role.QK_NORM, 1.0), (Role.BIAS, 0.0)])
def test_constants(role, value):
    assert torch.equal(whole(matrix(9, role=role), None), torch.full((9,), value))


def test_a_copy_gets_its_originals_values():
    original, other = matrix(9, 9, name="embedding"), matrix(9, 9, name="head")
    assert not torch.equal(whole(other), whole(original))
    assert torch.equal(whole(replace(other, tied_to="embedding")), whole(original))


def test_impossible_rectangles_are_refused():
    for offsets, shape in (((0, 0), (3, 5)), ((-1, 0), (1, 1)), ((2, 0), (2, 4)), ((0,), (4,)), ((0, 0, 0), (1, 1, 1))):
        with pytest.raises(ValueError, match="no rectangle"):
            initial_values(matrix(3, 4), 1.0, 1, offsets, shape)


def test_the_generator_stays_the_same():
    """Changing these numbers changes every run's start: on purpose only."""
    values = whole(matrix(2, 3, name="decoder.layers.0.mlp.linear_fc1.weight"), 0.02, seed=1234)
    assert values.view(torch.int32).tolist() == [
        [-1123430395, -1130517267, -1133526288],
        [1004925289, 1024418640, 1011319001],
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_cpus_bits():
    meta = matrix(1031, 2053)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(whole(meta, 0.02, device="cuda", dtype=dtype).cpu(), whole(meta, 0.02, dtype=dtype))
