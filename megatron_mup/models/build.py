"""From a configuration to this rank's part of the model: cut into stages, sharded, with memory, compiled."""

from __future__ import annotations

import torch
from torch._functorch import config as partitioner

from megatron_mup.config import Config
from megatron_mup.config.pipeline import stage_layers
from megatron_mup.config.schedules import stages_of_rank
from megatron_mup.layers.moe import MoE
from megatron_mup.models.chunks import Chunks, Model
from megatron_mup.models.gpt import GPT, Stage
from megatron_mup.parallel.data_parallel import Units, parameter_dtype, shard_over_data, use_copy_engines
from megatron_mup.parallel.mesh import Mesh


def build_model(config: Config, vocab_size: int, mesh: Mesh) -> Model:
    """Makes this rank's stages. Their values are not set: `MainParams.initialise` or a checkpoint does that.

    Args:
        config: validated configuration.
        vocab_size: number of token ids.
        mesh: the run's mesh.
    """
    numbers = stages_of_rank(config, mesh.rank("pp"))
    parts = [build_stage(config, vocab_size, mesh, number) for number in numbers]
    return parts[0] if len(parts) == 1 else Chunks(parts)


def build_stage(config: Config, vocab_size: int, mesh: Mesh, number: int) -> GPT:
    """Makes one stage of the pipeline, of which this rank holds a part: see `build_model`."""
    stages = stage_layers(config)
    stage = Stage(*stages[number], is_first=number == 0, is_last=number == len(stages) - 1)
    with torch.device("meta"):
        model = GPT(config, vocab_size, stage, mesh.tp, parameter_dtype(config, mesh), mesh.ep, mesh.cp)
    layers = list(model.decoder.layers.values())
    units = Units(layers, model.experts(), model.heads())
    shard_over_data(model, units, config, mesh)
    if config.parallel.distributed_engine == "native":  # DeepSpeed's gives memory by itself
        model.to_empty(device=mesh.device)
        use_copy_engines(model, units, config, mesh)
    for router in model.routers().values():
        router.reset()
    if config.training.torch_compile:
        partitioner.activation_memory_budget = config.training.activation_memory_budget
        for layer in layers:
            # Experts, and attention over context ranks, interrupt what is compiled.
            whole = not isinstance(layer.mlp, MoE) and mesh.cp.size == 1
            layer.keeps_products = whole and config.training.recompute == "selective"
            layer.compile()
        if config.training.cross_entropy_fusion_impl == "native":  # else each chunk is compiled
            model.objective = torch.compile(model.head_and_loss)
    return model
