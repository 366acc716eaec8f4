"""Experts against a plain sum over all experts for every token, on one rank and over several."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_mup.kernels.grouped import grouped_linear
from megatron_mup.layers.dispatch import dispatch, plan_rows
from megatron_mup.layers.moe import Experts, GroupedLinear, expert_blocks, halved_swiglu
from megatron_mup.layers.router import Routing, within_capacity
from megatron_mup.models.gpt import GPT, Stage
from megatron_mup.parallel import collectives
from megatron_mup.parallel.mesh import ONE_EXPERT_RANK, ExpertAxis, TensorAxis
from tests.runs import VOCAB_SIZE, batch_of, config_of, model_of

EXPERTS, TOPK, HIDDEN, FFN, TOKENS = 4, 2, 8, 16, 12

CHOICES = {
    "mixed": lambda t: [(t * 7) % EXPERTS, (t * 7 + 1 + t % 3) % EXPERTS],
    "all to one pair": lambda _: [2, 3],
    "all to one": lambda _: [1],
    "one expert idle": lambda t: [t % 3, (t + 1) % 3],
    "nothing to the first rank": lambda t: [2 + t % 2, 3 - t % 2],
}


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    """``[experts, 2 ffn, hidden]`` (gate, then up) and ``[experts, hidden, ffn]``."""
    generator = torch.Generator().manual_seed(0)
    shapes = (EXPERTS, 2 * FFN, HIDDEN), (EXPERTS, HIDDEN, FFN)
    first, second = (torch.randn(shape, generator=generator) for shape in shapes)
    return first, second


def experts_of(first: torch.Tensor, second: torch.Tensor) -> Experts:
    layers = [GroupedLinear(nn.Parameter(w.flatten(0, 1).clone()), len(w)) for w in (first, second)]
    return Experts(*layers, halved_swiglu)


def inputs(choice: str, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, gates and experts of a rank."""
    generator = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    experts = torch.tensor([CHOICES[choice](token + rank) for token in range(TOKENS)])
    return x, torch.rand(experts.shape, generator=generator), experts


def plain(x, gates, experts, kept, first, second):
    """Every expert for every token, then a weighted sum."""
    gate, up = torch.einsum("th,efh->tef", x, first).chunk(2, -1)
    out = torch.einsum("tef,ehf->teh", F.silu(gate) * up, second)
    factors = torch.zeros(len(x), EXPERTS).scatter(1, experts, gates * kept)
    return torch.einsum("te,teh->th", factors, out)


def share(first: torch.Tensor, second: torch.Tensor, axis: ExpertAxis) -> list[torch.Tensor]:
    """What a rank has of both weights: whole experts, and of each an equal part of its width."""
    here, part = EXPERTS // axis.size, FFN // axis.tensor.size
    experts, width = slice(axis.rank * here, (axis.rank + 1) * here), slice(axis.tensor.rank * part, None)
    gates_and_ups = first[experts].unflatten(1, (2, FFN))[:, :, width][:, :, :part].flatten(1, 2)
    return [gates_and_ups, second[experts][:, :, width][:, :, :part]]


def compare(
    rank: int,
    ranks: int,
    axis: ExpertAxis,
    choice: str,
    capacity: int | None,
    pad: bool,
    compiled: bool = False,
    meanwhile=None,
) -> dict[str, float]:
    """Differences from the plain sum on one rank: output and gradients of tokens, gates and weights."""
    module = experts_of(*share(*weights(), axis))
    leaves = [w.clone().requires_grad_() for w in weights()]
    found: dict[str, float] = {}
    for source in range(ranks):
        x, gates, experts = inputs(choice, source)
        kept = torch.ones_like(experts, dtype=torch.bool)
        if capacity is not None:
            kept = within_capacity(gates, experts, EXPERTS, capacity, "probs")
        theirs = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
        want = plain(*theirs, experts, kept, *leaves)
        want.square().sum().backward()
        if source == rank:
            own = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
            routing = Routing(own[1], experts, None if capacity is None else kept, capacity)
            got = dispatch(own[0], routing, module, EXPERTS, axis, pad, compiled, meanwhile)
            got.square().sum().backward()
            found["output"] = difference(got, want)
            found["tokens"] = difference(own[0].grad, theirs[0].grad)
            found["gates"] = difference(own[1].grad, theirs[1].grad)
    grads = share(*(leaf.grad for leaf in leaves), axis)
    for name, layer, grad in zip(("fc1", "fc2"), (module.linear_fc1, module.linear_fc2), grads, strict=True):
        found[name] = difference(layer.weight.grad, grad.flatten(0, 1))
    return found


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest value, or over 1."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


CAPACITIES = [(None, False), (4, False), (4, True), (2 * TOKENS, True)]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("capacity", "pad"), CAPACITIES)
def test_equals_the_plain_sum(choice, capacity, pad):
    found = compare(0, 1, ONE_EXPERT_RANK, choice, capacity, pad)
    assert max(found.values()) < 1e-6, found


@pytest.mark.long
@pytest.mark.parametrize(("capacity", "pad"), [(None, False), (4, True)])
def test_compiled_equals_the_plain_sum(capacity, pad):
    torch._dynamo.reset()
    found = compare(0, 1, ONE_EXPERT_RANK, "mixed", capacity, pad, compiled=True)
    assert max(found.values()) < 1e-6, found


