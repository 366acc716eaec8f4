"""Schemes beside muP and CompleteP, each cell written out by hand from its paper (see docs/parametrization.md)."""

from __future__ import annotations

from dataclasses import replace
from math import isclose, sqrt

import pytest

from megatron_mup.config import Config, ConfigError, ParametrizationConfig, TrainingConfig, parse_config, validate
from megatron_mup.parametrization.horizon import adam_betas, horizon_factors
from megatron_mup.parametrization.operations import matrix_scales
from megatron_mup.parametrization.schemes import FORM_B, Kind, Row, Scheme
from megatron_mup.parametrization.table import forward_multipliers, scaling

ETA, ETA_EMBEDDING, LAMBDA, EPS = 0.011, 0.017, 0.19, 2.3e-9
SIGMA, SIGMA_EMBEDDING, SIGMA_HEAD, LAYERS, BASE_LAYERS, VOCAB = 0.03, 0.05, 0.07, 24, 6, 1000
M_N, M_A, M_F, M_L = 4.0, 16 / 3, 8.0, 4.0
N, F, H = 1024, 4096, 128
OUTPUT = SIGMA / sqrt(2 * LAYERS)
HIDDEN = ("qkv", "proj", "fc1", "fc2")


def under(case, name, **flags):
    sections = {"parametrization": {"parametrization": name, **flags.pop("parametrization", {})}}
    return case.change(**sections, **flags)


def check(case, expected):
    """``expected``: name to (init std, learning rate, decay, eps)."""
    for name, wanted in expected.items():
        s = scaling(case.metas[name], case.config)
        got = (s.init_std, s.lr, s.weight_decay, s.eps)
        assert all(g is w if w is None else isclose(g, w, rel_tol=1e-12) for g, w in zip(got, wanted, strict=True)), (
            name,
            got,
            wanted,
        )


def test_depth_mup_is_alpha_one_half(grown):
    """TP-VI: branches as 1/sqrt(L), Adam's learning rates inside the layers as 1/sqrt(L)."""
    case = under(grown, "depth-mup")
    output = SIGMA / sqrt(2 * BASE_LAYERS)
    eps = EPS / M_N / sqrt(M_L)
    check(
        case,
        {
            "embedding": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, EPS / M_N),
            "qkv": (SIGMA / sqrt(M_N), ETA / M_N / sqrt(M_L), LAMBDA * M_N, eps),
            "proj": (output / sqrt(M_A), ETA / M_A / sqrt(M_L), LAMBDA * M_A, eps),
            "fc2": (output / sqrt(M_F), ETA / M_F / sqrt(M_L), LAMBDA * M_F, eps),
            "norm": (None, ETA / sqrt(M_L), 0, eps),
            "final_norm": (None, ETA, 0, EPS / M_N),
            "head": (SIGMA_HEAD, ETA_EMBEDDING, LAMBDA, EPS / M_N),
        },
    )
    assert isclose(forward_multipliers(case.config).mlp_branch, 1 / sqrt(M_L))
    # Its exponent is its own.
    other = under(grown, "depth-mup", parametrization={"depth_alpha": 1.0})
    assert scaling(case.metas["qkv"], case.config) == scaling(case.metas["qkv"], other.config)


