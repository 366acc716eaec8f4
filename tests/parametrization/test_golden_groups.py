"""Numbers that the authors' own code gave, taken once and written down here.

microsoft/mup 1981497: MuAdamW(lr=0.01, weight_decay=0.1) and ``mup.init.normal_(std=0.02)`` over a base of hidden 64,
MLP 128, for hidden 256, MLP 1024. EleutherAI/nanoGPT-mup 6f8bc3b (branch completep): ``configure_optimizers(0.1, 0.004,
(0.9, 0.95), 1e-12)`` for width multiplier 8, depth multiplier 6. graphcore-research/unit-scaling 0.3.5:
``optim.scaled_parameters(lr_scale_func_adam, lr=0.3, weight_decay=0.01)`` for ``TransformerDecoder(48, 96, layers=3)``.
"""

from __future__ import annotations

import pytest

from megatron_mup.config import parse_config
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parametrization.table import forward_multipliers, scaling

VOCAB = 96


def numbers(*flags: str):
    """The configuration, and what each parameter of the model trains with, by the end of its name."""
    config = parse_config(" ".join(flags).split()).config
    first = [m for m in parameter_metas(config, VOCAB) if m.layer in (None, 0)]
    return config, {m.name.replace("decoder.layers.0.", ""): scaling(m, config) for m in first}


def test_groups_of_microsoft_mup():
    config, rows = numbers(
        "--num-layers 2 --hidden-size 256 --ffn-hidden-size 1024 --num-attention-heads 4 --normalization LayerNorm",
        "--parametrization mup --mup-base-hidden-size 64 --mup-base-ffn-hidden-size 128",
        "--mup-base-num-attention-heads 1 --mup-base-head-dim 64 --lr 0.01 --weight-decay 0.1 --decay-embeddings",
        "--untie-embeddings-and-output-weights --init-method-std 0.02",
    )
    by_width = {
        "self_attention.linear_qkv.weight": (0.0025, 0.4),
        "self_attention.linear_proj.weight": (0.0025, 0.4),
        "mlp.linear_fc1.weight": (0.0025, 0.4),
        "mlp.linear_fc2.weight": (0.00125, 0.8),
        "embedding.word_embeddings.weight": (0.01, 0.1),
        "output_layer.weight": (0.01, 0.1),
    }
    for name, wanted in by_width.items():
        assert (rows[name].lr, rows[name].weight_decay) == pytest.approx(wanted, rel=1e-6), name
    # Norms and biases: mup leaves their decay to the caller; here they have none.
    vectors = ("input_layernorm.weight", "self_attention.linear_qkv.bias", "decoder.final_layernorm.weight")
    assert all(rows[name].lr == pytest.approx(0.01, rel=1e-6) for name in vectors)
    assert rows["self_attention.linear_qkv.weight"].init_std == pytest.approx(0.01, rel=1e-6)
    assert rows["output_layer.weight"].init_std == pytest.approx(0.02, rel=1e-6)
    # Of a matrix with fan-in 1024 over 128: 0.02 / sqrt(8), beside GPT-2's 1 / sqrt(2 x layers).
    assert rows["mlp.linear_fc2.weight"].init_std * 2 == pytest.approx(0.0070710678, rel=1e-6)
    assert forward_multipliers(config).logits == pytest.approx(1 / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "branch", "hidden_lr", "vector_lr", "eps"),
    [
        (1.0, 0.16666666666666666, 0.0005, 0.004, 2.083333333333333e-14),
        (0.5, 0.4082482904638631, 0.00020412414523193151, 0.0016329931618554521, 5.103103630798288e-14),
    ],
)
def test_groups_of_nanogpt_completep(alpha, branch, hidden_lr, vector_lr, eps):
    config, rows = numbers(
        "--num-layers 24 --hidden-size 512 --num-attention-heads 8 --normalization LayerNorm --decay-embeddings",
        "--position-embedding-type learned_absolute --parametrization completep --mup-base-hidden-size 64",
        f"--base-num-layers 4 --depth-alpha {alpha} --lr 0.004 --weight-decay 0.1 --adam-eps 1e-12",
        "--init-method-std 0.02",
    )
    for role in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        weight, bias = rows[f"{role}.weight"], rows[f"{role}.bias"]
        assert (weight.lr, weight.weight_decay, weight.eps) == pytest.approx((hidden_lr, 0.8, eps), rel=1e-6)
        assert (bias.lr, bias.weight_decay, bias.eps) == pytest.approx((vector_lr, 0.0, eps), rel=1e-6)
    for norm in ("input_layernorm.weight", "pre_mlp_layernorm.bias"):
        assert (rows[norm].lr, rows[norm].weight_decay, rows[norm].eps) == pytest.approx((vector_lr, 0, eps), rel=1e-6)
    for table in ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight"):
        assert (rows[table].lr, rows[table].weight_decay) == pytest.approx((0.004, 0.1), rel=1e-6)
    assert rows["decoder.final_layernorm.weight"].lr == pytest.approx(0.004, rel=1e-6)
    assert rows["self_attention.linear_qkv.weight"].init_std == pytest.approx(0.0070710678118654745, rel=1e-6)
    factors = forward_multipliers(config)
    assert (factors.attention_branch, factors.mlp_branch) == pytest.approx((branch, branch), rel=1e-6)
    assert factors.logits == pytest.approx(1 / 8, rel=1e-6)


def test_groups_of_unit_scaling():
    _, rows = numbers(
        "--num-layers 3 --hidden-size 48 --ffn-hidden-size 192 --num-attention-heads 4 --swiglu --disable-bias-linear",
        "--parametrization umup --untie-embeddings-and-output-weights --no-norm-affine --decay-embeddings",
        "--lr 0.3 --weight-decay 0.01",
    )
    assert {name: (row.lr, row.weight_decay) for name, row in rows.items()} == {
        "embedding.word_embeddings.weight": pytest.approx((0.043301270189221926, 0.23094010767585035), rel=1e-6),
        "self_attention.linear_qkv.weight": pytest.approx((0.025, 0.4), rel=1e-6),
        "self_attention.linear_proj.weight": pytest.approx((0.025, 0.4), rel=1e-6),
        "mlp.linear_fc1.weight": pytest.approx((0.025, 0.4), rel=1e-6),
        "mlp.linear_fc2.weight": pytest.approx((0.0125, 0.8), rel=1e-6),
        "output_layer.weight": pytest.approx((0.3, 0.03333333333333333), rel=1e-6),
    }
