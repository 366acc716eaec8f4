"""What FP8, and Transformer Engine's products, cannot be combined with."""

from __future__ import annotations

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import multiples, told
from megatron_mup.config.schedules import schedule_of

MULTIPLES = {"static": 16, "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Of which the sides of FP8 matrices are, by recipe: cuBLAS takes no others than 16's, and blocks are whole."""
TE = "--transformer-impl transformer_engine"


def check_fp8(config: Config) -> None:
    """Models, layouts, layers and sizes that FP8 or Transformer Engine don't fit.

    Raises:
        ConfigError: names the setting.
    """
    if config.training.transformer_impl == "transformer_engine":
        _check_transformer_engine(config)
    if config.fp8.fp8_param_gather:
        raise ConfigError(
            "--fp8-param-gather",
            "parameters are this package's, in the optimizer's precision or bf16, and FSDP2 gathers bf16",
            "drop it: FP8 weights are cast where they are gathered, once a step if they stay there",
        )
    if config.fp8.fp8_format is None:
        return
    _check_recipe(config)
    if config.parallel.distributed_engine != "native" or schedule_of(config).splits_backward:
        raise ConfigError(
            told(config, "fp8_format", "distributed_engine", "pipeline_schedule"),
            "an FP8 layer has one backward pass, and gradients that are scaled behind it",
            "use --distributed-engine native, and a schedule that takes backward whole, e.g. 1F1B",
        )
    if not config.fp8.layers(config.model.num_layers):
        raise ConfigError(
            told(config, "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "num_layers"),
            "no layer is left in FP8",
            "lower them, or drop --fp8-format",
        )
    _check_sizes(config)


def _check_transformer_engine(config: Config) -> None:
    training = config.training
    for name, wrong, why, fix in (
        ("bf16", not training.bf16, "its products have been tried in bf16 and FP8 alone", "add --bf16"),
        (
            "recompute_granularity",
            training.recompute == "selective",
            "selective recomputation keeps the products that PyTorch sees, and would compute these again",
            "recompute nothing or whole layers (--recompute-granularity full)",
        ),
        (
            "cuda_graph_impl",
            training.cuda_graph_impl != "none" and config.fp8.fp8_format and config.fp8.fp8_recipe == "mxfp8",
            "nobody has seen recipe mxfp8 train in a graph as it does without",
            "drop --cuda-graph-impl, use another --fp8-recipe",
        ),
        (
            "distributed_engine",
            config.parallel.distributed_engine != "native",
            "DeepSpeed's hooks and these layers have not been tried together",
            "use --distributed-engine native",
        ),
        (
            "pipeline_schedule",
            schedule_of(config).splits_backward,
            "a layer of Transformer Engine has one backward pass, which can't be taken in two halves",
            "use a schedule that takes backward whole, e.g. 1F1B",
        ),
    ):
        if wrong:
            raise ConfigError(f"{TE}, {told(config, name)}", why, f"{fix}, or --transformer-impl local")


def _check_recipe(config: Config) -> None:
    fp8, local = config.fp8, config.training.transformer_impl == "local"
    shown = told(config, "fp8_recipe", "transformer_impl")
    if fp8.fp8_recipe != "static":
        if local:
            raise ConfigError(shown, "this recipe is Transformer Engine's", f"add {TE}, or use --fp8-recipe static")
        if config.moe.num_experts is not None and not fp8.fp8_wgrad:
            raise ConfigError(
                told(config, "fp8_wgrad", "num_experts"),
                "all gradients of an expert are multiplied in FP8, or none",
                "drop --no-fp8-wgrad",
            )
        if fp8.fp8_fallback == "emulate":
            raise ConfigError(
                told(config, "fp8_recipe", "fp8_fallback"),
                "only static FP8 is emulated",
                "use --fp8-fallback stop or bf16",
            )
        return
    if not local:
        raise ConfigError(
            shown,
            "static FP8 is PyTorch's products with constant scales, not Transformer Engine's",
            "choose --fp8-recipe delayed, tensorwise, blockwise or mxfp8, or --transformer-impl local",
        )
    if config.parametrization.parametrization not in ("umup", "munit"):
        raise ConfigError(
            told(config, "fp8_recipe", "parametrization"),
            "values without unit scale leave the range of FP8, and nothing brings them back",
            f"use --parametrization umup or munit, or {TE} with another --fp8-recipe, or drop --fp8-format",
        )


def _check_sizes(config: Config) -> None:
    """Sides of a rank's matrices. Experts' rows are padded."""
    model, moe, parallel, training = config.model, config.moe, config.parallel, config.training
    multiple = MULTIPLES[config.fp8.fp8_recipe]
    tp = parallel.tensor_model_parallel_size
    wide = f"--tensor-model-parallel-size {tp}"
    heads, groups = model.num_attention_heads, model.query_groups
    qkv = "num_attention_heads", "kv_channels"
    for names, shared, what, size in (
        (("hidden_size",), "", "the hidden size", model.hidden_size),
        (("ffn_hidden_size",), wide, "a rank's MLP width", model.ffn_size // tp),
        (("moe_ffn_hidden_size",), "", "the width of an expert", config.expert_ffn_size if moe.num_experts else 0),
        (
            ("moe_shared_expert_intermediate_size",),
            wide,
            "a rank's width of shared experts",
            (moe.moe_shared_expert_intermediate_size or 0) // tp,
        ),
        (qkv, wide, "a rank's heads x head width", heads // tp * model.head_dim),
        (qkv, wide, "a rank's queries, keys and values", (heads + 2 * groups) // tp * model.head_dim),
        (
            ("micro_batch_size", "seq_length"),
            f"--context-parallel-size {parallel.context_parallel_size}",
            "a rank's tokens in a micro-batch",
            training.micro_batch_size * training.seq_length // parallel.context_parallel_size,
        ),
    ):
        if size % multiple:
            raise ConfigError(
                ", ".join(filter(None, (told(config, "fp8_format", "fp8_recipe", *names), shared))),
                f"{what}, {size}, is no multiple of {multiple}, as FP8 products need",
                f"choose sizes that make it {multiples(size, multiple)}, or drop --fp8-format",
            )
