"""Activation recomputation: what is kept from forward for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron_mup.config import TrainingConfig
from megatron_mup.layers.attention import OPERATIONS

KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    *OPERATIONS,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
}

LayerCall = Callable[[torch.Tensor], torch.Tensor]

_save = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def keeping_products(function: Callable[..., torch.Tensor], *inputs: object) -> torch.Tensor:
    """Calls a function; its backward finds every matrix product, attention and collective, and computes the rest again.

    Called by what is compiled, it is the compiler that follows. Calling what is compiled, it sees only what the
    compiler leaves to PyTorch: attention, but no product.
    """
    result: torch.Tensor = checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_CONTEXTS
    )
    return result


def _policy(_ctx: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS = partial(create_selective_checkpoint_contexts, _policy)


def run_layers(x: torch.Tensor, layers: Sequence[LayerCall], training: TrainingConfig) -> torch.Tensor:
    """Applies layers in turn, recomputing in backward the whole ones that the configuration says.

    Nothing here saves random state: dropout is a function of its counter.

    Args:
        x: hidden states.
        layers: functions of the hidden states alone.
        training: granularity, method and number of layers (Chen et al., arXiv 1604.06174). With ``selective``
            (Korthikanti et al., arXiv 2205.05198) layers see to it themselves, by `keeping_products`.
    """
    if training.recompute in ("none", "selective") or not torch.is_grad_enabled():
        for layer in layers:
            x = layer(x)
        return x
    if training.recompute_method == "block":
        for index, layer in enumerate(layers):
            x = _save(layer, x) if index < training.recompute_num_layers else layer(x)
        return x
    size = training.recompute_num_layers
    for start in range(0, len(layers), size):
        x = _save(partial(_chain, layers[start : start + size]), x)
    return x


def _chain(layers: Sequence[LayerCall], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x
