"""From a checkpoint of any layout to a whole model in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mup.checkpoint import load
from megatron_mup.checkpoint.state import MODEL, whole_piece
from megatron_mup.checkpoint.whole import open_model
from megatron_mup.config import Config
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
    saved = open_model(folder, step)
    config = saved.config
    with torch.device("meta"):
        model = GPT(config, saved.vocab_size, Stage(0, config.model.num_layers), dtype=compute_dtype(config))
    model = model.to_empty(device=device).eval().requires_grad_(False)
    tensors = {model.metas[name].tied_to or name: param for name, param in model.named_parameters()}
    pieces = [whole_piece(f"{MODEL}/{name}", value) for name, value in {**tensors, **model.expert_biases()}.items()]
    load(saved.path, pieces, config)
    return LoadedModel(model, config, saved.path, saved.manifest.iteration)
