"""Muon: momentum, orthonormalized per logical matrix, on weights sharded in any way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_mup.optim.clip import gradients
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.parametrization.meta import Block, ParamMeta, Role
from megatron_mup.parametrization.table import Scaling

BATCH_NUMEL = 1 << 25
"""Elements of equal-shape matrices that are orthonormalized at once; a larger matrix goes alone. Bounds the memory of
a step to a small multiple of 2^25 elements (128 MiB in fp32), or of the largest matrix."""


@dataclass(frozen=True, kw_only=True)
class MuonSettings:
    """Settings that all of Muon's matrices share; the fields follow the ``--muon-*`` flags."""

    momentum: float = 0.95
    nesterov: bool = True
    scale_mode: str = "unit_rms_norm"
    extra_scale_factor: float = 1.0
    num_ns_steps: int = 5
    coefficients: str = "quintic"
    split_qkv: bool = True
    split_fc1: bool = True
    ns_dtype: torch.dtype = torch.float32


def update_scale(mode: str, rows: int, columns: int) -> float:
    """Factor on the orthonormal update of a logical ``[rows, columns]`` = [out, in] matrix (``--muon-scale-mode``).

    Sources: unit_rms_norm, spectral and shape_scaling as in Megatron-LM (shape_scaling is Keller Jordan's);
    match_rms_adamw is Moonlight's, arXiv 2502.16982.
    """
    match mode:
        case "unit_rms_norm":
            return math.sqrt(rows / columns)
        case "spectral":
            return math.sqrt(max(rows, columns))
        case "shape_scaling":
            return math.sqrt(max(1.0, rows / columns))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
    raise ValueError(f"no Muon scale mode {mode!r}")


def logical_blocks(meta: ParamMeta, settings: MuonSettings) -> tuple[Block, ...]:
    """The matrices that are orthonormalized apart; the whole tensor is one block where it isn't split.

    Raises:
        ValueError: not a matrix, or blocks that don't cover each row once.
    """
    if len(meta.shape) != 2:
        raise ValueError(f"Muon takes matrices, and {meta.name} has shape {meta.shape}")
    rows = meta.shape[0]
    unsplit = (meta.role is Role.QKV and not settings.split_qkv) or (
        meta.role is Role.MLP_IN and not settings.split_fc1
    )
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
    return blocks


def take_block(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """View of a block's rows, ``[batch, rows / period, size, columns]``, in ``[batch, rows, columns]``."""
    batch, rows, columns = tensor.shape
    view = tensor.view(batch, rows // block.period, block.period, columns)
    return view[:, :, block.start : block.start + block.size]


@dataclass
class _Batch:
    """Parameters of equal shape, blocks and settings, orthonormalized together."""

    params: list[MainParam]
    momenta: list[torch.Tensor]
    blocks: tuple[Block, ...]
    lr: float
    weight_decay: float


class Muon:
    """Muon with exponential-average momentum (Keller Jordan's and PyTorch's form) and decoupled weight decay.

    With gradient G, momentum M, rate lr and decay wd, per step::

        M <- beta M + (1 - beta) G;   U = beta M + (1 - beta) G (Nesterov) or M
        W <- W - lr wd W - lr s O(U)

    O orthonormalizes each logical block and s is its shape's factor, both from the global matrix, so that no layout
    changes the update beyond rounding: the momentum lives on the shard, the update is gathered whole on every rank
    that shares it (in the precision of Newton-Schulz), orthonormalized there, and each keeps its own part.
    """

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: MuonSettings) -> None:
        """Momentum for every parameter, and the order of work: sorted by name, so the same on all ranks of a matrix."""
        self._settings = settings
        ordered = sorted(params, key=lambda item: item[0].meta.name)
        self._momentum = {param.meta.name: (param, torch.zeros_like(param.value)) for param, _ in ordered}
        self._batches = list(self._plan(ordered))

    def _plan(self, params: list[tuple[MainParam, Scaling]]) -> Iterable[_Batch]:
        """Batches of at most ``BATCH_NUMEL`` elements; the same on every rank that holds the same parameters."""
        alike: dict[tuple[object, ...], list[tuple[MainParam, Scaling]]] = {}
        for param, scaling in params:
            meta = param.meta
            blocks = logical_blocks(meta, self._settings)
            key = (meta.shape, blocks, scaling.lr, scaling.weight_decay)
            alike.setdefault(key, []).append((param, scaling))
        for members in alike.values():
            first, scaling = members[0]
            at_once = max(1, BATCH_NUMEL // first.meta.numel)
            for start in range(0, len(members), at_once):
                chosen = [param for param, _ in members[start : start + at_once]]
                yield _Batch(
                    params=chosen,
                    momenta=[self._momentum[param.meta.name][1] for param in chosen],
                    blocks=logical_blocks(first.meta, self._settings),
                    lr=scaling.lr,
                    weight_decay=scaling.weight_decay,
                )

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at ``factor`` times the peak learning rates. Collective over the ranks that share a matrix."""
        for batch in self._batches:
            lr = batch.lr * factor
            full = self._orthonormal(self._updates(batch), batch.blocks, -lr)
            deltas = [param.layout.shard(full[i]) for i, param in enumerate(batch.params)]
            values = [param.value for param in batch.params]
            if batch.weight_decay:
                torch._foreach_add_(deltas, values, alpha=-lr * batch.weight_decay)
            torch._foreach_add_(values, deltas)

    def _updates(self, batch: _Batch) -> torch.Tensor:
        """Advances the momenta and gathers the updates, ``[batch, out, in]`` in Newton-Schulz's precision."""
        beta = self._settings.momentum
        grads = [grad.to(momentum.dtype) for grad, momentum in zip(gradients(batch.params), batch.momenta, strict=True)]
        torch._foreach_lerp_(batch.momenta, grads, 1 - beta)
        updates = torch._foreach_lerp(grads, batch.momenta, beta) if self._settings.nesterov else batch.momenta
        return torch.stack(
            [
                param.layout.gather(update.to(self._settings.ns_dtype))
                for param, update in zip(batch.params, updates, strict=True)
            ]
        )

    def _orthonormal(self, whole: torch.Tensor, blocks: tuple[Block, ...], rate: float) -> torch.Tensor:
        """``rate`` x scale x orthonormal factor of each block: ``[batch, out, in]`` in fp32.

        Blocks of one shape (key and value) go through Newton-Schulz together.
        """
        settings = self._settings
        batch, rows, columns = whole.shape
        out = torch.empty_like(whole, dtype=torch.float32)
        sizes: dict[int, list[Block]] = {}
        for block in blocks:
            sizes.setdefault(rows // block.period * block.size, []).append(block)
        for height, equal in sizes.items():
            parts = [take_block(whole, block).reshape(batch, height, columns) for block in equal]
            matrices = parts[0] if len(parts) == 1 else torch.cat(parts)
            ortho = orthonormalize(matrices, settings.num_ns_steps, settings.coefficients, settings.ns_dtype)
            scale = rate * settings.extra_scale_factor * update_scale(settings.scale_mode, height, columns)
            scale_fp32 = out.new_full((1, 1, 1, 1), scale)  # a tensor, so that a bf16 product is not rounded to bf16
            for block, part in zip(equal, ortho.split(batch), strict=True):
                target = take_block(out, block)
                torch.mul(part.view(target.shape), scale_fp32, out=target)
        return out

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """Momentum, as ``momentum/<name>``: live tensors in storage layout."""
        return {f"momentum/{name}": item for name, item in self._momentum.items()}
