"""What every parameter knows about itself from birth."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """The part a parameter plays; rules, routing and initialisation read it."""

    EMBEDDING = "embedding"
    POSITION_EMBEDDING = "position_embedding"
    QKV = "qkv"
    LATENT = "latent"
    SHARED_KEY = "shared_key"
    ATTENTION_OUTPUT = "attention_output"
    MLP_IN = "mlp_in"
    MLP_OUT = "mlp_out"
    ROUTER = "router"
    EXPERT_IN = "expert_in"
    EXPERT_OUT = "expert_out"
    READOUT = "readout"
    NORM = "norm"
    QK_NORM = "qk_norm"
    BIAS = "bias"

    @property
    def is_hidden_matrix(self) -> bool:
        """Both dimensions grow with the model."""
        return self.is_expert or self in _HIDDEN

    @property
    def is_orthonormalized(self) -> bool:
        """A matrix that orthonormalizing optimizers train: a hidden one, or the key that all heads share."""
        return self.is_hidden_matrix or self is Role.SHARED_KEY

    @property
    def is_output_projection(self) -> bool:
        """Last matrix of a residual branch."""
        return self in (Role.ATTENTION_OUTPUT, Role.MLP_OUT, Role.EXPERT_OUT)

    @property
    def is_expert(self) -> bool:
        """A matrix that every expert has; those of one layer are stacked along the rows."""
        return self in (Role.EXPERT_IN, Role.EXPERT_OUT)


_HIDDEN = (Role.QKV, Role.LATENT, Role.ATTENTION_OUTPUT, Role.MLP_IN, Role.MLP_OUT)
"""`Role.LATENT`: from the stream into a latent, of which queries, or keys and values, are made. Its rotated part of the
key is as wide in every model (`Role.SHARED_KEY`)."""


@dataclass(frozen=True)
class Block:
    """Logical matrices among rows interleaved along dimension 0 of a fused tensor.

    A block owns the rows ``r`` with ``start <= r % period < start + size``. In order they are one matrix; with
    ``apart`` those of each period are a matrix of their own. ``heads`` of them lie in a period, of equal size; 1 where
    there are no heads.
    """

    name: str
    start: int
    size: int
    period: int
    apart: bool = False
    heads: int = 1

    def matrices(self, rows: int) -> tuple[int, int]:
        """How many matrices it has in a tensor of ``rows`` rows, and how many rows each of them."""
        periods = rows // self.period
        return (periods, self.size) if self.apart else (1, periods * self.size)


@dataclass(frozen=True, kw_only=True)
class ParamMeta:
    """Logical facts of one parameter, the same on every rank that holds a part of it.

    Shapes and fans are those of the global, unsharded matrix, never of a shard.

    Attributes:
        name: full name, with the global layer number; the key in checkpoints.
        role: part it plays.
        shape: global shape; matrices are ``[out, in]``.
        fan_in, fan_out: of the logical matrix. Biases and norms: 1 and their length; embedding: 1 (a one-hot input
            picks a row) and the hidden size.
        base_fan_in, base_fan_out: the same at base size.
        blocks: logical matrices of a fused tensor; empty when the tensor is one matrix.
        layer: number of the transformer layer, or None outside the stack.
        branch: residual branch it lies in, ``"attention"`` or ``"mlp"``, or None.
        tp_dim: dimension that tensor parallelism shards, or None when every tensor rank holds a copy. Of experts: the
            dimension of each expert's matrix that expert tensor ranks share, of its rows an equal run of each block.
        experts: number of experts whose matrices are stacked along the rows, of which expert-parallel ranks take equal
            shares; None for a parameter that expert parallelism doesn't touch. Fans are those of one expert's matrix.
            Their blocks are of one size.
        tied_to: name of the parameter of which this is another stage's copy; it counts, and is saved, only once.
        grad_sum_axes: axes over which the gradients of its copies still have to be summed: ``"tp"``, ``"embedding"``
            (first and last pipeline stage), ``"edp_replicate"`` (copies of the same experts).
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    base_fan_in: float
    base_fan_out: float
    blocks: tuple[Block, ...] = ()
    layer: int | None = None
    branch: str | None = None
    tp_dim: int | None = None
    experts: int | None = None
    tied_to: str | None = None
    grad_sum_axes: tuple[str, ...] = ()

    @property
    def cut_dim(self) -> int | None:
        """Dimension that model-parallel ranks cut: tensor ranks, or expert ranks for experts; None for copies."""
        return self.tp_dim if self.experts is None else 0

    @property
    def numel(self) -> int:
        """Number of logical elements."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def width_ratio(self) -> float:
        """Growth of the fan-in over the base model's: ``mw`` of the rule tables."""
        return self.fan_in / self.base_fan_in
