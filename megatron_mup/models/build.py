"""From a configuration to this rank's part of the model: cut into stages, sharded, with memory, compiled."""

from __future__ import annotations

import torch

from megatron_mup.config import Config
from megatron_mup.config.pipeline import stage_layers
from megatron_mup.models.gpt import GPT, Stage
from megatron_mup.parallel.data_parallel import parameter_dtype, shard_over_data
from megatron_mup.parallel.mesh import Mesh


def build_model(config: Config, vocab_size: int, mesh: Mesh) -> GPT:
    """Makes this rank's pipeline stage. Its values are not set: `MainParams.initialise` or a checkpoint does that.

    Args:
        config: validated configuration.
        vocab_size: number of token ids.
        mesh: the run's mesh.
    """
    start, end = stage_layers(config)[mesh.rank("pp")]
    stage = Stage(start, end, mesh.is_first_stage, mesh.is_last_stage)
    with torch.device("meta"):
        model = GPT(config, vocab_size, stage, mesh.tp, parameter_dtype(config, mesh), mesh.ep)
    layers = list(model.decoder.layers.values())
    shard_over_data(model, layers, model.experts(), config, mesh)
    model.to_empty(device=mesh.device)
    for router in model.routers().values():
        router.reset()
    if config.training.torch_compile:
        for layer in layers:
            layer.compile()
        model.objective = torch.compile(model.head_and_loss)
    return model
