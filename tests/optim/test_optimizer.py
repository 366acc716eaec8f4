from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from optim_cases import alone, meta, model_metas, numbers

from megatron_mup.config import Config, OptimizerConfig
from megatron_mup.optim.build import shared_settings
from megatron_mup.optim.clip import clip_factor, global_grad_norm, scale_grads
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.optimizer import RULES, Optimizer, peak_learning_rates, route
from megatron_mup.parametrization.meta import Role

CONFIG = Config(optimizer=OptimizerConfig(optimizer="muon", lr=1e-3, muon_lr=2e-2, decoupled_lr=5e-3))


def value_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode())))


def build(config: Config, mesh) -> tuple[list[MainParam], Optimizer]:
    params = [alone(m, value_of(m.name, m.shape)) for m in model_metas()]
    return params, Optimizer(params, config, mesh)


def give_gradients(params: list[MainParam], step: int) -> None:
    for param in params:
        param.grad = value_of(f"{param.meta.name}/{step}", param.meta.shape)


def test_routing(lone_mesh):
    _, optimizer = build(CONFIG, lone_mesh)
    rows = {row.name: row for row in optimizer.routing_table()}
    assert [row.name for row in optimizer.routing_table()] == [m.name for m in model_metas()]
    assert all((row.optimizer == "muon") == row.role.is_hidden_matrix for row in rows.values())
    assert rows["layers.0.fc1"].lr == 2e-2
    assert rows["layers.0.norm"].lr == 1e-3
    assert rows["layers.0.norm"].weight_decay == 0.0
    _, adam_only = build(replace(CONFIG, optimizer=OptimizerConfig()), lone_mesh)
    assert {row.optimizer for row in adam_only.routing_table()} == {"adam"}


def test_a_parameter_needs_exactly_one_rule():
    bias, matrix = meta("b", Role.BIAS, (4,)), meta("w", Role.MLP_OUT, (4, 4))
    with pytest.raises(ValueError, match=r"b .*claimed by no optimizer"):
        route(bias, numbers("muon"))
    greedy = {**RULES, "adam": lambda *_: True}
    with pytest.raises(ValueError, match=r"w .*claimed by adam and muon"):
        route(matrix, numbers("muon"), greedy)


def test_one_name_once(lone_mesh):
    twins = [alone(meta("w", Role.MLP_OUT, (4, 4)), torch.zeros(4, 4)) for _ in range(2)]
    with pytest.raises(ValueError, match="twice: w"):
        Optimizer(twins, CONFIG, lone_mesh)


def test_peak_learning_rates():
    rates = peak_learning_rates(model_metas(), CONFIG)
    assert rates["mlp_in"] == 2e-2
    assert rates["norm"] == rates["final_norm"] == 1e-3
    assert rates["embedding"] == rates["readout"] == 5e-3


def test_state_and_resume(lone_mesh):
    params, optimizer = build(CONFIG, lone_mesh)
    keys = set(optimizer.state_tensors())
    assert {"momentum/layers.0.qkv", "exp_avg/embedding", "exp_avg_sq/final_norm"} <= keys
    assert "exp_avg/layers.0.qkv" not in keys
    for step in range(2):
        give_gradients(params, step)
        optimizer.step(1.0)
    again, resumed = build(CONFIG, lone_mesh)
    assert set(resumed.state_tensors()) == keys
    for source, target in zip(params, again, strict=True):
        target.value.copy_(source.value)
    for key, (_, tensor) in optimizer.state_tensors().items():
        resumed.state_tensors()[key][1].copy_(tensor)
    resumed.load_state_scalars(optimizer.state_scalars())
    assert resumed.state_scalars() == {"step": 2}
    for run_params, run_optimizer in ((params, optimizer), (again, resumed)):
        give_gradients(run_params, 2)
        run_optimizer.step(0.5)
    assert all(torch.equal(a.value, b.value) for a, b in zip(params, again, strict=True))


