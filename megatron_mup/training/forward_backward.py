"""One step's forward and backward passes over all micro-batches, through pipeline stages or without them."""

from __future__ import annotations

import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from megatron_mup.config import Config
from megatron_mup.models.gpt import GPT
from megatron_mup.parallel.data_parallel import compute_dtype, set_last_micro_batch
from megatron_mup.parallel.mesh import Mesh

Batch = dict[str, torch.Tensor]
INPUTS = ("labels", "position_ids", "document_ids", "sample_index")


class ForwardBackward:
    """Runs a stage over a step's micro-batches.

    Args:
        model: this rank's stage.
        config: the run's configuration.
        mesh: the run's mesh.
    """

    def __init__(self, model: GPT, config: Config, mesh: Mesh) -> None:
        self.model, self.config, self.mesh = model, config, mesh
        self._schedules: dict[int, Schedule1F1B] = {}
        self._divisor = torch.ones((), device=mesh.device)

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
        self.model.train(train)
        self._divisor = divisor
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        if self.mesh.size("pp") > 1:
            return self._pipelined(batch["tokens"], inputs, count, train)
        total = torch.zeros(2, device=self.mesh.device)
        parts = {name: value.chunk(count) for name, value in inputs.items()}
        with torch.set_grad_enabled(train):
            for index, tokens in enumerate(batch["tokens"].chunk(count)):
                set_last_micro_batch(self.model, index == count - 1)
                loss = self.model(tokens, **{name: part[index] for name, part in parts.items()})
                if train:
                    self._objective(loss).backward()
                total += loss.detach()[0]
        return total

    def _pipelined(self, tokens: torch.Tensor, inputs: Batch, count: int, train: bool) -> torch.Tensor:
        schedule = self._schedule(count)
        run = schedule.step if train else schedule.eval
        target = torch.zeros(count, device=self.mesh.device)
        losses: list[torch.Tensor] = []
        with torch.set_grad_enabled(train):
            outputs = run(*([tokens] if self.mesh.is_first_stage else []), target=target, losses=losses, **inputs)
        if not self.mesh.is_last_stage:
            return torch.zeros(2, device=self.mesh.device)
        return outputs.detach().sum(0)

    def _objective(self, loss: torch.Tensor, _target: torch.Tensor | None = None) -> torch.Tensor:
        return loss[0, 0] / self._divisor

    def _schedule(self, count: int) -> Schedule1F1B:
        """The schedule for so many micro-batches. Shapes are given, so that no trial pass runs through the model."""
        if count not in self._schedules:
            training, hidden = self.config.training, self.config.model.hidden_size
            length = training.seq_length
            if self.config.parallel.sequence_parallel:
                length //= self.mesh.size("tp")
            with torch.device("meta"):
                state = torch.empty(
                    length, training.micro_batch_size, hidden, dtype=compute_dtype(self.config), requires_grad=True
                )
                tokens = torch.empty(training.micro_batch_size, training.seq_length, dtype=torch.long)
                loss = torch.empty(1, 2, requires_grad=True)
            stage = PipelineStage(
                self.model,
                self.mesh.rank("pp"),
                self.mesh.size("pp"),
                self.mesh.device,
                input_args=tokens if self.mesh.is_first_stage else state,
                output_args=loss if self.mesh.is_last_stage else state,
                group=self.mesh.group("pp"),
            )
            self._schedules[count] = Schedule1F1B(stage, count, loss_fn=self._objective, scale_grads=False)
        return self._schedules[count]
