"""Tensor-parallel edges: values forward, sums of gradients backward; and two ranks' layers are the whole layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.config import Config, ParallelConfig
from megatron_mup.layers.embedding import PositionEmbedding, VocabParallelEmbedding
from megatron_mup.layers.linear import ColumnLinear, RowLinear
from megatron_mup.parallel.collectives import all_reduce, enter_tensor_parallel, leave_tensor_parallel
from megatron_mup.parallel.mesh import ALONE, Mesh, TensorAxis

SEQ, BATCH, HIDDEN, FFN, VOCAB = 6, 2, 8, 12, 7


def axis() -> TensorAxis:
    return Mesh.build(Config(parallel=ParallelConfig(tensor_model_parallel_size=2)), torch.device("cpu")).tp


def tensor(tag: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(tag))


def edges():
    """Output and input gradient of each edge; rank r puts in x_r and weighs its output by w_r."""
    tp, seen = axis(), {}
    for name, edge in (("enter", enter_tensor_parallel), ("leave", leave_tensor_parallel)):
        for sequence_parallel in (False, True):
            x = tensor(tp.rank, SEQ, BATCH, HIDDEN).requires_grad_()
            y = edge(x, tp, sequence_parallel)
            weights = tensor(10 + tp.rank, *y.shape)
            (y * weights).sum().backward()
            seen[name, sequence_parallel] = y.detach(), x.grad, weights
    seen["max"] = all_reduce(tensor(tp.rank, 5), "max", tp)
    return seen


def test_edges(pool):
    ranks = pool.run(2, edges)
    x = [tensor(rank, SEQ, BATCH, HIDDEN) for rank in range(2)]
    for rank, seen in enumerate(ranks):

        def weights(key):
            return [r[key][2] for r in ranks]

        def check(key, output, gradient, seen=seen):
            torch.testing.assert_close(seen[key][0], output)
            torch.testing.assert_close(seen[key][1], gradient)

        check(("enter", False), x[rank], sum(weights(("enter", False))))
        check(("enter", True), torch.cat(x), sum(weights(("enter", True))).chunk(2)[rank])
        check(("leave", False), x[0] + x[1], seen["leave", False][2])
        check(("leave", True), (x[0] + x[1]).chunk(2)[rank], torch.cat(weights(("leave", True))))
        assert torch.equal(seen["max"], torch.maximum(tensor(0, 5), tensor(1, 5)))


def test_alone_nothing_happens():
    x = torch.randn(3)
    assert enter_tensor_parallel(x, ALONE, False) is leave_tensor_parallel(x, ALONE, False) is x
    assert all_reduce(x, "sum", ALONE) is x


WEIGHTS = {
    "embedding": (VOCAB, HIDDEN),
    "positions": (SEQ, HIDDEN),
    "fc1": (FFN, HIDDEN),
    "fc1_bias": (FFN,),
    "fc2": (HIDDEN, FFN),
    "fc2_bias": (HIDDEN,),
}
CUT = {"embedding": 0, "fc1": 0, "fc1_bias": 0, "fc2": 1}
TOKENS = torch.tensor([[0, 6], [1, 5], [2, 4], [3, 3], [6, 6], [5, 0]])


def whole():
    """Output and gradients of the layers on one rank, by plain PyTorch."""
    weights = {name: tensor(i, *shape).requires_grad_() for i, (name, shape) in enumerate(WEIGHTS.items())}
    x = F.embedding(TOKENS, weights["embedding"]) + weights["positions"][:, None]
    x = F.linear(F.gelu(F.linear(x, weights["fc1"], weights["fc1_bias"])), weights["fc2"], weights["fc2_bias"])
    (x * tensor(99, *x.shape)).sum().backward()
    return x.detach(), {name: w.grad for name, w in weights.items()}


def layers(sequence_parallel: bool):
    """The same from this rank's shards."""
    tp, params, weights = axis(), {}, {name: tensor(i, *s) for i, (name, s) in enumerate(WEIGHTS.items())}
    for name, weight in weights.items():
        dim = CUT.get(name)
        part = weight if dim is None else weight.narrow(dim, *tp.local(weight.shape[dim]))
        params[name] = nn.Parameter(part.clone())
    start = tp.local(VOCAB)[0]
    x = VocabParallelEmbedding(params["embedding"], start, tp, sequence_parallel)(TOKENS)
    positions = torch.arange(SEQ)[:, None]
    x = x + PositionEmbedding(params["positions"], tp, sequence_parallel)(positions)
    x = F.gelu(ColumnLinear(params["fc1"], params["fc1_bias"], tp, sequence_parallel)(x))
    x = RowLinear(params["fc2"], params["fc2_bias"], tp, sequence_parallel)(x)
    weight = tensor(99, SEQ, BATCH, HIDDEN)
    (x * (weight.chunk(2)[tp.rank] if sequence_parallel else weight)).sum().backward()
    return x.detach(), {name: p.grad for name, p in params.items()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_layers_of_two_ranks(pool, sequence_parallel):
    output, gradients = whole()
    ranks = pool.run(2, layers, sequence_parallel)
    if sequence_parallel:
        torch.testing.assert_close(torch.cat([r[0] for r in ranks]), output)
    else:
        for rank in ranks:
            torch.testing.assert_close(rank[0], output)
    for name, gradient in gradients.items():
        parts = [r[1][name] for r in ranks]
        if name in CUT:
            torch.testing.assert_close(torch.cat(parts, CUT[name]), gradient)
        elif sequence_parallel:
            torch.testing.assert_close(parts[0] + parts[1], gradient)
        else:
            torch.testing.assert_close(parts[0], gradient)
            torch.testing.assert_close(parts[1], gradient)
