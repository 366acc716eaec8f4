"""AdamW's state for the optimizer that takes over from it (``--optimizer-switch-carry-state``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_mup.optim.blocks import MatrixSettings
from megatron_mup.optim.main_params import MainParam
from megatron_mup.parametrization.meta import Role

State = Mapping[str, tuple[MainParam, torch.Tensor]]


def _rows_of(part: MainParam, holder: MainParam) -> slice:
    """Where the rows of a state are in another one: of a tensor of experts the next optimizer may hold a part."""
    length, cpu = part.layout.local_shape[0], torch.device("cpu")
    first = (holder.layout.rows(cpu) == part.layout.rows(cpu)[0]).nonzero().item() if length else 0
    return slice(int(first), int(first) + length)


@torch.no_grad()
def carry_state(old: State, new: State, settings: MatrixSettings) -> None:
    """Writes AdamW's state into that of the next optimizer, shard by shard.

    A first moment is an average of gradients whose weights sum to one, as a momentum of style ``ema`` is, so it becomes
    that momentum; a momentum of style ``sum`` is larger by 1 / (1 - its decay). Moments of the same name stay what they
    are. What AdamW has no counterpart of begins at zero.

    Args:
        old: AdamW's, of all parameters, as `Optimizer.state_tensors` gives it.
        new: that of the next optimizer, in the same layout; written to.
        settings: those of its hidden matrices.
    """
    for key, (param, value) in new.items():
        kind = key.partition("/")[0]
        found = old.get(f"{'exp_avg' if kind == 'momentum' else kind}/{param.meta.name}")
        if found is None:
            continue
        holder, source = found
        value.copy_(source[_rows_of(param, holder)])
        is_matrix = param.meta.role.is_orthonormalized or param.meta.role is Role.ROUTER
        if kind == "momentum" and settings.momentum_style == "sum" and is_matrix:
            value.div_(1 - settings.momentum)