def over_ranks(parts: int) -> list[tuple[str, dict[str, float]]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group, places = dist.group.WORLD, range(ranks)
    tensor = TensorAxis(None, 0, 1)
    if parts > 1:
        own, _ = dist.new_subgroups_by_enumeration([list(places[i : i + parts]) for i in places[::parts]])
        tensor = TensorAxis(own, rank % parts, parts)
        group, _ = dist.new_subgroups_by_enumeration([list(places[i::parts]) for i in range(parts)])
    axis = ExpertAxis(group if ranks > parts else None, rank // parts, ranks // parts, tensor=tensor)
    return [
        (
            f"{choice}, capacity {capacity}, pad {pad}",
            compare(rank, ranks, axis, choice, capacity, pad, meanwhile=None if index % 2 else lambda: None),
        )
        for index, choice in enumerate(CHOICES)
        for capacity, pad in CAPACITIES
    ]


@pytest.mark.parametrize(("ranks", "parts"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_equals_the_plain_sum_over_ranks(pool, ranks, parts):
    """With four expert ranks each holds one expert, and some get no token; or so many ranks share each expert."""
    for rank, cases in enumerate(pool.run(ranks, over_ranks, parts)):
        assert len(cases) == len(CHOICES) * len(CAPACITIES)
        for name, found in cases:
            assert max(found.values()) < 1e-6, (rank, name, found)


def test_rows_are_planned_expert_by_expert():
    _x, gates, experts = inputs("mixed", 0)
    plan = plan_rows(Routing(gates, experts, None, None), EXPERTS, pad=False)
    in_order = experts.flatten()[plan.assignment]
    assert torch.equal(in_order, in_order.sort().values)
    assert torch.equal(plan.counts, experts.flatten().bincount(minlength=EXPERTS))
    assert torch.equal(plan.assignment[plan.place], torch.arange(TOKENS * TOPK))


def test_grouped_linear_without_rows():
    weight = torch.randn(3, 5, 4, requires_grad=True)
    rows = torch.randn(0, 4, requires_grad=True)
    out = grouped_linear(rows, weight, torch.zeros(3, dtype=torch.long))
    assert out.shape == (0, 5)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_blocks_are_each_experts_own():
    gate, up = expert_blocks(2 * FFN, "gate", "up")
    assert (gate.start, up.start, gate.size, gate.period) == (0, FFN, FFN, 2 * FFN)
    assert gate.matrices(EXPERTS * 2 * FFN) == (EXPERTS, FFN)


FLAGS = (
    "--num-experts 4 --disable-bias-linear --swiglu --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 24"
)


def test_a_layer_is_its_experts_and_the_shared_ones():
    """With all experts chosen and gates that sum to one."""
    model = model_of(config_of(FLAGS, "--moe-router-topk 4"))
    moe = model.decoder.layers["0"].mlp
    moe.router.reset()
    x = torch.randn(5, 3, 32)
    gates = (x @ moe.router.weight.T).softmax(-1)
    first = moe.experts.linear_fc1.weight.view(4, 2, 32, 32)
    second = moe.experts.linear_fc2.weight.view(4, 32, 32)
    want = moe.shared_experts(x)
    for e in range(4):
        inner = F.silu(x @ first[e, 0].T) * (x @ first[e, 1].T)
        want = want + gates[..., e, None] * (inner @ second[e].T)
    torch.testing.assert_close(moe(x), want, rtol=1e-5, atol=1e-6)


def test_dense_and_expert_layers_take_turns():
    config = config_of(FLAGS, "--num-layers 4 --moe-layer-freq 2")
    model = model_of(config)
    assert list(model.routers()) == [0, 2]
    assert {name.split(".")[2] for name in model.metas if "experts." in name} == {"0", "2"}
    assert model.metas["decoder.layers.1.mlp.linear_fc1.weight"].shape == (128, 32)
    for router in model.routers().values():
        router.reset()
    batch = batch_of(config)
    model(batch["tokens"], labels=batch["labels"])[0, 0].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.fixture
def lone_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_shared_experts_run_while_rows_travel(lone_group, monkeypatch, compiled):
    """And their backward while gradients do; nothing else changes."""
    torch._dynamo.reset()
    found, events = [], []
    for more in ("", "--moe-shared-expert-overlap"):
        config = config_of(
            FLAGS, "--num-layers 1 --moe-aux-loss-coeff 0.1", more, "--torch-compile" if compiled else ""
        )
        values = model_of(config)
        values.routers()[0].reset()
        model = GPT(config, VOCAB_SIZE, Stage(0, 1), expert_axis=ExpertAxis(lone_group, 0, 1)).to_empty(device="cpu")
        model.load_state_dict(values.state_dict())
        layer, shared = model.decoder.layers["0"], model.decoder.layers["0"].mlp.shared_experts
        if compiled:
            layer.compile()
        elif more:
            for name in ("_started", "_waited"):
                monkeypatch.setattr(collectives, name, noted(getattr(collectives, name), name, events))
            shared.register_forward_hook(lambda *_: events.append("forward"))
            shared.register_full_backward_hook(lambda *_: events.append("backward"))
        batch = batch_of(config)
        loss = model(batch["tokens"], labels=batch["labels"])[0, 0]
        loss.backward()
        found.append([loss, model.routers()[0].tally, *(p.grad for p in model.parameters())])
    assert events == ([] if compiled else ["_started", "forward", "_waited", "_started", "backward", "_waited"])
    for seen, want in zip(*found, strict=True):
        torch.testing.assert_close(seen, want, rtol=1e-4 * compiled, atol=1e-5 * compiled)


def noted(function, name, events):
    def run(*args):
        events.append(name)
        return function(*args)

    return run
