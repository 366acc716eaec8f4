from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from optim_cases import alone, meta, numbers

from megatron_mup.optim.adamw import AdamW, AdamWSettings
from megatron_mup.parametrization.meta import Role

SHAPES = [(13, 7), (64,), (300, 40), (0, 5)]
SETTINGS = AdamWSettings(betas=(0.9, 0.95))
RATES = [(1e-2, 0.1, 1e-8), (1e-2, 0.0, 1e-8), (3e-3, 0.1, 1e-6), (1e-2, 0.1, 1e-8)]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def build(dtype: torch.dtype = torch.float32, settings: AdamWSettings = SETTINGS):
    params = [alone(meta(f"p{i}", Role.NORM, tuple(t.shape)), t) for i, t in enumerate(tensors(0, dtype))]
    scalings = [numbers("adam", lr, decay, eps) for lr, decay, eps in RATES]
    return params, AdamW(list(zip(params, scalings, strict=True)), settings)


def run(params, optimizer, steps: range, dtype: torch.dtype = torch.float32) -> None:
    for step in steps:
        for param, grad in zip(params, tensors(step + 1, dtype), strict=True):
            param.grad = grad
        optimizer.step(1 / (step + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_torch(dtype):
    params, optimizer = build(dtype)
    run(params, optimizer, range(5), dtype)

    plain = [torch.nn.Parameter(t) for t in tensors(0, dtype)]
    groups = [
        {"params": [p], "lr": lr, "weight_decay": decay, "eps": eps}
        for p, (lr, decay, eps) in zip(plain[:3], RATES[:3], strict=True)
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step in range(5):
        for group, (lr, _, _) in zip(theirs.param_groups, RATES[:3], strict=True):
            group["lr"] = lr / (step + 1)
        for p, grad in zip(plain, tensors(step + 1, dtype), strict=True):
            p.grad = grad
        theirs.step()

    for param, want in zip(params, plain, strict=True):
        assert torch.equal(param.value, want.detach())
    state = optimizer.state_tensors()
    for i, p in enumerate(plain[:3]):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[f"{key}/p{i}"][1], theirs.state[p][key])


def test_state_is_there_from_the_start_even_for_empty_shards():
    params, optimizer = build()
    state = optimizer.state_tensors()
    assert set(state) == {f"{kind}/p{i}" for kind in ("exp_avg", "exp_avg_sq") for i in range(4)}
    assert all(tensor.shape == param.value.shape for param, tensor in state.values())
    params[3].grad = None
    for param in params[:3]:
        param.grad = torch.ones_like(param.value)
    optimizer.step(1.0)
    assert optimizer.state_tensors()["exp_avg/p0"][1] is state["exp_avg/p0"][1]
    assert state["exp_avg/p0"][1].count_nonzero()


def test_resume_in_place_is_bitwise():
    params, optimizer = build()
    run(params, optimizer, range(2))
    again, resumed = build()
    for param, source in zip(again, params, strict=True):
        param.value.copy_(source.value)
    for key, (_, tensor) in resumed.state_tensors().items():
        tensor.copy_(optimizer.state_tensors()[key][1])
    resumed.steps_done = optimizer.steps_done
    run(params, optimizer, range(2, 4))
    run(again, resumed, range(2, 4))
    for got, want in zip(again, params, strict=True):
        assert torch.equal(got.value, want.value)
    assert resumed.steps_done == 4


def test_gradients_of_another_precision():
    params, optimizer = build(torch.bfloat16)
    run(params, optimizer, range(1), torch.float32)
    assert params[0].grad.dtype is torch.float32


def test_only_empty_shards_and_no_parameters():
    for shapes in ([(0, 3)], []):
        params = [alone(meta("e", Role.NORM, shape), torch.empty(shape)) for shape in shapes]
        optimizer = AdamW([(param, numbers("adam")) for param in params], SETTINGS)
        optimizer.step(1.0)
        assert optimizer.steps_done == 1


def test_missing_gradient_is_named():
    _, optimizer = build()
    with pytest.raises(RuntimeError, match="p0"):
        optimizer.step(1.0)


def test_moments_in_bf16_under_weights_in_fp32():
    bf16 = replace(SETTINGS, dtypes=(torch.bfloat16, torch.bfloat16))
    params, optimizer = build(settings=bf16)
    exact, reference = build()
    for step in range(5):
        run(params, optimizer, range(step, step + 1))
        run(exact, reference, range(step, step + 1))
        want = reference.state_tensors()
        for key, (_, moment) in optimizer.state_tensors().items():
            assert moment.dtype == torch.bfloat16
            # Each step rounds once.
            torch.testing.assert_close(moment.float(), want[key][1], rtol=0.01, atol=1e-3)
            moment.copy_(want[key][1])
        for param, other in zip(params, exact, strict=True):
            torch.testing.assert_close(param.value, other.value, rtol=0, atol=3e-4 * (step + 1))
            assert step or torch.allclose(param.value, other.value, rtol=0, atol=1e-6), "the first begins with zeros"


def test_of_one_precision_the_plain_formula_is_the_same_step():
    params, optimizer = build(settings=replace(SETTINGS, dtypes=(None, torch.float64)))
    exact, reference = build()
    run(params, optimizer, range(3))
    run(exact, reference, range(3))
    for param, other in zip(params, exact, strict=True):
        torch.testing.assert_close(param.value, other.value, rtol=1e-6, atol=1e-6)
