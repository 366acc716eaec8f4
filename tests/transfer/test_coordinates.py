"""The coordinate check passes where it must, and sees every rule that is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from benchmarks.coordinates import PLANS, TOY, cases
from benchmarks.coordinates import SCHEMES as SCHEME_FLAGS
from megatron_mup.config import ConfigError, parse_config
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization import table
from megatron_mup.parametrization.schemes import SCHEMES, Attention, Kind, Ratios, Scheme
from megatron_mup.transfer.check import CheckPlan, check_plan, exponents_of
from megatron_mup.transfer.coordinates import EPSILON, UPDATE, VECTOR_CHANGE, measure_sizes
from megatron_mup.transfer.verdict import Verdict, judge

WIDTH = CheckPlan(widths=(64, 128, 256), depths=(2,), steps=4)
DEPTH = CheckPlan(widths=(64,), depths=(2, 4, 10), steps=6)

HEADS = CheckPlan(widths=(64, 128, 256), depths=(2,), steps=8, grow="head-dim", tolerance=0.23)
"""Needs a learning rate at which queries and keys align within the steps."""


def verdicts(mesh, plan: CheckPlan, *flags: str) -> list[Verdict]:
    config = check_plan(parse_config(f"{TOY} {' '.join(flags)} --train-iters 1".split()).config, plan, 1)
    if config.moe.num_experts:
        mesh = Mesh.build(config, mesh.device)
    rows = list(measure_sizes(config, 64, mesh, plan.sizes, plan.steps, [config.training.seed], plan.grow))
    return judge(rows, exponents_of(config), plan.tolerance)


def failures(found: list[Verdict]) -> list[str]:
    return [f"{v.quantity} of {v.name}: {v.slope:.2f}" for v in found if not v.passed]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("plan", [WIDTH, DEPTH], ids=["width", "depth"])
def test_passes(lone_mesh, plan, optimizer):
    assert failures(verdicts(lone_mesh, plan, f"--parametrization completep --optimizer {optimizer}")) == []


def test_passes_on_the_sphere(lone_mesh):
    plan = replace(WIDTH, widths=(64, 128), depths=(1,))
    assert failures(verdicts(lone_mesh, plan, "--parametrization completep --optimizer spectral_sphere")) == []


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in cases() if case.parametrization != "standard"], ids=str)
def test_grid(lone_mesh, case):
    """Schemes and optimizers over sizes that they promise; the sphere, of which a core takes long, over fewer, and over
    all in tests/gpu."""
    plan = PLANS[case.axis]
    if case.optimizer == "spectral_sphere":
        plan = replace(plan, widths=plan.widths[:3], depths=plan.depths[:5])
    assert failures(case.run(lone_mesh, plan)) == []


@pytest.mark.parametrize("plan", [WIDTH, DEPTH], ids=["width", "depth"])
def test_the_standard_parametrization_fails(lone_mesh, plan):
    failed = failures(verdicts(lone_mesh, plan, "--parametrization standard"))
    assert any(line.startswith("activation change of final residual") for line in failed)
    assert len(failed) >= 10


def one(_: Ratios) -> float:
    return 1.0


def without(kind: Kind, cell: str) -> Callable[[Scheme], Scheme]:
    """The scheme without one rule of one kind of parameter."""
    return lambda s: replace(s, rows={**s.rows, kind: replace(s.rows[kind], **{cell: one})})


EPSILON_OF = {
    Kind.INPUT: "embedding",
    Kind.HIDDEN: "qkv",
    Kind.BLOCK_VECTOR: "norm",
    Kind.FINAL_VECTOR: "final_norm",
    Kind.READOUT: "readout",
}


def broken() -> Iterator[object]:
    """Each rule of CompleteP at alpha 1/2, where none is 1, over the size that it follows; and what must show it."""

    def case(name: str, plan: CheckPlan, change: Callable[[Scheme], Scheme], quantity: str, of: str) -> object:
        # Over depth models are costly: one in `make test`.
        slow = plan is DEPTH and not name.startswith("hidden lr")
        return pytest.param(plan, change, quantity, of, id=name, marks=pytest.mark.long if slow else ())

    yield case("hidden init", WIDTH, without(Kind.HIDDEN, "init"), "activation", "mlp.linear_fc1")
    yield case("hidden lr", WIDTH, without(Kind.HIDDEN, "lr_width"), UPDATE, "mlp.linear_fc1")
    yield case("logits", WIDTH, lambda s: replace(s, logits=one), "activation change", "logits")
    for kind, name in EPSILON_OF.items():
        yield case(f"{kind} eps", WIDTH, without(kind, "eps"), EPSILON, name)
    change = lambda s: replace(s, attention=Attention.ROOT)  # noqa: E731
    yield case("attention", HEADS, change, "activation change", "attention logits")
    yield case("hidden lr, depth", DEPTH, without(Kind.HIDDEN, "lr_depth"), UPDATE, "self_attention.linear_qkv")
    for kind, name in ((Kind.BLOCK_VECTOR, "norm"), (Kind.HEAD_VECTOR, "qk_norm")):
        yield case(f"{kind} lr, depth", DEPTH, without(kind, "lr_depth"), VECTOR_CHANGE, name)
        yield case(f"{kind} eps, depth", DEPTH, without(kind, "eps"), EPSILON, name)
    yield case("hidden eps, depth", DEPTH, without(Kind.HIDDEN, "eps"), EPSILON, "mlp_out")
    yield case("branch, depth", DEPTH, lambda s: replace(s, branch=one), "activation", "final residual")


@pytest.mark.parametrize(("plan", "change", "quantity", "name"), list(broken()))
def test_every_broken_rule_is_seen(lone_mesh, monkeypatch, plan, change, quantity, name):
    flags = "--parametrization completep --depth-alpha 0.5" + (" --qk-layernorm" if name == "qk_norm" else "")
    flags += " --lr 3e-2" if plan is HEADS else ""
    monkeypatch.setattr(table, "SCHEMES", {**SCHEMES, "completep": change(SCHEMES["completep"])})
    failed = failures(verdicts(lone_mesh, plan, flags))
    assert any(line.startswith(f"{quantity} of {name}") for line in failed), failed


EPSILONS = [(kind, "eps", WIDTH, EPSILON, EPSILON_OF[kind]) for kind in EPSILON_OF]
HIDDEN = [
    (Kind.HIDDEN, "lr_width", WIDTH, UPDATE, "mlp.linear_fc1"),
    (Kind.HIDDEN, "stored", WIDTH, UPDATE, "self_attention.linear_qkv"),
]
OTHERS = {
    "spectral": [
        HIDDEN[0],
        *EPSILONS[:-1],
        (Kind.HIDDEN, "init", WIDTH, "activation", "mlp.linear_fc1"),
        (Kind.READOUT, "lr_width", WIDTH, UPDATE, "logits"),
        (Kind.READOUT, "init", WIDTH, "activation", "logits"),
    ],
    # Its epsilon falls with what is stored alone, by half an exponent.
    "umup": [
        *HIDDEN,
        (Kind.HIDDEN, "eps", replace(WIDTH, tolerance=0.2), EPSILON, "qkv"),
        (Kind.HIDDEN, "lr_depth", DEPTH, UPDATE, "self_attention.linear_qkv"),
        (Kind.BLOCK_VECTOR, "lr_depth", DEPTH, VECTOR_CHANGE, "norm"),
        (None, "logits", WIDTH, UPDATE, "logits"),
    ],
    "munit": [*HIDDEN, *EPSILONS, (None, "logits", WIDTH, UPDATE, "logits")],
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("scheme", "kind", "cell", "plan", "quantity", "name"),
    [
        pytest.param(scheme, *rule, id=f"{scheme} {rule[0] or ''} {rule[1]}")
        for scheme, rules in OTHERS.items()
        for rule in rules
    ],
)
def test_every_broken_rule_of_other_schemes_is_seen(lone_mesh, monkeypatch, scheme, kind, cell, plan, quantity, name):
    """All cells that aren't 1 but that of u-muP's embedding, a finding of the paper: either slope is accepted."""
    change = without(kind, cell) if kind else lambda s: replace(s, logits=one)
    monkeypatch.setattr(table, "SCHEMES", {**SCHEMES, scheme: change(SCHEMES[scheme])})
    failed = failures(verdicts(lone_mesh, plan, f"--parametrization {scheme}", SCHEME_FLAGS[scheme]))
    assert any(line.startswith(f"{quantity} of {name}") for line in failed), failed


def test_the_unbroken_scheme_passes(lone_mesh):
    flags = "--parametrization completep --depth-alpha 0.5 --qk-layernorm"
    assert failures(verdicts(lone_mesh, DEPTH, flags)) == []


def test_unbroken_attention_passes(lone_mesh):
    """At the learning rate that a broken one needs to show, where other quantities of so small a model waver."""
    failed = failures(verdicts(lone_mesh, HEADS, "--parametrization completep --depth-alpha 0.5 --lr 3e-2"))
    assert not any(line.startswith("activation change") for line in failed), failed


ROUTED = "--num-experts 4 --moe-ffn-hidden-size 64 --moe-aux-loss-coeff 0.01"
EXPERTS = CheckPlan(widths=(64,), depths=(2,), experts=(4, 8, 16), steps=4, tolerance=0.3)
"""Tokens of one of many experts are more alike than those of one of few, so that their steps add up a little more."""
ROUTED_LARGE = {
    "width": replace(WIDTH, widths=(64, 128, 256, 512)),
    "experts": replace(EXPERTS, experts=(4, 8, 16, 32)),
    "both": replace(EXPERTS, widths=(64, 128, 256)),
}


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("plan", [WIDTH, EXPERTS], ids=["width", "experts"])
def test_experts_pass(lone_mesh, plan, optimizer):
    flags = f"{ROUTED} --parametrization completep --optimizer {optimizer}"
    assert failures(verdicts(lone_mesh, plan, flags)) == []


@pytest.mark.long
@pytest.mark.parametrize("rule", ["hidden", "zero"])
def test_other_rules_of_routers_pass(lone_mesh, rule):
    """Over width: of a router that starts at zero the first step's choice is the same experts for all tokens."""
    plan = replace(WIDTH, widths=(64, 128, 256, 512), tolerance=0.3)
    flags = f"{ROUTED} --parametrization completep --mup-router-rule {rule}"
    assert failures(verdicts(lone_mesh, plan, flags)) == []


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("scheme", ["mup", "completep"])
@pytest.mark.parametrize("plan", ROUTED_LARGE)
@pytest.mark.parametrize(
    "routing", ["", "--moe-router-score-function sigmoid --moe-shared-expert-intermediate-size 64"]
)
def test_experts_grid(lone_mesh, plan, scheme, optimizer, routing):
    flags = f"{ROUTED} {routing} --parametrization {scheme} --optimizer {optimizer}"
    assert failures(verdicts(lone_mesh, ROUTED_LARGE[plan], flags)) == []


