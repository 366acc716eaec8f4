"""The range of every number among the settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import Setting, settings, value_of

_SIZE = 2**31 - 1
_COUNT = 2**63 - 1


@dataclass(frozen=True)
class Bound:
    """An interval; ``above`` and ``below`` exclude their end."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a finite value lies inside."""
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under

    def __str__(self) -> str:
        """In words."""
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.above else 'at least'} {self.low:g}")
        if self.high < math.inf:
            high = f"{self.high:g}" if self.high < 1e6 else str(self.high)
            parts.append(f"{'below' if self.below else 'at most'} {high}")
        return " and ".join(parts) or "finite"


_POSITIVE = Bound(0, above=True)
_NOT_NEGATIVE = Bound(0)
_FROM_ONE = Bound(1, _SIZE)
_FROM_ZERO = Bound(0, _SIZE)
_SAMPLES = Bound(1, _COUNT)
_SHARE = Bound(0, 1, below=True)
_ANY = Bound()

BOUNDS: dict[str, Bound] = {
    "num_layers": _FROM_ONE,
    "hidden_size": _FROM_ONE,
    "ffn_hidden_size": _FROM_ONE,
    "num_attention_heads": _FROM_ONE,
    "num_query_groups": _FROM_ONE,
    "kv_channels": _FROM_ONE,
    "q_lora_rank": _FROM_ONE,
    "kv_lora_rank": _FROM_ONE,
    "qk_head_dim": _FROM_ONE,
    "qk_pos_emb_head_dim": _FROM_ONE,
    "v_head_dim": _FROM_ONE,
    "max_position_embeddings": _FROM_ONE,
    "rotary_base": _POSITIVE,
    "rotary_percent": Bound(0, 1, above=True),
    "rope_scaling_factor": Bound(1),
    "window_size": _FROM_ONE,
    "norm_epsilon": _NOT_NEGATIVE,
    "vocab_size": _FROM_ONE,
    "make_vocab_size_divisible_by": _FROM_ONE,
    "attention_dropout": _SHARE,
    "hidden_dropout": _SHARE,
    "init_method_std": _NOT_NEGATIVE,
    "embedding_init_method_std": _NOT_NEGATIVE,
    "output_layer_init_method_std": _NOT_NEGATIVE,
    "softmax_scale": _POSITIVE,
    "num_experts": Bound(2, _SIZE),
    "moe_ffn_hidden_size": _FROM_ONE,
    "moe_shared_expert_intermediate_size": _FROM_ONE,
    "moe_router_topk": _FROM_ONE,
    "moe_router_topk_scaling_factor": _POSITIVE,
    "moe_router_num_groups": _FROM_ONE,
    "moe_router_group_topk": _FROM_ONE,
    "moe_router_bias_update_rate": _NOT_NEGATIVE,
    "moe_aux_loss_coeff": _NOT_NEGATIVE,
    "moe_z_loss_coeff": _NOT_NEGATIVE,
    "moe_input_jitter_eps": Bound(0, 1, above=True),
    "moe_expert_capacity_factor": _POSITIVE,
    "mup_base_hidden_size": _FROM_ONE,
    "mup_base_ffn_hidden_size": _FROM_ONE,
    "mup_base_moe_ffn_hidden_size": _FROM_ONE,
    "mup_base_num_attention_heads": _FROM_ONE,
    "mup_base_head_dim": _FROM_ONE,
    "mup_base_q_lora_rank": _FROM_ONE,
    "mup_base_kv_lora_rank": _FROM_ONE,
    "base_num_layers": _FROM_ONE,
    "depth_alpha": Bound(0.5, 1),
    "mup_embedding_mult": _POSITIVE,
    "mup_output_mult": _POSITIVE,
    "mup_attention_mult": _POSITIVE,
    "mup_residual_mult": _POSITIVE,
    "mup_residual_attention_ratio": _POSITIVE,
    "mup_ffn_act_mult": _POSITIVE,
    "residual_tau": Bound(0, 1, above=True, below=True),
    "mup_attention_residual_scale": _POSITIVE,
    "mup_ffn_residual_scale": _POSITIVE,
    "base_batch_tokens": _SAMPLES,
    "base_train_tokens": _SAMPLES,
    "lr": _POSITIVE,
    "muon_lr": _POSITIVE,
    "decoupled_lr": _POSITIVE,
    "min_lr": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "clip_grad": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_eps": _NOT_NEGATIVE,
    "lion_beta1": _SHARE,
    "lion_beta2": _SHARE,
    "ademamix_beta3": Bound(0, 1, above=True, below=True),
    "ademamix_alpha": _NOT_NEGATIVE,
    "ademamix_warmup_iters": _FROM_ZERO,
    "optimizer_switch_at": _FROM_ONE,
    "muon_momentum": _SHARE,
    "muon_extra_scale_factor": _POSITIVE,
    "muon_num_ns_steps": _FROM_ONE,
    "muon_coefficient_safety": Bound(1, 1.5),
    "muon_coefficient_lower": Bound(1e-8, 1),
    "normuon_beta2": _SHARE,
    "dion_rank_fraction": Bound(0, 1, above=True),
    "sphere_radius": _POSITIVE,
    "sphere_solver_steps": _FROM_ONE,
    "scion_radius": _POSITIVE,
    "scion_output_radius": _POSITIVE,
    "scion_embedding_radius": _POSITIVE,
    "lr_decay_iters": _FROM_ONE,
    "lr_decay_samples": _SAMPLES,
    "lr_warmup_iters": _FROM_ZERO,
    "lr_warmup_samples": Bound(0, _COUNT),
    "lr_warmup_fraction": Bound(0, 1),
    "lr_warmup_init": _NOT_NEGATIVE,
    "lr_wsd_decay_iters": _FROM_ONE,
    "lr_wsd_decay_samples": _SAMPLES,
    "lr_power_exponent": Bound(high=0),
    "lr_power_scale": _POSITIVE,
    "tensor_model_parallel_size": _FROM_ONE,
    "context_parallel_size": _FROM_ONE,
    "expert_model_parallel_size": _FROM_ONE,
    "expert_tensor_parallel_size": _FROM_ONE,
    "pipeline_model_parallel_size": _FROM_ONE,
    "decoder_first_pipeline_num_layers": _FROM_ZERO,
    "decoder_last_pipeline_num_layers": _FROM_ZERO,
    "num_virtual_stages_per_pipeline_rank": _FROM_ONE,
    "num_layers_per_virtual_pipeline_stage": _FROM_ONE,
    "num_distributed_optimizer_instances": _FROM_ONE,
    "zero_stage": Bound(1, 3),
    "distributed_timeout_minutes": _POSITIVE,
    "distributed_timeout_seconds_after_init": _FROM_ONE,
    "micro_batch_size": _FROM_ONE,
    "global_batch_size": _FROM_ONE,
    "rampup_batch_size": _SAMPLES,
    "seq_length": _FROM_ONE,
    "train_iters": _FROM_ONE,
    "train_samples": _SAMPLES,
    "exit_interval": _FROM_ONE,
    "exit_duration_in_mins": _POSITIVE,
    # NumPy's RandomState, which orders the data, takes 32 bits.
    "seed": Bound(0, 2**32 - 1),
    "recompute_num_layers": _FROM_ONE,
    "cross_entropy_z_loss": _NOT_NEGATIVE,
    "loss_chunk_size": _FROM_ONE,
    "fp8_margin": Bound(0, 8),
    "fp8_amax_history_len": Bound(1, 65536),
    "num_layers_at_start_in_bf16": _FROM_ZERO,
    "num_layers_at_end_in_bf16": _FROM_ZERO,
    "activation_memory_budget": Bound(0, 1),
    "manual_gc_interval": _FROM_ONE,
    "eval_interval": _FROM_ONE,
    "eval_iters": _FROM_ZERO,
    "eod_token_id": _FROM_ZERO,
    "num_workers": _FROM_ZERO,
    "save_interval": _FROM_ONE,
    "keep_last": _FROM_ONE,
    "save_retain_interval": _FROM_ONE,
    "non_persistent_save_interval": _FROM_ONE,
    "ckpt_step": _FROM_ZERO,
    "log_interval": _FROM_ONE,
    "profile_step_start": _FROM_ONE,
    "profile_step_end": _FROM_ONE,
    "profile_ranks": _FROM_ZERO,
    "diagnostics_interval": _FROM_ONE,
    "prometheus_port": Bound(1, 65535),
    "max_skipped_steps": _FROM_ZERO,
    "spike_sigma": _POSITIVE,
    "spike_window": Bound(2, 1 << 16),
    "max_rollbacks": _FROM_ZERO,
    "watchdog_minutes": _NOT_NEGATIVE,
    "check_weight_hash_across_dp_replicas_interval": _FROM_ONE,
}
"""By name. Every whole number and number stands here."""


def check_bounds(config: Config) -> None:
    """Refuses numbers outside their range, and values of another type than the setting's.

    Raises:
        ConfigError: names the setting and the range.
    """
    for setting in settings().values():
        value = setting.checked(value_of(config, setting.name), "configuration")
        if value is None or setting.item not in (int, float) or setting.kind not in ("int", "float", "tuple"):
            continue
        for number in value if isinstance(value, tuple) else (value,):
            _check(setting, value, number)


def _check(setting: Setting, value: object, number: float) -> None:
    bound = BOUNDS[setting.name]
    try:
        finite = math.isfinite(number)
    except OverflowError:
        finite = False
    if not finite or not bound.holds(number):
        instead = setting.example if setting.default is not None else f"{setting.flag} {_inside(setting, bound)}"
        raise ConfigError(setting.shown(value), f"must be {bound}", f"choose a value in that range, e.g. {instead}")


def _inside(setting: Setting, bound: Bound) -> str:
    """A value in the range."""
    one = 1 if setting.item is int or bound.holds(1) else 0.5
    return " ".join([str(one)] * (setting.count or 1))
