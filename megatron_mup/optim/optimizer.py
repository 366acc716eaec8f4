"""The optimizer of a run: each parameter routed by its role, one step over all, state by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from megatron_mup.config import Config
from megatron_mup.optim.adamw import AdamW
from megatron_mup.optim.build import MATRIX_OPTIMIZERS, SCALAR_OPTIMIZERS, build_matrix, build_scalar, build_tables
from megatron_mup.optim.clip import gradients, scale_grads
from megatron_mup.optim.compressed_dion import CompressedDion
from megatron_mup.optim.experts import ExpertRanks
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.planner import Plan, describe
from megatron_mup.optim.switch import carry_state
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta, Role
from megatron_mup.parametrization.table import Scaling, scaling

Rule = Callable[[ParamMeta, Scaling], bool]

TABLES = (Role.EMBEDDING, Role.POSITION_EMBEDDING, Role.READOUT)


def _is_scalar(name: str, _meta: ParamMeta, numbers: Scaling) -> bool:
    return numbers.optimizer == name


def _is_matrix(name: str, meta: ParamMeta, numbers: Scaling) -> bool:
    matrix = meta.role.is_orthonormalized or meta.role is Role.ROUTER
    return numbers.optimizer == name and matrix and len(meta.shape) == 2


RULES: Mapping[str, Rule] = {
    **{name: partial(_is_scalar, name) for name in SCALAR_OPTIMIZERS},
    **{name: partial(_is_matrix, name) for name in MATRIX_OPTIMIZERS},
    "scion_tables": lambda meta, numbers: numbers.optimizer == "scion" and meta.role in TABLES,
}
"""Which parameters an optimizer claims, given its logical facts and its row of the scaling table."""


@dataclass(frozen=True)
class RoutingRow:
    """One line of the routing table: a parameter, its optimizer and the numbers it is trained with."""

    name: str
    role: Role
    shape: tuple[int, ...]
    optimizer: str
    lr: float
    weight_decay: float
    eps: float


def route(meta: ParamMeta, numbers: Scaling, rules: Mapping[str, Rule] = RULES) -> str:
    """Name of the one optimizer that claims a parameter.

    Raises:
        ValueError: none claims it, or several do.
    """
    claims = [name for name, rule in rules.items() if rule(meta, numbers)]
    if len(claims) != 1:
        problem = f"claimed by {' and '.join(claims)}" if claims else "claimed by no optimizer"
        raise ValueError(
            f"parameter {meta.name} (role {meta.role.value}, shape {meta.shape}, scaled for {numbers.optimizer!r}) "
            f"is {problem}; exactly one must"
        )
    return claims[0]


def learning_rate_class(meta: ParamMeta) -> str:
    """Name under which a parameter's learning rate is logged: its role; norms and biases outside the layers apart."""
    outside = meta.layer is None and meta.role in (Role.NORM, Role.BIAS)
    return f"final_{meta.role.value}" if outside else meta.role.value


def peak_learning_rates(metas: Iterable[ParamMeta], config: Config) -> dict[str, float]:
    """Peak learning rate of each class of parameters (see :func:`learning_rate_class`)."""
    return {learning_rate_class(meta): scaling(meta, config).lr for meta in metas}


