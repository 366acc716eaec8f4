"""Kernels compiled ahead: with a compiler that stands in for Triton's, for there is none without a GPU."""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from megatron_mup.kernels import late

CPU = torch.device("cpu")


class Compiled:
    """What comes of a kernel; whoever reads ``run`` has its launcher built."""

    def __init__(self) -> None:
        self.launchers = 0

    @property
    def run(self) -> object:
        self.launchers += 1
        return print


class FutureKernel:
    def __init__(self, kernel: Compiled) -> None:
        self._kernel = kernel

    def result(self) -> Compiled:
        return self._kernel


class Kernel:
    """Like Triton's: compiled in a thread at its first use inside the mode, known from then on."""

    def __init__(self) -> None:
        self.compiled: Compiled | None = None
        self.runs: list[tuple[object, ...]] = []

    def warmup(self, *args: object, grid: tuple[int, ...], **options: object) -> object:
        if self.compiled is not None:
            return self.compiled
        self.compiled = Compiled()
        return FutureKernel(self.compiled)

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **options: self.runs.append((grid, args, options))


@pytest.fixture
def pools(monkeypatch) -> list[object]:
    """The thread pools that the compiler was given."""
    given = []

    @contextlib.contextmanager
    def mode(pool):
        done: Future[int] = pool.submit(int)
        yield
        given.append(pool)
        assert done.result() == 0

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(AsyncCompileMode=mode, FutureKernel=FutureKernel))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return given


def test_kernels_are_compiled_and_not_run(pools):
    kernel, other = Kernel(), Kernel()
    with late.compiled_ahead(CPU):
        for _ in range(3):
            late.run(kernel, 4, "x", WHOLE=True)
        late.run(other, 1)
    assert len(pools) == 1
    assert (kernel.runs, other.runs) == ([], [])
    assert kernel.compiled.launchers == other.compiled.launchers == 1
    late.run(kernel, 4, "x", WHOLE=True)
    assert kernel.runs == [((4,), ("x",), {"WHOLE": True})]


def test_an_error_inside_leaves_kernels_running(pools):
    kernel = Kernel()
    with pytest.raises(KeyError), late.compiled_ahead(CPU):
        raise KeyError
    late.run(kernel, 2)
    assert kernel.runs == [((2,), (), {})]
