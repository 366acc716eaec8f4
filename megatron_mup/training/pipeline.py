"""One step's passes through the stages of a pipeline, of which this rank holds one or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from megatron_mup.config import Config
from megatron_mup.config.schedules import rank_of_stage, schedule_name, schedule_of, stages_of_rank, stages_per_rank
from megatron_mup.models.chunks import Model
from megatron_mup.parallel.data_parallel import compute_dtype, take_over_gradients
from megatron_mup.parallel.mesh import Mesh

Inputs = dict[str, torch.Tensor]


class _Stage(PipelineStage):
    """A stage that takes labels and the like from its own rank's batch: only hidden states travel.

    Attributes:
        inputs: of each micro-batch; set before each step.
        after_weights: called when gradients of weights were taken by themselves.
        keeps_graph: whether a micro-batch's graph is kept until gradients of weights were taken from it.
        graphs: those kept, by micro-batch.
    """

    inputs: list[Inputs]
    after_weights: Callable[[], None]
    keeps_graph: bool
    graphs: dict[int, list[Any]]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Runs one micro-batch."""
        self._running = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: torch.Tensor, **kwargs: Any) -> Any:
        """Calls the module. As inputs of the schedule integers would be asked for their gradients (PyTorch 2.11)."""
        return self.submod(*args, **self.inputs[self._running], **kwargs)

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: torch.Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Takes all gradients, or that of the input.

        The latter frees what lies above the nodes that have weights, and PyTorch 2.11 remembers nodes of Python's
        autograd functions without holding them: those that have weights, as the router's, would be gone too.
        """
        if self.keeps_graph and not full_backward:
            outputs, _ = self.fwd_cache[bwd_chunk_id]
            # A view's node is PyTorch's own and holds all below it.
            self.graphs[bwd_chunk_id] = [output.view_as(output).grad_fn for output in outputs]
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Takes the gradients of weights."""
        super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        self.graphs.pop(bwd_chunk_id, None)
        take_over_gradients(self.submod)
        self.after_weights()


