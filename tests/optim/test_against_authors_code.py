"""Scion and SSO against what their authors' code makes of the same weights and gradients (`golden_of_others`)."""

from __future__ import annotations

from collections.abc import Mapping

import golden_of_others as golden
import numpy
import pytest
import torch
from optim_cases import alone, meta, numbers

from megatron_mup.optim.muon import Muon
from megatron_mup.optim.scion import ScionTables, ScionTableSettings, hidden_settings
from megatron_mup.optim.sphere import SpectralSphere, SphereSettings
from megatron_mup.parametrization.meta import Role

THEIRS: Mapping[str, numpy.ndarray] = numpy.load(golden.FILE)
"""Weights after five steps."""


def trained(role: Role, shape: tuple[int, int], build, **numbered: object) -> torch.Tensor:
    param = alone(meta("w", role, shape), golden.start(shape))
    optimizer = build([(param, numbers(**numbered))])
    for gradient in golden.gradients(shape):
        param.grad = gradient
        optimizer.step(1.0)
    return param.value


def assert_theirs(key: str, weight: torch.Tensor, shape: tuple[int, int]) -> None:
    moved = (weight - golden.start(shape)).norm()
    assert ((weight - torch.from_numpy(THEIRS[key])).norm() / min(moved, weight.norm())).item() < 1e-5


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

    weight = trained(role, shape, build, optimizer="scion", lr=golden.SCION_LR, weight_decay=float(constrained))
    kind = "constrained" if constrained else "unconstrained"
    assert_theirs(golden.key(f"scion/{norm}/{kind}", shape), weight, shape)


@pytest.mark.parametrize("shape", golden.SHAPES)
def test_spectral_sphere(shape):
    settings = SphereSettings(
        radius=golden.SPHERE_RADIUS, momentum=0.9, num_ns_steps=8, coefficients="polar_express", solver_steps=12
    )
    weight = trained(
        Role.MLP_OUT, shape, lambda p: SpectralSphere(p, settings, None), lr=golden.SPHERE_LR, weight_decay=0.0
    )
    assert_theirs(golden.key("spectral_sphere", shape), weight, shape)
