"""Triton's side of this package: imported late, so that machines without a GPU need no Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

HAS_KERNEL = torch.version.hip is None and importlib.util.find_spec("triton") is not None
"""Whether there are kernels for tensors on a GPU."""


@functools.cache
def kernels_of(module: str) -> ModuleType:
    """The Triton kernels behind a module of this package, by its name."""
    return importlib.import_module(f"megatron_mup.kernels.{module}_triton")
