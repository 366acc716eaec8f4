"""Broken steps: whether a step is applied, and when leaving steps out is no longer enough."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from megatron_mup.config import Config

NAMES = ("loss", "gradient norm")


class BrokenRunError(RuntimeError):
    """The run can't go on: its loss or gradients are broken, and what was allowed to mend it has been tried."""


class Guard:
    """Decides for each step whether the optimizer takes it. All ranks see the same numbers and decide alike.

    A step is broken if its loss or gradient norm isn't finite, or spikes: is more than ``--spike-sigma`` standard
    deviations above the mean over the last ``--spike-window`` accepted steps (the rule of OLMo-core's optimizers that
    skip steps).

    Looking at the numbers waits for the device, which has nothing to do until the optimizer's first kernel comes; a run
    without ``--max-skipped-steps`` doesn't look.

    Args:
        config: the run's configuration.

    Attributes:
        reason: why the last step was left out; None if it was taken.
        skipped: steps left out in a row.
    """

    def __init__(self, config: Config) -> None:
        flags = config.guard
        self._allowed, self._sigma, self._window = flags.max_skipped_steps, flags.spike_sigma, flags.spike_window
        self._accepted: deque[list[float]] = deque(maxlen=self._window)
        self.reason: str | None = None
        self.skipped = 0

    @property
    def looks(self) -> bool:
        """Whether it refuses any step."""
        return self._allowed > 0

    def accepts(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        """Whether the optimizer shall take this step.

        Args:
            loss: 0-d, mean over the global batch.
            grad_norm: 0-d, before clipping.
        """
        if not self.looks:
            return True
        values = torch.stack((loss, grad_norm)).tolist()
        self.reason = self._objection(values)
        if self.reason is None:
            self.skipped = 0
            if self._sigma is not None:
                self._accepted.append(values)
        else:
            self.skipped += 1
        return self.reason is None

    @property
    def exhausted(self) -> bool:
        """Whether more steps in a row were left out than the run allows."""
        return self.skipped > self._allowed

    def restart(self) -> None:
        """Forgets the steps left out, after going back to a checkpoint."""
        self.skipped = 0

    def _objection(self, values: list[float]) -> str | None:
        for name, value in zip(NAMES, values, strict=True):
            if not math.isfinite(value):
                return f"its {name} is {value}"
        if self._sigma is None or 2 * len(self._accepted) < self._window:
            return None
        for name, value, past in zip(NAMES, values, zip(*self._accepted, strict=True), strict=True):
            mean, deviation = statistics.fmean(past), statistics.pstdev(past)
            if value > mean + self._sigma * deviation:
                return f"its {name} {value:.4g} is a spike: the last ones were {mean:.4g} +- {deviation:.2g}"
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"accepted": [list(values) for values in self._accepted]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state` gave; nothing from a checkpoint without."""
        self._accepted = deque(state.get("accepted", ()), maxlen=self._window)
