"""Saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    save: str | None = None
    """Folder to save to."""
    load: str | None = None
    """Folder to resume from. A folder without a checkpoint starts a new run."""
    pretrained_checkpoint: str | None = None
    """Folder of a checkpoint whose weights start a new run, as --finetune does, while --load holds no checkpoint."""
    save_interval: int | None = None
    """Iterations between saves. The last iteration is always saved."""
    keep_last: int | None = None
    """Keep only so many newest checkpoints. Default: all."""
    save_retain_interval: int | None = None
    """Checkpoints of iterations divisible by this stay for good, beside those that --keep-last keeps (default then:
    1)."""
    non_persistent_save_interval: int | None = None
    """Iterations between non-persistent saves: one more checkpoint, which the next of its kind replaces. A run whose
    --load is its --save goes on from it where it is newer."""
    non_persistent_ckpt_type: Literal["global", "local"] = "global"
    """Non-persistent saves. global: into the folder non_persistent of --save; local: each rank's own shards into
    --non-persistent-local-ckpt-dir, for the same layout only."""
    non_persistent_local_ckpt_dir: str | None = None
    """Folder for local non-persistent saves, on a disk of each node's own."""
    async_save: bool = False
    """Save in the background: training waits only while weights and optimizer state are copied to host memory."""
    ckpt_step: int | None = None
    """Iteration to load. Default: the latest."""
    exit_on_missing_checkpoint: bool = False
    """Stop instead of starting anew when --load holds no checkpoint."""
    finetune: bool = False
    """Load weights only; start at iteration 0 with fresh optimizer, schedule and data position."""
    no_save_optim: bool = False
    """Save without optimizer state."""
    no_load_optim: bool = False
    """Load without optimizer state."""
    no_load_rng: bool = False
    """Load without the random generators' state."""
    override_opt_param_scheduler: bool = False
    """Take the schedule from this run's flags when they differ from the checkpoint's; without it a difference is an
    error."""
