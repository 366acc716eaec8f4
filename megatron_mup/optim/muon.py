"""Muon: momentum, orthonormalized per logical matrix, on weights sharded in any way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_mup.optim.clip import gradients
from megatron_mup.optim.exchange import Exchange
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.optim.planner import Assignment, make_plan, newton_schulz_cost
from megatron_mup.parallel.mesh import Mesh
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


class Muon:
    """Muon with exponential-average momentum (Keller Jordan's and PyTorch's form) and decoupled weight decay.

    With gradient G, momentum M, rate lr and decay wd, per step::

        M <- beta M + (1 - beta) G;   U = beta M + (1 - beta) G (Nesterov) or M
        W <- W - lr wd W - lr s O(U)

    O orthonormalizes each logical block and s is its shape's factor, both from the global matrix, so that no layout
    changes the update beyond rounding. Each matrix has a home rank (`optim.planner`) that orthonormalizes it whole;
    shards of U travel there and of O back, in Newton-Schulz's precision (`optim.exchange`). Momentum lives on the
    shard, and in one replica only: the one that the home is in.

    Args:
        params: this rank's shards and their numbers.
        settings: what all matrices share.
        mesh: the run's mesh; None for a rank alone. Collective over its stage's ranks.
    """

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: MuonSettings, mesh: Mesh | None) -> None:
        self._settings = settings
        self._params = {param.meta.name: (param, scaling) for param, scaling in params}
        self._blocks = {param.meta.name: logical_blocks(param.meta, settings) for param, _ in params}
        device = params[0][0].value.device if params else torch.device("cpu")
        self._exchange = Exchange(mesh, device, settings.ns_dtype)
        metas = [param.meta for param, _ in params]
        costs = [newton_schulz_cost(m.shape, self._blocks[m.name]) for m in metas]
        self.plan = make_plan(metas, costs, self._exchange.ranks)
        self._exchange.check(self.plan)
        self._momentum = {
            a.meta.name: torch.zeros_like(self._params[a.meta.name][0].value)
            for a in self.plan.assignments
            if self._exchange.holds(a.home)
        }
        self._scales = {param.meta.name: self._scale(param) for param, _ in params}

    def _scale(self, param: MainParam) -> float | torch.Tensor:
        """Factor on the orthonormal update of this shard: a number, or ``[rows, 1]`` where blocks differ."""
        rows, columns = param.meta.shape
        blocks, settings = self._blocks[param.meta.name], self._settings
        factors = [
            settings.extra_scale_factor * update_scale(settings.scale_mode, rows // b.period * b.size, columns)
            for b in blocks
        ]
        if len(set(factors)) == 1:
            return factors[0]
        period = torch.cat([torch.full((b.size,), f) for b, f in zip(blocks, factors, strict=True)])
        first, count = param.layout.offsets[0], param.layout.local_shape[0]
        place = torch.arange(first, first + count) % blocks[0].period
        return period[place][:, None].to(param.value.device)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at ``factor`` times the peak learning rates. Collective over the ranks that share matrices.

        The exchange of the next chunk and of the last one's results runs beside the arithmetic of this one.
        """
        chunks = self.plan.chunks
        arriving = self._send(chunks[0]) if chunks else None
        returning: Callable[[], None] | None = None
        for number, chunk in enumerate(chunks):
            whole = arriving()
            if number + 1 < len(chunks):
                arriving = self._send(chunks[number + 1])
            results = self._exchange.from_homes(chunk, self._orthonormal(whole))
            if returning is not None:
                returning()
            returning = partial(self._apply, results, factor)
        if returning is not None:
            returning()

    def _send(self, chunk: Sequence[Assignment]) -> Callable[[], dict[str, torch.Tensor]]:
        """Advances the momenta of a chunk and starts the updates on their way."""
        beta = self._settings.momentum
        names = [a.meta.name for a in chunk if self._exchange.holds(a.home)]
        updates: dict[str, torch.Tensor] = {}
        if names:
            momenta = [self._momentum[name] for name in names]
            grads = gradients([self._params[name][0] for name in names])
            grads = [grad.to(momentum.dtype) for grad, momentum in zip(grads, momenta, strict=True)]
            torch._foreach_lerp_(momenta, grads, 1 - beta)
            nesterov = self._settings.nesterov
            updates = dict(zip(names, torch._foreach_lerp(grads, momenta, beta) if nesterov else momenta, strict=True))
        return self._exchange.to_homes(chunk, updates)

    def _apply(self, results: Callable[[], dict[str, torch.Tensor]], factor: float) -> None:
        """Waits for orthonormal factors and updates the shards, each value rounded once."""
        for name, ortho in results().items():
            param, scaling = self._params[name]
            rate = scaling.lr * factor
            delta = ortho.to(torch.float32) * (self._scales[name] * -rate)
            if scaling.weight_decay:
                delta.add_(param.value, alpha=-rate * scaling.weight_decay)
            param.value.add_(delta)

    def _orthonormal(self, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Orthonormal factor of each block of whole matrices, by name; equal shapes go through together."""
        alike: dict[tuple[object, ...], list[str]] = {}
        for name in sorted(whole):
            alike.setdefault((whole[name].shape, self._blocks[name]), []).append(name)
        out: dict[str, torch.Tensor] = {}
        for (shape, blocks), names in alike.items():
            at_once = max(1, BATCH_NUMEL // math.prod(shape))
            for start in range(0, len(names), at_once):
                chosen = names[start : start + at_once]
                stacked = torch.stack([whole[name] for name in chosen])
                out.update(zip(chosen, self._orthonormal_blocks(stacked, blocks).unbind(), strict=True))
        return out

    def _orthonormal_blocks(self, whole: torch.Tensor, blocks: tuple[Block, ...]) -> torch.Tensor:
        """Orthonormal factor of each block of ``[batch, out, in]``; blocks of one shape (key and value) together."""
        settings = self._settings
        if len(blocks) == 1:
            return orthonormalize(whole, settings.num_ns_steps, settings.coefficients, settings.ns_dtype)
        batch, rows, columns = whole.shape
        out = torch.empty_like(whole)
        sizes: dict[int, list[Block]] = {}
        for block in blocks:
            sizes.setdefault(rows // block.period * block.size, []).append(block)
        for height, equal in sizes.items():
            parts = torch.cat([take_block(whole, block).reshape(batch, height, columns) for block in equal])
            ortho = orthonormalize(parts, settings.num_ns_steps, settings.coefficients, settings.ns_dtype)
            for block, part in zip(equal, ortho.split(batch), strict=True):
                target = take_block(out, block)
                target.copy_(part.view(target.shape))
        return out

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """Momentum, as ``momentum/<name>``: live tensors in storage layout, on the ranks of one replica."""
        return {f"momentum/{name}": (self._params[name][0], value) for name, value in self._momentum.items()}
