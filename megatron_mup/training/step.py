"""One optimizer step, phase by phase."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.layers.loss import IGNORE
from megatron_mup.models.chunks import Model
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.optim.clip import clip_factor, global_grad_norm
from megatron_mup.optim.main_params import MainParams
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.operations import scales_gradients
from megatron_mup.training.balancing import Balancing
from megatron_mup.training.forward_backward import Batch, ForwardBackward
from megatron_mup.training.graphed import Found, GraphedGradients, PhaseTimer, untimed
from megatron_mup.training.precision import TransformerEngineStep, keep_static_casts

Gate = Callable[[torch.Tensor, torch.Tensor], bool]
"""Whether the optimizer takes a step, given its loss and gradient norm; the same on all ranks."""


def always(_loss: torch.Tensor, _grad_norm: torch.Tensor) -> bool:
    """Takes every step."""
    return True


def at_once() -> None:
    """Weights and state may change at once: nobody is reading them."""


@dataclass(frozen=True)
class StepResult:
    """What a step found, on the device, equal on all ranks.

    Attributes:
        loss: mean language-model loss per valid token, nats.
        grad_norm: global gradient norm before clipping.
        request: sum of the numbers that ranks passed as ``request``.
        routing: what the routers counted, see `Balancing.finish`; None in a model without experts.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    request: torch.Tensor
    routing: torch.Tensor | None = None


