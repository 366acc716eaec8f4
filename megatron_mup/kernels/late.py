"""Triton's side of this package: imported late, so that machines without a GPU need no Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

HAS_KERNEL = torch.version.hip is None and importlib.util.find_spec("triton") is not None
"""Whether there are kernels for tensors on a GPU."""


@functools.cache
def kernels_of(module: str) -> ModuleType:
    """The Triton kernels behind a module of this package, by its name."""
    return importlib.import_module(f"megatron_mup.kernels.{module}_triton")


_THREADS = 8
_compiled: list[Any] | None = None


def run(kernel: Any, programs: int, *args: object, **options: object) -> Any:
    """Runs a Triton kernel in a row of programs and returns it compiled; inside `compiled_ahead` it is compiled only,
    and nothing returned."""
    if _compiled is None:
        return kernel[(programs,)](*args, **options)
    _compiled.append(kernel.warmup(*args, grid=(programs,), **options))
    return None


@contextmanager
def compiled_ahead(device: torch.device) -> Iterator[None]:
    """Has all kernels that :func:`run` is given inside compiled side by side, in threads, and not run.

    One takes about a second, and a step of an optimizer has half a dozen. What is computed inside is of no use.
    """
    global _compiled
    from triton import AsyncCompileMode, FutureKernel

    def get_ready(kernel: Any) -> None:
        with torch.cuda.device(device):
            assert kernel.run is not None  # this builds what launches it, another compiler's work

    with ThreadPoolExecutor(_THREADS) as pool:
        _compiled = []
        try:
            with AsyncCompileMode(pool):
                yield
        finally:
            started, _compiled = _compiled, None
        kernels = [one.result() if isinstance(one, FutureKernel) else one for one in started]
        list(pool.map(get_ready, {id(kernel): kernel for kernel in kernels}.values()))
