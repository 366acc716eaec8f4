"""What DeepSpeed's engine cannot do (``--distributed-engine deepspeed``), or does otherwise than this package."""

from __future__ import annotations

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import told

NATIVE = "use --distributed-engine native"


def check_engine(config: Config) -> None:
    """Refuses what doesn't go with DeepSpeed.

    Raises:
        ConfigError: names the setting, why it can't be, and what can.
    """
    if config.parallel.distributed_engine == "native":
        return
    for name, wrong, why, fix in _obstacles(config):
        if wrong:
            raise ConfigError(f"{told(config, name)}, --distributed-engine deepspeed", why, f"{fix}, or {NATIVE}")


def _obstacles(config: Config) -> list[tuple[str, bool, str, str]]:
    """Setting, whether it stands in the way, why, and what to do."""
    parallel, training, optimizer = config.parallel, config.training, config.optimizer
    alone = "ZeRO is run over data-parallel ranks alone here"
    shards = "ZeRO says what is sharded over data-parallel ranks (--zero-stage)"
    flat = "ZeRO's optimizer sees flat vectors, where AdamW's rule is the one that stays the same"
    return [
        ("tensor_model_parallel_size", parallel.tensor_model_parallel_size > 1, alone, "use 1"),
        ("context_parallel_size", parallel.context_parallel_size > 1, alone, "use 1"),
        ("pipeline_model_parallel_size", parallel.pipeline_model_parallel_size > 1, alone, "use 1"),
        (
            "num_experts",
            config.moe.num_experts is not None,
            "experts and their routers' state are not handed to it",
            "drop it",
        ),
        ("use_torch_fsdp2", parallel.use_torch_fsdp2, shards, "drop it"),
        ("use_distributed_optimizer", parallel.use_distributed_optimizer, shards, "drop it"),
        ("data_parallel_sharding_strategy", parallel.sharding != "no_shard", shards, "leave it at no_shard"),
        ("optimizer", optimizer.optimizer != "adam", flat, "use --optimizer adam"),
        (
            "main_params_dtype",
            training.bf16 and training.main_params_dtype == "bf16",
            "it keeps fp32 weights",
            "use fp32",
        ),
        (
            "torch_compile",
            training.torch_compile,
            "its hooks and compiled layers have not been tried together",
            "drop it",
        ),
        (
            "parametrization",
            config.parametrization.parametrization == "umup",
            "u-muP scales gradients between backward and the step, which is inside DeepSpeed",
            "use another",
        ),
        (
            "non_persistent_ckpt_type",
            config.checkpoint.non_persistent_ckpt_type == "local",
            "a rank's own shards fit one way to cut alone, and each engine and stage has its own",
            "use global",
        ),
        (
            "check_weight_hash_across_dp_replicas_interval",
            config.guard.check_weight_hash_across_dp_replicas_interval is not None,
            "it shards its weights over all ranks, so there are no replicas",
            "drop it",
        ),
        (
            "diagnostics_interval",
            config.logging.diagnostics_interval is not None,
            "diagnostics read whole gradients and optimizer state",
            "drop it",
        ),
    ]
