"""Fused kernels of NVIDIA's libraries, Apex and Transformer Engine, for NVIDIA GPUs: AdamW's step, and norms; and which
libraries this machine can use.

Their plain twins are :class:`torch.optim.AdamW`, :func:`torch.nn.functional.rms_norm` and
:func:`torch.nn.functional.layer_norm`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_mup.kernels import flash4

_OPTIMIZERS = {"apex": "apex.optimizers", "transformer_engine": "transformer_engine.pytorch.optimizers"}
_NEEDED = {
    # Apex's Python part can be there without its CUDA extensions.
    "apex": (_OPTIMIZERS["apex"], "amp_C", "fused_layer_norm_cuda"),
    "transformer_engine": (_OPTIMIZERS["transformer_engine"],),
    "flash4": (flash4.INTERFACE,),
}


def obstacle(library: str) -> str | None:
    """Why kernels of ``apex``, ``transformer_engine`` or ``flash4`` can't be used here; None if they can."""
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU, and PyTorch sees none here"
    if library == "flash4" and torch.cuda.get_device_capability()[0] not in flash4.COMPUTE_CAPABILITIES:
        return f"FlashAttention-4's gradient has no kernel for {torch.cuda.get_device_name()}"
    try:
        for module in _NEEDED[library]:
            importlib.import_module(module)
    # A build for another PyTorch, CUDA or CUTLASS fails in many ways.
    except Exception as error:
        return f"importing it failed: {type(error).__name__}: {error}"
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
