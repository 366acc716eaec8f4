"""Parameters by Hugging Face's names, and fused tensors cut into their logical matrices and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_mup.config import ConfigError
from megatron_mup.parametrization.meta import Block, ParamMeta, Role

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
class ExpertNames:
    """What the files of an architecture call the parts of a layer with experts, behind ``model.layers.N.``.

    Attributes:
        router: its linear layer.
        fc1: gate and up of expert ``{}``; or one tensor ``[experts, gate and then up, in]``.
        fc2: down of expert ``{}``; or one tensor ``[experts, out, in]``.
    """

    router: str
    fc1: tuple[str, ...]
    fc2: str

    @property
    def stacked(self) -> bool:
        """Whether the experts of a layer are one tensor."""
        return "{}" not in self.fc2

    def of_module(self, name: str, experts: int) -> list[list[str]] | None:
        """The files' tensors that make up a parameter of transformers' own modules, which stack the experts.

        Args:
            name: the parameter.
            experts: number of experts.

        Returns:
            Names by expert, to be joined along the rows and then stacked; one name where it is a tensor of the files;
            None where it doesn't belong to router or experts.
        """
        match = _MODULE.fullmatch(name)
        if match is None:
            return None
        prefix, part = match[1], match[2]
        names = (self.router,) if part == "weight" else self.fc1 if part == "gate_up_proj" else (self.fc2,)
        times = 1 if self.stacked or part == "weight" else experts
        return [[f"{prefix}.{one.format(number)}.weight" for one in names] for number in range(times)]


_MODULE = re.compile(
    r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.(?:(?:gate|router)\.(?=weight)|experts\.)"
    r"(weight|gate_up_proj|down_proj)"
)


@dataclass(frozen=True)
class Entry:
    """A parameter of ours and what it is there.

    Attributes:
        meta: our parameter.
        names: Hugging Face's, one per block (of each expert), or one for all.
        blocks: logical matrices of the fused tensor; empty when it is one.
        view: shape there of a tensor that is whole in both, where it isn't ours.
    """

    meta: ParamMeta
    names: tuple[str, ...]
    blocks: tuple[Block, ...]
    view: tuple[int, ...] | None = None

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors there."""
        if not self.blocks:
            return [self.view or self.meta.shape]
        rows, columns = self.meta.shape[0], self.meta.shape[1:]
        counts = [block.matrices(rows) for block in self.blocks]
        return [(size, *columns) for _ in range(counts[0][0]) for _, size in counts]

    def block(self, part: int) -> str | None:
        """Name of the logical matrix that a part of `split` is; None for a whole tensor."""
        return self.blocks[part % len(self.blocks)].name if self.blocks else None

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Our tensor as theirs."""
        return [tensor.view(self.view)] if self.view else split(tensor, self.blocks)

    def fuse(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Their tensors as ours."""
        return parts[0].view(self.meta.shape) if self.view else fuse(parts, self.blocks)


def split(tensor: torch.Tensor, blocks: Sequence[Block]) -> list[torch.Tensor]:
    """The logical matrices of a fused tensor, expert after expert; the tensor itself where it is one matrix."""
    if not blocks:
        return [tensor]
    runs = tensor.reshape(-1, blocks[0].period, *tensor.shape[1:])
    if blocks[0].apart:
        return [run[b.start : b.start + b.size] for run in runs for b in blocks]
    return [runs[:, b.start : b.start + b.size].flatten(0, 1) for b in blocks]


def fuse(parts: Sequence[torch.Tensor], blocks: Sequence[Block]) -> torch.Tensor:
    """The inverse of `split`."""
    if not blocks:
        return parts[0]
    if blocks[0].apart:
        return torch.cat(list(parts))
    runs = [part.reshape(-1, block.size, *part.shape[1:]) for part, block in zip(parts, blocks, strict=True)]
    return torch.cat(runs, 1).flatten(0, 1)


def entries(metas: Mapping[str, ParamMeta], experts: ExpertNames | None = None) -> list[Entry]:
    """Every parameter of a whole model, in order.

    Args:
        metas: of the model.
        experts: the architecture's names of router and experts, if it has any.

    Raises:
        ConfigError: a parameter that the architecture doesn't have.
    """
    return [_entry(meta, metas, experts) for meta in metas.values()]


def _entry(meta: ParamMeta, metas: Mapping[str, ParamMeta], experts: ExpertNames | None) -> Entry:
    if meta.name in _OUTSIDE:
        return Entry(meta, (_OUTSIDE[meta.name],), ())
    if experts is not None and (meta.role is Role.ROUTER or meta.role.is_expert):
        return _routed(meta, experts)
    if meta.layer is not None:
        module, _, part = meta.name.removeprefix(f"decoder.layers.{meta.layer}.").rpartition(".")
        # A bias is cut as its weight.
        weight = metas.get(f"{meta.name.rpartition('.')[0]}.weight", meta)
        prefix = f"model.layers.{meta.layer}"
        if weight.blocks:
            return Entry(meta, tuple(f"{prefix}.{_BLOCKS[b.name]}.{part}" for b in weight.blocks), weight.blocks)
        if module in _INSIDE:
            return Entry(meta, (f"{prefix}.{_INSIDE[module]}.{part}",), ())
    raise ConfigError(meta.name, "has no counterpart in this architecture of Hugging Face's", "choose another one")


def _routed(meta: ParamMeta, experts: ExpertNames) -> Entry:
    """A router, or the matrices of a layer's experts."""
    prefix = f"model.layers.{meta.layer}"
    if meta.role is Role.ROUTER:
        return Entry(meta, (f"{prefix}.{experts.router}.weight",), ())
    assert meta.experts is not None
    names = experts.fc1 if meta.role is Role.EXPERT_IN else (experts.fc2,)
    if experts.stacked:
        rows, columns = meta.shape
        return Entry(meta, (f"{prefix}.{names[0]}.weight",), (), (meta.experts, rows // meta.experts, columns))
    every = tuple(f"{prefix}.{name.format(e)}.weight" for e in range(meta.experts) for name in names)
    return Entry(meta, every, meta.blocks)