def test_forms(grown):
    """Reference 1.1: form A is table 3, form C the symmetric one; both shift epsilon and decay too."""
    a, c = (under(grown, "mup", parametrization={"mup_form": form}) for form in "AC")
    a, c = (x.change(optimizer={"decay_embeddings": True}) for x in (a, c))
    hidden = {"qkv": (SIGMA / sqrt(M_N), ETA / M_N, LAMBDA * M_N, EPS / M_N)}
    check(
        a,
        hidden
        | {
            "embedding": (SIGMA_EMBEDDING, ETA_EMBEDDING, LAMBDA, EPS / M_N),
            "head": (SIGMA_HEAD / M_N, ETA_EMBEDDING / M_N, LAMBDA * M_N, EPS),
        },
    )
    check(
        c,
        hidden
        | {
            "embedding": (SIGMA_EMBEDDING / sqrt(M_N), ETA_EMBEDDING / sqrt(M_N), LAMBDA * sqrt(M_N), EPS / sqrt(M_N)),
            "head": (SIGMA_HEAD / sqrt(M_N), ETA_EMBEDDING / sqrt(M_N), LAMBDA * sqrt(M_N), EPS / sqrt(M_N)),
        },
    )
    assert (forward_multipliers(a.config).embedding, forward_multipliers(a.config).logits) == (1, 1)
    assert forward_multipliers(c.config).embedding == sqrt(M_N)
    assert isclose(forward_multipliers(c.config).logits, 1 / sqrt(M_N))


def test_spectral(grown):
    """Entries min(1, sqrt(out/in)) / sqrt(in) and Adam's learning rate 1/in, relative to the base, the head's too."""
    case = under(grown, "spectral")

    def growth(own, base):
        own, base = (min(1, sqrt(out / into)) / sqrt(into) for out, into in (own, base))
        return own / base

    eps = EPS / M_N
    check(
        case,
        {
            "embedding": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, eps),
            # Query, its largest block: 4/6 of 3072 rows, of 576 in the base.
            "qkv": (SIGMA * growth((2048, N), (384, 256)), ETA / M_N, LAMBDA * M_N, eps),
            "proj": (OUTPUT * growth((N, 2048), (256, 384)), ETA / M_A, LAMBDA * M_A, eps),
            "fc1": (SIGMA * growth((F, N), (512, 256)), ETA / M_N, LAMBDA * M_N, eps),
            "fc2": (OUTPUT * growth((N, F), (256, 512)), ETA / M_F, LAMBDA * M_F, eps),
            "norm": (None, ETA, 0, eps),
            "q_norm": (None, ETA, 0, EPS),
            "head": (SIGMA_HEAD * growth((VOCAB, N), (VOCAB, 256)), ETA_EMBEDDING / M_N, LAMBDA * M_N, EPS),
        },
    )
    factors = forward_multipliers(case.config)
    assert (factors.logits, factors.embedding, factors.mlp_branch) == (1, 1, 1)
    assert isclose(factors.attention_logits, sqrt(64) / 128)
    # fc2 is wide at both sizes and grows out of proportion: not muP's 1/sqrt(fan-in).
    assert not isclose(growth((N, F), (256, 512)), 1 / sqrt(M_F), rel_tol=1e-3)


@pytest.mark.parametrize("alignment", ["full", "none"])
def test_everett(grown, alignment):
    """2407.05872: SP with learning rates 1, 1/n, 1/n or 1, 1/sqrt(n), 1/sqrt(n); eps n^-1/2, n^-1/2, 1."""
    case = under(grown, "everett", parametrization={"lr_alignment": alignment})
    power = 1.0 if alignment == "full" else 0.5
    eps = EPS / sqrt(M_N)
    check(
        case,
        {
            "embedding": (SIGMA_EMBEDDING, ETA_EMBEDDING, 0, eps),
            "qkv": (SIGMA / sqrt(M_N), ETA / M_N**power, LAMBDA * M_N**power, eps),
            "proj": (OUTPUT / sqrt(M_A), ETA / M_A**power, LAMBDA * M_A**power, eps),
            "fc1": (SIGMA / sqrt(M_N), ETA / M_N**power, LAMBDA * M_N**power, eps),
            "fc2": (OUTPUT / sqrt(M_F), ETA / M_F**power, LAMBDA * M_F**power, eps),
            "norm": (None, ETA, 0, eps),
            "q_norm": (None, ETA, 0, EPS),
            "final_norm": (None, ETA, 0, eps),
            "head": (SIGMA_HEAD / sqrt(M_N), ETA_EMBEDDING / M_N**power, LAMBDA * M_N**power, EPS),
        },
    )
    factors = forward_multipliers(case.config)
    assert (factors.logits, factors.attention_branch) == (1, 1)
    assert isclose(factors.attention_logits, 1 / sqrt(H))


