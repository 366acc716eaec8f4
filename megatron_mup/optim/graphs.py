"""CUDA graphs of an optimizer's work: launched once as it is, recorded the second time, replayed from then on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence

import torch

Work = Callable[[], None]
"""Reads and writes tensors that stay where they are, and waits for nothing."""


class Lanes:
    """Streams side by side in a CUDA graph.

    A kernel's last programs leave most of a GPU idle, and the next kernel, if it needs them, waits. Another lane's can
    have the room.

    Args:
        device: where the work is done.
        count: of lanes.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device, self._count = device, count
        self._sides: list[torch.cuda.Stream] = []

    def __call__(self, works: Sequence[tuple[float, Work]]) -> None:
        """Does pieces of work that need nothing of each other; while a graph is recorded, in lanes of about even cost.

        Args:
            works: each with its cost.
        """
        if self._device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            for _, work in works:
                work()
            return
        while len(self._sides) < self._count - 1:
            self._sides.append(torch.cuda.Stream(self._device))
        main = torch.cuda.current_stream(self._device)
        streams, loads = [main, *self._sides], [0.0] * self._count
        for side in self._sides:
            side.wait_stream(main)
        for cost, work in sorted(works, key=lambda one: -one[0]):
            lane = loads.index(min(loads))
            loads[lane] += cost
            with torch.cuda.stream(streams[lane]):
                work()
        for side in self._sides:
            main.wait_stream(side)


class Replays:
    """Runs pieces of work, in the same order each time. Their graphs share one pool of memory.

    Args:
        device: where the work is done.
        enabled: whether to record at all; else everything is launched each time.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._device, self.enabled = device, enabled
        self._launched: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, key: Hashable, work: Work) -> None:
        """Does a piece of work once.

        Args:
            key: names it; the same work each time.
            work: what to do.

        Raises:
            RuntimeError: it can't be recorded.
        """
        if not self.enabled:
            work()
            return
        if key not in self._launched:  # compiles kernels and makes libraries' handles, which a graph can't
            self._launched.add(key)
            work()
            return
        if key not in self._graphs:
            self._graphs[key] = self._record(work)
        self._graphs[key].replay()

    def _record(self, work: Work) -> torch.cuda.CUDAGraph:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            torch.cuda.empty_cache()  # can't be done while recording, should memory be short
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Threads of NCCL and of the data loader go on with theirs.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except RuntimeError as error:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise RuntimeError(
                    f"the optimizer's step can't be recorded in a CUDA graph ({error}); --no-optimizer-cuda-graph "
                    "launches it kernel by kernel"
                ) from error
            graph.capture_end()
        return graph
