"""What a rank keeps of parameters and optimizer state under DeepSpeed's ZeRO, as this package's shards.

DeepSpeed updates flat fp32 vectors. With ZeRO-1 and 2 the parameters of a group lie in one vector, one after the other,
which the ranks cut evenly; with ZeRO-3 each parameter is flattened and cut. So a rank keeps a run of a parameter's
elements, which is up to three rectangles of the matrix. Each is a `MainParam` whose value is a view into DeepSpeed's
vector: what draws initial values, saves and loads meets shards with offsets, as it does everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.models.chunks import Model
from megatron_mup.optim.main_params import MainParam, draw
from megatron_mup.parallel.layout import Layout
from megatron_mup.parametrization.meta import ParamMeta

MOMENTS = ("exp_avg", "exp_avg_sq")

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a flattened parameter: ``count`` from ``start`` on, at ``place`` in a vector."""

    vector: torch.Tensor
    place: int
    start: int
    count: int


def rectangles(shape: tuple[int, ...], start: int, count: int) -> Iterator[Rectangle]:
    """Cuts ``count`` elements from ``start`` on of a flattened vector or matrix into rectangles, three at most."""
    if len(shape) == 1:
        yield (start,), (count,)
        return
    columns, end = shape[1], start + count
    while start < end:
        row, column = divmod(start, columns)
        whole = 0 if column else (end - start) // columns
        sizes = (whole, columns) if whole else (1, min(columns - column, end - start))
        yield (row, column), sizes
        start += math.prod(sizes)


class ZeroShards:
    """This rank's shards, and AdamW's state for them.

    Args:
        model: the model, handed to DeepSpeed.
        config: the run's configuration.
        engine: DeepSpeed's engine.

    Attributes:
        params: rectangles; several or none of a parameter.
        state: both moments of each, as `Optimizer.state_tensors` gives them.
        steps: AdamW's counts of steps.
    """

    def __init__(self, model: Model, config: Config, engine: Any) -> None:
        self._config, self._zero, self._module_params = config, engine.optimizer, list(model.parameters())
        self._is_stage_3 = config.parallel.zero_stage == 3
        self.params: list[MainParam] = []
        self.state: dict[str, tuple[MainParam, torch.Tensor]] = {}
        self.steps: list[torch.Tensor] = []
        adamw = engine.basic_optimizer
        self._vectors: list[torch.Tensor] = (
            self._zero.fp32_partitioned_groups_flat
            if self._is_stage_3
            else [group["params"][0] for group in adamw.param_groups]
        )
        for vector in self._vectors:
            self.steps.append(torch.zeros((), dtype=torch.float32, device=vector.device))
            moments = {key: torch.zeros_like(vector, requires_grad=False) for key in MOMENTS}
            adamw.state[vector] = {"step": self.steps[-1], **moments}
        for name, param in model.named_parameters():
            run = self._run_of_stage_3(param) if self._is_stage_3 else self._run(param)
            if run is not None:
                self._add(model.metas[name], run, adamw.state[run.vector])

    def _run(self, param: Any) -> Run | None:
        fragment = param._hp_mapping
        if fragment is None:
            return None
        there, here = fragment.hp_fragment_address, fragment.lp_fragment_address
        return Run(self._vectors[fragment.param_group_index], there.start, here.start, here.numel)

    def _run_of_stage_3(self, param: Any) -> Run | None:
        """All ranks keep equally many elements, of which the last may be padding."""
        group, place, size = self._zero.grad_position[self._zero.get_param_id(param)]
        start = size * dist.get_rank()
        count = min(size, param.ds_numel - start)
        return Run(self._vectors[group], place, start, count) if count > 0 else None

    def _add(self, meta: ParamMeta, run: Run, state: dict[str, torch.Tensor]) -> None:
        place = run.place
        for offsets, sizes in rectangles(meta.shape, run.start, run.count):
            here = slice(place, place + math.prod(sizes))
            layout = Layout(meta.shape, offsets, sizes, None, sizes[0], None, None)
            main = MainParam(meta, layout, run.vector.detach()[here].view(sizes))
            for key in MOMENTS:
                self.state[f"{key}/{meta.name}/{here.start}"] = (main, state[key][here].view(sizes))
            self.params.append(main)
            place = here.stop

    def initialise(self) -> None:
        """Draws every value from its counter-based generator."""
        draw(self.params, self._config)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the vectors to the parameters that the model computes with. Collective."""
        if not self._is_stage_3:
            self._zero.update_lp_params()
            return
        import deepspeed

        for param in self._module_params:
            whole = self._zero.get_full_hp_param(param)
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                param.copy_(whole)
