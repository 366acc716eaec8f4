"""What cannot work with experts: routers, capacities and how experts are shared out."""

from __future__ import annotations

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import choices, divisors, multiples, settings, told


def check_moe(config: Config, world_size: int) -> None:
    """Mixture of experts in a world of ranks whose other axes have been checked."""
    moe = config.moe
    if moe.num_experts is None:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if getattr(config.parallel, name) > 1:
                raise ConfigError(told(config, name), "there are no experts", "give --num-experts, or drop it")
        return
    if not any(moe.layers(config.model.num_layers)):
        raise ConfigError(
            told(config, "num_experts", "moe_layer_freq"), "no layer has experts", "give one layer a 1, or drop both"
        )
    _check_experts(config)
    _check_router(config, moe.num_experts)
    _check_groups(config, moe.num_experts)
    if moe.moe_pad_expert_input_to_capacity and moe.moe_expert_capacity_factor is None:
        raise ConfigError(
            told(config, "moe_pad_expert_input_to_capacity"),
            "experts have no capacity",
            "give --moe-expert-capacity-factor, or drop it",
        )
    _check_expert_tensor(config)
    _check_ranks(config, moe.num_experts, world_size)


def _check_experts(config: Config) -> None:
    """What an expert is made of."""
    if config.parametrization.parametrization == "everett":
        raise ConfigError(
            told(config, "num_experts", "parametrization"),
            "it has no rules for routers and experts",
            "use standard, mup, completep, depth-mup or spectral",
        )
    if config.optimizer.optimizer == "dion" and config.optimizer.dion_compressed_sync:
        raise ConfigError(
            told(config, "num_experts", "dion_compressed_sync"),
            "replicas of experts sum their gradients",
            "drop --dion-compressed-sync",
        )
    model, moe, tp = config.model, config.moe, config.parallel.tensor_model_parallel_size
    if model.linear_bias:
        raise ConfigError(
            f"{told(config, 'num_experts')}, biases in linear layers",
            "experts have none: their rows are one grouped product",
            "add --disable-bias-linear (and --add-qkv-bias where queries, keys and values shall keep theirs)",
        )
    for name, size in (("moe_ffn_hidden_size", config.expert_ffn_size), ("hidden_size", model.hidden_size)):
        if config.training.bf16 and size % 8:
            raise ConfigError(
                f"{settings()[name].shown(size)}, --bf16",
                "the grouped product of experts takes widths that are multiples of 8",
                f"use {settings()[name].flag} {multiples(size, 8)}",
            )
    shared, unit = moe.moe_shared_expert_intermediate_size, 8 * tp if model.swiglu else tp
    if shared is not None and shared % unit:
        raise ConfigError(
            told(config, "moe_shared_expert_intermediate_size", "tensor_model_parallel_size"),
            f"the width of shared experts must be a multiple of {unit}"
            + (" (8 x tensor-parallel size) with --swiglu" if model.swiglu else ""),
            f"use --moe-shared-expert-intermediate-size {multiples(shared, unit)}",
        )


def _check_router(config: Config, experts: int) -> None:
    moe = config.moe
    if moe.moe_router_topk > experts:
        raise ConfigError(
            told(config, "moe_router_topk", "num_experts"),
            "a token can't go to more experts than there are",
            f"use --moe-router-topk {experts} or less",
        )
    softmax = moe.moe_router_score_function == "softmax"
    if moe.moe_router_topk == 1 and softmax and not moe.moe_router_pre_softmax:
        raise ConfigError(
            told(config, "moe_router_topk"),
            "the softmax over one chosen expert is always 1, so the router would learn nothing",
            "add --moe-router-pre-softmax, or use --moe-router-score-function sigmoid",
        )
    if moe.moe_router_enable_expert_bias and softmax:
        raise ConfigError(
            told(config, "moe_router_enable_expert_bias", "moe_router_score_function"),
            "the bias is made for scores that don't depend on one another",
            "use --moe-router-score-function sigmoid",
        )