class TrainStep:
    """The model, its optimizer, and what a step does with them.

    Args:
        model: this rank's stages, without values.
        config: validated configuration.
        mesh: the run's mesh.

    Attributes:
        before_update: called in every step before anything changes that a checkpoint keeps.
    """

    before_update: Callable[[], None] = staticmethod(at_once)

    def __init__(self, model: Model, config: Config, mesh: Mesh) -> None:
        self.model, self.config, self.mesh = model, config, mesh
        self.main = MainParams(model, model.metas, config, mesh)
        self.optimizer = Optimizer(self.main.params, config, mesh)
        self.forward_backward = ForwardBackward(model, config, mesh, self.main.accumulate)
        self.balancing = Balancing(model, config, mesh)
        self.transformer_engine = TransformerEngineStep(model, config, mesh)
        keep_static_casts(model, config, mesh)
        self.unit_scaled = scales_gradients(config)
        # FP8 with scales that are older than the values needs gradients of a size that doesn't depend on the number of
        # tokens, until they are summed.
        self.sums_tokens = self.unit_scaled or config.fp8.steady_gradients
        self.largest_norm = config.optimizer.clip_grad
        if self.unit_scaled:
            # Gradients there have a root mean square of about 1, so that is what the limit is for.
            self.largest_norm *= math.sqrt(sum(meta.numel for meta in parameter_metas(config, model.vocab_size)))
        # Else the update may come first, and find the norm as it reads gradients.
        self.norm_comes_first = self.largest_norm > 0 or config.guard.max_skipped_steps > 0
        self._gradients: Callable[[Batch, int, PhaseTimer], Found] = self._find_gradients
        if config.training.cuda_graph_impl == "local" and mesh.device.type == "cuda":
            self._gradients = GraphedGradients(self._find_gradients, self.main.params)

    def initialise(self) -> None:
        """Gives parameters their initial values. Collective."""
        self.main.initialise()
        self.optimizer.start()
        self.main.publish()

    def __call__(
        self, batch: Batch, factor: float, request: int = 0, timer: PhaseTimer = untimed, gate: Gate = always
    ) -> StepResult:
        """Takes one step; no host synchronisation but the gate's.

        Args:
            batch: this rank's samples of the global batch, on the device.
            factor: of the peak learning rates.
            request: a number whose sum all ranks shall learn (a wish to stop, see `training.signals`).
            timer: measures the phases.
            gate: a step that it refuses leaves weights and state as they were, to the bit.
        """
        found = self._gradients(batch, request, timer)
        norm = found.grad_norm
        measure = norm is None and gate is always and self.optimizer.measures
        if norm is None and not measure:
            with timer("gradients"):
                norm = self._norm(found.scale)
        taken = norm is None or gate(found.loss, norm)
        with timer("optimizer"):
            self.before_update()
            if taken:
                self.optimizer.step(factor, self._scale(norm, found.scale), measure)
                self.main.publish()
            norm = self._norm(found.scale) if norm is None else norm
            self.main.zero_grad()
            routing = self.balancing.finish(taken)
        return StepResult(found.loss, norm, found.requests, routing)

    def close(self) -> None:
        """Frees a CUDA graph: NCCL waits for those that hold its messages when process groups are destroyed."""
        self._gradients = self._find_gradients

    def _find_gradients(self, batch: Batch, request: int | torch.Tensor, timer: PhaseTimer) -> Found:
        """The part of a step before the update: every `MainParam` has its final gradient then."""
        with timer("forward-backward"):
            tokens, requests = self._agree(batch, request)
            micro_batches = len(batch["tokens"]) // self.config.training.micro_batch_size
            self.balancing.begin(micro_batches * self.mesh.dp_size)
            divisor = torch.ones_like(tokens) if self.sums_tokens else tokens
            if self.transformer_engine.cold:
                self._warm_up(batch, divisor, micro_batches)
            with self.transformer_engine.around(micro_batches):
                sums = self.forward_backward(batch, divisor)
        with timer("gradients"):
            self.main.collect_grads()
            scale = None
            if self.sums_tokens:
                scale = tokens.rsqrt() if self.unit_scaled else tokens.reciprocal()
            norm = self._norm(scale) if self.norm_comes_first else None
            loss = self._mean_loss(sums, tokens)
        return Found(loss, norm, requests, scale)

    def _norm(self, scale: torch.Tensor | None) -> torch.Tensor:
        """The gradients' norm with the factor that they still lack."""
        norm = global_grad_norm(self.main.params, self.mesh)
        return norm if scale is None else norm * scale

    def _scale(self, norm: torch.Tensor | None, scale: torch.Tensor | None) -> torch.Tensor | None:
        """The factor on gradients that the optimizer applies: what they lack, times what clips them by their norm."""
        clip = None if norm is None else clip_factor(norm, self.largest_norm)
        if clip is None or scale is None:
            return scale if clip is None else clip
        return clip * scale

    def _warm_up(self, batch: Batch, divisor: torch.Tensor, micro_batches: int) -> None:
        """Lets FP8's scales see a step's values, and forgets all else that the passes did."""
        with self.transformer_engine.around(micro_batches):
            self.forward_backward(batch, divisor)
        self.main.zero_grad()
        for router in self.model.routers().values():
            router.tally.zero_()
        self.transformer_engine.cold = False

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Sum of the loss and number of valid tokens ``[2]`` of a global batch, equal on all ranks, on the device."""
        tokens, _ = self._agree(batch, 0)
        with self.transformer_engine.around(len(batch["tokens"]) // self.config.training.micro_batch_size, train=False):
            sums = self.forward_backward(batch, tokens, train=False)
        dist.all_reduce(sums, group=self.mesh.loss_group)
        return torch.stack([sums[1], tokens.float()])

    def _agree(self, batch: Batch, request: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Valid tokens of the global batch (0-d fp32, at least one) and the sum of requests, in one collective."""
        if isinstance(request, int):
            request = torch.full_like(batch["labels"][0, 0], request)
        counts = torch.stack([(batch["labels"] != IGNORE).sum(), request])
        if self.mesh.world.size() > 1:
            dist.all_reduce(counts)
        tokens = counts[0] // self.config.parallel.model_parallel_size
        return tokens.clamp(min=1).float(), counts[1]

    def _mean_loss(self, sums: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if self.mesh.world.size() > 1:
            dist.all_reduce(sums, group=self.mesh.loss_group)
        return sums[1] / tokens
