"""Five steps of optimizers as their authors publish them, on inputs made from seeds.

    python tests/optim/golden_of_others.py CHECKOUTS

writes ``golden_of_others.npz`` beside this file from checkouts of `COMMITS`, each at ``CHECKOUTS/owner/name``. What is
changed of theirs, on the way in, is this: bf16 is fp32, ``torch.compile`` does nothing, and so do CUDA's streams;
packages that the optimizers don't need (Triton, data sets) are stood in for. What SSO and MuonSphere leave to settings
is set to convergence: 300 power iterations in the place of 5 or 10, and 60 bisections.

Where their code does something by mistake, the case is arranged so that the right value comes out of it:

- SSO of a fused query/key/value by components retracts copies of them: here each component is a tensor of its own.
- SSO's dynamic retraction lacks the learning rate in the authors' Megatron-LM; that of microsoft/ArchScale, a later
  copy of the same files, has it, as the paper does.
- microsoft/dion's NorMuon takes norms of shards: here one rank has all.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy
import torch

FILE = Path(__file__).with_suffix(".npz")
STEPS = 5
SHAPES = [(16, 48), (48, 16), (32, 32), (7, 20)]

COMMITS = {
    "KellerJordan/Muon": "857d1adc159e098212f828d927460782d3da59e9",
    "LIONS-EPFL/scion": "f58a393e010395a5913176be5673d8839caa6285",
    "microsoft/ArchScale": "c2ec1d6903d248842cd1568cc76577e77c96feaa",
    "microsoft/dion": "0a059a4542e5aa74b40dcd1dce363836c7afcd48",
    "MoonshotAI/Moonlight": "c2ad5b20c605086526a179d36901bfc41b52b44b",
    "Unakar/Spectral-Sphere-Optimizer": "304d7a4f67c2221cda04b891831db94e5c049092",
}

STRANGERS = ("absl", "datasets", "loguru", "tqdm", "transformers", "emerging_optimizers.triton_kernels")
"""Imported by their modules, and used by none of the optimizers."""

SCION_LR, SPHERE_LR, SPHERE_RADIUS = 2.0**-6, 0.02, 2.0
RETRACTION = 5.0
"""Strength of dynamic retraction: strong enough that weights cross the sphere within the steps."""

BALL = {
    "lr": SPHERE_LR,
    "momentum_beta": 0.9,
    "weight_decay": 0.0,
    "retract_alpha": RETRACTION,
    "scale_mode": "spectral_mup",
    "power_iteration_steps": 300,
    "msign_steps": 8,
    "fp32_matmul_prec": "highest",
}
"""MuonSphere as microsoft/ArchScale has it; radius 1."""
SOLVED = {**BALL, "solver_tolerance_f": 0.0, "solver_max_iterations": 60}

SCION: dict[str, tuple[str, dict[str, Any], float]] = {
    "spectral": ("Spectral", {}, 50.0),
    "sign": ("Sign", {}, 3000.0),
    "tokens": ("ColNorm", {"transpose": True}, 2.0),
    "plain_sign": ("Sign", {"normalized": False}, 2.0),
    "rows": ("RowNorm", {}, 300.0),
}
"""Norm, its settings and radius, by what the tests call it."""

MUON = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.3}
"""Of Keller Jordan's, Moonlight's and microsoft/dion's."""

DION = {"lr": 0.1, "mu": 0.9, "weight_decay": 0.3}
DION_FRACTIONS = (0.25, 1.0)

QKV, QKV_COLUMNS = (8, 4, 4), 20
"""Rows of query, key and value in a group of a fused tensor of two groups; a head has four."""


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Fp32 with singular values from 0.3 to 1, so that each form of Newton-Schulz converges to the last digits."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(drawn, full_matrices=False)
    return ((u * torch.linspace(1, 0.3, u.shape[1], dtype=torch.float64)) @ vh).float()


def start(shape: tuple[int, int], seed: int = 1) -> torch.Tensor:
    """Initial weights, with a gap below the largest singular value: without one its vectors are nobody's."""
    weight = matrix(shape, seed)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    return weight + 0.5 * torch.outer(u[:, 0], vh[0])


def gradients(shape: tuple[int, int]) -> list[torch.Tensor]:
    """One for each step, not far from one another."""
    return [matrix(shape, 10) + 0.1 * matrix(shape, 20 + step) for step in range(STEPS)]