def without_base(case):
    names = ("mup_base_hidden_size", "mup_base_ffn_hidden_size", "mup_base_num_attention_heads", "mup_base_head_dim")
    return case.change(parametrization=dict.fromkeys((*names, "base_num_layers")))


def test_umup(grown):
    """Reference 3.1: all weights start at 1; decay of 0.19 per step at peak, whatever the learning rate."""
    case = without_base(under(grown, "umup", optimizer={"decay_embeddings": True}))

    def row(std, lr, decays=True):
        return std, lr, LAMBDA / lr if decays else 0, EPS

    check(
        case,
        {
            "embedding": row(1, ETA_EMBEDDING / sqrt(N)),
            "qkv": row(1, ETA / sqrt(N) / sqrt(LAYERS)),
            "proj": row(1, ETA / sqrt(2048) / sqrt(LAYERS)),
            "fc1": row(1, ETA / sqrt(N) / sqrt(LAYERS)),
            "fc2": row(1, ETA / sqrt(F) / sqrt(LAYERS)),
            "norm": row(None, ETA / sqrt(LAYERS), False),
            "q_norm": row(None, ETA / sqrt(LAYERS), False),
            "final_norm": row(None, ETA, False),
            "head": row(1, ETA_EMBEDDING),
        },
    )
    factors = forward_multipliers(case.config)
    assert isclose(factors.logits, 1 / N)
    assert isclose(factors.attention_logits, 1 / H)
    for name, fan_in in (("qkv", N), ("proj", 2048), ("fc1", N), ("fc2", F)):
        assert isclose(scaling(case.metas[name], case.config).multiplier, fan_in**-0.5)


def test_munit(grown):
    """Reference 4: hidden learning rates as sqrt(d_base / d), the others constant; the multipliers are absolute."""
    case = under(grown, "munit", parametrization={"residual_tau": 0.3, "base_num_layers": None})
    check(
        case,
        {
            "embedding": (1, ETA_EMBEDDING, 0, EPS / M_N),
            "qkv": (1, ETA / sqrt(M_N), LAMBDA / ETA * sqrt(M_N), EPS / M_N**1.5),
            "proj": (1, ETA / sqrt(M_A), LAMBDA / ETA * sqrt(M_A), EPS / M_N / sqrt(M_A)),
            "fc1": (1, ETA / sqrt(M_N), LAMBDA / ETA * sqrt(M_N), EPS / M_N**1.5),
            "fc2": (1, ETA / sqrt(M_F), LAMBDA / ETA * sqrt(M_F), EPS / M_N / sqrt(M_F)),
            "norm": (None, ETA, 0, EPS / M_N),
            "head": (1, ETA_EMBEDDING, LAMBDA / ETA_EMBEDDING, EPS / M_N),
        },
    )
    factors = forward_multipliers(case.config)
    assert isclose(factors.logits, 1 / N)
    assert isclose(factors.attention_logits, 1 / sqrt(H))
    for name, fan_in in (("qkv", N), ("proj", 2048), ("fc1", N), ("fc2", F)):
        scales = matrix_scales(case.metas[name], case.config)
        assert scales.forward == scales.weight == scales.backward
        assert isclose(scales.forward, fan_in**-0.5)


@pytest.mark.parametrize("name", ["umup", "munit"])
@pytest.mark.parametrize("optimizer", ["muon", "normuon", "muonsphere", "spectral_sphere"])
def test_orthonormal_steps_are_as_large_as_the_matrix_is_stored(grown, name, optimizer):
    """abc symmetry: W / sqrt(fan-in) acts, so a step of norm sqrt(out/in) on it is sqrt(fan-in) larger on W."""
    case = under(without_base(grown), name, optimizer={"optimizer": optimizer}, parametrization={"residual_tau": 0.3})
    depth = sqrt(LAYERS) if name == "umup" else 1.0
    for key, fan_in in (("qkv", N), ("proj", 2048), ("fc1", N), ("fc2", F)):
        s = scaling(case.metas[key], case.config)
        assert isclose(s.stored, sqrt(fan_in))
        assert isclose(s.lr, 0.013 / depth)
    assert scaling(case.metas["head"], case.config).stored == 1


