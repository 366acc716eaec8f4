"""AdamW, then another optimizer: which state it begins with, and by which numbers it goes on."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from optim_cases import alone, meta, model_metas
from test_sharded_optimizer import value_of

from megatron_mup.config import Config, ConfigError, OptimizerConfig, TrainingConfig, validate
from megatron_mup.optim.build import build_matrix
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parametrization.meta import Role

FLAGS = OptimizerConfig(optimizer="muon", lr=1e-3, muon_lr=2e-2, optimizer_switch_at=3)
HIDDEN = "layers.0.fc1"


def of(**flags: object) -> Config:
    return Config(optimizer=replace(FLAGS, **flags))


def fresh() -> list[MainParam]:
    return [alone(m, value_of(m, "init")) for m in model_metas()]


def train(params: list[MainParam], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.advance(step)
        for param in params:
            param.grad = value_of(param.meta, str(step))
        optimizer.step(1.0)


def values(params: list[MainParam]) -> dict[str, torch.Tensor]:
    return {param.meta.name: param.value.clone() for param in params}


def test_without_state_it_is_one_optimizer_after_the_other(lone_mesh):
    params = fresh()
    train(params, Optimizer(params, of(), lone_mesh), range(5))
    want = fresh()
    train(want, Optimizer(want, Config(optimizer=OptimizerConfig(lr=1e-3)), lone_mesh), range(3))
    train(want, Optimizer(want, of(optimizer_switch_at=None), lone_mesh), range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(values(params).values(), values(want).values(), strict=True))


def test_numbers_are_those_of_the_optimizer_at_work(lone_mesh):
    params = fresh()
    optimizer = Optimizer(params, of(), lone_mesh)
    rows = {row.name: row for row in optimizer.routing_table()}
    assert (rows[HIDDEN].optimizer, rows[HIDDEN].lr, rows[HIDDEN].eps) == ("adam", 1e-3, 1e-8)
    assert not optimizer.advance(2)
    assert optimizer.advance(3)
    assert not optimizer.advance(4)
    rows = {row.name: row for row in optimizer.routing_table()}
    assert (rows[HIDDEN].optimizer, rows[HIDDEN].lr, rows[HIDDEN].eps) == ("muon", 2e-2, 0.0)
    assert rows["embedding"].optimizer == "adam"


@pytest.mark.parametrize(("style", "factor"), [("ema", 1.0), ("sum", 1 / (1 - 0.95))])
def test_the_first_moment_becomes_the_momentum(lone_mesh, style, factor):
    router = meta("router", Role.ROUTER, (4, 12))
    params = [*fresh(), alone(router, value_of(router, "init"))]
    flags = {"optimizer_switch_carry_state": True, "muon_momentum_style": style, "muon_moe_router": True}
    optimizer = Optimizer(params, of(**flags), lone_mesh)
    train(params, optimizer, range(3))
    before = {key: tensor.clone() for key, (_, tensor) in optimizer.state_tensors().items()}
    optimizer.advance(3)
    after = {key: tensor for key, (_, tensor) in optimizer.state_tensors().items()}
    assert before[f"exp_avg/{HIDDEN}"].abs().max() > 0
    for name in (HIDDEN, "router"):
        torch.testing.assert_close(after[f"momentum/{name}"], before[f"exp_avg/{name}"] * factor, rtol=1e-6, atol=0)
    for key in ("exp_avg/embedding", "exp_avg_sq/final_norm"):
        assert torch.equal(after[key], before[key])
    assert optimizer.state_scalars() == {"step": 3}


@pytest.mark.parametrize("change", ["advance", "restore"])
def test_old_state_is_freed_before_new_is_allocated(lone_mesh, monkeypatch, change):
    config = of()
    optimizer = Optimizer(fresh(), config, lone_mesh)
    old, build, seen = weakref.ref(next(iter(optimizer.state_tensors().values()))[1]), build_matrix, []
    monkeypatch.setattr(
        "megatron_mup.optim.optimizer.build_matrix", lambda *args: (seen.append(old() is None), build(*args))[1]
    )
    assert optimizer.advance(3) if change == "advance" else optimizer.restore(config, 4) is None
    assert seen == [True]


@pytest.mark.parametrize("name", ["normuon", "muonsphere", "spectral_sphere", "scion"])
def test_any_optimizer_may_follow(lone_mesh, name):
    params = fresh()
    rest = {"scalar_optimizer": "ademamix"} if name != "scion" else {"scalar_optimizer": "lion"}
    config = of(optimizer=name, optimizer_switch_carry_state=True, ademamix_warmup_iters=2, **rest)
    optimizer = Optimizer(params, config, lone_mesh)
    train(params, optimizer, range(3))
    moment = optimizer.state_tensors()["exp_avg/head"][1].clone()
    optimizer.advance(3)
    state = optimizer.state_tensors()
    assert torch.equal(state["momentum/head" if name == "scion" else "exp_avg/head"][1], moment)
    train(params, optimizer, range(3, 5))
    assert all(value.isfinite().all() for value in values(params).values())


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_resumes_bitwise(lone_mesh, at, carry):
    """Saved before the change, at it and after it."""
    config = of(optimizer_switch_carry_state=carry)
    params = fresh()
    optimizer = Optimizer(params, config, lone_mesh)
    train(params, optimizer, range(at))
    saved, scalars = {k: t.clone() for k, (_, t) in optimizer.state_tensors().items()}, optimizer.state_scalars()
    assert (f"momentum/{HIDDEN}" in saved) == (at > 3)
    again = [alone(param.meta, param.value) for param in params]
    resumed = Optimizer(again, config, lone_mesh)
    resumed.restore(config, at)
    assert resumed.state_tensors().keys() == saved.keys()
    for key, (_, tensor) in resumed.state_tensors().items():
        tensor.copy_(saved[key])
    resumed.load_state_scalars(scalars)
    train(params, optimizer, range(at, 6))
    train(again, resumed, range(at, 6))
    assert all(torch.equal(a, b) for a, b in zip(values(params).values(), values(again).values(), strict=True))


def test_going_back_before_the_change(lone_mesh):
    """A run that returns to an earlier checkpoint has AdamW again."""
    config, params = of(), fresh()
    optimizer = Optimizer(params, config, lone_mesh)
    train(params, optimizer, range(5))
    optimizer.restore(config, 2)
    assert f"exp_avg/{HIDDEN}" in optimizer.state_tensors()
    assert optimizer.advance(3)


def test_what_cannot_be(lone_mesh):
    training = TrainingConfig(train_iters=10)
    for flags, message in (
        ({"optimizer": "adam"}, "nothing is named"),
        ({"optimizer": "dion", "optimizer_switch_carry_state": True}, "no counterpart"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(replace(of(**flags), training=training), 1)


def test_phases():
    config = of()
    assert [p.optimizer.optimizer for p in config.phases().values()] == ["adam", "muon"]
    assert list(config.phases()) == [0, 3]
    assert list(Config().phases()) == [0]
    assert config.at_iteration(2).optimizer.optimizer == "adam"
    assert config.at_iteration(3) is config
