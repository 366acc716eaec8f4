"""Which parts of a tensor are logical matrices: what is orthonormalized apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_mup.parallel.shared_memory import MakeBuffer
from megatron_mup.parametrization.meta import Block, ParamMeta, Role

Reach = Callable[[dist.ProcessGroup, torch.device], MakeBuffer | None]
"""What makes memory that the ranks of a group share; None where they aren't within reach. Collective."""


@dataclass(frozen=True, kw_only=True)
class MatrixSettings:
    """Settings that all matrices of an optimizer share; the fields follow the ``--muon-*`` flags."""

    momentum: float = 0.95
    momentum_style: str = "ema"
    nesterov: bool = True
    num_ns_steps: int = 5
    coefficients: str = "quintic"
    split_qkv: bool = True
    split_heads: bool = False
    split_fc1: bool = True
    ns_dtype: torch.dtype = torch.float32
    cuda_graph: bool = True
    measured_costs: bool = False
    reach: Reach | None = None


def logical_blocks(meta: ParamMeta, settings: MatrixSettings) -> tuple[Block, ...]:
    """The matrices that are orthonormalized apart; the whole tensor is one block where it isn't split.

    With ``split_heads`` each head of query, key and value is a matrix.

    Raises:
        ValueError: not a matrix, or blocks that don't cover each row once.
    """
    if len(meta.shape) != 2:
        raise ValueError(f"{meta.name} has shape {meta.shape}; only matrices can be orthonormalized")
    rows = meta.shape[0]
    unsplit = (meta.role is Role.QKV and not settings.split_qkv) or (
        meta.role is Role.MLP_IN and not settings.split_fc1
    )
    if meta.role is Role.EXPERT_IN and not settings.split_fc1:
        return (Block("whole", 0, meta.fan_out, meta.fan_out, apart=True),)
    if unsplit or not meta.blocks:
        return (Block("whole", 0, rows, rows),)
    blocks = tuple(sorted(meta.blocks, key=lambda block: block.start))
    period, end = blocks[0].period, 0
    for block in blocks:
        if block.start != end or block.period != period:
            break
        end += block.size
    if end != period or rows % period:
        raise ValueError(f"the blocks of {meta.name} don't cover each of its {rows} rows once: {blocks}")
    if meta.role is Role.QKV and settings.split_heads:
        return tuple(head for block in blocks for head in _heads(block))
    return blocks


def _heads(block: Block) -> list[Block]:
    """Each head of a period apart."""
    size = block.size // block.heads
    return [
        replace(block, name=f"{block.name}.{i}", start=block.start + i * size, size=size, apart=True, heads=1)
        for i in range(block.heads)
    ]


def block_shape(meta: ParamMeta, block: Block) -> tuple[int, int]:
    """``[out, in]`` of a block's logical matrices."""
    rows, columns = meta.shape
    return block.matrices(rows)[1], columns


def take_block(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """View of a block's rows, ``[rows / period, size, columns]``, in ``[rows, columns]``."""
    rows, columns = tensor.shape
    return tensor.view(rows // block.period, block.period, columns)[:, block.start : block.start + block.size]
