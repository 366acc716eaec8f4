"""From a checkpoint of any layout to a whole model in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_mup.checkpoint import Piece, find, load, read_manifest
from megatron_mup.checkpoint.state import MODEL
from megatron_mup.config import Config, ConfigError, ParallelConfig, from_dict
from megatron_mup.models.gpt import GPT, Stage
from megatron_mup.parallel.data_parallel import compute_dtype


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference.

    Attributes:
        model: whole and in evaluation mode, in the precision in which the run computed.
        config: the run's configuration, without its layout.
        path: the checkpoint's folder.
        iteration: optimizer steps done.
    """

    model: GPT
    config: Config
    path: Path
    iteration: int


def load_model(folder: str | Path, step: int | None = None, device: torch.device | str = "cpu") -> LoadedModel:
    """Builds the model of a checkpoint and fills it.

    Args:
        folder: what ``--save`` named.
        step: iteration to load; default: the latest.
        device: where the model lives.

    Raises:
        ConfigError: no checkpoint, or a damaged one.
    """
    path = find(folder, step)
    if path is None:
        raise ConfigError(f"--load {folder}", "holds no checkpoint", "give the folder that --save named")
    manifest = read_manifest(path)
    config = _alone(from_dict(manifest.config, str(path)))
    assert config.model.vocab_size is not None
    with torch.device("meta"):
        model = GPT(config, config.model.vocab_size, Stage(0, config.model.num_layers), dtype=compute_dtype(config))
    model = model.to_empty(device=device).eval().requires_grad_(False)
    pieces = [
        Piece(f"{MODEL}/{model.metas[name].tied_to or name}", param, tuple(param.shape), (0,) * param.dim())
        for name, param in model.named_parameters()
    ]
    load(path, pieces, config)
    return LoadedModel(model, config, path, manifest.iteration)


def _alone(config: Config) -> Config:
    """The same model on one rank, with nothing recomputed."""
    training = replace(config.training, recompute_granularity="none", recompute_activations=False)
    return replace(config, parallel=ParallelConfig(), training=training)
