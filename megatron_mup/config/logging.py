"""What a run shows and records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging."""

    log_interval: int = 10
    """Iterations between log lines."""
    diagnostics_interval: int | None = None
    """Iterations between diagnoses of the steady state: sizes of activations, updates, singular values and epsilon.
    Each costs about a third of a step. Default: none."""
    profile: bool = False
    """Trace some steps with PyTorch's profiler."""
    profile_step_start: int = 10
    """First step of the trace."""
    profile_step_end: int = 12
    """Last step of the trace."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that trace."""
    profile_dir: str = "profiles"
    """Folder that takes a trace from each of these ranks, for ui.perfetto.dev or chrome://tracing."""
    progress: bool = True
    """Progress bar on a terminal."""
    tensorboard_dir: str | None = None
    """Folder of TensorBoard events."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the wandb package."""
    wandb_exp_name: str | None = None
    """Name of the run there."""
    wandb_entity: str | None = None
    """Team or user there."""
    wandb_save_dir: str | None = None
    """Folder of its local files."""
    metrics_file: str | None = None
    """File to which every logged step is appended as one JSON line."""
    html_report: str | None = None
    """File to which a report of the run is written at its end, however it ends: one HTML page with curves,
    parametrization and configuration. Needs --metrics-file."""
    prometheus_port: int | None = None
    """Port on which the logging rank shows the latest metrics to a Prometheus server; needs the prometheus_client
    package."""
