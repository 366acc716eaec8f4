"""One optimizer step, phase by phase."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.layers.loss import IGNORE
from megatron_mup.models.gpt import GPT
from megatron_mup.optim.clip import clip_, global_grad_norm
from megatron_mup.optim.main_params import MainParams
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.forward_backward import Batch, ForwardBackward


class PhaseTimer(Protocol):
    """Measures the phases of a step, e.g. `training.metrics.StepTimer`."""

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        """Context in which the phase runs."""


def untimed(_phase: str) -> AbstractContextManager[None]:
    """Measures nothing."""
    return nullcontext()


@dataclass(frozen=True)
class StepResult:
    """What a step found, on the device, equal on all ranks.

    Attributes:
        loss: mean language-model loss per valid token, nats.
        grad_norm: global gradient norm before clipping.
        request: sum of the numbers that ranks passed as ``request``.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    request: torch.Tensor


class TrainStep:
    """The model, its optimizer, and what a step does with them.

    Args:
        model: this rank's stage, without values.
        config: validated configuration.
        mesh: the run's mesh.
    """

    def __init__(self, model: GPT, config: Config, mesh: Mesh) -> None:
        self.model, self.config, self.mesh = model, config, mesh
        self.main = MainParams(model, model.metas, config, mesh)
        self.optimizer = Optimizer(self.main.params, config, mesh)
        self.forward_backward = ForwardBackward(model, config, mesh)

    def __call__(self, batch: Batch, factor: float, request: int = 0, timer: PhaseTimer = untimed) -> StepResult:
        """Takes one step; no host synchronisation.

        Args:
            batch: this rank's samples of the global batch, on the device.
            factor: of the peak learning rates.
            request: a number whose sum all ranks shall learn (a wish to stop, see `training.signals`).
            timer: measures the phases.
        """
        with timer("forward-backward"):
            tokens, requests = self._agree(batch, request)
            sums = self.forward_backward(batch, tokens)
        with timer("gradients"):
            self.main.collect_grads()
            norm = global_grad_norm(self.main.params, self.mesh)
            clip_(self.main.params, norm, self.config.optimizer.clip_grad)
        with timer("optimizer"):
            self.optimizer.step(factor)
            self.main.publish()
            self.main.zero_grad()
        return StepResult(self._mean_loss(sums, tokens), norm, requests)

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Sum of the loss and number of valid tokens ``[2]`` of a global batch, equal on all ranks, on the device."""
        tokens, _ = self._agree(batch, 0)
        sums = self.forward_backward(batch, tokens, train=False)
        dist.all_reduce(sums, group=self.mesh.loss_group)
        return torch.stack([sums[1], tokens.float()])

    def _agree(self, batch: Batch, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Valid tokens of the global batch (0-d fp32, at least one) and the sum of requests, in one collective."""
        counts = torch.stack([(batch["labels"] != IGNORE).sum(), torch.full_like(batch["labels"][0, 0], request)])
        dist.all_reduce(counts)
        tokens = counts[0] // (self.mesh.size("tp") * self.mesh.size("pp"))
        return tokens.clamp(min=1).float(), counts[1]

    def _mean_loss(self, sums: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(sums, group=self.mesh.loss_group)
        return sums[1] / tokens
