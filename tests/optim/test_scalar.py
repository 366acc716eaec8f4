"""Lion, Adam-atan2, AdEMAMix and Scion's tables against their formulas in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from optim_cases import alone, meta, numbers

from megatron_mup.config import Config, ConfigError, OptimizerConfig, ParametrizationConfig
from megatron_mup.config.rules import check_optimizer, check_parametrization
from megatron_mup.config.unused import unused
from megatron_mup.optim.build import MATRIX_OPTIMIZERS
from megatron_mup.optim.muon import Muon
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.optim.scalar import (
    AdamAtan2,
    AdEMAMix,
    AdEMAMixSettings,
    Lion,
)
from megatron_mup.optim.scion import ScionTables, ScionTableSettings, hidden_settings
from megatron_mup.parametrization.meta import Role

SHAPE = (6, 5)
BETAS = (0.9, 0.95)


def tensor(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def lion(w, grads, lr, decay, eps):
    m = torch.zeros_like(w)
    for g in grads:
        w = w - lr * (torch.sign(0.9 * m + 0.1 * g) + decay * w)
        m = 0.95 * m + 0.05 * g
    return w


def adam_atan2(w, grads, lr, decay, eps):
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        u = torch.atan2(m / (1 - 0.9**t), (v / (1 - 0.95**t)).sqrt())
        w = (1 - lr * decay) * w - lr * 1.27 * u
    return w


def ademamix(w, grads, lr, decay, eps, warmup=4, alpha=5.0, beta3=0.999):
    m, s, v = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        share = min(t / warmup, 1)
        half_lives = [math.log(0.5) / math.log(b) for b in (0.9, beta3)]
        b3 = 0.5 ** (1 / ((1 - share) * half_lives[0] + share * half_lives[1]))
        m, v, s = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g, b3 * s + (1 - b3) * g
        u = (m / (1 - 0.9**t) + share * alpha * s) / ((v / (1 - 0.95**t)).sqrt() + eps)
        w = w - lr * (u + decay * w)
    return w


BUILD = {
    lion: lambda p: Lion(p, BETAS),
    adam_atan2: lambda p: AdamAtan2(p, BETAS),
    ademamix: lambda p: AdEMAMix(p, AdEMAMixSettings(betas=BETAS, beta3=0.999, alpha=5.0, warmup=4)),
}


@pytest.mark.parametrize("formula", BUILD)
def test_equals_the_formula(formula):
    rates = [(0.02, 0.3, 1e-3), (0.01, 0.0, 1e-8), (0.02, 0.3, 1e-3)]
    params = [alone(meta(f"p{i}", Role.NORM, SHAPE), tensor(i)) for i in range(3)]
    empty = alone(meta("empty", Role.NORM, (0, 5)), torch.empty(0, 5))
    numbered = [numbers("x", lr, decay, eps) for lr, decay, eps in rates]
    optimizer = BUILD[formula]([*zip(params, numbered, strict=True), (empty, numbered[0])])
    for step in range(7):
        for i, param in enumerate(params):
            param.grad = tensor(10 * step + i)
        optimizer.step(0.5)
    for i, (param, (lr, decay, eps)) in enumerate(zip(params, rates, strict=True)):
        grads = [tensor(10 * step + i).double() for step in range(7)]
        want = formula(tensor(i).double(), grads, 0.5 * lr, decay, eps)
        torch.testing.assert_close(param.value.double(), want, rtol=1e-5, atol=1e-6)
        assert torch.equal(param.grad, tensor(60 + i)), "gradients stay as they are"
    assert optimizer.steps_done == 7
    assert all(t.shape == p.value.shape for p, t in optimizer.state_tensors().values())
    assert {key.split("/")[1] for key in optimizer.state_tensors()} == {"p0", "p1", "p2", "empty"}


def test_ademamix_without_warmup_or_fast_average():
    settings = AdEMAMixSettings(betas=BETAS, beta3=0.999, alpha=5.0, warmup=0)
    assert AdEMAMix([], settings).schedule(1) == (5.0, 0.999)
    late = AdEMAMix([], replace(settings, warmup=10))
    assert late.schedule(10) == late.schedule(11) == (5.0, 0.999)
    assert 0.9 < late.schedule(1)[1] < late.schedule(9)[1] < 0.999
    assert AdEMAMix([], replace(settings, betas=(0.0, 0.9), warmup=10)).schedule(5) == (2.5, 0.999)


# ---- Scion: LIONS-EPFL/scion's dual directions, with exact SVDs


def scion(w, grads, lr, dual, constrained):
    d = torch.zeros_like(w)
    for g in grads:
        d = 0.9 * d + 0.1 * g
        w = ((1 - lr) if constrained else 1) * w - lr * dual(d)
    return w


def spectral(d):
    u, _, vh = torch.linalg.svd(d, full_matrices=False)
    return 50 * math.sqrt(d.shape[0] / d.shape[1]) * u @ vh


def sign(d):
    return 3000 / d.shape[1] * torch.sign(d)


def column_norm(d):
    """Of the matrix [hidden, vocabulary]: the table transposed."""
    return 2 * math.sqrt(d.shape[1]) * d / d.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize(
    ("role", "tied", "dual"),
    [
        (Role.MLP_OUT, False, spectral),
        (Role.READOUT, False, sign),
        (Role.EMBEDDING, True, sign),
        (Role.EMBEDDING, False, column_norm),
        (Role.POSITION_EMBEDDING, True, column_norm),
    ],
)
def test_scion_equals_its_formulas(role, tied, dual, constrained):
    param = alone(meta("w", role, SHAPE), tensor(0))
    scaled = [(param, numbers("scion", lr=2**-6, weight_decay=float(constrained)))]
    if role is Role.MLP_OUT:
        hidden = hidden_settings(50.0, momentum=0.9, num_ns_steps=14, coefficients="polar_express")
        optimizer = Muon(scaled, hidden, None)
    else:
        tables = ScionTableSettings(momentum=0.9, output_radius=3000.0, embedding_radius=2.0, tied=tied)
        optimizer = ScionTables(scaled, tables)
    for step in range(5):
        param.grad = tensor(step + 1)
        optimizer.step(1.0)
    want = scion(tensor(0).double(), [tensor(s + 1).double() for s in range(5)], 2**-6, dual, constrained)
    torch.testing.assert_close(param.value.double(), want, rtol=1e-5, atol=1e-5)


def test_scion_leaves_a_token_that_has_never_come():
    param = alone(meta("w", Role.EMBEDDING, SHAPE), torch.ones(SHAPE))
    param.grad = tensor(1)
    param.grad[3] = 0
    settings = ScionTableSettings(momentum=0.9, output_radius=3000.0, embedding_radius=1.0, tied=False)
    ScionTables([(param, numbers("scion", lr=0.5, weight_decay=0.0))], settings).step(1.0)
    assert torch.equal(param.value[3], torch.ones(5))


# ---- From the flags


def of(**flags: object) -> Config:
    return Config(optimizer=OptimizerConfig(**flags))  # type: ignore[arg-type]


@pytest.mark.parametrize("rest", ["adam", "lion", "adam_atan2", "ademamix"])
@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_routing(lone_mesh, name, rest):
    config = of(optimizer=name, scalar_optimizer=rest, lr=1e-3, muon_lr=2e-2, ademamix_warmup_iters=3)
    roles = {
        Role.EMBEDDING: (8, 4),
        Role.READOUT: (8, 4),
        Role.MLP_OUT: (4, 6),
        Role.QKV: (4, 4),
        Role.NORM: (4,),
        Role.QK_NORM: (4,),
    }
    params = [alone(meta(role.value, role, shape), torch.ones(shape)) for role, shape in roles.items()]
    optimizer = Optimizer(params, config, lone_mesh)
    rows = {row.role: row for row in optimizer.routing_table()}
    assert rows[Role.MLP_OUT].optimizer == rows[Role.QKV].optimizer == name
    assert rows[Role.EMBEDDING].optimizer == rows[Role.READOUT].optimizer
    assert rows[Role.EMBEDDING].optimizer == ("scion_tables" if name == "scion" else rest)
    assert rows[Role.NORM].optimizer == rows[Role.QK_NORM].optimizer == rest
    assert rows[Role.MLP_OUT].lr == 2e-2
    assert rows[Role.NORM].lr == 1e-3
    assert rows[Role.EMBEDDING].lr == (2e-2 if name == "scion" else 1e-3)
    for param in params:
        param.grad = torch.randn(param.value.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step(1.0)
    assert all((param.value != 1).all() for param in params)
    assert set(optimizer.state_scalars()) == {"step"}
    assert "2 matrices" in optimizer.plan()


def test_defaults_of_the_papers(lone_mesh):
    def built(**flags):
        return Optimizer([], of(**flags), lone_mesh)._matrix.settings

    for name in ("muonsphere", "spectral_sphere"):
        settings = built(optimizer=name)
        assert (settings.momentum, settings.num_ns_steps, settings.coefficients) == (0.9, 8, "polar_express:1.01")
        assert settings.nesterov
    settings = built(optimizer="scion")
    assert (settings.momentum, settings.nesterov, settings.extra_scale_factor) == (0.9, False, 50.0)
    for name in ("muon", "normuon"):
        settings = built(optimizer=name)
        assert (settings.momentum, settings.num_ns_steps, settings.coefficients) == (0.95, 5, "quintic")
    for name, steps in (("muon", 2), ("muonsphere", 3)):
        settings = built(optimizer=name, muon_coefficient_type="squaring")
        assert (settings.num_ns_steps, settings.coefficients) == (steps, "squaring")
    simple = built(optimizer="scion", muon_momentum=0.8, muon_coefficient_type="simple", muon_num_ns_steps=3)
    assert (simple.momentum, simple.num_ns_steps, simple.coefficients) == (0.8, 3, "jordan")
    normuon = built(optimizer="normuon", normuon_beta2=0.7, muon_momentum_style="sum")
    assert (normuon.beta2, normuon.momentum_style) == (0.7, "sum")
    sphere = built(optimizer="spectral_sphere", sphere_radius=2.0, sphere_retraction="dynamic", sphere_solver_steps=3)
    assert (sphere.radius, sphere.retraction, sphere.solver_steps) == (2.0, "dynamic", 3)


def test_weight_decay_where_there_are_balls(lone_mesh):
    param = alone(meta("w", Role.MLP_OUT, (4, 4)), torch.ones(4, 4))
    table = alone(meta("e", Role.EMBEDDING, (4, 4)), torch.ones(4, 4))

    def decay(**flags):
        rows = Optimizer([param, table], of(weight_decay=0.3, **flags), lone_mesh).routing_table()
        return [row.weight_decay for row in rows]

    assert decay(optimizer="muon") == decay(optimizer="normuon") == [0.3, 0]
    assert decay(optimizer="spectral_sphere") == decay(optimizer="muonsphere") == [0, 0]
    assert decay(optimizer="spectral_sphere", sphere_retraction="dynamic") == [0.3, 0]
    assert decay(optimizer="scion") == [1, 1]
    assert decay(optimizer="scion", scion_constrained=False) == [0, 0]


def test_refusals():
    scheme = ParametrizationConfig(parametrization="mup")
    with pytest.raises(ConfigError, match="Scion's norms follow width"):
        check_parametrization(replace(of(optimizer="scion"), parametrization=scheme))
    dynamic = {"sphere_retraction": "dynamic", "weight_decay": 0.0}
    with pytest.raises(ConfigError, match="as strong as the weight decay"):
        check_optimizer(of(optimizer="muonsphere", **dynamic))
    with pytest.raises(ConfigError, match="--muon-coefficient-type squaring"):
        check_optimizer(of(optimizer="spectral_sphere", muon_coefficient_type="squaring"))
    for flags in ({"optimizer": "scion"}, {"optimizer": "muon", **dynamic}, {"optimizer": "muonsphere"}):
        check_optimizer(of(**flags))
    for name in ("normuon", "muonsphere", "spectral_sphere"):
        check_optimizer(replace(of(optimizer=name), parametrization=scheme))


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ({}, "scalar_optimizer muon_coefficient_type sphere_radius scion_radius lion_beta1 print_optimizer_plan"),
        ({"optimizer": "muon"}, "normuon_beta2 sphere_solver_steps ademamix_alpha scion_constrained"),
        ({"optimizer": "muon", "scalar_optimizer": "lion"}, "adam_beta1 adam_eps ademamix_beta3"),
        ({"optimizer": "normuon", "scalar_optimizer": "adam_atan2"}, "adam_eps lion_beta2"),
        ({"optimizer": "muonsphere"}, "scion_radius sphere_solver_steps normuon_beta2 weight_decay"),
        ({"optimizer": "spectral_sphere", "scalar_optimizer": "ademamix"}, "dion_rank_fraction lion_beta1"),
        (
            {"optimizer": "scion"},
            "muon_scale_mode muon_nesterov weight_decay decay_embeddings scion_embedding_radius scion_embedding_norm "
            "sphere_retraction",
        ),
    ],
)
def test_settings_that_change_nothing_are_told(flags, idle):
    given = frozenset(idle.split())
    assert len(unused(of(**flags), 1, given)) == len(given)


@pytest.mark.parametrize(
    ("flags", "alive"),
    [
        ({}, "adam_beta1 adam_eps weight_decay"),
        ({"optimizer": "normuon"}, "scalar_optimizer muon_scale_mode normuon_beta2 adam_eps muon_momentum_style"),
        ({"optimizer": "muon", "scalar_optimizer": "ademamix"}, "ademamix_alpha adam_beta1 adam_eps muon_nesterov"),
        ({"optimizer": "spectral_sphere", "scalar_optimizer": "lion"}, "sphere_solver_steps lion_beta1 muon_nesterov"),
        ({"optimizer": "muonsphere"}, "sphere_retraction sphere_radius muon_scale_mode"),
        ({"optimizer": "muonsphere", "sphere_retraction": "dynamic"}, "weight_decay weight_decay_rule"),
        ({"optimizer": "scion"}, "scion_radius scion_output_radius scion_constrained muon_momentum muon_lr"),
    ],
)
def test_settings_that_count_are_not(flags, alive):
    assert unused(of(**flags), 1, frozenset(alive.split())) == []