@pytest.mark.parametrize(
    ("kind", "cell", "quantity", "name"),
    [
        (Kind.ROUTER, "lr_width", UPDATE, "mlp.router"),
        (Kind.ROUTER, "init", "activation", "mlp.router"),
        pytest.param(Kind.HIDDEN, "lr_width", UPDATE, "mlp.experts.linear_fc1", marks=pytest.mark.long),
    ],
)
def test_every_broken_rule_of_experts_is_seen(lone_mesh, monkeypatch, kind, cell, quantity, name):
    monkeypatch.setattr(table, "SCHEMES", {**SCHEMES, "completep": without(kind, cell)(SCHEMES["completep"])})
    plan = replace(WIDTH, widths=(64, 256))
    failed = failures(verdicts(lone_mesh, plan, f"{ROUTED} --parametrization completep"))
    assert any(line.startswith(f"{quantity} of {name}") for line in failed), failed


def test_experts_must_be_there(lone_mesh):
    with pytest.raises(ConfigError, match="the recipe has no experts"):
        verdicts(lone_mesh, EXPERTS, "")


LATENT = (
    "--multi-latent-attention --q-lora-rank 48 --kv-lora-rank 32 --qk-head-dim 12 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 16 --num-query-groups 4 --qk-layernorm --parametrization completep"
)