class Pipeline:
    """Runs this rank's stages over a step's micro-batches. Collective over the pipeline ranks.

    Args:
        model: this rank's stages.
        config: the run's configuration.
        mesh: the run's mesh.
        after_weights: called after each pass that took gradients of weights by themselves, and set them without the
            notice of autograd's hooks.
    """

    def __init__(self, model: Model, config: Config, mesh: Mesh, after_weights: Callable[[], None]) -> None:
        self.config, self.mesh, self._after_weights = config, mesh, after_weights
        self._parts = dict(zip(stages_of_rank(config, mesh.rank("pp")), model.parts, strict=True))
        self._number = mesh.size("pp") * stages_per_rank(config)
        self._schedules: dict[int, tuple[Any, list[_Stage]]] = {}
        self._loss: Callable[[torch.Tensor], torch.Tensor] = torch.sum
        # Under NCCL all ranks of a group have to take part in its first call.
        dist.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.group("pp"))

    @property
    def _is_last(self) -> bool:
        return self._number - 1 in self._parts

    def train(
        self, tokens: torch.Tensor, inputs: list[Inputs], objective: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """Forward and backward in the order of the schedule.

        Args:
            tokens: ``[samples, seq]``.
            inputs: what else the stages read, one for each micro-batch.
            objective: scalar to differentiate, from the last stage's output for one micro-batch.

        Returns:
            The last stage's outputs, all micro-batches one after the other; None where that stage isn't.
        """
        self._loss = objective
        count = len(inputs)
        if count not in self._schedules:
            self._schedules[count] = self._schedule(count, tokens)
        schedule, stages = self._schedules[count]
        for stage in stages:
            stage.inputs = inputs
        target = torch.zeros(count, device=self.mesh.device)
        losses: list[torch.Tensor] = []
        outputs = schedule.step(*([tokens] if 0 in self._parts else []), target=target, losses=losses)
        return outputs.detach() if self._is_last else None

    def evaluate(self, tokens: torch.Tensor, inputs: list[Inputs]) -> torch.Tensor | None:
        """Forward only; arguments and result as of `train`.

        In lockstep: at each tick a rank runs one micro-batch through one stage at most, and its output is what the
        next stage runs at the next tick. (The schedules' own evaluation fails where a rank holds neighbouring stages.)
        """
        hidden = self._hidden(tokens)
        starts = {self._start(index): index for index in range(len(inputs))}
        chunks, arrived, outputs = tokens.chunk(len(inputs)), hidden, []
        for tick in range(max(starts) + self._number):
            stage, output = self._due(tick, starts), None
            if stage is not None:
                index = starts[tick - stage]
                output = self._parts[stage](arrived if stage else chunks[index], **inputs[index])
                if stage == self._number - 1:
                    outputs.append(output)
            arrived = self._passed_on(stage, output, self._due(tick + 1, starts), hidden)
        return torch.cat(outputs) if outputs else None

    def _start(self, index: int) -> int:
        """Tick at which a micro-batch enters, so that no rank ever has two stages to run."""
        ranks, held = self.mesh.size("pp"), self._number // self.mesh.size("pp")
        if schedule_of(self.config).v_shaped:
            return 2 * index
        return index // ranks * ranks * held + index % ranks

    def _due(self, tick: int, starts: dict[int, int]) -> int | None:
        """The stage that this rank runs at a tick."""
        return next((stage for stage in self._parts if tick - stage in starts), None)

    def _passed_on(
        self, ran: int | None, output: torch.Tensor | None, due: int | None, like: torch.Tensor
    ) -> torch.Tensor:
        """Sends a stage's output to the next one, and brings what the stage that is due runs on."""
        group, me, operations, arrived = self.mesh.group("pp"), self.mesh.rank("pp"), [], like
        if ran is not None and output is not None and ran + 1 < self._number:
            if (to := rank_of_stage(self.config, ran + 1)) == me:
                return output
            operations.append(dist.P2POp(dist.isend, output.contiguous(), group=group, group_peer=to))
        if due and (source := rank_of_stage(self.config, due - 1)) != me:
            arrived = torch.empty_like(like, device=self.mesh.device)
            operations.append(dist.P2POp(dist.irecv, arrived, group=group, group_peer=source))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return arrived

    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Shape and precision of what travels, without memory."""
        micro_batch, length = self.config.training.micro_batch_size, tokens.shape[1] // self.mesh.cp.size
        if self.config.parallel.sequence_parallel:
            length //= self.mesh.size("tp")
        shape = length, micro_batch, self.config.model.hidden_size
        return torch.empty(shape, dtype=compute_dtype(self.config), device="meta", requires_grad=True)

    def _schedule(self, count: int, tokens: torch.Tensor) -> tuple[Any, list[_Stage]]:
        """The schedule for so many micro-batches. Shapes are given, so that no trial pass runs through the model."""
        hidden = self._hidden(tokens)
        first = tokens[: len(tokens) // count].to("meta")
        loss = torch.empty(1, 2, device="meta", requires_grad=True)
        stages = [
            _Stage(
                part,
                number,
                self._number,
                self.mesh.device,
                input_args=first if number == 0 else hidden,
                output_args=loss if number == self._number - 1 else hidden,
                group=self.mesh.group("pp"),
            )
            for number, part in self._parts.items()
        ]
        fused = self.config.training.cross_entropy_fusion_impl == "linear"
        for stage in stages:
            stage.after_weights, stage.graphs = self._after_weights, {}
            # On the last stage the output layer's product holds all below it, unless it is one with the loss: so
            # logits don't stay.
            stage.keeps_graph = fused or not stage.is_last
        kind = get_schedule_class(schedule_name(self.config))
        held = stages if schedule_of(self.config).usual > 1 else stages[0]
        return kind(held, count, loss_fn=self._objective, scale_grads=False), stages

    def _objective(self, output: torch.Tensor, _target: torch.Tensor) -> torch.Tensor:
        return self._loss(output)
