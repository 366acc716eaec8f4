"""Forward and backward of a step as one CUDA graph: for small models, whose kernels end before the next is launched.

What comes after, the gate and the optimizer, runs as ever, on gradients that lie in the graph's memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_mup.optim.main_params import MainParam
from megatron_mup.training.forward_backward import Batch

EAGER = 3
"""Steps before the capture: what compiles, allocates or picks a kernel the first time must not do so in a graph."""


class PhaseTimer(Protocol):
    """Measures the phases of a step, e.g. `training.metrics.StepTimer`."""

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        """Context in which the phase runs."""


def untimed(_phase: str) -> AbstractContextManager[None]:
    """Measures nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Found:
    """What a step knows before its update: loss and gradient norm, 0-d, and the sum of all ranks' requests.

    ``grad_norm`` is None where nothing needs it yet. ``scale``, 0-d: the factor that gradients still lack, and the norm
    has; None for 1.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor | None
    requests: torch.Tensor
    scale: torch.Tensor | None = None


class GraphedGradients:
    """A function that computes a step's gradients, captured once its inputs keep their shapes.

    The first `EAGER` calls, and those after a change of shape, run the function itself. Messages to other ranks are
    captured with the rest, so all ranks have to capture and replay in the same steps.

    Args:
        compute: from batch, request (a number, or 0-d) and timer to what it found; leaves gradients in ``params``, and
            nothing else of it may depend on what the host knows but the batch's shapes.
        params: whose ``grad`` it sets.
    """

    def __init__(
        self, compute: Callable[[Batch, int | torch.Tensor, PhaseTimer], Found], params: list[MainParam]
    ) -> None:
        self._compute, self._params = compute, params
        self._stream = torch.cuda.Stream()
        self._shapes: dict[str, torch.Size] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager = EAGER

    def __call__(self, batch: Batch, request: int, timer: PhaseTimer) -> Found:
        """Computes gradients, which the next call overwrites."""
        shapes = {name: value.shape for name, value in batch.items()}
        if shapes != self._shapes:
            self._shapes, self._graph, self._eager = shapes, None, EAGER
        if self._eager:
            self._eager -= 1
            return self._on_own_stream(batch, request, timer)
        if self._graph is None:
            self._capture(batch)
        assert self._graph is not None
        with timer("forward-backward"):
            torch._foreach_copy_(list(self._inputs.values()), [batch[name] for name in self._inputs])
            self._request.fill_(request)
            self._graph.replay()
        for param, grad in zip(self._params, self._grads, strict=True):
            param.grad = grad
        found = self._found
        norm = None if found.grad_norm is None else found.grad_norm.clone()
        return Found(found.loss.clone(), norm, found.requests.clone(), found.scale)

    def _on_own_stream(self, batch: Batch, request: int, timer: PhaseTimer) -> Found:
        """Autograd remembers streams, and the default one can't be captured; so even the first step is on another."""
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            found = self._compute(batch, request, timer)
        outside.wait_stream(self._stream)
        return found

    def _capture(self, batch: Batch) -> None:
        self._inputs = {name: value.clone() for name, value in batch.items()}
        self._request = torch.zeros_like(self._inputs["labels"][0, 0])
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # no other graph may be freed meanwhile
        # Other threads load data meanwhile, and may allocate pinned memory.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._found = self._compute(self._inputs, self._request, untimed)
        self._grads = [param.grad for param in self._params]
        self._graph = graph