@pytest.mark.parametrize("name", ["standard", "mup", "completep", "spectral", "everett"])
def test_plain_schemes_store_hidden_matrices_as_they_act(grown, name):
    case = under(grown, name)
    assert all(scaling(case.metas[key], case.config).stored == 1 for key in HIDDEN)


# ---- Experts


@pytest.mark.parametrize("name", ["mup", "depth-mup", "completep", "spectral"])
def test_router_rules(grown_with_experts, name):
    """Reference 6.1: Megatron's router starts as a hidden matrix, MSSP's at zero; learning rates are 1/m in all."""
    alpha = {"depth-mup": 0.5, "completep": 1.0}.get(name)
    depth_lr, depth_eps = (1.0, 1.0) if alpha is None else (M_L ** (alpha - 1), M_L**-alpha)
    plain = under(grown_with_experts, name)
    for rule, std in (("output", SIGMA / M_N), ("hidden", SIGMA / sqrt(M_N)), ("zero", 0.0)):
        case = plain.change(parametrization={"mup_router_rule": rule})
        check(case, {"router": (std, ETA / M_N * depth_lr, LAMBDA * M_N, EPS * depth_eps)})
        others = [meta for key, meta in case.metas.items() if key != "router"]
        assert all(scaling(meta, case.config) == scaling(meta, plain.config) for meta in others)


# ---- Weight decay


def test_decay_falls_with_width_whichever_the_optimizer(grown):
    """Qiu et al. 2512.05620: learning rate x decay as 1/width. AdamW's coefficient stays, Muon's falls."""
    for optimizer, lr in (("adam", ETA), ("muon", 0.013)):
        case = under(
            grown, "mup", parametrization={"weight_decay_rule": "inverse-width"}, optimizer={"optimizer": optimizer}
        )
        for key, width in (("qkv", M_N), ("proj", M_A), ("fc2", M_F)):
            s = scaling(case.metas[key], case.config)
            assert isclose(s.lr * s.weight_decay, lr * LAMBDA / width)
        head = scaling(case.metas["head"], case.config)
        assert isclose(head.lr * head.weight_decay, ETA_EMBEDDING * LAMBDA)


# ---- Base equivalence


@pytest.mark.parametrize("name", ["mup", "depth-mup", "completep", "spectral", "everett"])
@pytest.mark.parametrize("form", ["A", "B", "C"])
@pytest.mark.parametrize("rule", ["independent", "coupled", "sqrt-width", "inverse-width", "lr-independent"])
def test_at_ratio_one_it_is_the_standard_one_bitwise(base_equal, name, form, rule):
    standard = base_equal.change(parametrization={"weight_decay_rule": rule})
    for alignment in ("full", "none"):
        other = under(standard, name, parametrization={"mup_form": form, "lr_alignment": alignment})
        for meta in other.metas.values():
            assert scaling(meta, other.config) == scaling(meta, standard.config)
        assert forward_multipliers(other.config) == forward_multipliers(standard.config)


# ---- Batch size and length


def run_of(rule, batch, tokens, samples=6400, size=64, **optimizer):
    """A run of 64 x 32 tokens per step and 6400 x 32 in all, over a base run with ``batch`` and ``tokens``."""
    flags = ParametrizationConfig(batch_horizon_rule=rule, base_batch_tokens=batch, base_train_tokens=tokens)
    training = TrainingConfig(seq_length=32, global_batch_size=size, train_samples=samples)
    config = Config(parametrization=flags, training=training)
    return replace(config, optimizer=replace(config.optimizer, **optimizer))


