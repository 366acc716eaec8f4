"""What a step's routing leaves behind: expert biases and loads for the next one, and numbers for the metrics."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.layers.router import Tally
from megatron_mup.models.chunks import Model
from megatron_mup.parallel.mesh import Mesh


class Balancing:
    """State of the routers between steps.

    Biases and loads follow the counts of the whole global batch, so they are alike on all ranks and in all layouts.

    Args:
        model: this rank's stages.
        config: the run's configuration.
        mesh: the run's mesh.

    Attributes:
        layers: numbers of the layers with experts, in all stages.
    """

    def __init__(self, model: Model, config: Config, mesh: Mesh) -> None:
        self._routers, self._moe, self._device = model.routers(), config.moe, mesh.device
        pattern = config.moe.layers(config.model.num_layers)
        self.layers = [number for number, has_experts in enumerate(pattern) if has_experts]

    def begin(self, micro_batches: int) -> None:
        """Tells the routers the number of micro-batches in the global batch, over all ranks."""
        for router in self._routers.values():
            router.share = 1 / micro_batches

    @torch.no_grad()
    def finish(self, taken: bool = True) -> torch.Tensor | None:
        """Moves biases and loads after a step. Collective over all ranks, without waiting for the device.

        A bias moves by ``--moe-router-bias-update-rate`` towards an even load (Wang et al., arXiv 2408.15664).

        Args:
            taken: whether the optimizer took the step; if not, biases and loads stay.

        Returns:
            ``[layers with experts, Tally.size]`` fp64, alike on all ranks; None in a model without.
        """
        if not self.layers:
            return None
        experts = self._moe.num_experts
        assert experts is not None
        tallies = torch.zeros(len(self.layers), Tally.size(experts), dtype=torch.float64, device=self._device)
        places = {layer: place for place, layer in enumerate(self.layers)}
        for layer, router in self._routers.items():
            tallies[places[layer]] = router.tally
            router.tally.zero_()
        dist.all_reduce(tallies)
        for layer, router in self._routers.items() if taken else ():
            tokens = Tally.of(tallies[places[layer]]).tokens
            router.load.copy_(tokens / tokens.sum().clamp(min=1))
            if self._moe.moe_router_enable_expert_bias:
                step = (tokens.mean() - tokens).sign() * self._moe.moe_router_bias_update_rate
                router.expert_bias.add_(step.to(router.expert_bias.dtype))
        return tallies

    def loads(self) -> dict[str, torch.Tensor]:
        """Loads of the last global batch, live, by the router's name; all ranks of a stage hold the same."""
        return {f"decoder.layers.{layer}.mlp.router": router.load for layer, router in self._routers.items()}
