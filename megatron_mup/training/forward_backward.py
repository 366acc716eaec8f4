"""One step's forward and backward passes over all micro-batches, through pipeline stages or without them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_mup.config import Config
from megatron_mup.models.chunks import Model
from megatron_mup.parallel.data_parallel import set_last_micro_batch
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.pipeline import Pipeline

Batch = dict[str, torch.Tensor]
INPUTS = ("labels", "position_ids", "document_ids", "sample_index")


class ForwardBackward:
    """Runs this rank's part of the model over a step's micro-batches.

    Args:
        model: this rank's stages.
        config: the run's configuration.
        mesh: the run's mesh.
        after_weights: called when gradients of weights were set without the notice of autograd's hooks, as some
            pipeline schedules do.
    """

    def __init__(
        self, model: Model, config: Config, mesh: Mesh, after_weights: Callable[[], None] = lambda: None
    ) -> None:
        self.model, self.config, self.mesh = model, config, mesh
        self._pipeline = Pipeline(model, config, mesh, after_weights) if mesh.size("pp") > 1 else None
        self._divisor = torch.ones((), device=mesh.device)
        self._mode: bool | None = None

    def __call__(self, batch: Batch, divisor: torch.Tensor, train: bool = True) -> torch.Tensor:
        """Forward, and backward of the objective divided by ``divisor``; gradients are added to the parameters'.

        Args:
            batch: ``tokens`` ``[samples, seq]`` and what of `GPT.forward`'s inputs applies, first dimension samples;
                a whole number of micro-batches.
            divisor: 0-d, number of valid tokens in the global batch.
            train: False runs forward only, without dropout.

        Returns:
            ``[2]`` fp32 on the device: objective and language-model loss summed over this rank's samples on the last
            stage, zeros on the others.
        """
        count = len(batch["tokens"]) // self.config.training.micro_batch_size
        if self._mode != train:  # it goes through all modules, while the device waits for the first kernel
            self._mode = train
            self.model.train(train)
        self._divisor = divisor
        parts = {name: batch[name].chunk(count) for name in INPUTS if name in batch}
        inputs = [{name: part[index] for name, part in parts.items()} for index in range(count)]
        if self._pipeline is not None:
            return self._pipelined(self._pipeline, batch["tokens"], inputs, train)
        total = torch.zeros(2, device=self.mesh.device)
        with torch.set_grad_enabled(train):
            for index, tokens in enumerate(batch["tokens"].chunk(count)):
                set_last_micro_batch(self.model, index == count - 1)
                loss = self.model(tokens, **inputs[index])
                if train:
                    self._objective(loss).backward()
                total += loss.detach()[0]
        return total

    def _pipelined(self, pipeline: Pipeline, tokens: torch.Tensor, inputs: list[Batch], train: bool) -> torch.Tensor:
        with torch.set_grad_enabled(train):
            outputs = pipeline.train(tokens, inputs, self._objective) if train else pipeline.evaluate(tokens, inputs)
        return torch.zeros(2, device=self.mesh.device) if outputs is None else outputs.sum(0)

    def _objective(self, loss: torch.Tensor) -> torch.Tensor:
        return loss[0, 0] / self._divisor
