"""Shows where a rank hangs, before the collective's timeout ends the run."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from megatron_mup.training.flight import last_collective
from megatron_mup.training.rollcall import RollCall
from megatron_mup.training.step import PhaseTimer

_LONGEST_PERIOD, _LEAST_PATIENCE = 5.0, 1.0
"""Seconds between two words of a rank at most, and for which it must be silent at least, before that is told."""


class Watchdog:
    """Says on stderr which rank spends too long in one phase of which iteration, with the stacks of its threads, and
    where all other ranks are at that time (`rollcall`).

    It only watches: a thread wakes now and then and looks at the clock. Used as a context, inside which the process
    group stays.

    Args:
        minutes: longest time in one phase without a report; 0 for no watching.
        rank: of this process.
        iteration: gives the number of the iteration under way, from 1.
    """

    def __init__(self, minutes: float, rank: int, iteration: Callable[[], int]) -> None:
        self._limit, self._rank, self._iteration = 60 * minutes, rank, iteration
        self._phase, self._since = "start", time.monotonic()
        self._reported = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._roll_call: RollCall | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is a phase of its own; after it the phase around it starts anew."""
        around = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(around)

    def over(self, timer: PhaseTimer) -> PhaseTimer:
        """A timer of phases that are watched too."""

        @contextmanager
        def watched(phase: str) -> Iterator[None]:
            with self.phase(phase), timer(phase):
                yield

        return watched

    def __enter__(self) -> Watchdog:
        """Starts watching."""
        if self._limit:
            self._enter("loop")
            if dist.is_initialized() and dist.get_world_size() > 1:
                # The run's own store may be busy for as long as the run waits in it.
                store = PrefixStore("watchdog", _get_default_store().clone())  # type: ignore[attr-defined]
                period = min(self._limit / 8, _LONGEST_PERIOD)
                patience = max(3 * period, _LEAST_PATIENCE)
                self._roll_call = RollCall(store, self._rank, dist.get_world_size(), self._where, period, patience)
                self._roll_call.start()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Ends it."""
        self._ended.set()
        if self._roll_call is not None:
            self._roll_call.stop()
        if self._thread.is_alive():
            self._thread.join()

    def _enter(self, name: str) -> None:
        if self._reported:
            spent = time.monotonic() - self._since
            print(f"rank {self._rank} left {self._phase} after {spent:.0f} s", file=sys.stderr, flush=True)
        self._phase, self._since, self._reported = name, time.monotonic(), False

    def _watch(self) -> None:
        while not self._ended.wait(self._limit / 8):
            phase, spent = self._phase, time.monotonic() - self._since
            if spent > self._limit and not self._reported:
                self._reported = True
                print(self._report(phase, spent), file=sys.stderr, flush=True)
                if self._roll_call is not None and (others := self._roll_call.ask(f"{self._iteration()}/{phase}")):
                    print(others, file=sys.stderr, flush=True)

    def _where(self) -> str:
        """Phase and iteration; and the collective, where the phase begins to last."""
        place = f"{self._phase} of iteration {self._iteration()}"
        lasts = time.monotonic() - self._since > self._limit / 2
        return f"{place}, {last_collective()}" if lasts else place

    def _report(self, phase: str, spent: float) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
            if ident != threading.get_ident()
        ]
        where = f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()})"
        collective = f"; it {last_collective()}" if dist.is_initialized() else ""
        head = f"{where} has been in {phase} of iteration {self._iteration()} for {spent:.0f} s{collective}."
        head += " It is here:"
        return "\n".join([head, *stacks])
