"""Matrices that are hard to orthonormalize in half precision."""

from __future__ import annotations

import torch

SPECTRA = ("gaussian", "log 1e-3", "log 1e-5", "log 1e-7", "ten and a tail", "rank 2", "one and noise")


def matrix(kind: str, m: int, n: int, device: str = "cpu") -> torch.Tensor:
    """[m, n] bf16 with a spectrum of reference page section 5.6."""
    generator = torch.Generator().manual_seed(m + n)
    k = min(m, n)
    if kind == "gaussian":
        return torch.randn(m, n, generator=generator).to(device, torch.bfloat16)
    values = {
        "log 1e-3": torch.logspace(0, -3, k),
        "log 1e-5": torch.logspace(0, -5, k),
        "log 1e-7": torch.logspace(0, -7, k),
        "ten and a tail": torch.where(torch.arange(k) < 10, 1.0, 1e-3),
        "rank 2": torch.where(torch.arange(k) < 1, 1.0, 0.5) * (torch.arange(k) < 2),
        "one and noise": torch.where(torch.arange(k) < 1, 1.0, 1e-2),
    }[kind].double()
    u, v = (torch.linalg.qr(torch.randn(s, k, generator=generator, dtype=torch.float64)).Q for s in (m, n))
    return ((u * values) @ v.T).to(device, torch.bfloat16)
