"""What FP8 cannot be combined with."""

from __future__ import annotations

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import multiples, told
from megatron_mup.config.schedules import schedule_of

MULTIPLE = 16
"""Sides of FP8 matrices: cuBLAS takes no others."""


def check_fp8(config: Config) -> None:
    """Models without unit scale, layers and sizes that FP8 doesn't fit.

    Raises:
        ConfigError: names the setting.
    """
    fp8, model = config.fp8, config.model
    if fp8.fp8_format is None:
        return
    if config.parametrization.parametrization not in ("umup", "munit"):
        raise ConfigError(
            told(config, "fp8_recipe", "parametrization"),
            "values without unit scale leave the range of FP8, and nothing brings them back",
            "use --parametrization umup or munit, or drop --fp8-format",
        )
    if config.parallel.distributed_engine != "native" or schedule_of(config).splits_backward:
        raise ConfigError(
            told(config, "fp8_format", "distributed_engine", "pipeline_schedule"),
            "an FP8 layer has one backward pass, and gradients that are scaled behind it",
            "use --distributed-engine native, and a schedule that takes backward whole, e.g. 1F1B",
        )
    if not fp8.layers(model.num_layers):
        raise ConfigError(
            told(config, "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "num_layers"),
            "no layer is left in FP8",
            "lower them, or drop --fp8-format",
        )
    parallel, training = config.parallel, config.training
    tp = parallel.tensor_model_parallel_size
    wide = f"--tensor-model-parallel-size {tp}"
    heads, groups = model.num_attention_heads, model.query_groups
    qkv = "num_attention_heads", "kv_channels"
    for names, shared, what, size in (
        (("hidden_size",), "", "the hidden size", model.hidden_size),
        (("ffn_hidden_size",), wide, "a rank's MLP width", model.ffn_size // tp),
        (qkv, wide, "a rank's heads x head width", heads // tp * model.head_dim),
        (qkv, wide, "a rank's queries, keys and values", (heads + 2 * groups) // tp * model.head_dim),
        (
            ("micro_batch_size", "seq_length"),
            f"--context-parallel-size {parallel.context_parallel_size}",
            "a rank's tokens in a micro-batch",
            training.micro_batch_size * training.seq_length // parallel.context_parallel_size,
        ),
    ):
        if size % MULTIPLE:
            raise ConfigError(
                ", ".join(filter(None, (told(config, "fp8_format", *names), shared))),
                f"{what}, {size}, is no multiple of {MULTIPLE}, as FP8 products need",
                f"choose sizes that make it {multiples(size, MULTIPLE)}, or drop --fp8-format",
            )
