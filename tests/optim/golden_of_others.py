"""Five steps of optimizers as their authors publish them, on inputs made from seeds.

    python tests/optim/golden_of_others.py SCION SPHERE

writes ``golden_of_others.npz`` beside this file from two checkouts: https://github.com/LIONS-EPFL/scion at
f58a393e010395a5913176be5673d8839caa6285 and https://github.com/Unakar/Spectral-Sphere-Optimizer at
304d7a4f67c2221cda04b891831db94e5c049092. Nothing of theirs is changed but this, on the way in: ``Tensor.bfloat16``
leaves fp32 as it is, and ``torch.compile`` does nothing. What SSO leaves to settings is set to convergence: 300 power
iterations in the place of 5, and 60 bisections.
"""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch

FILE = Path(__file__).with_suffix(".npz")
STEPS = 5
SHAPES = [(16, 48), (48, 16), (32, 32), (7, 20)]
SCION_LR, SPHERE_LR, SPHERE_RADIUS = 2.0**-6, 0.02, 2.0

SCION: dict[str, tuple[str, dict[str, Any], float]] = {
    "spectral": ("Spectral", {}, 50.0),
    "sign": ("Sign", {}, 3000.0),
    "tokens": ("ColNorm", {"transpose": True}, 2.0),
    "plain_sign": ("Sign", {"normalized": False}, 2.0),
    "rows": ("RowNorm", {}, 300.0),
}
"""Norm, its settings and radius, by what the tests call it."""


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Fp32 with singular values from 0.3 to 1, so that each form of Newton-Schulz converges to the last digits."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(drawn, full_matrices=False)
    return ((u * torch.linspace(1, 0.3, u.shape[1], dtype=torch.float64)) @ vh).float()


def start(shape: tuple[int, int]) -> torch.Tensor:
    """Initial weights, with a gap below the largest singular value: without one its vectors are nobody's."""
    weight = matrix(shape, 1)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    return weight + 0.5 * torch.outer(u[:, 0], vh[0])


def gradients(shape: tuple[int, int]) -> list[torch.Tensor]:
    """One for each step, not far from one another."""
    return [matrix(shape, 10) + 0.1 * matrix(shape, 20 + step) for step in range(STEPS)]


def key(kind: str, shape: tuple[int, int]) -> str:
    """Name of a case's result."""
    return f"{kind}/{shape[0]}x{shape[1]}"


def _module(name: str, path: str) -> ModuleType:
    spec = util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _trained(shape: tuple[int, int], build: Any) -> numpy.ndarray:
    weight = torch.nn.Parameter(start(shape))
    optimizer = build([weight])
    for gradient in gradients(shape):
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach().numpy()


def main(scion_checkout: str, sphere_checkout: str) -> None:
    """Runs their code and writes the file."""
    torch.compile = lambda function: function  # type: ignore[assignment]
    torch.Tensor.bfloat16 = torch.Tensor.float  # type: ignore[method-assign]
    scion = _module("scion", f"{scion_checkout}/scion.py")
    sphere = _module("sso", f"{sphere_checkout}/sso.py")
    results = {}
    for shape in SHAPES:
        for name, (norm, settings, radius) in SCION.items():
            for kind, free in (("constrained", False), ("unconstrained", True)):
                groups = {"norm": norm, "norm_kwargs": settings, "scale": radius, "unconstrained": free}
                results[key(f"scion/{name}/{kind}", shape)] = _trained(
                    shape, lambda p, groups=groups: scion.Scion(p, lr=SCION_LR, momentum=0.1, **groups)
                )
        converged = {"power_iter_steps": 300, "solver_max_iter": 60, "solver_tol": 0.0}
        results[key("spectral_sphere", shape)] = _trained(
            shape, lambda p, c=converged: sphere.SSO(p, lr=SPHERE_LR, momentum=0.9, radius_scaler=SPHERE_RADIUS, **c)
        )
    numpy.savez_compressed(FILE, **results)
    print(f"{len(results)} results, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