def test_missing_gradient_stops_before_any_update(lone_mesh):
    params, optimizer = build(CONFIG, lone_mesh)
    give_gradients(params, 0)
    params[-1].grad = None
    before = [param.value.clone() for param in params]
    with pytest.raises(RuntimeError, match=params[-1].meta.name):
        optimizer.step(1.0)
    assert all(torch.equal(param.value, old) for param, old in zip(params, before, strict=True))


def test_factor_zero_changes_nothing(lone_mesh):
    params, optimizer = build(CONFIG, lone_mesh)
    before = [param.value.clone() for param in params]
    give_gradients(params, 0)
    optimizer.step(0.0)
    assert all(torch.equal(param.value, old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("flag", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("fp32", "cuda", torch.float32),
        ("bf16", "cpu", torch.bfloat16),
    ],
)
def test_newton_schulz_precision(flag, device, dtype):
    assert shared_settings(OptimizerConfig(muon_ns_dtype=flag), torch.device(device))["ns_dtype"] is dtype


def test_norm_and_clip_equal_torch(lone_mesh):
    params, _ = build(CONFIG, lone_mesh)
    give_gradients(params, 0)
    plain = [torch.nn.Parameter(param.value) for param in params]
    for p, param in zip(plain, params, strict=True):
        p.grad = param.grad.clone()
    norm = global_grad_norm(params, lone_mesh)
    assert norm.shape == ()
    assert norm.dtype is torch.float32
    assert clip_factor(norm, 0.0) is None
    assert clip_factor(norm, 1e6) == 1
    scale_grads(params, clip_factor(norm, 1.0))
    want = torch.nn.utils.clip_grad_norm_(plain, 1.0)
    torch.testing.assert_close(norm, want, rtol=1e-6, atol=0)
    for p, param in zip(plain, params, strict=True):
        torch.testing.assert_close(param.grad, p.grad, rtol=1e-6, atol=0)


def test_tied_copies_count_once(lone_mesh):
    first = alone(meta("embedding", Role.EMBEDDING, (4, 4)), torch.zeros(4, 4))
    copy = alone(replace(first.meta, name="head", tied_to="embedding"), torch.zeros(4, 4))
    first.grad, copy.grad = torch.ones(4, 4), torch.ones(4, 4)
    assert global_grad_norm([first, copy], lone_mesh) == 4.0
    assert global_grad_norm([copy], lone_mesh) == 0.0


def test_norm_keeps_its_digits(lone_mesh):
    param = alone(meta("w", Role.EMBEDDING, (3000, 1000)), torch.zeros(3000, 1000))
    param.grad = torch.full((3000, 1000), 0.1)
    assert global_grad_norm([param], lone_mesh).item() == pytest.approx(0.1 * math.sqrt(3e6), rel=1e-6)
    param.grad = torch.full((3000, 1000), 0.1, dtype=torch.bfloat16)
    assert global_grad_norm([param], lone_mesh).item() == pytest.approx(0.10009765625 * math.sqrt(3e6), rel=1e-6)


def test_norm_names_a_missing_gradient(lone_mesh):
    param = alone(meta("layers.1.fc2", Role.MLP_OUT, (4, 4)), torch.zeros(4, 4))
    with pytest.raises(RuntimeError, match=r"layers\.1\.fc2"):
        global_grad_norm([param], lone_mesh)


@pytest.mark.parametrize(
    ("optimizer", "scalar"), [("adam", "adam"), ("muon", "adam"), ("muon", "lion"), ("scion", "adam")]
)
def test_a_factor_on_gradients_is_that_of_the_step(lone_mesh, optimizer, scalar):
    config, scale = Config(optimizer=OptimizerConfig(optimizer=optimizer, scalar_optimizer=scalar)), torch.tensor(0.37)
    (params, one), (scaled, other) = (build(config, lone_mesh) for _ in range(2))
    for step in range(2):
        give_gradients(params, step)
        give_gradients(scaled, step)
        for param in scaled:
            param.grad *= scale
        one.step(1.0, scale)
        other.step(1.0)
    assert all(torch.equal(a.value, b.value) for a, b in zip(params, scaled, strict=True))
