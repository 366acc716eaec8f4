"""The optimizer of a run: each parameter routed by its role, one step over all, state by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from megatron_mup.config import Config, OptimizerConfig
from megatron_mup.optim.adamw import AdamW, AdamWSettings
from megatron_mup.optim.clip import gradients
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.muon import Muon, MuonSettings
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta, Role
from megatron_mup.parametrization.table import Scaling, scaling

Rule = Callable[[ParamMeta, Scaling], bool]

RULES: Mapping[str, Rule] = {
    "adam": lambda meta, numbers: numbers.optimizer == "adam",
    "muon": lambda meta, numbers: numbers.optimizer == "muon" and meta.role.is_hidden_matrix and len(meta.shape) == 2,
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


def muon_settings(config: OptimizerConfig, device: torch.device) -> MuonSettings:
    """Muon's settings from the flags; ``--muon-ns-dtype auto`` is bf16 on a GPU and fp32 on a CPU."""
    precision = config.muon_ns_dtype
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    return MuonSettings(
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        scale_mode=config.muon_scale_mode,
        extra_scale_factor=config.muon_extra_scale_factor,
        num_ns_steps=config.muon_num_ns_steps,
        split_qkv=config.muon_split_qkv,
        split_fc1=config.muon_split_fc1,
        ns_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )


class Optimizer:
    """All optimizers of this rank's parameters behind one step."""

    def __init__(self, params: list[MainParam], config: Config, mesh: Mesh) -> None:
        """Routes parameters and allocates their state.

        Raises:
            ValueError: a parameter that no rule claims, or several do; two parameters of one name.
        """
        self._params = params
        self._rows: list[RoutingRow] = []
        claimed: dict[str, list[tuple[MainParam, Scaling]]] = {name: [] for name in RULES}
        for param in params:
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
        self._adamw = AdamW(claimed["adam"], AdamWSettings(betas=(flags.adam_beta1, flags.adam_beta2)))
        self._muon = Muon(claimed["muon"], muon_settings(flags, mesh.device), mesh)

    def routing_table(self) -> list[RoutingRow]:
        """One row for each parameter of this rank, in the order given."""
        return list(self._rows)

    def step(self, factor: float) -> None:
        """One step at ``factor`` times the peak learning rates; gradients stay as they are.

        Collective over the ranks that share Muon's matrices.

        Raises:
            RuntimeError: a parameter that has no gradient; nothing has been updated then.
        """
        gradients(self._params)
        self._muon.step(factor)
        self._adamw.step(factor)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for param in self._params:
            param.grad = None

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """State of every parameter by ``<kind>/<parameter>``: kinds ``exp_avg``, ``exp_avg_sq`` (AdamW), ``momentum``.

        The tensors are live shards in storage layout, allocated since construction: writing into them loads them. Keys
        are the same on all ranks that hold the same parameters, empty shards included.
        """
        return {**self._adamw.state_tensors(), **self._muon.state_tensors()}

    def state_scalars(self) -> dict[str, int]:
        """State that is one number for all parameters: ``step``, the steps taken."""
        return {"step": self._adamw.steps_done}

    def load_state_scalars(self, scalars: Mapping[str, int]) -> None:
        """Takes over what :meth:`state_scalars` gave."""
        self._adamw.steps_done = scalars["step"]

    def learning_rates(self, factor: float) -> dict[str, float]:
        """Learning rate of each class of this rank's parameters (see :func:`learning_rate_class`) for one step."""
        return {
            learning_rate_class(param.meta): row.lr * factor
            for param, row in zip(self._params, self._rows, strict=True)
        }