def _check_groups(config: Config, experts: int) -> None:
    moe = config.moe
    groups, chosen, topk = moe.moe_router_num_groups, moe.moe_router_group_topk, moe.moe_router_topk
    if groups is None and chosen is None:
        return
    if groups is None or chosen is None:
        given = "moe_router_num_groups" if chosen is None else "moe_router_group_topk"
        raise ConfigError(
            told(config, given),
            "groups need their number and how many a token chooses from",
            "give both --moe-router-num-groups and --moe-router-group-topk, or neither",
        )
    if experts % groups:
        raise ConfigError(
            told(config, "moe_router_num_groups", "num_experts"),
            f"{experts} experts don't divide by {groups} groups",
            f"use --moe-router-num-groups {choices(divisors(experts))}",
        )
    if chosen > groups:
        raise ConfigError(
            told(config, "moe_router_group_topk", "moe_router_num_groups"),
            "a token can't choose from more groups than there are",
            f"use --moe-router-group-topk {groups} or less",
        )
    if topk % chosen or topk // chosen > experts // groups:
        fitting = [n for n in divisors(topk) if n <= groups and topk // n <= experts // groups]
        raise ConfigError(
            told(config, "moe_router_topk", "moe_router_group_topk"),
            f"groups are ranked by their best {topk} / {chosen} scores, which must be a whole number of at most "
            f"{experts // groups}, the experts of a group",
            f"use --moe-router-group-topk {choices(fitting)}" if fitting else "use a smaller --moe-router-topk",
        )


def _check_expert_tensor(config: Config) -> None:
    """Ranks that share the matrices of each expert."""
    width, ranks = config.expert_ffn_size, config.parallel.expert_tensor_parallel_size
    if ranks == 1:
        return
    unit = 8 * ranks if config.training.bf16 else ranks
    if width % unit:
        raise ConfigError(
            f"{settings()['moe_ffn_hidden_size'].shown(width)}, {told(config, 'expert_tensor_parallel_size')}",
            f"ranks share an expert's width evenly, so it must be a multiple of {unit}"
            + (" (8 x expert tensor-parallel size) with --bf16" if config.training.bf16 else ""),
            f"use --moe-ffn-hidden-size {multiples(width, unit)}, or fewer ranks",
        )
    if config.training.transformer_impl == "transformer_engine" and config.fp8.fp8_format is not None:
        raise ConfigError(
            told(config, "expert_tensor_parallel_size", "fp8_format", "transformer_impl"),
            "Transformer Engine's FP8 products of experts are not made for parts of them",
            "use --expert-tensor-parallel-size 1, or --transformer-impl local",
        )


def _check_ranks(config: Config, experts: int, world_size: int) -> None:
    parallel = config.parallel
    tp, ep, etp = (
        parallel.tensor_model_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )
    if tp > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            told(config, "num_experts", "tensor_model_parallel_size"),
            "without --sequence-parallel every tensor-parallel rank would route all tokens, and compute the same",
            "add --sequence-parallel",
        )
    if experts % ep:
        raise ConfigError(
            told(config, "num_experts", "expert_model_parallel_size"),
            f"{experts} experts don't divide by {ep} ranks",
            f"use --expert-model-parallel-size {choices(divisors(experts))}",
        )
    stage = tp * config.sharding_size(world_size)
    if stage % etp:
        raise ConfigError(
            told(config, "expert_tensor_parallel_size"),
            f"a pipeline stage has {stage} ranks (tensor x context x data), no multiple of it",
            f"use --expert-tensor-parallel-size {choices(divisors(stage))}",
        )
    cuts = ["expert_model_parallel_size"] + ["expert_tensor_parallel_size"] * (etp > 1)
    if stage // etp % ep:
        raise ConfigError(
            told(config, *cuts),
            f"a pipeline stage has {stage} ranks (tensor x context x data), no multiple of "
            + ("it" if etp == 1 else "their product"),
            f"use --expert-model-parallel-size {choices([d for d in divisors(stage // etp) if experts % d == 0])}",
        )
    instances, copies = parallel.num_distributed_optimizer_instances, stage // (ep * etp)
    if copies % instances:
        fitting = [d for d in divisors(stage // etp) if experts % d == 0 and stage // (d * etp) % instances == 0]
        raise ConfigError(
            told(config, "num_distributed_optimizer_instances", *cuts),
            f"each expert is held by {copies} ranks (or their shards), which don't divide by {instances} instances",
            f"use --expert-model-parallel-size {choices(fitting)}" if fitting else "use fewer instances",
        )
