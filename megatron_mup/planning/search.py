"""Layouts of one run that fit, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from megatron_mup.config import Config, ConfigError
from megatron_mup.planning.estimate import Estimate, estimate
from megatron_mup.planning.hardware import Hardware
from megatron_mup.planning.inventory import Inventory

Sharding = Literal["no_shard", "optim_grads", "optim_grads_params"]
MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


def suggest(
    config: Config, inventory: Inventory, world_size: int, vocab_size: int, hardware: Hardware, number: int
) -> tuple[list[Estimate], int]:
    """Searches layouts at the configuration's model, optimizer, precision, global batch, context and expert ranks.

    Tensor ranks stay in a node. Of layouts that differ in nothing but the micro-batch and recomputation the fastest
    is shown, of equally fast ones that with the largest micro-batch, which is kinder to kernels than the model knows.

    Returns:
        The layouts, and how many were looked at.
    """
    best: dict[tuple[int, int, str, int], Estimate] = {}
    tried = 0
    for candidate in candidates(config, world_size, hardware.gpus_per_node):
        try:
            found = estimate(candidate, inventory, world_size, vocab_size, hardware, stages="some")
        except ConfigError:
            continue
        tried += 1
        parallel = candidate.parallel
        key = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.sharding,
            parallel.num_distributed_optimizer_instances,
        )
        if found.fits and (key not in best or found.speed.step <= best[key].speed.step):
            best[key] = found
    return sorted(best.values(), key=lambda found: (found.speed.step, found.reserved))[:number], tried


def candidates(config: Config, world_size: int, gpus_per_node: int) -> Iterator[Config]:
    """Configurations that differ in layout, micro-batch and recomputation; not all of them are valid."""
    batch, context = config.global_batch_size(world_size), config.parallel.context_parallel_size
    for tp in _powers_of_two(min(gpus_per_node, world_size)):
        if config.model.num_attention_heads % tp or config.model.query_groups % tp:
            continue
        for pp in range(1, min(config.model.num_layers, world_size // tp) + 1):
            data, rest = divmod(world_size, tp * pp * context)
            if rest or not data or batch % data:
                continue
            for sharding, instances in _shardings(data * context, max(1, gpus_per_node // tp)):
                for micro_batch in MICRO_BATCHES:
                    if batch // data % micro_batch or batch // data // micro_batch < pp:
                        continue
                    for recompute in RECOMPUTE:
                        yield _with(config, batch, tp, pp, sharding, instances, micro_batch, recompute)


def _powers_of_two(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _shardings(data: int, in_node: int) -> list[tuple[Sharding, int]]:
    """Strategies, each with its number of replicas; sharded over all ranks, or inside nodes and replicated."""
    if data == 1:
        return [("no_shard", 1)]
    found: list[tuple[Sharding, int]] = [("no_shard", 1), ("optim_grads", 1), ("optim_grads_params", 1)]
    if data > in_node > 1 and data % in_node == 0:
        found += [("optim_grads", data // in_node), ("optim_grads_params", data // in_node)]
    return found


def _with(
    config: Config,
    batch: int,
    tp: int,
    pp: int,
    sharding: Sharding,
    instances: int,
    micro_batch: int,
    recompute: Literal["none", "selective", "full"],
) -> Config:
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1 and config.training.seq_length % tp == 0,
        pipeline_model_parallel_size=pp,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        num_layers_per_virtual_pipeline_stage=None,
        pipeline_model_parallel_layout=None,
        data_parallel_sharding_strategy=sharding,
        use_torch_fsdp2=False,
        use_distributed_optimizer=False,
        num_distributed_optimizer_instances=instances,
    )
    training = replace(
        config.training,
        global_batch_size=batch,
        micro_batch_size=micro_batch,
        rampup_batch_size=None,
        recompute_granularity=recompute,
        recompute_activations=False,
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    return replace(config, parallel=parallel, training=training)
