"""What a model consists of: each parameter with its optimizer's state, layers of one kind counted once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from megatron_mup.config import Config
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.optim.build import MATRIX_OPTIMIZERS
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parallel.data_parallel import main_dtype
from megatron_mup.parallel.layout import Layout
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta, Role


class _Alone(Mesh):
    """The mesh of a rank alone, without process groups: enough to ask an optimizer what it would keep."""

    def size(self, axis: str) -> int:
        return 1

    def rank(self, axis: str) -> int:
        return 0

    def group(self, axis: str) -> None:  # type: ignore[override]
        return None

    @property
    def matrix_group(self) -> None:  # type: ignore[override]
        return None

    @property
    def expert_group(self) -> None:  # type: ignore[override]
        return None

    def matrix_places(self) -> list[tuple[int, int, int]]:
        return [(0, 0, 0)]


@dataclass(frozen=True)
class Holding:
    """A parameter and what its optimizer keeps for it.

    Attributes:
        meta: the parameter.
        on_shards: bytes of state per element, cut as the parameter is.
        at_home: bytes of state that are whole, on the rank that orthonormalizes it.
        cost: multiply-adds of orthonormalizing it once; None for a parameter of an elementwise optimizer, whose state
            every replica has (that of a matrix is in one).
    """

    meta: ParamMeta
    on_shards: int
    at_home: int
    cost: float | None


@dataclass(frozen=True)
class Inventory:
    """All parameters of a model.

    Attributes:
        kinds: parameters of one layer of each kind.
        layers: kind of each layer.
        first, last: parameters of the first and of the last stage outside the layers.
        copy: the last stage's copy of a tied embedding, where it has one.
    """

    kinds: tuple[tuple[Holding, ...], ...]
    layers: tuple[int, ...]
    first: tuple[Holding, ...]
    last: tuple[Holding, ...]
    copy: Holding | None

    @classmethod
    def of(cls, config: Config, vocab_size: int) -> Inventory:
        """Takes stock of a configuration's model. It is built without memory, and never whole."""
        depth = config.model.num_layers
        has_experts = config.moe.layers(depth)
        # Layers differ in nothing else, so one of each kind is enough.
        samples = [has_experts.index(kind) for kind in sorted(set(has_experts))]
        wanted = max(samples) + 1
        short = replace(
            config,
            model=replace(config.model, num_layers=wanted),
            moe=replace(config.moe, moe_layer_freq=str([int(kind) for kind in has_experts[:wanted]])),
            # Its value matters to nothing here, but some optimizers want to know it.
            training=replace(config.training, train_iters=config.training.train_iters or 1),
        )
        holdings = _holdings(short, parameter_metas(short, vocab_size))
        layers = tuple(tuple(h for h in holdings if h.meta.layer == sample) for sample in samples)
        outside = [h for h in holdings if h.meta.layer is None]
        first = tuple(h for h in outside if h.meta.role in (Role.EMBEDDING, Role.POSITION_EMBEDDING))
        tied = not config.model.untie_embeddings_and_output_weights
        return cls(
            kinds=layers,
            layers=tuple(sorted(set(has_experts)).index(kind) for kind in has_experts),
            first=first,
            last=tuple(h for h in outside if h not in first),
            copy=next(h for h in first if h.meta.role is Role.EMBEDDING) if tied else None,
        )

    def stage(self, start: int, end: int, first: bool, last: bool) -> list[tuple[Holding, int]]:
        """Parameters of a stage, alike ones once with their number."""
        counted = [
            (holding, count)
            for kind, holdings in enumerate(self.kinds)
            if (count := self.layers[start:end].count(kind))
            for holding in holdings
        ]
        outside: list[Holding] = [*(self.first if first else ()), *(self.last if last else ())]
        if last and not first and self.copy is not None:
            outside.append(self.copy)
        return counted + [(holding, 1) for holding in outside]

    def whole(self) -> list[tuple[Holding, int]]:
        """Parameters of the whole model."""
        return self.stage(0, len(self.layers), True, True)

    def matrices(self, start: int, end: int) -> dict[str, tuple[ParamMeta, Holding]]:
        """Matrices of a range of layers that are orthonormalized, by their own names."""
        found = {}
        for layer in range(start, end):
            for holding in self.kinds[self.layers[layer]]:
                if holding.cost is not None:
                    suffix = holding.meta.name.removeprefix(f"decoder.layers.{holding.meta.layer}.")
                    meta = replace(holding.meta, name=f"decoder.layers.{layer}.{suffix}", layer=layer)
                    found[meta.name] = (meta, holding)
        return found


def parameters(holdings: Iterable[tuple[Holding, int]]) -> int:
    """Number of parameters."""
    return sum(holding.meta.numel * count for holding, count in holdings)


def _holdings(config: Config, metas: list[ParamMeta]) -> list[Holding]:
    """Asks the run's own optimizer, on tensors without memory, what it would keep on a rank alone."""
    dtype = main_dtype(config)
    params = [
        MainParam(meta, Layout.alone(meta), torch.empty(meta.shape, dtype=dtype, device="meta")) for meta in metas
    ]
    # The device decides on the precision of Newton-Schulz alone: tensors are where the parameters are.
    experts = _Alone if config.moe.num_experts is not None else None
    optimizer = Optimizer(params, config, _Alone(None, torch.device("cuda"), {}, experts))  # type: ignore[arg-type]
    on_shards, at_home = dict.fromkeys((m.name for m in metas), 0), dict.fromkeys((m.name for m in metas), 0)
    for key, (param, state) in optimizer.state_tensors().items():
        # Experts' names say which of them.
        name = key.partition("/")[2].partition("[")[0]
        # What stays at home comes as a parameter of its own, and so does every state of experts.
        if param.value is state and not key.startswith("momentum/"):
            at_home[name] += state.nbytes
        else:
            on_shards[name] += state.element_size() * state.numel() // max(1, math.prod(param.value.shape))
    plans = [plan for plan in (optimizer.matrix_plan, optimizer.expert_plan) if plan is not None]
    costs = {a.meta.name.partition("[")[0]: a.cost for plan in plans for a in plan.assignments}
    matrices = {row.name for row in optimizer.routing_table() if row.optimizer in MATRIX_OPTIMIZERS}
    return [
        Holding(m, on_shards[m.name], at_home[m.name], costs.get(m.name, 0.0) if m.name in matrices else None)
        for m in metas
    ]
