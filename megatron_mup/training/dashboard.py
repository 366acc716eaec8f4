"""Which curves share a chart: the same in TensorBoard's custom scalars and in the HTML report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """A chart: its title, with the unit, and regular expressions that match the whole names of its curves."""

    title: str
    names: tuple[str, ...]


DASHBOARD: dict[str, tuple[Chart, ...]] = {
    "loss": (
        Chart("loss (nats per token)", ("train/lm loss", "validation/lm loss", "test/lm loss")),
        Chart("bits per byte", (".*/bits per byte",)),
    ),
    "optimization": (
        Chart("learning rate by parameter class", ("lr/.*",)),
        Chart("gradient norm before clipping", ("train/grad norm",)),
        Chart("global batch (sequences)", ("train/batch size",)),
        Chart("steps left out", ("train/left out",)),
    ),
    "throughput": (
        Chart("tokens per s per device", ("throughput/tokens per s per device",)),
        Chart("TFLOP/s per device", (r"throughput/TFLOP/s per device \(.*\)",)),
        Chart("model FLOP utilization (share of 1)", (r"throughput/MFU \(.*\)",)),
        Chart("time of a step and its phases (s)", ("time/(?!evaluation|checkpoint).*",)),
        Chart("evaluations and saves (s)", ("time/(evaluation|checkpoint)",)),
        Chart("slowest rank over the median rank", ("straggler/.*",)),
        Chart("memory (GiB)", ("memory/.*",)),
    ),
    "experts": (
        Chart("load over mean load", ("moe/max over mean load", "moe/min over mean load")),
        Chart("MaxVio", ("moe/MaxVio.*",)),
        Chart("losses of the routers", ("moe/load balancing loss", "moe/z loss")),
        Chart("dropped share of tokens", ("moe/dropped share",)),
    ),
    "diagnostics": (
        Chart("activations (RMS)", ("diagnostics/activation rms/.*",)),
        Chart("update over weight (RMS)", ("diagnostics/update to weight/.*",)),
        Chart("largest singular value over its target", ("diagnostics/singular value over target largest/.*",)),
        Chart("largest attention logit", ("diagnostics/attention logit max",)),
        Chart("norm of the head", ("diagnostics/head norm",)),
        Chart("second moments below eps (share of 1)", ("diagnostics/second moments below eps/.*",)),
    ),
}
"""Charts by group, in the order of a page."""