SMALL_LATENT = replace(WIDTH, tolerance=0.3)
"""At the smallest width latents and heads are so narrow that sizes waver."""
LARGE_LATENT = replace(WIDTH, widths=(128, 256, 512))


@pytest.mark.parametrize(
    ("plan", "optimizer"),
    [
        (SMALL_LATENT, "muon --muon-split-heads"),
        pytest.param(LARGE_LATENT, "adam", marks=pytest.mark.long),
        pytest.param(LARGE_LATENT, "muon", marks=pytest.mark.long),
        pytest.param(LARGE_LATENT, "muon --muon-scale-mode spectral", marks=pytest.mark.long),
        pytest.param(DEPTH, "adam", marks=pytest.mark.long),
        pytest.param(DEPTH, "muon", marks=pytest.mark.long),
    ],
)
def test_latent_attention_passes(lone_mesh, plan, optimizer):
    assert failures(verdicts(lone_mesh, plan, f"{LATENT} --optimizer {optimizer}")) == []


def test_the_shared_key_is_no_hidden_matrix(lone_mesh, monkeypatch):
    rows = {**SCHEMES["completep"].rows, Kind.SHARED_KEY: SCHEMES["completep"].rows[Kind.HIDDEN]}
    monkeypatch.setattr(table, "SCHEMES", {**SCHEMES, "completep": replace(SCHEMES["completep"], rows=rows)})
    failed = failures(verdicts(lone_mesh, replace(WIDTH, widths=(64, 256)), LATENT))
    assert any(line.startswith("spectral norm of shared_key") for line in failed), failed
