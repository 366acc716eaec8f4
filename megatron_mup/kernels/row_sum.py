"""The sum of a few long rows, in one pass."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

HAS_KERNEL = torch.version.hip is None and importlib.util.find_spec("triton") is not None
"""Whether there is a kernel for tensors on a GPU."""


@functools.cache
def _kernel() -> ModuleType:
    """Imported late, so that machines without a GPU need no Triton."""
    return importlib.import_module("megatron_mup.kernels.row_sum_triton")


def row_sum(first: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
    """Writes ``first + others[0] + others[1] + ...``, summed in fp32 in this order and rounded once, to ``out``.

    Args:
        first: ``[count]``, contiguous.
        others: ``[rows, count]``, contiguous.
        out: ``[count]``, contiguous, any floating-point precision.
    """
    if HAS_KERNEL and out.is_cuda:
        if out.numel():
            _kernel().launch(first, others, out)
        return
    total = first.float()
    for row in others:
        total = total + row
    out.copy_(total)
