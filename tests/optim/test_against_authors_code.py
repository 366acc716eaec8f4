"""Our steps against what their authors' code makes of the same weights and gradients (`golden_of_others`)."""

from __future__ import annotations

from collections.abc import Mapping

import golden_of_others as golden
import numpy
import pytest
import torch
from optim_cases import alone, meta, numbers

from megatron_mup.optim.dion import Dion, DionSettings
from megatron_mup.optim.muon import Muon, MuonSettings, NorMuon, NorMuonSettings
from megatron_mup.optim.scion import ScionTables, ScionTableSettings, hidden_settings
from megatron_mup.optim.sphere import MuonSphere, SpectralSphere, SphereSettings
from megatron_mup.parametrization.meta import Block, Role

THEIRS: Mapping[str, numpy.ndarray] = numpy.load(golden.FILE)
"""Weights after five steps."""

DION_MUON = {"momentum_style": "sum", "nesterov": False}
MUON_NUMBERS = {"lr": golden.MUON["lr"], "weight_decay": golden.MUON["weight_decay"]}
SPHERE = {"momentum": 0.9, "num_ns_steps": 8, "coefficients": "polar_express", "solver_steps": 6}


def trained(facts, start, gradients, build, begin=None, **numbered: object) -> torch.Tensor:
    param = alone(facts, start)
    optimizer = build([(param, numbers(**numbered))])
    if begin is not None:
        begin(optimizer.state_tensors())
    for gradient in gradients:
        param.grad = gradient
        optimizer.step(1.0)
    return param.value


def assert_theirs(key: str, weight: torch.Tensor, start: torch.Tensor) -> None:
    moved = (weight - start).norm()
    assert ((weight - torch.from_numpy(THEIRS[key])).norm() / min(moved, weight.norm())).item() < 1e-5


def check(kind: str, shape: tuple[int, int], build, role: Role = Role.MLP_OUT, begin=None, **numbered: object) -> None:
    """One matrix of a shape."""
    start = golden.start(shape)
    weight = trained(meta("w", role, shape), start, golden.gradients(shape), build, begin, **numbered)
    assert_theirs(golden.key(kind, shape), weight, start)


@pytest.mark.parametrize("shape", golden.SHAPES)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("keller_jordan", MuonSettings(scale_mode="shape_scaling", coefficients="jordan")),
        ("moonlight/True", MuonSettings(scale_mode="match_rms_adamw", coefficients="jordan", momentum_style="sum")),
        ("moonlight/False", MuonSettings(scale_mode="match_rms_adamw", coefficients="jordan", nesterov=False)),
        ("dion/muon/spectral_norm", MuonSettings(**DION_MUON)),
        ("dion/muon/rms_norm", MuonSettings(scale_mode="match_rms_adamw", momentum_style="sum")),
        ("dion/normuon", NorMuonSettings(beta2=0.8, **DION_MUON)),
    ],
)
def test_muon_and_normuon(kind, settings, shape):
    cls = NorMuon if isinstance(settings, NorMuonSettings) else Muon
    check(kind, shape, lambda params: cls(params, settings, None), **MUON_NUMBERS)


@pytest.mark.parametrize("shape", golden.SHAPES)
@pytest.mark.parametrize("fraction", golden.DION_FRACTIONS)
def test_dion(fraction, shape):
    own = {"lr": golden.DION["lr"], "weight_decay": golden.DION["weight_decay"]}
    settings = DionSettings(rank_fraction=fraction, momentum=golden.DION["mu"])

    def begin(state) -> None:
        state["dion_basis/w"][1].copy_(golden.basis(shape, fraction).flatten())

    check(f"dion/reference/{fraction}", shape, lambda params: Dion(params, settings, None), begin=begin, **own)


