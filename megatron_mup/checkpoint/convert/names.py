"""Parameters by Hugging Face's names, and fused tensors cut into their logical matrices and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_mup.config import ConfigError
from megatron_mup.parametrization.meta import Block, ParamMeta

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_OUTSIDE = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": HEAD,
}
_INSIDE = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc2": "mlp.down_proj",
}
_BLOCKS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
}


@dataclass(frozen=True)
class Entry:
    """A parameter of ours and what it is there.

    Attributes:
        meta: our parameter.
        names: Hugging Face's, one per block, or one for all.
        blocks: logical matrices of the fused tensor; empty when it is one.
    """

    meta: ParamMeta
    names: tuple[str, ...]
    blocks: tuple[Block, ...]

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors there."""
        shape = self.meta.shape
        return [(shape[0] // b.period * b.size, *shape[1:]) for b in self.blocks] or [shape]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Our tensor as theirs."""
        return split(tensor, self.blocks)

    def fuse(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Their tensors as ours."""
        return fuse(parts, self.blocks)


def split(tensor: torch.Tensor, blocks: Sequence[Block]) -> list[torch.Tensor]:
    """The logical matrices of a fused tensor; the tensor itself where it is one matrix."""
    if not blocks:
        return [tensor]
    runs = tensor.reshape(-1, blocks[0].period, *tensor.shape[1:])
    return [runs[:, b.start : b.start + b.size].flatten(0, 1) for b in blocks]


def fuse(parts: Sequence[torch.Tensor], blocks: Sequence[Block]) -> torch.Tensor:
    """The inverse of `split`."""
    if not blocks:
        return parts[0]
    runs = [part.reshape(-1, block.size, *part.shape[1:]) for part, block in zip(parts, blocks, strict=True)]
    return torch.cat(runs, 1).flatten(0, 1)


def entries(metas: Mapping[str, ParamMeta]) -> list[Entry]:
    """Every parameter of a whole model, in order.

    Raises:
        ConfigError: a parameter that the dense architectures of Hugging Face don't have.
    """
    return [_entry(meta, metas) for meta in metas.values()]


def _entry(meta: ParamMeta, metas: Mapping[str, ParamMeta]) -> Entry:
    if meta.name in _OUTSIDE:
        return Entry(meta, (_OUTSIDE[meta.name],), ())
    if meta.layer is not None:
        module, _, part = meta.name.removeprefix(f"decoder.layers.{meta.layer}.").rpartition(".")
        # A bias is cut as its weight.
        weight = metas.get(f"{meta.name.rpartition('.')[0]}.weight", meta)
        prefix = f"model.layers.{meta.layer}"
        if weight.blocks:
            return Entry(meta, tuple(f"{prefix}.{_BLOCKS[b.name]}.{part}" for b in weight.blocks), weight.blocks)
        if module in _INSIDE:
            return Entry(meta, (f"{prefix}.{_INSIDE[module]}.{part}",), ())
    raise ConfigError(meta.name, "has no counterpart in Hugging Face's dense architectures", "convert a dense model")
