"""Fused kernels of NVIDIA's libraries, Apex and Transformer Engine, for NVIDIA GPUs: AdamW's step, and norms.

Their plain twins are :class:`torch.optim.AdamW`, :func:`torch.nn.functional.rms_norm` and
:func:`torch.nn.functional.layer_norm`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

_OPTIMIZERS = {"apex": "apex.optimizers", "transformer_engine": "transformer_engine.pytorch.optimizers"}
_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda")
"""Apex's CUDA extensions; its Python part can be there without them."""


def obstacle(library: str) -> str | None:
    """Why kernels of ``apex`` or ``transformer_engine`` can't be used here; None if they can."""
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU, and PyTorch sees none here"
    try:
        for module in (_OPTIMIZERS[library], *(_EXTENSIONS if library == "apex" else ())):
            importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


def fused_adam(library: str, groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """FusedAdam with decoupled weight decay over groups with ``params``, ``lr``, ``weight_decay`` and ``eps``.

    A group's ``step`` is the number of steps taken before; its state has both moments in fp32, named as in PyTorch's.
    """
    optimizer: torch.optim.Optimizer = importlib.import_module(_OPTIMIZERS[library]).FusedAdam(groups, betas=betas)
    return optimizer


def apex_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, on a GPU; the weight is in the input's precision."""
    shape = [x.shape[-1]]
    if weight is None:
        return _apex("fused_rms_norm")(x, shape, eps)
    return _apex("fused_rms_norm_affine")(x, weight, shape, eps)


def apex_layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """LayerNorm over the last dimension, on a GPU; weight and bias, both or neither, are in the input's precision."""
    shape = [x.shape[-1]]
    if weight is None:
        return _apex("fused_layer_norm")(x, shape, eps)
    return _apex("fused_layer_norm_affine")(x, weight, bias, shape, eps)


def _apex(norm: str) -> Callable[..., torch.Tensor]:
    found: Callable[..., torch.Tensor] = getattr(importlib.import_module("apex.normalization.fused_layer_norm"), norm)
    return found
