"""What parameters know about themselves, over architectures and ranks."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.layers.factory import LayerFactory
from megatron_mup.models.gpt import GPT, Stage, parameter_metas
from megatron_mup.parallel.mesh import ALONE, TensorAxis
from megatron_mup.parametrization.meta import Role
from tests.runs import VOCAB_SIZE, config_of

ARCHITECTURES = {
    "tied": "",
    "llama": "--swiglu --disable-bias-linear --num-query-groups 2 --untie-embeddings-and-output-weights",
    "gpt2": "--normalization LayerNorm --position-embedding-type learned_absolute",
    "qk-norm": "--qk-layernorm --normalization LayerNorm --kv-channels 12 --num-query-groups 2",
    "qkv-bias": "--disable-bias-linear --add-qkv-bias --swiglu",
}
LAYER = "decoder.layers.1"


def facts(*flags):
    return {m.name: m for m in parameter_metas(config_of(*flags), VOCAB_SIZE)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_described(architecture):
    config = config_of(ARCHITECTURES[architecture])
    model = GPT(config, VOCAB_SIZE, Stage(0, 2))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {name: meta.shape for name, meta in model.metas.items()}
    assert all(name == meta.name for name, meta in model.metas.items())
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(m.numel for m in parameter_metas(config, VOCAB_SIZE))
    assert total == expected_total(config.model)
    for name, meta in model.metas.items():
        assert (meta.layer is None) == (not name.startswith("decoder.layers."))
        assert meta.layer is None or name.startswith(f"decoder.layers.{meta.layer}.")
        assert (meta.branch is None) == (meta.layer is None)
        if meta.layer is not None:
            assert meta.branch == ("mlp" if "mlp" in name else "attention"), name
        assert (len(meta.shape) == 1) == (meta.role in (Role.NORM, Role.QK_NORM, Role.BIAS))


def expected_total(model) -> int:
    """Counted by hand."""
    hidden, heads, groups, width = model.hidden_size, model.num_attention_heads, model.query_groups, model.head_dim
    norm = 2 if model.normalization == "LayerNorm" else 1
    qkv, ffn = (heads + 2 * groups) * width, (2 if model.swiglu else 1) * model.ffn_size
    layer = hidden * (qkv + heads * width + ffn + model.ffn_size) + 2 * norm * hidden
    layer += qkv * model.qkv_bias + (2 * hidden + ffn) * model.linear_bias + 2 * norm * width * model.qk_layernorm
    tables = VOCAB_SIZE * (1 + model.untie_embeddings_and_output_weights)
    tables += 16 * (model.position_embedding_type == "learned_absolute")
    return model.num_layers * layer + norm * hidden + tables * hidden


def test_roles_fans_blocks_and_dimensions():
    flags = "--qk-layernorm --kv-channels 12 --num-query-groups 2 --swiglu --untie-embeddings-and-output-weights"
    metas = facts(flags, "--position-embedding-type learned_absolute")
    seen = {
        name.removeprefix(f"{LAYER}."): (m.role, m.shape, m.fan_in, m.fan_out, m.tp_dim)
        for name, m in metas.items()
        if m.layer in (None, 1)
    }
    assert seen == {
        "embedding.word_embeddings.weight": (Role.EMBEDDING, (101, 32), 1, 32, 0),
        "embedding.position_embeddings.weight": (Role.POSITION_EMBEDDING, (16, 32), 1, 32, None),
        "input_layernorm.weight": (Role.NORM, (32,), 1, 32, None),
        "self_attention.linear_qkv.weight": (Role.QKV, (96, 32), 32, 96, 0),
        "self_attention.linear_qkv.bias": (Role.BIAS, (96,), 1, 96, 0),
        "self_attention.linear_proj.weight": (Role.ATTENTION_OUTPUT, (32, 48), 48, 32, 1),
        "self_attention.linear_proj.bias": (Role.BIAS, (32,), 1, 32, None),
        "self_attention.q_layernorm.weight": (Role.QK_NORM, (12,), 1, 12, None),
        "self_attention.k_layernorm.weight": (Role.QK_NORM, (12,), 1, 12, None),
        "pre_mlp_layernorm.weight": (Role.NORM, (32,), 1, 32, None),
        "mlp.linear_fc1.weight": (Role.MLP_IN, (128, 32), 32, 128, 0),
        "mlp.linear_fc1.bias": (Role.BIAS, (128,), 1, 128, 0),
        "mlp.linear_fc2.weight": (Role.MLP_OUT, (32, 64), 64, 32, 1),
        "mlp.linear_fc2.bias": (Role.BIAS, (32,), 1, 32, None),
        "decoder.final_layernorm.weight": (Role.NORM, (32,), 1, 32, None),
        "output_layer.weight": (Role.READOUT, (101, 32), 32, 101, 0),
    }
    qkv = metas[f"{LAYER}.self_attention.linear_qkv.weight"].blocks
    assert [(b.name, b.start, b.size, b.period) for b in qkv] == [
        ("query", 0, 24, 48),
        ("key", 24, 12, 48),
        ("value", 36, 12, 48),
    ]
    glu = metas[f"{LAYER}.mlp.linear_fc1.weight"].blocks
    assert [(b.name, b.start, b.size, b.period) for b in glu] == [("gate", 0, 8, 16), ("up", 8, 8, 16)]
    assert {name for name, m in metas.items() if m.blocks} == {
        f"decoder.layers.{i}.{part}.weight"
        for i in range(2)
        for part in ("self_attention.linear_qkv", "mlp.linear_fc1")
    }


def test_base_sizes():
    """Each matrix knows its own growth: MLP, heads and head width apart from the hidden size."""
    metas = facts(
        "--swiglu --num-query-groups 2 --qk-layernorm --mup-base-hidden-size 16 --mup-base-ffn-hidden-size 48",
        "--mup-base-num-attention-heads 2 --mup-base-head-dim 4 --parametrization mup",
    )
    growth = {
        name.removeprefix(f"{LAYER}."): (m.fan_in / m.base_fan_in, m.fan_out / m.base_fan_out)
        for name, m in metas.items()
        if m.layer in (None, 1)
    }
    # Queries grow from 2 x 4 to 4 x 8 channels, keys and values from 1 x 4 to 2 x 8: all of them fourfold.
    assert growth["self_attention.linear_qkv.weight"] == (2, 4)
    assert growth["self_attention.linear_qkv.bias"] == (1, 4)
    assert growth["self_attention.linear_proj.weight"] == (4, 2)
    assert growth["self_attention.q_layernorm.weight"] == (1, 2)
    assert growth["mlp.linear_fc1.weight"] == pytest.approx((2, 64 / 48))
    assert growth["mlp.linear_fc1.bias"] == pytest.approx((1, 64 / 48))
    assert growth["mlp.linear_fc2.weight"] == pytest.approx((64 / 48, 2))
    assert growth["input_layernorm.weight"] == growth["embedding.word_embeddings.weight"] == (1, 2)


PARALLEL = "--tensor-model-parallel-size 2"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_facts_dont_depend_on_ranks(architecture, sequence_parallel):
    """Only sums that copies of a parameter still need follow the layout."""
    flags = f"{ARCHITECTURES[architecture]} {PARALLEL}{' --sequence-parallel' if sequence_parallel else ''}"
    config, alone = config_of(flags), facts(ARCHITECTURES[architecture])
    # On the meta device nothing is sent; a group that is not None stands for two ranks.
    ranks = []
    with torch.device("meta"):
        for rank in range(2):
            ranks.append(GPT(config, VOCAB_SIZE, Stage(0, 2), TensorAxis(object(), rank, 2)))
    for model in ranks:
        described = {name: {**vars(m), "grad_sum_axes": ()} for name, m in model.metas.items()}
        assert described == {name: {**vars(m), "grad_sum_axes": ()} for name, m in alone.items()}
    for name, meta in ranks[0].metas.items():
        parts = [dict(model.named_parameters())[name].shape for model in ranks]
        if meta.tp_dim is None:
            assert parts == [meta.shape, meta.shape]
        else:
            assert sum(p[meta.tp_dim] for p in parts) == meta.shape[meta.tp_dim]
            assert all(p[1 - meta.tp_dim :] == meta.shape[1 - meta.tp_dim :] for p in parts if meta.tp_dim == 0)
        # A copy sees part of the tokens under sequence parallelism, part of the heads if it is a query or key norm.
        of_heads = "q_layernorm" in name or "k_layernorm" in name
        partial = meta.tp_dim is None and (sequence_parallel or of_heads)
        assert alone[name].grad_sum_axes == (("tp",) if of_heads else ())
        assert meta.grad_sum_axes == (("tp",) if partial else ()), name


def test_tied_copies_over_stages():
    config = config_of("--pipeline-model-parallel-size 2")
    with torch.device("meta"):
        first = GPT(config, VOCAB_SIZE, Stage(0, 1, True, False)).metas
        last = GPT(config, VOCAB_SIZE, Stage(1, 2, False, True)).metas
    embedding, copy = first["embedding.word_embeddings.weight"], last["output_layer.weight"]
    assert copy.tied_to == embedding.name
    assert embedding.tied_to is None
    assert embedding.grad_sum_axes == copy.grad_sum_axes == ("embedding",)
    same = ("role", "shape", "fan_in", "fan_out", "base_fan_in", "base_fan_out", "tp_dim")
    assert [getattr(copy, f) for f in same] == [getattr(embedding, f) for f in same]
    assert not set(first) & set(last)
    assert set(first) | set(last) == set(facts()) | {"output_layer.weight"}


def test_parameters_are_born_without_memory():
    factory = LayerFactory(config_of(), VOCAB_SIZE, ALONE, torch.bfloat16)
    weight = factory.word_embeddings().weight
    assert weight.is_meta
    assert weight.dtype == torch.bfloat16
