"""A model made from another one of ours: written as iteration 0, weights only, and compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_mup.checkpoint.convert import logits
from megatron_mup.checkpoint.convert.output import ConversionError, save_pieces, staged
from megatron_mup.checkpoint.manifest import Manifest
from megatron_mup.checkpoint.state import MODEL, LazyPiece
from megatron_mup.checkpoint.whole import SavedModel, open_model
from megatron_mup.config import Config, to_dict
from megatron_mup.parallel.mesh import AXES
from megatron_mup.parametrization.init import initial_values
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.report import table_rows
from megatron_mup.parametrization.table import scaling


def derive(
    saved: SavedModel,
    config: Config,
    metas: Mapping[str, ParamMeta],
    value: Callable[[ParamMeta], torch.Tensor],
    target: str | Path,
    extra: Mapping[str, Any],
) -> logits.Comparison:
    """Writes a model of the same function, tensor by tensor.

    Args:
        saved: the model that it comes from.
        config: of the new one.
        metas: its parameters, by name.
        value: the value of each.
        target: a new folder.
        extra: what the manifest shall remember.

    Raises:
        ConfigError: it can't be written.
        ConversionError: the result computes something else.
    """
    pieces = [
        LazyPiece(
            key=f"{MODEL}/{meta.name}",
            tensor=torch.empty(meta.shape, device="meta"),
            shape=meta.shape,
            offsets=(0,) * len(meta.shape),
            make=partial(value, meta),
        )
        for meta in metas.values()
    ]
    manifest = Manifest(
        iteration=0,
        consumed_samples=0,
        config=to_dict(config),
        parametrization=table_rows(list(metas.values()), config),
        layout=dict.fromkeys(AXES, 1),
        extra=extra,
    )
    with staged(target) as temporary:
        save_pieces(temporary, pieces, manifest)
        tokens = logits.random_tokens(saved.vocab_size)
        before, after = (logits.our_logits(one, tokens) for one in (saved, open_model(temporary)))
        comparison = logits.compare(after, before, logits.TOLERANCE[torch.float32])
        if not comparison.holds:
            raise ConversionError(comparison)
    return comparison


def initial(meta: ParamMeta, config: Config) -> torch.Tensor:
    """The value that a new run gives a parameter, from its seed."""
    std, seed = scaling(meta, config).init_std, config.training.seed
    first = (0,) * len(meta.shape)
    return initial_values(meta, std, seed, first, meta.shape, torch.device("cpu"), torch.float32)