def basis(shape: tuple[int, int], fraction: float) -> torch.Tensor:
    """Dion's first ``[short side, rank]``."""
    rank = -int(-fraction * min(shape) // 1)
    return torch.randn(min(shape), rank, generator=torch.Generator().manual_seed(2))


def key(kind: str, shape: tuple[int, int]) -> str:
    """Name of a case's result."""
    return f"{kind}/{shape[0]}x{shape[1]}"


@contextlib.contextmanager
def _in_fp32_on_a_cpu() -> Iterator[None]:
    def compiled(function: Any = None, **_settings: Any) -> Any:
        return function or (lambda decorated: decorated)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "compile", compiled))
        stack.enter_context(mock.patch.object(torch, "bfloat16", torch.float32))
        stack.enter_context(mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone))
        stack.enter_context(mock.patch.object(torch.cuda, "Stream"))
        stack.enter_context(mock.patch.object(torch.cuda, "stream"))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        yield


def _module(folder: Path, name: str) -> ModuleType:
    strangers = {stranger: mock.MagicMock() for stranger in STRANGERS if stranger not in sys.modules}
    sys.modules.update(strangers)
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        module = import_module(name)
    for stranger in strangers:
        del sys.modules[stranger]
    return module


def _trained(weight: torch.Tensor, grads: list[torch.Tensor], build: Callable[[list[Any]], Any]) -> numpy.ndarray:
    param = torch.nn.Parameter(weight)
    optimizer = build([param])
    for gradient in grads:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach().numpy()


Recorded = Iterator[tuple[str, Callable[[list[Any]], Any]]]
"""What a case is called, and what makes the optimizer of one parameter."""


def _scion(module: ModuleType) -> Recorded:
    for name, (norm, settings, radius) in SCION.items():
        for kind, free in (("constrained", False), ("unconstrained", True)):
            groups = {"norm": norm, "norm_kwargs": settings, "scale": radius, "unconstrained": free}
            yield f"scion/{name}/{kind}", lambda p, g=groups: module.Scion(p, lr=SCION_LR, momentum=0.1, **g)


def _muons(keller: ModuleType, moonlight: ModuleType, dion: ModuleType) -> Recorded:
    yield "keller_jordan", lambda p: keller.SingleDeviceMuon(p, **MUON)
    lr, momentum, decay = MUON.values()
    for nesterov in (True, False):
        yield (
            f"moonlight/{nesterov}",
            lambda p, n=nesterov: moonlight.Muon(lr, decay, muon_params=p, momentum=momentum, nesterov=n),
        )
    # Their other set, Polar Express', has a factor of its own on the norm; coefficients are compared elsewhere.
    shared = {"lr": lr, "mu": momentum, "weight_decay": decay, "use_polar_express": False}
    yield "dion/muon/spectral_norm", lambda p: dion.Muon(p, adjust_lr="spectral_norm", **shared)
    yield "dion/muon/rms_norm", lambda p: dion.Muon(p, adjust_lr="rms_norm", nesterov=True, **shared)
    yield "dion/normuon", lambda p: dion.NorMuon(p, muon_beta2=0.8, **shared)


def _dions(dion: ModuleType) -> Recorded:
    def begun(optimizer: Any, fraction: float) -> Any:
        (param,) = optimizer.param_groups[0]["params"]
        optimizer._init_opt_state_dion(param, optimizer.state[param], fraction, 1)
        optimizer.state[param]["Q"].copy_(basis(tuple(param.shape), fraction))
        return optimizer

    for fraction in DION_FRACTIONS:
        yield (
            f"dion/reference/{fraction}",
            lambda p, f=fraction: begun(dion.DionReference(p, rank_fraction=f, qr_method="qr", **DION), f),
        )


def _spheres(sso: ModuleType, balls: ModuleType) -> Recorded:
    converged = {"power_iter_steps": 300, "solver_max_iter": 60, "solver_tol": 0.0}
    yield (
        "spectral_sphere",
        lambda p: sso.SSO(p, lr=SPHERE_LR, momentum=0.9, radius_scaler=SPHERE_RADIUS, **converged),
    )
    for mode in ("hard", "dynamic"):
        yield f"muonsphere/{mode}", lambda p, m=mode: balls.MuonBall(p, retract_mode=m, **BALL)
    for mode in ("align_adamw_rms", "shape_scaling"):
        yield f"muonsphere/{mode}", lambda p, m=mode: balls.MuonBall(p, **{**BALL, "scale_mode": m})
    yield "spectral_sphere/dynamic", lambda p: balls.SpectralBall(p, retract_mode="dynamic", **SOLVED)


_SOLVED = {"solver_tolerance_f": 0.0, "solver_max_iterations": 60}


def _ball(**more: Any) -> dict[str, Any]:
    settled = {
        "power_iteration_steps": 300,
        "msign_steps": 8,
        "scale_mode": "spectral_mup",
        "fp32_matmul_prec": "highest",
    }
    return {"lr": SPHERE_LR, "momentum_beta": 0.9, "weight_decay": 0.0, "retract_alpha": RETRACTION, **settled, **more}


