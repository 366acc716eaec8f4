"""A model of odd proportions: every ratio of it to its base differs from the others, so that no two can be mistaken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from megatron_mup.config import Config, ModelConfig, OptimizerConfig, ParametrizationConfig
from megatron_mup.parametrization.meta import Block, ParamMeta, Role

VOCAB = 1000


@dataclass(frozen=True)
class Case:
    """Hidden 1024 over 256, MLP 4096 over 512, experts 768 over 128, heads 16 x 128 over 6 x 64, layers 24 over 6."""

    config: Config
    metas: dict[str, ParamMeta]

    def change(self, **sections: dict[str, Any]) -> Case:
        return Case(
            replace(self.config, **{k: replace(getattr(self.config, k), **v) for k, v in sections.items()}), self.metas
        )


def meta(name: str, role: Role, shape: tuple[int, ...], **facts: Any) -> ParamMeta:
    fan_out, fan_in = (shape[0], 1) if len(shape) == 1 else shape
    defaults = {"fan_in": fan_in, "fan_out": fan_out, "base_fan_in": fan_in, "base_fan_out": fan_out}
    return ParamMeta(name=name, role=role, shape=shape, **{**defaults, **facts})


def build_metas(grown: bool) -> dict[str, ParamMeta]:
    def pick(base: float, own: float) -> float:
        return base if grown else own

    n, f, kv, attention, h = pick(256, 1024), pick(512, 4096), pick(1.5 * 64, 4 * 128), pick(6 * 64, 2048), 128
    group = 6 * h  # four query heads, key, value
    qkv = (Block("query", 0, 4 * h, group, heads=4), Block("key", 4 * h, h, group), Block("value", 5 * h, h, group))
    glu = (Block("gate", 0, 8, 16), Block("up", 8, 8, 16))
    metas = [
        meta("embedding", Role.EMBEDDING, (VOCAB, 1024), fan_in=1, fan_out=1024, base_fan_in=1, base_fan_out=n),
        meta("position", Role.POSITION_EMBEDDING, (64, 1024), fan_in=1, fan_out=1024, base_fan_in=1, base_fan_out=n),
        meta("norm", Role.NORM, (1024,), base_fan_out=n, layer=3),
        meta(
            "qkv", Role.QKV, (3072, 1024), base_fan_in=n, base_fan_out=attention + 2 * kv, blocks=qkv, layer=3, tp_dim=0
        ),
        meta("qkv_bias", Role.BIAS, (3072,), base_fan_out=attention + 2 * kv, layer=3),
        meta("q_norm", Role.QK_NORM, (128,), base_fan_out=pick(64, 128), layer=3),
        meta("proj", Role.ATTENTION_OUTPUT, (1024, 2048), base_fan_in=attention, base_fan_out=n, layer=3, tp_dim=1),
        meta("fc1", Role.MLP_IN, (8192, 1024), base_fan_in=n, base_fan_out=2 * f, blocks=glu, layer=3, tp_dim=0),
        meta("fc2", Role.MLP_OUT, (1024, 4096), base_fan_in=f, base_fan_out=n, layer=3, tp_dim=1),
        meta("final_norm", Role.NORM, (1024,), base_fan_out=n),
        meta("final_bias", Role.BIAS, (1024,), base_fan_out=n),
        meta("head", Role.READOUT, (VOCAB, 1024), base_fan_in=n),
    ]
    return {m.name: m for m in metas}


def expert_metas() -> dict[str, ParamMeta]:
    """Parameters of a layer with five experts and latent attention, every ratio above 1."""
    e = 768
    glu = (Block("gate", 0, e, 2 * e, apart=True), Block("up", e, e, 2 * e, apart=True))
    metas = [
        meta("latent", Role.LATENT, (512, 1024), base_fan_in=256, base_fan_out=128, layer=3),
        meta("shared_key", Role.SHARED_KEY, (64, 1024), base_fan_in=256, layer=3),
        meta("router", Role.ROUTER, (5, 1024), base_fan_in=256, layer=3),
        meta(
            "expert_in",
            Role.EXPERT_IN,
            (5 * 2 * e, 1024),
            fan_out=2 * e,
            base_fan_in=256,
            base_fan_out=2 * 128,
            blocks=glu,
            layer=3,
            experts=5,
        ),
        meta(
            "expert_out",
            Role.EXPERT_OUT,
            (5 * 1024, e),
            fan_out=1024,
            base_fan_in=128,
            base_fan_out=256,
            blocks=(Block("matrix", 0, 1024, 1024, apart=True),),
            layer=3,
            experts=5,
        ),
    ]
    return {m.name: m for m in metas}


MODEL = ModelConfig(
    num_layers=24,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    num_query_groups=4,
    kv_channels=128,
    swiglu=True,
    qk_layernorm=True,
    untie_embeddings_and_output_weights=True,
    vocab_size=VOCAB,
    init_method_std=0.03,
    embedding_init_method_std=0.05,
    output_layer_init_method_std=0.07,
)
OPTIMIZER = OptimizerConfig(lr=0.011, muon_lr=0.013, decoupled_lr=0.017, weight_decay=0.19, adam_eps=2.3e-9)
BASE = {
    "mup_base_hidden_size": 256,
    "mup_base_ffn_hidden_size": 512,
    "mup_base_num_attention_heads": 6,
    "mup_base_head_dim": 64,
    "base_num_layers": 6,
}


@pytest.fixture(scope="session")
def grown() -> Case:
    """Every ratio above 1."""
    return Case(
        Config(model=MODEL, optimizer=OPTIMIZER, parametrization=ParametrizationConfig(**BASE)), build_metas(True)
    )


@pytest.fixture(scope="session")
def grown_with_experts(grown: Case) -> Case:
    """The same with what a layer with experts has."""
    return Case(grown.config, grown.metas | expert_metas())


@pytest.fixture(scope="session")
def base_equal() -> Case:
    """The base sizes are the model's own."""
    same = ParametrizationConfig(
        mup_base_hidden_size=1024,
        mup_base_ffn_hidden_size=4096,
        mup_base_num_attention_heads=16,
        mup_base_head_dim=128,
        base_num_layers=24,
    )
    return Case(Config(model=MODEL, optimizer=OPTIMIZER, parametrization=same), build_metas(False))
