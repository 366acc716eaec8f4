"""The table against the published ones, each cell written out by hand from the sources in docs/parametrization.md."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import isclose, sqrt
from types import MappingProxyType

import pytest
import torch

from megatron_mup.config import ConfigError
from megatron_mup.parametrization import table
from megatron_mup.parametrization.meta import Role
from megatron_mup.parametrization.schemes import SCHEMES, Kind, Row, Scheme, kind_of
from megatron_mup.parametrization.table import Scaling, forward_multipliers, scaling

ETA, ETA_MUON, ETA_EMBEDDING, LAMBDA, EPS = 0.011, 0.013, 0.017, 0.19, 2.3e-9
SIGMA, SIGMA_EMBEDDING, SIGMA_HEAD, LAYERS, BASE_LAYERS = 0.03, 0.05, 0.07, 24, 6
# Growth: hidden 1024/256, attention's output 2048/384, MLP 4096/512, layers 24/6.
M_N, M_A, M_F, M_L = 4.0, 16 / 3, 8.0, 4.0
# Of an expert's MLP: 768/128.
M_E = 6.0

SCHEME_NAMES = ("standard", "mup", "completep")
RULES = ("independent", "coupled", "sqrt-width", "lr-independent")
SCALE_MODES = ("unit_rms_norm", "spectral", "shape_scaling", "match_rms_adamw")

# name: (init std, learning rate, weight decay, epsilon)
STANDARD = {
    "embedding": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, EPS),
    "position": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, EPS),
    "norm": (None, ETA, 0, EPS),
    "qkv": (SIGMA, ETA, LAMBDA, EPS),
    "latent": (SIGMA, ETA, LAMBDA, EPS),
    "qkv_bias": (None, ETA, 0, EPS),
    "q_norm": (None, ETA, 0, EPS),
    "proj": (SIGMA / sqrt(2 * LAYERS), ETA, LAMBDA, EPS),
    "fc1": (SIGMA, ETA, LAMBDA, EPS),
    "fc2": (SIGMA / sqrt(2 * LAYERS), ETA, LAMBDA, EPS),
    "router": (SIGMA, ETA, LAMBDA, EPS),
    "shared_key": (SIGMA, ETA, LAMBDA, EPS),
    "expert_in": (SIGMA, ETA, LAMBDA, EPS),
    "expert_out": (SIGMA / sqrt(2 * LAYERS), ETA, LAMBDA, EPS),
    "final_norm": (None, ETA, 0, EPS),
    "final_bias": (None, ETA, 0, EPS),
    "head": (SIGMA_HEAD, ETA_EMBEDDING, LAMBDA, EPS),
}
# Reference 1.1, form B; output projections keep GPT-2's factor.
MUP = {
    "embedding": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, EPS / M_N),
    "position": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, EPS / M_N),
    "norm": (None, ETA, 0, EPS / M_N),
    "qkv": (SIGMA / sqrt(M_N), ETA / M_N, LAMBDA * M_N, EPS / M_N),
    "latent": (SIGMA / sqrt(M_N), ETA / M_N, LAMBDA * M_N, EPS / M_N),
    "qkv_bias": (None, ETA, 0, EPS / M_N),
    "q_norm": (None, ETA, 0, EPS),
    "proj": (SIGMA / sqrt(2 * LAYERS) / sqrt(M_A), ETA / M_A, LAMBDA * M_A, EPS / M_N),
    "fc1": (SIGMA / sqrt(M_N), ETA / M_N, LAMBDA * M_N, EPS / M_N),
    "fc2": (SIGMA / sqrt(2 * LAYERS) / sqrt(M_F), ETA / M_F, LAMBDA * M_F, EPS / M_N),
    "router": (SIGMA / M_N, ETA / M_N, LAMBDA * M_N, EPS),
    "shared_key": (SIGMA / M_N, ETA / M_N, LAMBDA * M_N, EPS),
    "expert_in": (SIGMA / sqrt(M_N), ETA / M_N, LAMBDA * M_N, EPS / M_N),
    "expert_out": (SIGMA / sqrt(2 * LAYERS) / sqrt(M_E), ETA / M_E, LAMBDA * M_E, EPS / M_N),
    "final_norm": (None, ETA, 0, EPS / M_N),
    "final_bias": (None, ETA, 0, EPS / M_N),
    "head": (SIGMA_HEAD, ETA_EMBEDDING, LAMBDA, EPS / M_N),
}
# Reference 2.1 (alpha = 1) and 13.
COMPLETEP_1 = {
    "embedding": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, EPS / M_N),
    "position": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, EPS / M_N),
    "norm": (None, ETA, 0, EPS / M_N / M_L),
    "qkv": (SIGMA / sqrt(M_N), ETA / M_N, LAMBDA * M_N, EPS / M_N / M_L),
    "latent": (SIGMA / sqrt(M_N), ETA / M_N, LAMBDA * M_N, EPS / M_N / M_L),
    "qkv_bias": (None, ETA, 0, EPS / M_N / M_L),
    "q_norm": (None, ETA, 0, EPS / M_L),
    "proj": (SIGMA / sqrt(2 * BASE_LAYERS) / sqrt(M_A), ETA / M_A, LAMBDA * M_A, EPS / M_N / M_L),
    "fc1": (SIGMA / sqrt(M_N), ETA / M_N, LAMBDA * M_N, EPS / M_N / M_L),
    "fc2": (SIGMA / sqrt(2 * BASE_LAYERS) / sqrt(M_F), ETA / M_F, LAMBDA * M_F, EPS / M_N / M_L),
    "router": (SIGMA / M_N, ETA / M_N, LAMBDA * M_N, EPS / M_L),
    "shared_key": (SIGMA / M_N, ETA / M_N, LAMBDA * M_N, EPS / M_L),
    "expert_in": (SIGMA / sqrt(M_N), ETA / M_N, LAMBDA * M_N, EPS / M_N / M_L),
    "expert_out": (SIGMA / sqrt(2 * BASE_LAYERS) / sqrt(M_E), ETA / M_E, LAMBDA * M_E, EPS / M_N / M_L),
    "final_norm": (None, ETA, 0, EPS / M_N),
    "final_bias": (None, ETA, 0, EPS / M_N),
    "head": (SIGMA_HEAD, ETA_EMBEDDING, LAMBDA, EPS / M_N),
}
# The same at alpha = 1/2: in-block learning rates fall as m_L^-1/2, epsilon too; the decay follows width alone.
COMPLETEP_HALF = {
    "embedding": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, EPS / M_N),
    "position": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, EPS / M_N),
    "norm": (None, ETA / sqrt(M_L), 0, EPS / M_N / sqrt(M_L)),
    "qkv": (SIGMA / sqrt(M_N), ETA / M_N / sqrt(M_L), LAMBDA * M_N, EPS / M_N / sqrt(M_L)),
    "latent": (SIGMA / sqrt(M_N), ETA / M_N / sqrt(M_L), LAMBDA * M_N, EPS / M_N / sqrt(M_L)),
    "qkv_bias": (None, ETA / sqrt(M_L), 0, EPS / M_N / sqrt(M_L)),
    "q_norm": (None, ETA / sqrt(M_L), 0, EPS / sqrt(M_L)),
    "proj": (
        SIGMA / sqrt(2 * BASE_LAYERS) / sqrt(M_A),
        ETA / M_A / sqrt(M_L),
        LAMBDA * M_A,
        EPS / M_N / sqrt(M_L),
    ),
    "fc1": (SIGMA / sqrt(M_N), ETA / M_N / sqrt(M_L), LAMBDA * M_N, EPS / M_N / sqrt(M_L)),
    "fc2": (
        SIGMA / sqrt(2 * BASE_LAYERS) / sqrt(M_F),
        ETA / M_F / sqrt(M_L),
        LAMBDA * M_F,
        EPS / M_N / sqrt(M_L),
    ),
    "router": (SIGMA / M_N, ETA / M_N / sqrt(M_L), LAMBDA * M_N, EPS / sqrt(M_L)),
    "shared_key": (SIGMA / M_N, ETA / M_N / sqrt(M_L), LAMBDA * M_N, EPS / sqrt(M_L)),
    "expert_in": (SIGMA / sqrt(M_N), ETA / M_N / sqrt(M_L), LAMBDA * M_N, EPS / M_N / sqrt(M_L)),
    "expert_out": (
        SIGMA / sqrt(2 * BASE_LAYERS) / sqrt(M_E),
        ETA / M_E / sqrt(M_L),
        LAMBDA * M_E,
        EPS / M_N / sqrt(M_L),
    ),
    "final_norm": (None, ETA, 0, EPS / M_N),
    "final_bias": (None, ETA, 0, EPS / M_N),
    "head": (SIGMA_HEAD, ETA_EMBEDDING, LAMBDA, EPS / M_N),
}
# Factors: embedding, attention logits, attention branch, MLP branch, logits. Reference 1.1 and 2.1.
PUBLISHED = [
    ("standard", 1.0, STANDARD, (1, 1 / sqrt(128), 1, 1, 1)),
    ("mup", 1.0, MUP, (1, sqrt(64) / 128, 1, 1, 1 / M_N)),
    ("completep", 1.0, COMPLETEP_1, (1, sqrt(64) / 128, 1 / M_L, 1 / M_L, 1 / M_N)),
    ("completep", 0.5, COMPLETEP_HALF, (1, sqrt(64) / 128, 1 / sqrt(M_L), 1 / sqrt(M_L), 1 / M_N)),
]


def under(case, name, alpha=1.0, **optimizer):
    return case.change(parametrization={"parametrization": name, "depth_alpha": alpha}, optimizer=optimizer)


def numbers(s: Scaling):
    return s.init_std, s.lr, s.weight_decay, s.eps


def close(got, wanted) -> bool:
    return all(g is w if w is None else isclose(g, w, rel_tol=1e-12) for g, w in zip(got, wanted, strict=True))


def forward(config):
    m = forward_multipliers(config)
    return m.embedding, m.attention_logits, m.attention_branch, m.mlp_branch, m.logits


def matches(case, expected, factors) -> bool:
    return close(forward(case.config), factors) and all(
        close(numbers(scaling(case.metas[k], case.config)), w) for k, w in expected.items()
    )


@pytest.mark.parametrize(("name", "alpha", "expected", "factors"), PUBLISHED)
def test_published_tables_row_by_row(grown_with_experts, name, alpha, expected, factors):
    case = under(grown_with_experts, name, alpha)
    assert set(expected) == set(case.metas)
    for key, wanted in expected.items():
        assert close(numbers(scaling(case.metas[key], case.config)), wanted), key
    assert close(forward(case.config), factors)
    assert {scaling(m, case.config).optimizer for m in case.metas.values()} == {"adam"}


CELLS = [(kind, cell) for kind in Kind for cell in ("init", "lr_width", "lr_depth", "eps")]


@pytest.mark.parametrize(("kind", "cell"), CELLS)
def test_every_cell_counts(grown_with_experts, monkeypatch, kind, cell):
    """Any cell dropped, or any trivial cell made to follow width or depth, breaks one of the published tables."""
    original = SCHEMES["completep"]
    was = getattr(original.rows[kind], cell)
    mutants = ((lambda r: 1.0, True), (lambda r: was(r) / r.hidden, False), (lambda r: was(r) / r.depth, False))
    for mutant, dropped in mutants:
        rows = {**original.rows, kind: replace(original.rows[kind], **{cell: mutant})}
        patched = {k: replace(v, rows=rows) for k, v in SCHEMES.items()}
        monkeypatch.setattr(table, "SCHEMES", MappingProxyType(patched))
        seen = [matches(under(grown_with_experts, name, alpha), *published) for name, alpha, *published in PUBLISHED]
        # Initial values of vectors are constants, and a dropped factor that is 1 already is no change.
        vector = cell == "init" and kind in (Kind.BLOCK_VECTOR, Kind.HEAD_VECTOR, Kind.FINAL_VECTOR)
        trivial = was is Row.__dataclass_fields__[cell].default
        assert all(seen) == (vector or (dropped and trivial))


@pytest.mark.parametrize("field", ["branch", "logits", "width", "depth"])
def test_every_part_of_a_scheme_counts(grown_with_experts, monkeypatch, field):
    def mutate(scheme: Scheme) -> Scheme:
        return replace(
            scheme, **{field: (lambda r: 1.0) if field in ("branch", "logits") else not getattr(scheme, field)}
        )

    monkeypatch.setattr(table, "SCHEMES", {k: mutate(v) for k, v in SCHEMES.items()})
    assert not all(
        matches(under(grown_with_experts, name, alpha), rows, factors) for name, alpha, rows, factors in PUBLISHED
    )


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("rule", RULES)
def test_at_ratio_one_every_scheme_is_the_standard_one_bitwise(base_equal, optimizer, rule):
    for mode, alpha in itertools.product(SCALE_MODES, (0.5, 1.0)):
        case = under(base_equal, "standard", alpha, optimizer=optimizer, muon_scale_mode=mode)
        case = case.change(parametrization={"weight_decay_rule": rule})
        standard = {k: scaling(m, case.config) for k, m in case.metas.items()}
        for name in ("mup", "completep"):
            other = case.change(parametrization={"parametrization": name})
            assert {k: scaling(m, other.config) for k, m in other.metas.items()} == standard
            assert forward_multipliers(other.config) == forward_multipliers(case.config)


def test_without_base_sizes_every_ratio_is_one(base_equal):
    names = ("mup_base_hidden_size", "mup_base_ffn_hidden_size", "mup_base_num_attention_heads", "mup_base_head_dim")
    bare = base_equal.change(parametrization=dict.fromkeys((*names, "base_num_layers")))
    for name in SCHEME_NAMES:
        assert forward_multipliers(under(bare, name).config) == forward_multipliers(bare.config)
        assert all(scaling(m, under(bare, name).config) == scaling(m, bare.config) for m in bare.metas.values())


def test_standard_ignores_the_base(grown, base_equal):
    for rule in RULES:
        a, b = (c.change(parametrization={"weight_decay_rule": rule}) for c in (grown, base_equal))
        assert [scaling(m, a.config) for m in a.metas.values()] == [scaling(m, b.config) for m in b.metas.values()]


def test_mup_ignores_depth(grown):
    shallow = grown.change(parametrization={"base_num_layers": None})
    for m in grown.metas.values():
        assert scaling(m, under(grown, "mup", 0.5).config) == scaling(m, under(shallow, "mup", 1.0).config)


# ---- Forward factors


def test_attention_scale(grown):
    for name, expected in (("standard", 128**-0.5), ("mup", 64**0.5 / 128)):
        assert isclose(forward_multipliers(under(grown, name).config).attention_logits, expected)
        mult = under(grown, name).change(parametrization={"mup_attention_mult": 3.0})
        assert isclose(forward_multipliers(mult.config).attention_logits, 3 * expected)
        assert forward_multipliers(mult.change(model={"softmax_scale": 0.7}).config).attention_logits == 0.7


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_plain_factors_multiply_what_the_scheme_says(grown, name):
    case = under(grown, name)
    plain = forward(case.config)
    factors = {
        "mup_embedding_mult": 12.0,
        "mup_attention_mult": 2.0,
        "mup_residual_mult": 0.5,
        "mup_output_mult": 1.5,
    }
    wanted = [p * f for p, f in zip(plain, (12.0, 2.0, 0.5, 0.5, 1.5), strict=True)]
    assert close(forward(case.change(parametrization=factors).config), wanted)


def test_xmodel_residual_scales_replace_the_branch_factor(grown):
    case = under(grown, "completep").change(
        parametrization={"mup_residual_mult": 9.0, "mup_attention_residual_scale": 1.4}
    )
    assert isclose(forward_multipliers(case.config).attention_branch, 1.4 / sqrt(24))
    assert isclose(forward_multipliers(case.config).mlp_branch, 9.0 / 4)
    case = case.change(parametrization={"mup_ffn_residual_scale": 1.3})
    assert isclose(forward_multipliers(case.config).mlp_branch, 1.3 / sqrt(24))


def test_reported_multipliers(grown):
    case = under(grown, "completep").change(
        parametrization={"mup_embedding_mult": 12.0, "mup_attention_residual_scale": 1.4}
    )
    got = {k: scaling(m, case.config).multiplier for k, m in case.metas.items()}
    wanted = dict.fromkeys(case.metas, 1.0) | {"embedding": 12.0, "position": 12.0, "head": 1 / 4, "fc2": 1 / 4}
    assert got == pytest.approx(wanted | {"proj": 1.4 / sqrt(24)})


# ---- Defaults, learning rates, weight decay


def test_defaults_of_init_and_learning_rates(grown):
    case = under(grown, "mup", muon_lr=None, decoupled_lr=None, optimizer="muon")
    case = case.change(model={"embedding_init_method_std": None, "output_layer_init_method_std": None})
    got = {k: scaling(m, case.config) for k, m in case.metas.items()}
    assert got["embedding"].init_std == got["position"].init_std == got["head"].init_std == SIGMA
    assert got["embedding"].lr == got["head"].lr == got["qkv"].lr == ETA
    zero = case.change(model={"output_layer_init_method_std": 0.0})
    assert scaling(case.metas["head"], zero.config).init_std == 0.0


def test_norms_and_biases_never_decay(grown):
    for name, rule, flag in itertools.product(SCHEME_NAMES, RULES, (False, True)):
        case = under(grown, name, decay_embeddings=flag, decay_output_layer=flag)
        case = case.change(parametrization={"weight_decay_rule": rule})
        decay = {k: scaling(m, case.config).weight_decay > 0 for k, m in case.metas.items()}
        assert decay == dict.fromkeys(case.metas, False) | {
            "embedding": flag,
            "position": flag,
            "head": flag,
            **dict.fromkeys(("qkv", "proj", "fc1", "fc2"), True),
        }


def test_tied_head_is_the_embedding(grown):
    copy = replace(grown.metas["embedding"], name="output_layer.weight", tied_to="embedding")
    for name in SCHEME_NAMES:
        case = under(grown, name, decay_embeddings=True)
        assert scaling(copy, case.config) == scaling(case.metas["embedding"], case.config)
        assert scaling(copy, case.config).weight_decay == LAMBDA


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_weight_decay_rules(grown, alpha):
    widths = {"qkv": M_N, "proj": M_A, "fc1": M_N, "fc2": M_F, "embedding": 1, "head": 1}
    depth = M_L ** (alpha - 1)
    for key, m in widths.items():
        base_lr = ETA_EMBEDDING if key in ("embedding", "head") else ETA
        for rule, coefficient in (
            ("independent", LAMBDA * m),
            ("coupled", LAMBDA),
            ("sqrt-width", LAMBDA * sqrt(m)),
            ("lr-independent", LAMBDA / (base_lr / m * (1 if key in ("embedding", "head") else depth))),
        ):
            case = under(grown, "completep", alpha, decay_embeddings=True)
            case = case.change(parametrization={"weight_decay_rule": rule})
            assert isclose(scaling(case.metas[key], case.config).weight_decay, coefficient), (key, rule)


def test_independent_decay_keeps_the_product_with_the_base_learning_rate_of_the_class(grown):
    for mode in SCALE_MODES:
        case = under(grown, "completep", 1.0, optimizer="muon", muon_scale_mode=mode, decay_embeddings=True)
        for key, base_lr in (
            ("qkv", ETA_MUON),
            ("fc2", ETA_MUON),
            ("embedding", ETA_EMBEDDING),
            ("head", ETA_EMBEDDING),
        ):
            s = scaling(case.metas[key], case.config)
            assert isclose(s.lr * s.weight_decay, base_lr * LAMBDA)


def test_sqrt_width_means_the_coefficient_under_muon_too(grown):
    case = under(grown, "mup", optimizer="muon").change(parametrization={"weight_decay_rule": "sqrt-width"})
    assert isclose(scaling(case.metas["fc2"], case.config).weight_decay, LAMBDA * sqrt(M_F))


def test_decay_per_step_needs_a_learning_rate(grown):
    case = grown.change(optimizer={"lr": 0.0}, parametrization={"weight_decay_rule": "lr-independent"})
    with pytest.raises(ConfigError, match="lr-independent"):
        scaling(case.metas["qkv"], case.config)
    assert scaling(case.metas["norm"], case.config).weight_decay == 0
    undecayed = case.change(optimizer={"weight_decay": 0.0})
    assert scaling(case.metas["qkv"], undecayed.config).weight_decay == 0


# ---- Muon


def muon_norm(mode, rows, cols):
    return {
        "unit_rms_norm": sqrt(rows / cols),
        "spectral": sqrt(max(rows, cols)),
        "shape_scaling": sqrt(max(1, rows / cols)),
        "match_rms_adamw": 0.2 * sqrt(max(rows, cols)),
    }[mode]


@pytest.mark.parametrize("mode", SCALE_MODES)
def test_muon_step_satisfies_the_spectral_condition(grown, mode):
    """Learning rate x norm of the step grows as sqrt(out/in), from the base matrix to this one."""
    case = under(grown, "mup", optimizer="muon", muon_scale_mode=mode)
    for key, own, base in (
        ("fc1", (4096, 1024), (512, 256)),  # gate and up apart
        ("fc2", (1024, 4096), (256, 512)),
        ("proj", (1024, 2048), (256, 384)),
    ):
        lr = scaling(case.metas[key], case.config).lr
        growth = lr * muon_norm(mode, *own) / (ETA_MUON * muon_norm(mode, *base))
        assert isclose(growth, sqrt(own[0] / own[1]) / sqrt(base[0] / base[1]), rel_tol=1e-12), key


def test_muon_by_head_follows_the_head(grown):
    """A head's matrix has as many rows as the head is wide, and the columns of the whole."""
    m, head, base_head = grown.metas["qkv"], 128, 64
    assert {block.size // block.heads for block in m.blocks} == {head}
    for mode in SCALE_MODES:
        case = under(grown, "mup", optimizer="muon", muon_scale_mode=mode, muon_split_heads=True)
        growth = scaling(m, case.config).lr * muon_norm(mode, head, 1024)
        growth /= ETA_MUON * muon_norm(mode, base_head, 256)
        assert isclose(growth, sqrt(head / 1024) / sqrt(base_head / 256)), mode


def test_muon_learning_rates_in_closed_form(grown):
    expected = {
        "unit_rms_norm": (ETA_MUON, ETA_MUON),
        "spectral": (ETA_MUON / sqrt(M_N), ETA_MUON * sqrt(4) / 8),  # fc2: wide at both sizes, sqrt(out)/in
        "match_rms_adamw": (ETA_MUON / sqrt(M_N), ETA_MUON * sqrt(4) / 8),
        "shape_scaling": (ETA_MUON, ETA_MUON * sqrt(4 / 8)),
    }
    for mode, (fc1, fc2) in expected.items():
        for name, alpha, depth in (("mup", 1.0, 1.0), ("completep", 1.0, 1.0), ("completep", 0.5, 0.5)):
            case = under(grown, name, alpha, optimizer="muon", muon_scale_mode=mode)
            assert isclose(scaling(case.metas["fc1"], case.config).lr, fc1 * depth), mode
            assert isclose(scaling(case.metas["fc2"], case.config).lr, fc2 * depth), mode
        standard = under(grown, "standard", optimizer="muon", muon_scale_mode=mode)
        assert scaling(grown.metas["fc2"], standard.config).lr == ETA_MUON


def test_muon_blocks_that_disagree_follow_the_fan_in(grown):
    """Query rows (2048 x 1024) are tall, key and value rows (512 x 1024) wide, and rows grow more than columns."""
    for mode, factor in (("spectral", 1 / sqrt(M_N)), ("match_rms_adamw", 1 / sqrt(M_N)), ("shape_scaling", 1.0)):
        case = under(grown, "mup", optimizer="muon", muon_scale_mode=mode)
        assert isclose(scaling(case.metas["qkv"], case.config).lr, ETA_MUON * factor)
    # In proportion, every block has the same factor, and it is the fan-in's.
    even = replace(grown.metas["qkv"], base_fan_out=3072 / 4)
    case = under(grown, "mup", optimizer="muon", muon_scale_mode="spectral")
    assert isclose(scaling(even, case.config).lr, ETA_MUON / 2)
    # Orthonormalized whole, the tensor is one matrix: 3072 over 576 rows, 1024 over 256 columns.
    whole = under(grown, "mup", optimizer="muon", muon_scale_mode="spectral", muon_split_qkv=False)
    assert isclose(scaling(grown.metas["qkv"], whole.config).lr, ETA_MUON / 2)


def test_muon_takes_hidden_matrices_only_and_leaves_the_rest_unchanged(grown):
    for name in SCHEME_NAMES:
        adam, muon = under(grown, name), under(grown, name, optimizer="muon")
        for key, m in grown.metas.items():
            if key in ("qkv", "proj", "fc1", "fc2"):
                s = scaling(m, muon.config)
                assert (s.optimizer, s.eps, s.init_std) == ("muon", 0.0, scaling(m, adam.config).init_std)
                assert s.weight_decay == LAMBDA  # constant learning rate in width, so constant decay
            else:
                assert scaling(m, muon.config) == scaling(m, adam.config)


def test_other_matrix_optimizers(grown):
    """All take Muon's numbers; but on the sphere hard retraction leaves no decay, and dynamic has it for strength."""
    hidden = ("qkv", "proj", "fc1", "fc2")
    for name, alpha, mode in itertools.product(SCHEME_NAMES, (0.5, 1.0), SCALE_MODES):
        muon = under(grown, name, alpha, optimizer="muon", muon_scale_mode=mode)
        for other in ("normuon", "dion"):
            case = under(grown, name, alpha, optimizer=other, muon_scale_mode=mode)
            for key, m in grown.metas.items():
                want = scaling(m, muon.config)
                assert scaling(m, case.config) == replace(want, optimizer=other if key in hidden else "adam")
        depth = M_L ** (alpha - 1) if name == "completep" else 1.0
        for optimizer, retraction in itertools.product(("muonsphere", "spectral_sphere"), ("hard", "dynamic")):
            sphere = under(grown, name, alpha, optimizer=optimizer, muon_scale_mode=mode, sphere_retraction=retraction)
            for key, m in grown.metas.items():
                s = scaling(m, sphere.config)
                if key in hidden:
                    want = scaling(m, muon.config)
                    assert (s.optimizer, s.lr) == (optimizer, want.lr)
                    # What a step stretches by does not follow the step's own scale.
                    strength = ETA_MUON * depth * LAMBDA if retraction == "dynamic" else 0
                    assert isclose(s.lr * s.weight_decay, strength)
                    assert mode != "unit_rms_norm" or isclose(s.lr, ETA_MUON * depth)
                else:
                    assert s == scaling(m, muon.config)


@pytest.mark.parametrize("rest", ["lion", "adam_atan2", "ademamix"])
def test_other_scalar_optimizers_follow_adams_rows(grown, rest):
    for name in SCHEME_NAMES:
        adam = under(grown, name, optimizer="muon")
        other = under(grown, name, optimizer="muon", scalar_optimizer=rest)
        for key, m in grown.metas.items():
            want = scaling(m, adam.config)
            if key not in ("qkv", "proj", "fc1", "fc2"):
                want = replace(want, optimizer=rest, eps=want.eps if rest == "ademamix" else 0.0)
            assert scaling(m, other.config) == want
        # Under AdamW for everything there is no rest.
        alone = under(grown, name, scalar_optimizer=rest)
        assert {scaling(m, alone.config).optimizer for m in grown.metas.values()} == {"adam"}


# ---- Identities


def test_every_role_has_a_row(grown_with_experts):
    assert {m.role for m in grown_with_experts.metas.values()} == set(Role)
    assert {kind_of(m) for m in grown_with_experts.metas.values()} == set(Kind)
    for scheme in SCHEMES.values():
        # Everett's and u-muP's papers have no routers and no shared key; experts and latents are refused there.
        assert set(scheme.rows) | {Kind.ROUTER, Kind.SHARED_KEY} == set(Kind)
        assert all(row.source for row in scheme.rows.values())


def test_hidden_matrices_meet_the_spectral_condition_at_init_and_in_steps(grown):
    """Init std x sqrt(fan in) and Adam's learning rate x fan in are those of the base."""
    case = under(grown, "mup")
    for key, fan_in, base in (("qkv", 1024, 256), ("proj", 2048, 384), ("fc1", 1024, 256), ("fc2", 4096, 512)):
        s = scaling(case.metas[key], case.config)
        sigma = SIGMA / sqrt(2 * LAYERS) if key in ("proj", "fc2") else SIGMA
        assert isclose(s.init_std * sqrt(fan_in), sigma * sqrt(base))
        assert isclose(s.lr * fan_in, ETA * base)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_branch_factor_times_learning_rate_is_one_over_depth(grown, alpha):
    case = under(grown, "completep", alpha)
    s, m = scaling(case.metas["qkv"], case.config), forward_multipliers(case.config)
    assert isclose(m.mlp_branch * s.lr, ETA / M_N / M_L)


def test_form_b_head_maps_to_form_a(grown):
    """abc symmetry: (a t, b / t, c / t, eps t, wd t) with t = m_N turns table 8's head into table 3's."""
    case = under(grown, "mup")
    s, t = scaling(case.metas["head"], case.config), M_N
    assert isclose(s.multiplier * t, 1.0)
    assert isclose(s.init_std / t, SIGMA_HEAD / M_N)
    assert isclose(s.lr / t, ETA_EMBEDDING / M_N)
    assert isclose(s.eps * t, EPS)
    assert isclose(s.weight_decay * t, LAMBDA * M_N)


def test_forms_a_and_b_train_alike(grown):
    """Twenty AdamW steps of an embedding, a hidden matrix and a head, head in form A and in form B."""
    case = under(grown, "mup", decay_embeddings=True, adam_eps=1e-3)
    table = {k: scaling(case.metas[k], case.config) for k in ("embedding", "qkv", "head")}
    factor = forward_multipliers(case.config).logits
    losses = []
    for t in (1.0, M_N):
        torch.manual_seed(0)
        weights = {k: torch.randn(16, 16, dtype=torch.float64) * 10 * s.init_std for k, s in table.items()}
        weights["head"] /= t
        groups = [
            {
                "params": [w.requires_grad_()],
                "lr": table[k].lr / (t if k == "head" else 1),
                "weight_decay": table[k].weight_decay * (t if k == "head" else 1),
                "eps": table[k].eps * (t if k == "head" else 1),
            }
            for k, w in weights.items()
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        tokens = torch.arange(16)
        for _ in range(20):
            x = torch.tanh(weights["embedding"] @ weights["qkv"])
            loss = torch.nn.functional.cross_entropy(factor * t * x @ weights["head"].T, tokens.roll(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0] < 2.7