def parts(kind: str) -> list[tuple[int, ...]]:
    """Rows of each logical matrix of a fused tensor of two groups, in which each group is query, key, value."""
    ends = (0, *itertools.accumulate(QKV))
    groups = [[tuple(range(g * ends[-1] + a, g * ends[-1] + b)) for a, b in itertools.pairwise(ends)] for g in range(2)]
    if kind == "component":
        return [first + second for first, second in zip(*groups, strict=True)]
    heads = [rows[i : i + 4] for group in groups for rows in group for i in range(0, len(rows), 4)]
    return heads if kind == "head" else [rows for group in groups for rows in group]


def fused(kind: str, of_part: Callable[[tuple[int, int], int], torch.Tensor]) -> torch.Tensor:
    """A fused tensor of what ``of_part`` makes of each logical matrix's shape and number."""
    whole = torch.empty(2 * sum(QKV), QKV_COLUMNS)
    for number, rows in enumerate(parts(kind)):
        whole[list(rows)] = of_part((len(rows), QKV_COLUMNS), number)
    return whole


def fused_start(kind: str) -> torch.Tensor:
    """Initial weights: each logical matrix is like those of `start`."""
    return fused(kind, lambda shape, number: start(shape, 100 + number))


def fused_gradients(kind: str) -> list[torch.Tensor]:
    """One for each step; each logical matrix is like those of `gradients`."""
    return [
        fused(kind, lambda shape, n, s=step: matrix(shape, 200 + n) + 0.1 * matrix(shape, 300 + 50 * s + n))
        for step in range(STEPS)
    ]


def _of_fused(dion: ModuleType, balls: ModuleType) -> Iterator[tuple[str, numpy.ndarray]]:
    lr, momentum, decay = MUON.values()
    shared = {"lr": lr, "mu": momentum, "weight_decay": decay, "use_polar_express": False}
    for kind in ("component", "group", "head"):
        # Their blocks lie one after another.
        sizes, order = [len(rows) for rows in parts(kind)], [row for rows in parts(kind) for row in rows]
        split = {"num_heads": len(sizes)} if kind == "head" else {"split_sizes": sizes}
        weight, grads = fused_start(kind)[order], [gradient[order] for gradient in fused_gradients(kind)]
        for name, cls, own in (("muon", dion.Muon, {}), ("normuon", dion.NorMuon, {"muon_beta2": 0.8})):
            settings = {**shared, **own}
            result = _trained(weight.clone(), grads, lambda p, c=cls, s=split, o=settings: c([{"params": p, **s}], **o))
            yield f"dion/{name}/{kind}", result[numpy.argsort(order)]
    modes = {"split_qkv": True, "is_qkv_fn": lambda _: True, "qkv_split_shapes": QKV}
    for kind in ("group", "head"):
        result = _trained(
            fused_start(kind),
            fused_gradients(kind),
            lambda p, k=kind: balls.SpectralBall(p, **modes, qkv_split_mode=k, **SOLVED),
        )
        yield f"spectral_sphere/{kind}", result
    start_of_all, grads = fused_start("component"), fused_gradients("component")
    whole = numpy.empty_like(start_of_all.numpy())
    for rows in map(list, parts("component")):
        own_grads = [gradient[rows] for gradient in grads]
        whole[rows] = _trained(start_of_all[rows], own_grads, lambda p: balls.SpectralBall(p, **SOLVED))
    yield "spectral_sphere/component", whole


def main(checkouts: str) -> None:
    """Runs their code and writes the file."""
    root = Path(checkouts)
    results = {}
    with _in_fp32_on_a_cpu():
        keller = _module(root / "KellerJordan/Muon", "muon")
        moonlight = _module(root / "MoonshotAI/Moonlight/examples", "toy_train")
        dion = _module(root / "microsoft/dion", "dion")
        balls = _module(root / "microsoft/ArchScale", "emerging_optimizers.orthogonalized_optimizers")
        sso = _module(root / "Unakar/Spectral-Sphere-Optimizer", "sso")
        scion = _module(root / "LIONS-EPFL/scion", "scion")
        cases = [*_scion(scion), *_muons(keller, moonlight, dion), *_dions(dion), *_spheres(sso, balls)]
        for shape in SHAPES:
            for kind, build in cases:
                results[key(kind, shape)] = _trained(start(shape), gradients(shape), build)
        results |= dict(_of_fused(dion, balls))
    numpy.savez_compressed(FILE, **results)
    print(f"{len(results)} results, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
