"""What the routers' counts say, for the metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mup.layers.router import Tally


def routing_metrics(tallies: torch.Tensor, layers: Sequence[int], per_layer: bool) -> dict[str, float]:
    """Loads and losses of a step by name, under ``moe/``.

    MaxVio is the load of the busiest expert over the mean load, minus one (Wang et al., arXiv 2408.15664).

    Args:
        tallies: ``[layers, Tally.size]`` on the host, see `Balancing.finish`.
        layers: numbers of these layers.
        per_layer: whether each layer's numbers and tokens per expert come too, beside the means over layers.
    """
    tally = Tally.of(tallies)
    tokens = tally.tokens
    mean = tokens.mean(-1).clamp(min=1e-30)
    found = {
        "load balancing loss": tally.balancing_loss,
        "z loss": tally.z_loss,
        "max over mean load": tokens.amax(-1) / mean,
        "min over mean load": tokens.amin(-1) / mean,
        "MaxVio": tokens.amax(-1) / mean - 1,
        "dropped share": tally.dropped / tokens.sum(-1).clamp(min=1),
    }
    metrics = {f"moe/{name}": values.mean().item() for name, values in found.items()}
    metrics["moe/MaxVio of the worst layer"] = found["MaxVio"].max().item()
    if per_layer:
        for place, layer in enumerate(layers):
            metrics |= {f"moe/layer {layer}/{name}": values[place].item() for name, values in found.items()}
            metrics |= {f"moe/layer {layer}/tokens of expert {e}": n for e, n in enumerate(tokens[place].tolist())}
    return metrics
