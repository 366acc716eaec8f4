"""AdamW's state for the optimizer that takes over from it (``--optimizer-switch-carry-state``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_mup.optim.blocks import MatrixSettings
from megatron_mup.optim.main_params import MainParam

State = Mapping[str, tuple[MainParam, torch.Tensor]]


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
        # Of a tensor of experts the next optimizer may hold a part.
        first = param.layout.offsets[0] - holder.layout.offsets[0]
        value.copy_(source[first : first + len(value)])
        if kind == "momentum" and settings.momentum_style == "sum" and param.meta.role.is_orthonormalized:
            value.div_(1 - settings.momentum)
