"""What a run does about broken steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Guards."""

    max_skipped_steps: int = 0
    """Leave out up to so many steps in a row whose loss or gradient norm is not finite, or spikes. 0: the run stops."""
    spike_sigma: float | None = None
    """A spike is so many standard deviations above the mean of the last accepted steps. Default: no step is one."""
    spike_window: int = 128
    """Accepted steps of which mean and deviation are taken; no step is a spike before half of them."""
    watchdog_minutes: float = 5.0
    """Say on stderr where a rank is that spends longer in one phase of a step, an evaluation or a save. 0: don't."""
    log_straggler: bool = False
    """Compare the times of all ranks each log interval, and name ranks and hosts that are slower than the others."""
    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Iterations between comparisons of the weights of data-parallel replicas, to the bit. The run stops where they
    differ. Default: none."""
    max_rollbacks: int = 1
    """Where too many steps in a row are broken, go back to the last checkpoint and past their data, up to so often."""