@pytest.mark.parametrize("shape", golden.SHAPES)
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize(
    ("norm", "role", "named"),
    [
        ("spectral", Role.MLP_OUT, {}),
        ("sign", Role.READOUT, {}),
        ("rows", Role.READOUT, {"output_norm": "row"}),
        ("tokens", Role.EMBEDDING, {}),
        ("plain_sign", Role.EMBEDDING, {"embedding_norm": "sign"}),
    ],
)
def test_scion(norm, role, named, constrained, shape):
    radius = golden.SCION[norm][2]
    tables = ScionTableSettings(momentum=0.9, output_radius=radius, embedding_radius=radius, tied=False, **named)
    # Their Newton-Schulz: five steps of one polynomial.
    hidden = hidden_settings(radius, momentum=0.9, num_ns_steps=5, coefficients="jordan")

    def build(params):
        return Muon(params, hidden, None) if role is Role.MLP_OUT else ScionTables(params, tables)

    kind = f"scion/{norm}/{'constrained' if constrained else 'unconstrained'}"
    check(kind, shape, build, role, optimizer="scion", lr=golden.SCION_LR, weight_decay=float(constrained))


@pytest.mark.parametrize("shape", golden.SHAPES)
def test_spectral_sphere(shape):
    settings = SphereSettings(radius=golden.SPHERE_RADIUS, **SPHERE)
    check("spectral_sphere", shape, lambda p: SpectralSphere(p, settings, None), lr=golden.SPHERE_LR, weight_decay=0.0)


@pytest.mark.parametrize("shape", golden.SHAPES)
@pytest.mark.parametrize(
    ("kind", "cls"),
    [("muonsphere/hard", MuonSphere), ("muonsphere/dynamic", MuonSphere), ("spectral_sphere/dynamic", SpectralSphere)],
)
def test_retractions(kind, cls, shape):
    settings = SphereSettings(retraction=kind.partition("/")[2], **SPHERE)

    def begin(state) -> None:
        # As if a step had been: ours begins with a hard retraction, theirs expects weights to be on the sphere.
        state["right_vector/w"][1].fill_(1.0)

    own = {"lr": golden.SPHERE_LR, "weight_decay": golden.RETRACTION}
    check(kind, shape, lambda params: cls(params, settings, None), begin=begin, **own)


@pytest.mark.parametrize("shape", golden.SHAPES)
@pytest.mark.parametrize(
    ("theirs", "ours"), [("align_adamw_rms", "match_rms_adamw"), ("shape_scaling", "shape_scaling")]
)
def test_scales_of_the_spheres_step(theirs, ours, shape):
    settings = SphereSettings(scale_mode=ours, **SPHERE)
    own = {"lr": golden.SPHERE_LR, "weight_decay": 0.0}
    check(f"muonsphere/{theirs}", shape, lambda params: MuonSphere(params, settings, None), **own)


def blocks_of_qkv(kind: str) -> tuple[Block, ...]:
    """Those that `golden.parts` tells of; heads are split by the settings."""
    ends = numpy.cumsum((0, *golden.QKV)).tolist()
    return tuple(
        Block(name, start, size, ends[-1], apart=kind == "group", heads=size // 4)
        for name, start, size in zip("qkv", ends, golden.QKV, strict=False)
    )


@pytest.mark.parametrize("kind", ["component", "group", "head"])
@pytest.mark.parametrize("name", ["dion/muon", "dion/normuon", "spectral_sphere"])
def test_logical_matrices_of_a_fused_tensor(name, kind):
    split = {"split_heads": kind == "head"}
    own = {"lr": golden.SPHERE_LR, "weight_decay": 0.0} if name == "spectral_sphere" else MUON_NUMBERS

    def build(params):
        match name:
            case "dion/muon":
                return Muon(params, MuonSettings(**DION_MUON, **split), None)
            case "dion/normuon":
                return NorMuon(params, NorMuonSettings(beta2=0.8, **DION_MUON, **split), None)
        return SpectralSphere(params, SphereSettings(**SPHERE, **split), None)

    start = golden.fused_start(kind)
    facts = meta("qkv", Role.QKV, tuple(start.shape), blocks=blocks_of_qkv(kind))
    assert_theirs(f"{name}/{kind}", trained(facts, start, golden.fused_gradients(kind), build, **own), start)
