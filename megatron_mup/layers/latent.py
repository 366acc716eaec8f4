"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values come out of narrow latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.layers.attention import Attention
from megatron_mup.layers.info import TokenInfo
from megatron_mup.layers.linear import ColumnLinear
from megatron_mup.layers.rope import rotate
from megatron_mup.parallel.collectives import enter_tensor_parallel
from megatron_mup.parallel.mesh import TensorAxis
from megatron_mup.parametrization.meta import Block, ParamMeta, Role

if TYPE_CHECKING:
    from megatron_mup.layers.factory import LayerFactory


class DownProjection(nn.Module):
    """A linear layer into a latent, which every tensor rank holds whole and applies to the tokens that it has.

    Args:
        weight: ``[out, in]``.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[seq (/ tp), batch, in]`` to ``[seq (/ tp), batch, out]``."""
        return F.linear(x, self.weight)


class LatentAttention(Attention):
    """Attention out of latents. Heads of queries and keys have a plain part and a rotated one; the rotated part of a
    key is the same for all heads and comes from the stream itself.

    Args:
        linear_q_down_proj: ``hidden -> query latent``, or None where queries come from the stream.
        q_layernorm, kv_layernorm: norms over the latents, or None.
        linear_q: ``query latent (or hidden) -> heads x (plain + rotated)``.
        linear_kv_down_proj: ``hidden -> latent``.
        linear_k_pos_proj: ``hidden -> rotated``.
        linear_kv_up_proj: ``latent -> heads x (plain + value)``.
        linear_proj: ``heads x value -> hidden``.
        widths: of a head: plain part, rotated part, value.
        axis: tensor-parallel axis.
        sequence_parallel: whether the input is a sequence shard.
        core: the numbers of `Attention`.
    """

    def __init__(
        self,
        linear_q_down_proj: nn.Module | None,
        q_layernorm: nn.Module | None,
        linear_q: nn.Module,
        linear_kv_down_proj: nn.Module,
        linear_k_pos_proj: nn.Module,
        kv_layernorm: nn.Module | None,
        linear_kv_up_proj: nn.Module,
        linear_proj: nn.Module,
        *,
        widths: tuple[int, int, int],
        axis: TensorAxis,
        sequence_parallel: bool,
        **core: Any,
    ) -> None:
        super().__init__(**core)
        self.linear_q_down_proj, self.q_layernorm = linear_q_down_proj, q_layernorm
        if linear_q_down_proj is None:
            self.linear_q_proj = linear_q
        else:
            self.linear_q_up_proj = linear_q
        self.linear_kv_down_proj, self.kv_layernorm = linear_kv_down_proj, kv_layernorm
        self.linear_kv_up_proj, self.linear_k_pos_proj = linear_kv_up_proj, linear_k_pos_proj
        self.linear_proj = linear_proj
        self.plain, self.rotated, self.value = widths
        self.axis, self.sequence_parallel = axis, sequence_parallel

    def query_key_value(self, x: torch.Tensor, info: TokenInfo) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Attention.query_key_value`; a key/value head for each query head."""
        query = self._queries(x).unflatten(-1, (self.heads, -1))
        plain, turned = query.split([self.plain, self.rotated], -1)
        latent = _norm(self.kv_layernorm, self.linear_kv_down_proj(x))
        key, value = self.linear_kv_up_proj(latent).unflatten(-1, (self.heads, -1)).split([self.plain, self.value], -1)
        # Every rank's heads read it, as they read what a column-parallel layer is entered with.
        shared = enter_tensor_parallel(self.linear_k_pos_proj(x), self.axis, self.sequence_parallel)[:, :, None]
        if info.cos is not None and info.sin is not None:
            turned, shared = rotate(turned, info.cos, info.sin), rotate(shared, info.cos, info.sin)
        key = torch.cat([key, shared.expand(-1, -1, self.heads, -1)], -1)
        return torch.cat([plain, turned], -1), key, value

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        if self.linear_q_down_proj is None:
            return self.linear_q_proj(x)
        return self.linear_q_up_proj(_norm(self.q_layernorm, self.linear_q_down_proj(x)))


def _norm(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)


def latent_attention(factory: LayerFactory, name: str, layer: int) -> LatentAttention:
    """The attention branch of a layer under ``--multi-latent-attention``, with Megatron-LM's names of its parts.

    But for the rotated key, there a part of the key/value down projection: it grows in one dimension only, so its rules
    are others.
    """
    model, base, hidden = factory.config.model, factory.base, factory.config.model.hidden_size
    assert model.kv_lora_rank is not None
    assert base.kv_lora_rank is not None
    heads, plain, rotated, value = (
        model.num_attention_heads,
        model.qk_head_dim,
        model.qk_pos_emb_head_dim,
        model.value_dim,
    )

    def matrix(
        part: str, role: Role, rows: int, columns: int, base_rows: float, base_columns: float, *blocks: Block
    ) -> nn.Parameter:
        down = role is not Role.QKV
        return factory.parameter(
            ParamMeta(
                name=f"{name}.{part}.weight",
                role=role,
                shape=(rows, columns),
                fan_in=columns,
                fan_out=rows,
                base_fan_in=base_columns,
                base_fan_out=base_rows,
                blocks=blocks,
                layer=layer,
                branch="attention",
                tp_dim=None if down else 0,
                grad_sum_axes=("tp",) if down and factory.sequence_parallel else (),
            )
        )

    def up(part: str, columns: int, base_columns: float, *blocks: Block) -> ColumnLinear:
        """To the heads; ``blocks`` are those of one head."""
        rows, base_rows = heads * blocks[0].period, base.heads * blocks[0].period * base.head_shrink
        weight = matrix(part, Role.QKV, rows, columns, base_rows, base_columns, *blocks)
        return factory.column_linear(f"{name}.{part}.weight", weight, None)

    def norm(part: str, length: int, base_length: float) -> nn.Module | None:
        return factory.norm(f"{name}.{part}", layer, size=(length, base_length)) if model.qk_layernorm else None

    query = Block("query", 0, plain + rotated, plain + rotated)
    q_down = q_norm = None
    if model.q_lora_rank is None:
        q_up = up("linear_q_proj", hidden, base.hidden, query)
    else:
        rank, base_rank = model.q_lora_rank, base.q_lora_rank
        assert base_rank is not None
        q_down = DownProjection(matrix("linear_q_down_proj", Role.LATENT, rank, hidden, base_rank, base.hidden))
        q_norm = norm("q_layernorm", rank, base_rank)
        q_up = up("linear_q_up_proj", rank, base_rank, query)
    rank, base_rank, base_rotated = model.kv_lora_rank, base.kv_lora_rank, rotated * base.head_shrink
    kv_down = matrix("linear_kv_down_proj", Role.LATENT, rank, hidden, base_rank, base.hidden)
    k_pos = matrix("linear_k_pos_proj", Role.SHARED_KEY, rotated, hidden, base_rotated, base.hidden)
    kv_norm = norm("kv_layernorm", rank, base_rank)
    blocks = Block("key", 0, plain, plain + value), Block("value", plain, value, plain + value)
    kv_up = up("linear_kv_up_proj", rank, base_rank, *blocks)
    output = factory.row_linear(
        f"{name}.linear_proj", Role.ATTENTION_OUTPUT, heads * value, base.heads * value * base.head_shrink, layer
    )
    return LatentAttention(
        q_down,
        q_norm,
        q_up,
        DownProjection(kv_down),
        DownProjection(k_pos),
        kv_norm,
        kv_up,
        output,
        widths=(plain, rotated, value),
        axis=factory.axis,
        sequence_parallel=factory.sequence_parallel,
        **factory.attention_core(),
    )
