"""Parameters for the optimizer tests."""

from __future__ import annotations

import torch

from megatron_mup.optim.main_params import MainParam
from megatron_mup.parallel.layout import Layout
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import Block, ParamMeta, Role
from megatron_mup.parametrization.table import Scaling

QKV_BLOCKS = (Block("q", 0, 4, 8), Block("k", 4, 2, 8), Block("v", 6, 2, 8))
GATE_UP_BLOCKS = (Block("gate", 0, 1, 2), Block("up", 1, 1, 2))


def meta(name: str, role: Role, shape: tuple[int, ...], **facts: object) -> ParamMeta:
    fan_in = shape[1] if len(shape) == 2 else 1
    facts = {"layer": 0, **facts}
    return ParamMeta(
        name=name,
        role=role,
        shape=shape,
        fan_in=fan_in,
        fan_out=shape[0],
        base_fan_in=fan_in,
        base_fan_out=shape[0],
        **facts,  # type: ignore[arg-type]
    )


def numbers(optimizer: str = "muon", lr: float = 0.02, weight_decay: float = 0.1, eps: float = 1e-8) -> Scaling:
    return Scaling(init_std=None, multiplier=1.0, optimizer=optimizer, lr=lr, weight_decay=weight_decay, eps=eps)


def alone(facts: ParamMeta, value: torch.Tensor) -> MainParam:
    """The whole parameter on one rank."""
    return MainParam(facts, Layout.alone(facts), value.clone())


def shard_of(facts: ParamMeta, value: torch.Tensor, mesh: Mesh) -> MainParam:
    """This rank's part of a parameter."""
    layout = Layout.of(facts, mesh)
    return MainParam(facts, layout, layout.shard(value).clone())


def model_metas() -> list[ParamMeta]:
    """Parameters of a tiny model: shapes that repeat, don't divide, leave ranks empty, along either dimension."""
    metas = [
        meta("embedding", Role.EMBEDDING, (22, 12), tp_dim=0, layer=None),
        meta("head", Role.READOUT, (22, 12), tp_dim=0, layer=None),
        meta("final_norm", Role.NORM, (12,), layer=None),
        meta("short", Role.ATTENTION_OUTPUT, (2, 12), tp_dim=1),
        meta("odd", Role.ATTENTION_OUTPUT, (7, 13), tp_dim=1),
        meta("column", Role.ATTENTION_OUTPUT, (6, 1), tp_dim=1),
        meta("row", Role.LATENT, (1, 12)),
    ]
    for layer in range(2):
        facts = {"layer": layer}
        metas += [
            meta(f"layers.{layer}.qkv", Role.QKV, (32, 12), tp_dim=0, blocks=QKV_BLOCKS, **facts),
            meta(f"layers.{layer}.qkv_bias", Role.BIAS, (32,), tp_dim=0, **facts),
            meta(f"layers.{layer}.out", Role.ATTENTION_OUTPUT, (12, 16), tp_dim=1, **facts),
            meta(f"layers.{layer}.norm", Role.NORM, (12,), **facts),
            meta(f"layers.{layer}.fc1", Role.MLP_IN, (40, 12), tp_dim=0, blocks=GATE_UP_BLOCKS, **facts),
            meta(f"layers.{layer}.fc2", Role.MLP_OUT, (12, 20), tp_dim=1, **facts),
        ]
    return metas
