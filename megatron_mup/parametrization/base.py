"""Sizes of the base model, at which the hyperparameters were tuned."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mup.config import Config


@dataclass(frozen=True)
class BaseSizes:
    """Widths of the base model; where the user gave none, in proportion to this model's.

    ``shrink`` is the base model's hidden size over this model's, ``head_shrink`` the same of the width of a head: of
    queries and keys, and of all parts of a head in latent attention. Latents are None where there are none.
    """

    hidden: float
    ffn: float
    expert_ffn: float
    shrink: float
    head_dim: float
    head_shrink: float
    heads: float
    query_groups: float
    q_lora_rank: float | None
    kv_lora_rank: float | None

    @classmethod
    def of(cls, config: Config) -> BaseSizes:
        """Base sizes of a run. Without a base hidden size every ratio is one."""
        model, base = config.model, config.parametrization
        hidden = base.mup_base_hidden_size or model.hidden_size
        shrink = hidden / model.hidden_size
        head_dim = base.mup_base_head_dim or model.head_dim
        heads = base.mup_base_num_attention_heads or (model.num_attention_heads * model.head_dim * shrink / head_dim)
        return cls(
            hidden=hidden,
            ffn=base.mup_base_ffn_hidden_size or model.ffn_size * shrink,
            expert_ffn=base.mup_base_moe_ffn_hidden_size or config.expert_ffn_size * shrink,
            shrink=shrink,
            head_dim=head_dim,
            head_shrink=head_dim / model.head_dim,
            heads=heads,
            query_groups=model.query_groups * heads / model.num_attention_heads,
            q_lora_rank=base.mup_base_q_lora_rank or _proportion(model.q_lora_rank, shrink),
            kv_lora_rank=base.mup_base_kv_lora_rank or _proportion(model.kv_lora_rank, shrink),
        )


def _proportion(size: int | None, shrink: float) -> float | None:
    return None if size is None else size * shrink