class Optimizer:
    """All optimizers of this rank's parameters behind one step."""

    def __init__(self, params: list[MainParam], config: Config, mesh: Mesh) -> None:
        """Routes parameters and allocates their state: AdamW's for all while ``--optimizer-switch-at`` lies ahead.

        Raises:
            ValueError: a parameter that no rule claims, or several do; two parameters of one name.
        """
        self._params, self._mesh = params, mesh
        self._phase: Config | None = None
        self._later: Config | None = None
        self.restore(config, 0)

    def restore(self, config: Config, iteration: int) -> None:
        """Has the state that is saved after ``iteration`` iterations, to be loaded. Collective.

        Args:
            config: the run's.
            iteration: iterations done. At ``--optimizer-switch-at`` the state is still AdamW's.
        """
        phase = config.at_iteration(max(0, iteration - 1))
        self._later = None if phase is config else config
        if phase != self._phase:
            self._build(phase)
        else:
            self.gather_state()

    def advance(self, iteration: int) -> bool:
        """Changes optimizers if ``--optimizer-switch-at`` is reached. Collective over the ranks that share matrices.

        Args:
            iteration: iterations done; called before the next one.

        Returns:
            Whether it has changed them now.
        """
        config = self._later
        if config is None or config.at_iteration(iteration) is not config:
            return False
        state = self.state_tensors() if config.optimizer.optimizer_switch_carry_state else {}
        steps, self._later = self._scalar.steps_done, None
        self._build(config)
        if state:
            carry_state(state, self.state_tensors(), self._matrix.settings)
            self._scalar.steps_done = steps
        return True

    def _build(self, config: Config) -> None:
        mesh, self._phase = self._mesh, config
        for old in ("_matrix", "_experts", "_scalar", "_tables"):
            vars(self).pop(old, None)  # frees what isn't carried before anything new is allocated
        self._rows: list[RoutingRow] = []
        claimed: dict[str, list[tuple[MainParam, Scaling]]] = {name: [] for name in RULES}
        for param in self._params:
            meta, numbers = param.meta, scaling(param.meta, config)
            name = route(meta, numbers)
            claimed[name].append((param, numbers))
            self._rows.append(
                RoutingRow(meta.name, meta.role, meta.shape, name, numbers.lr, numbers.weight_decay, numbers.eps)
            )
        names = [row.name for row in self._rows]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"parameters given to the optimizer twice: {', '.join(twice)}")
        flags = config.optimizer
        matrix = flags.optimizer if flags.optimizer in MATRIX_OPTIMIZERS else "muon"
        self._all_by_adamw = flags.optimizer == "adam"
        scalar = "adam" if self._all_by_adamw else flags.scalar_optimizer
        dense = [numbered for numbered in claimed[matrix] if numbered[0].meta.experts is None]
        experts = [numbered for numbered in claimed[matrix] if numbered[0].meta.experts is not None]
        self._matrix = build_matrix(matrix, dense, config, mesh, mesh.device)
        self._experts = None
        if mesh.experts is not None:
            ranks = ExpertRanks(mesh)
            self._experts = build_matrix(matrix, ranks.parts(experts, mesh), config, ranks, mesh.device)
        self._scalar = build_scalar(scalar, claimed[scalar], config, mesh)
        self._for_others = [param for name in RULES if name != scalar for param, _ in claimed[name]]
        self._tables = build_tables(claimed["scion_tables"], config)

    @torch.no_grad()
    def start(self) -> None:
        """Moves initial weights to where the optimizer keeps them, as on the spectral sphere. Collective."""
        matrices = [m for m in (self._matrix, self._experts) if m is not None]
        if not self._matrix.places_weights:
            return
        for param in self._params:
            param.grad = torch.zeros_like(param.value)
        for optimizer in matrices:
            optimizer.step(0.0)
        for param in self._params:
            param.grad = None

    def routing_table(self) -> list[RoutingRow]:
        """One row for each parameter of this rank, in the order given."""
        return list(self._rows)

    @property
    def matrix_plan(self) -> Plan:
        """Where each matrix is orthonormalized, and what that costs."""
        return self._matrix.plan

    @property
    def expert_plan(self) -> Plan | None:
        """The same of experts, in runs that have homes of their own; None in a model without."""
        return None if self._experts is None else self._experts.plan

    def transport(self) -> str | None:
        """What moves hidden matrices between ranks, in words; None where none are moved."""
        return self._matrix.transport if self._matrix.plan.chunks else None

    def plan(self) -> str:
        """Which rank orthonormalizes which matrix of this stage, as a table (``--print-optimizer-plan``)."""
        size = self._matrix.settings.ns_dtype.itemsize
        dense = describe(self._matrix.plan, size)
        if isinstance(self._matrix, CompressedDion):
            dense = f"{dense}\n{self._matrix.describe_sync()}"
        if self._experts is None:
            return dense
        return f"{dense}\nexperts, over the ranks that hold the same ones:\n{describe(self._experts.plan, size)}"

    @property
    def measures(self) -> bool:
        """Whether a step finds the squares of all gradients on its way; the same on all ranks."""
        return self._all_by_adamw and isinstance(self._scalar, AdamW) and self._scalar.measures

    def step(self, factor: float, scale: torch.Tensor | None = None, measure: bool = False) -> None:
        """One step at ``factor`` times the peak learning rates. Collective over the ranks that share matrices.

        Args:
            factor: of the rates.
            scale: 0-d fp32, a factor on all gradients; None is 1. AdamW's kernel multiplies as it reads; for the others
                gradients are multiplied in place.
            measure: whether to leave the sum of squares of each gradient, without the factor, in its parameter, for
                `clip.global_grad_norm`; only if it `measures`.

        Raises:
            RuntimeError: a parameter that has no gradient; nothing has been updated then.
        """
        gradients(self._params)
        if scale is not None:
            scale_grads(self._for_others, scale)
        self._matrix.step(factor, meanwhile=lambda: self._step_others(factor, scale, measure))
        if self._experts is not None:
            self._experts.step(factor)

    def _step_others(self, factor: float, scale: torch.Tensor | None, measure: bool) -> None:
        """The step of what is no hidden matrix."""
        self._tables.step(factor)
        if measure:
            assert isinstance(self._scalar, AdamW)
            self._scalar.step(factor, scale, measure)
        else:
            self._scalar.step(factor, scale)

    def gather_state(self) -> None:
        """Before state is saved or loaded: brings parts of it that replicas keep apart together. Collective."""
        self._matrix.gather_state()

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """State of every parameter by ``<kind>/<parameter>``: ``exp_avg``, ``momentum`` and so on.

        The tensors are live, allocated since construction: writing into them loads them. Most are shards in storage
        layout, with the same keys on all ranks that hold the same parameters, empty shards included; for the others
        see `MatrixOptimizer.state_tensors`. Each comes with its place in the global tensor.
        """
        return {
            **self._scalar.state_tensors(),
            **self._tables.state_tensors(),
            **self._matrix.state_tensors(),
            **(self._experts.state_tensors() if self._experts is not None else {}),
        }

    def state_scalars(self) -> dict[str, int]:
        """State that is one number for all parameters: ``step``, the steps taken."""
        return {"step": self._scalar.steps_done}

    def load_state_scalars(self, scalars: Mapping[str, int]) -> None:
        """Takes over what :meth:`state_scalars` gave."""
        self._scalar.steps_done = scalars["step"]