def test_sde_rule():
    """Complete(d)P: batch x kappa at fixed data is lr, decay x sqrt(kappa), (1 - beta) x kappa, eps / sqrt(kappa)."""
    for batch, tokens, steps in ((2048, 204800 / 9, 9.0), (2048 / 4, 204800, 1 / 4), (2048 / 4, 204800 / 4, 1.0)):
        config = run_of("sde", int(batch), tokens, adam_beta1=0.99, adam_beta2=0.999)
        factors = horizon_factors(config)
        assert isclose(factors.lr, steps**-0.5, rel_tol=1e-9)
        assert isclose(factors.weight_decay, steps**-0.5, rel_tol=1e-9)
        assert isclose(factors.eps, steps**0.5, rel_tol=1e-9)
        assert adam_betas(config) == pytest.approx((1 - 0.01 / steps, 1 - 0.001 / steps), rel=1e-9)


def test_other_horizon_rules():
    base = (2048 // 4, 204800 // 16)
    assert isclose(horizon_factors(run_of("sqrt-batch", *base)).lr, 2)
    assert isclose(horizon_factors(run_of("power-law", *base)).lr, 2 * 16**-0.32)
    assert isclose(horizon_factors(run_of("step-law", *base)).lr, 16**0.307)
    assert horizon_factors(run_of("none", *base)) == horizon_factors(Config())
    assert adam_betas(run_of("power-law", *base)) == (0.9, 0.95)


def test_horizon_factors_reach_every_parameter(grown):
    rule = run_of("sde", 2048 // 4, 204800)
    case = replace(under(grown, "completep"), config=replace(under(grown, "completep").config, training=rule.training))
    scaled = case.change(parametrization={"batch_horizon_rule": "sde", "base_batch_tokens": 2048 // 4})
    for meta in case.metas.values():
        plain, got = scaling(meta, case.config), scaling(meta, scaled.config)
        assert isclose(got.lr, 2 * plain.lr)
        assert isclose(got.weight_decay, 2 * plain.weight_decay)
        assert isclose(got.eps, plain.eps / 2)


def test_short_runs_have_no_betas():
    config = run_of("sde", 2048, 204800 * 20)
    with pytest.raises(ConfigError, match="betas"):
        adam_betas(config)


# ---- Refusals

RUN = "--mock-data --vocab-size 256 --train-iters 10 --global-batch-size 4"


def refusal(argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(parse_config(f"{RUN} {argv}".split()).config, 1)
    return str(caught.value)


UMUP = "--parametrization umup --untie-embeddings-and-output-weights --disable-bias-linear"
MUNIT = "--parametrization munit --norm-position post-branch --residual-tau 0.3 --disable-bias-linear"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--parametrization mup --mup-form A", ["--mup-form A", "--mup-form B or C"]),
        ("--parametrization everett --optimizer muon", ["--parametrization everett", "--optimizer muon", "Adam"]),
        ("--parametrization mup --optimizer scion", ["--optimizer scion", "twice"]),
        ("--parametrization umup", ["umup", "add --disable-bias-linear"]),
        ("--parametrization umup --disable-bias-linear", ["umup", "--untie-embeddings-and-output-weights"]),
        (f"{UMUP} --mup-base-hidden-size 64", ["no base model", "--mup-base-hidden-size 64"]),
        (f"{UMUP} --base-num-layers 2", ["no base model"]),
        (f"{UMUP} --mup-embedding-mult 2", ["--mup-embedding-mult 2.0"]),
        (f"{UMUP} --softmax-scale 0.1", ["--softmax-scale 0.1", "--mup-attention-mult"]),
        (f"{UMUP} --squared-relu", ["--squared-relu"]),
        (f"{UMUP} --window-size 8", ["--window-size 8"]),
        (f"{UMUP} --norm-position post-branch", ["--norm-position post-branch"]),
        (f"{UMUP} --position-embedding-type learned_absolute", ["learned_absolute"]),
        (f"{UMUP} --mup-ffn-residual-scale 1.4", ["--mup-ffn-residual-scale 1.4"]),
        (f"{UMUP} --optimizer muon --muon-scale-mode spectral", ["--muon-scale-mode spectral"]),
        (f"{UMUP} --num-experts 4", ["--num-experts 4"]),
        ("--parametrization munit --residual-tau 0.3 --disable-bias-linear", ["--norm-position post-branch"]),
        (
            "--parametrization munit --norm-position post-branch --disable-bias-linear",
            ["--residual-tau", "0.4 for 4 layers"],
        ),
        (f"{MUNIT} --base-num-layers 2", ["--base-num-layers 2", "tau"]),
        (f"{MUNIT} --mup-residual-mult 2", ["--mup-residual-mult 2.0"]),
        ("--parametrization depth-mup --mup-attention-residual-scale 1.4", ["depth-mup"]),
        ("--parametrization everett --num-experts 4 --disable-bias-linear", ["everett", "--num-experts 4"]),
        ("--parametrization custom", ["--custom-parametrization"]),
        ("--custom-parametrization a:b", ["--parametrization custom"]),
        ("--batch-horizon-rule sde", ["--base-batch-tokens"]),
        ("--batch-horizon-rule sde --base-batch-tokens 4 --global-batch-size None", ["--global-batch-size"]),
        ("--batch-horizon-rule sde --base-batch-tokens 4 --optimizer muon", ["sde", "--optimizer adam only"]),
        ("--batch-horizon-rule power-law --base-batch-tokens 4 --optimizer muon", ["spectral_sphere"]),
        ("--batch-horizon-rule step-law --base-train-tokens 4 --parametrization mup", ["standard"]),
        ("--batch-horizon-rule sde --base-batch-tokens 4 --rampup-batch-size 2 2 4", ["one batch size"]),
    ],
)
def test_what_has_no_rule_is_refused(argv, parts):
    told = refusal(argv)
    assert [part for part in parts if part not in told] == []


# ---- Rules of the user's own


def made_by_the_user() -> Scheme:
    """Standard, but hidden learning rates fall as 1/width^2."""
    hidden = replace(FORM_B[Kind.HIDDEN], source="this test", init=lambda r: 1.0, lr_width=lambda r: r.matrix**-2)
    return Scheme(width=True, depth=False, rows={**FORM_B, Kind.HIDDEN: hidden})


def incomplete() -> Scheme:
    return Scheme(width=True, depth=False, rows={Kind.HIDDEN: Row(source="this test")})


def no_scheme() -> int:
    return 1


def custom(case, name):
    return under(case, "custom", parametrization={"custom_parametrization": f"{__name__}:{name}"})


def test_custom_rules(grown):
    case = custom(grown, "made_by_the_user")
    s = scaling(case.metas["qkv"], case.config)
    assert (s.init_std, s.lr) == (SIGMA, ETA / M_N**2)
    assert isclose(s.weight_decay, LAMBDA * M_N**2)
    assert forward_multipliers(case.config).logits == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (f"{__name__}:missing", "no function 'missing'"),
        (f"{__name__}:no_scheme", "returned a int"),
        ("no_such_module:rules", "can't import"),
        ("", "can't import"),
    ],
)
def test_custom_rules_that_are_none(grown, name, why):
    case = under(grown, "custom", parametrization={"custom_parametrization": name})
    with pytest.raises(ConfigError, match=why):
        scaling(case.metas["qkv"], case.config)


def test_a_kind_without_a_rule_is_refused(grown):
    case = custom(grown, "incomplete")
    assert scaling(case.metas["qkv"], case.config).lr == ETA
    with pytest.raises(ConfigError, match="no rule for parameters of kind readout"):
        scaling(case.metas["head"], case.config)
