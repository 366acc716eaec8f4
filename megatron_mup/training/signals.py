"""Being asked to stop: signals and the time limit become one number that all ranks agree on."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

import torch

EXIT_FINISHED = 0
"""Exit code: the run did all its iterations."""
EXIT_STOPPED = 75
"""Exit code: the run was asked to stop, has saved a checkpoint and wants to be started again (EX_TEMPFAIL)."""

_DURATION, _USR1, _TERM = 1, 1 << 20, 1 << 40
"""What a rank says. The largest any rank says wins; the gaps keep that readable in a sum over 2^20 ranks."""
_CODES = {signal.SIGUSR1: _USR1, signal.SIGTERM: _TERM}


class StopRequest:
    """Notices SIGTERM, SIGUSR1 and the end of the allowed time; used as a context, which restores the handlers.

    Ranks are signalled at different moments and their clocks differ, so a rank never acts on its own. It adds
    :meth:`local` to a collective that every step has anyway, the sum of valid tokens for instance (a sum or a maximum,
    int64 or floating point), gives the result to :meth:`submit`, and asks :meth:`agreed` at the end of the step::

        with StopRequest(minutes, device) as stop:
            for ...:
                counts = torch.tensor([tokens, stop.local()], device=device)
                dist.all_reduce(counts)
                stop.submit(counts[1])
                ...  # the step
                if stop.agreed():
                    ...  # save, leave with EXIT_STOPPED

    On a GPU the number is copied without waiting, behind what has been launched before, and :meth:`agreed` waits for
    the copy before the last one alone: called at the end of each step it waits for the step before, so that the device
    always has the next one to do. What it answers is a step old there.

    Args:
        minutes: allowed time from now on; None for no limit.
        device: where the collective runs.
    """

    def __init__(self, minutes: float | None, device: torch.device) -> None:
        """Starts the clock; handlers come with the context."""
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._signalled = 0
        self._previous: dict[signal.Signals, object] = {}
        on_gpu = device.type == "cuda"
        self._agreed = [torch.zeros((), dtype=torch.int64, pin_memory=on_gpu) for _ in range(2 if on_gpu else 1)]
        self._copied = [torch.cuda.Event() for _ in self._agreed] if on_gpu else []

    def __enter__(self) -> StopRequest:
        """Installs the handlers; main thread only."""
        self._previous = {number: signal.signal(number, self._note) for number in _CODES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Puts the handlers back that were there."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signalled = max(self._signalled, _CODES[signal.Signals(number)])

    def local(self) -> int:
        """This rank's wish: 0 to go on, otherwise a positive number to be reduced over all ranks."""
        if self._signalled or self._deadline is None:
            return self._signalled
        return _DURATION if time.monotonic() >= self._deadline else 0

    def submit(self, reduced: torch.Tensor) -> None:
        """Takes the reduced number, 0-d on the device, and starts its way to the host."""
        self._agreed.append(self._agreed.pop(0).copy_(reduced, non_blocking=True))
        if self._copied:
            self._copied.append(self._copied.pop(0))
            self._copied[-1].record()

    def agreed(self) -> str | None:
        """Why all ranks stop, e.g. ``SIGTERM``; None to go on. The same on every rank."""
        if self._copied:
            self._copied[0].synchronize()
        value = int(self._agreed[0])
        if value >= _TERM:
            return "SIGTERM"
        if value >= _USR1:
            return "SIGUSR1"
        return "--exit-duration-in-mins" if value >= _DURATION else None
