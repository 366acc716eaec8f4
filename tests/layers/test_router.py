"""Which experts a token goes to, against plain arithmetic token by token."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mup.config import MoEConfig
from megatron_mup.layers.dropout import Noise, jitter
from megatron_mup.layers.router import Router, Tally, balancing_loss, choose, within_capacity
from tests.runs import batch_of, config_of, model_of

EXPERTS, TOKENS = 8, 50


def settings(**flags) -> MoEConfig:
    return MoEConfig(num_experts=EXPERTS, **flags)


def logits_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))


def chosen_one_by_one(logits, bias, moe):
    """Gates ``{expert: gate}`` of each token by Python's own arithmetic."""
    found = []
    for row in logits.tolist():
        exponentials = [math.exp(x) for x in row]
        if moe.moe_router_score_function == "sigmoid":
            scores = [1 / (1 + math.exp(-x)) for x in row]
        elif moe.moe_router_pre_softmax:
            scores = [e / sum(exponentials) for e in exponentials]
        else:
            scores = row
        wanted = {e: s + (bias[e] if moe.moe_router_enable_expert_bias else 0) for e, s in enumerate(scores)}
        if moe.moe_router_num_groups:
            size, best = EXPERTS // moe.moe_router_num_groups, moe.moe_router_topk // moe.moe_router_group_topk
            groups = [range(g * size, (g + 1) * size) for g in range(moe.moe_router_num_groups)]
            groups.sort(key=lambda group: -sum(sorted((wanted[e] for e in group), reverse=True)[:best]))
            allowed = {e for group in groups[: moe.moe_router_group_topk] for e in group}
            wanted = {e: w for e, w in wanted.items() if e in allowed}
        top = sorted(wanted, key=lambda e: -wanted[e])[: moe.moe_router_topk]
        gates = {e: scores[e] for e in top}
        if moe.moe_router_score_function == "sigmoid":
            if len(top) > 1:
                gates = {e: g / sum(gates.values()) for e, g in gates.items()}
        elif not moe.moe_router_pre_softmax:
            gates = {e: exponentials[e] / sum(exponentials[i] for i in top) for e in top}
        if moe.moe_router_sqrt_gates:
            gates = {e: math.sqrt(g) for e, g in gates.items()}
        found.append({e: g * (moe.moe_router_topk_scaling_factor or 1) for e, g in gates.items()})
    return found


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"moe_router_topk": 3, "moe_router_pre_softmax": True},
        {"moe_router_topk": 1, "moe_router_pre_softmax": True},
        {"moe_router_topk": EXPERTS},
        {"moe_router_topk": 3, "moe_router_score_function": "sigmoid"},
        {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {"moe_router_sqrt_gates": True, "moe_router_topk_scaling_factor": 2.5},
        {"moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {
            "moe_router_topk": 2,
            "moe_router_num_groups": 2,
            "moe_router_group_topk": 1,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
        },
    ],
    ids=str,
)
def test_gates_and_experts(flags):
    moe, logits, bias = settings(**flags), logits_of(), torch.linspace(0.3, -0.3, EXPERTS)
    gates, experts = choose(logits, bias, moe)
    for token, want in enumerate(chosen_one_by_one(logits, bias.tolist(), moe)):
        got = dict(zip(experts[token].tolist(), gates[token].tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-5)


def test_gates_have_gradients_where_a_score_vanishes():
    logits = torch.tensor([[0.0, -200.0, -300.0]], requires_grad=True)
    gates, _ = choose(logits, torch.zeros(3), MoEConfig(num_experts=3, moe_router_sqrt_gates=True))
    gates.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("capacity", [1, 5, 13, TOKENS])
def test_capacity(policy, capacity):
    gates, experts = choose(logits_of(), torch.zeros(EXPERTS), settings())
    kept = within_capacity(gates, experts, EXPERTS, capacity, policy)
    for expert in range(EXPERTS):
        places = [(t, c) for t in range(TOKENS) for c in range(2) if experts[t, c] == expert]
        if policy == "probs":
            places.sort(key=lambda place: -gates[place].item())
        assert [kept[place].item() for place in places] == [n < capacity for n in range(len(places))]


def test_balancing_loss_is_one_at_balance_and_the_number_of_experts_at_worst():
    even = torch.full((6, 2, EXPERTS), 1 / EXPERTS)
    assert balancing_loss(even, torch.full((1, EXPERTS), 1 / EXPERTS), 6).item() == pytest.approx(1)
    one = torch.eye(EXPERTS)[0]
    assert balancing_loss(one.expand(6, 2, -1), one[None], 6).item() == pytest.approx(EXPERTS)


@pytest.mark.parametrize("kind", ["global_aux_loss", "aux_loss", "seq_aux_loss"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_and_their_gradients(kind, score):
    """Against autograd through the formulas, written down for each sequence."""
    seq, batch, hidden, share = 10, 3, 16, 0.25
    moe = settings(
        moe_router_load_balancing_type=kind,
        moe_router_score_function=score,
        moe_aux_loss_coeff=0.3,
        moe_z_loss_coeff=0.1,
    )
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(EXPERTS, hidden, generator=generator)
    x = torch.randn(seq, batch, hidden, generator=generator)
    router = Router(torch.nn.Parameter(weight.clone()), moe)
    router.reset()
    router.share = share
    router.load.copy_(torch.arange(1.0, EXPERTS + 1) / 36)
    own = x.clone().requires_grad_()
    (router(own).gates * 0).sum().backward()

    mine, weight = x.clone().requires_grad_(), weight.requires_grad_()
    logits = mine @ weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    picked = torch.nn.functional.one_hot(logits.topk(2, -1).indices, EXPERTS).sum(2).float()
    sequences = []
    for b in range(batch):
        loads = {
            "global_aux_loss": router.load,
            "aux_loss": picked.mean((0, 1)) / 2,
            "seq_aux_loss": picked[:, b].mean(0) / 2,
        }[kind]
        sequences.append(EXPERTS * (loads * scores[:, b].mean(0)).sum())
    balance, z_loss = torch.stack(sequences).mean(), logits.logsumexp(-1).square().mean()
    (share * (0.3 * balance + 0.1 * z_loss)).backward()

    torch.testing.assert_close(own.grad, mine.grad, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-4, atol=1e-7)
    tally = Tally.of(router.tally)
    assert tally.balancing_loss.item() == pytest.approx(share * balance.item(), rel=1e-5)
    assert tally.z_loss.item() == pytest.approx(share * z_loss.item(), rel=1e-5)
    assert torch.equal(tally.tokens, picked.sum((0, 1)).double())
    assert tally.dropped == 0


def test_evaluation_counts_nothing_and_recomputation_counts_once():
    router = Router(torch.nn.Parameter(torch.randn(EXPERTS, 16)), settings())
    router.reset()
    x = torch.randn(4, 2, 16, requires_grad=True)
    with torch.no_grad():
        router(x)
    assert router.tally.sum() == 0
    torch.utils.checkpoint.checkpoint(lambda x: router(x).gates.sum(), x, use_reentrant=False).backward()
    assert Tally.of(router.tally).tokens.sum() == 4 * 2 * 2


def test_jitter():
    """Within its bounds, anew for each sample and place, the same at the same ones; none in evaluation."""
    x, epsilon = torch.ones(4, 2, 1000), 0.25
    noise = Noise(torch.tensor(7), torch.tensor([5, 6]), torch.arange(4))
    factors = jitter(x, epsilon, noise)
    assert 1 - epsilon <= factors.min() < 1 - 0.9 * epsilon
    assert 1 + 0.9 * epsilon < factors.max() <= 1 + epsilon
    assert factors.mean().item() == pytest.approx(1, abs=0.01)
    assert factors.std().item() == pytest.approx(epsilon / math.sqrt(3), rel=0.05)
    assert len(factors.unique()) > 0.99 * factors.numel()
    rest = jitter(x[2:, 1:], epsilon, Noise(noise.key, noise.sample_index[1:], noise.places[2:]))
    assert torch.equal(rest, factors[2:, 1:])

    moe = settings(moe_input_jitter_eps=epsilon)
    router = Router(torch.nn.Parameter(torch.randn(EXPERTS, 16)), moe)
    router.reset()
    x = torch.randn(4, 2, 16)
    plain, noisy = router(x).gates, router(x, noise).gates
    assert not torch.equal(plain, noisy)
    want = Router(router.weight, settings())(jitter(x, epsilon, noise)).gates
    torch.testing.assert_close(noisy, want)


def test_jitter_is_for_training():
    flags = "--num-experts 4 --disable-bias-linear --moe-input-jitter-eps 0.3"
    model, plain = model_of(config_of(flags)), model_of(config_of(flags.replace("--moe-input-jitter-eps 0.3", "")))
    for each in (model, plain):
        for router in each.routers().values():
            router.reset()
    batch = batch_of(model.config)
    losses = [
        each(batch["tokens"], labels=batch["labels"], sample_index=batch["sample_index"]) for each in (model, plain)
    ]
    assert not torch.equal(*losses)
    model.eval()
    assert torch.equal(model(batch["tokens"], labels=batch["labels"]), losses[1])
