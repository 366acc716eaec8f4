"""Gradients of weights taken by themselves: what that asks of the nodes that have weights."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import stage as torch_stage

from megatron_mup.config import Config
from megatron_mup.parallel.mesh import Mesh
from tests.one_rank_pipeline import split_passes, stages_of, whole_passes
from tests.runs import batch_of, config_of, model_of

UNTIED = "--num-layers 3 --untie-embeddings-and-output-weights --swiglu"
MODELS = {
    "experts": "--disable-bias-linear --num-experts 4 --moe-ffn-hidden-size 32 --moe-aux-loss-coeff 0.1 "
    "--moe-shared-expert-intermediate-size 16",
    "fused loss": "--cross-entropy-fusion-impl linear",
}


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Mesh.build(Config(), torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def older(monkeypatch):
    """PyTorch 2.11: between the halves its lists hold no node of a Python function, and gradients of a node's results
    become one, that of the first."""
    take_inputs, take_weights = torch_stage.stage_backward_input, torch_stage.stage_backward_weight

    def of_inputs(*args: Any, **kwargs: Any) -> Any:
        grads, groups = take_inputs(*args, **kwargs)
        for group in groups:
            group["intermediates"] = [_weak(node) for node in group["intermediates"]]
        return grads, groups

    def of_weights(weights: Any, groups: Any, *args: Any, **kwargs: Any) -> Any:
        for group in groups:
            group["intermediates"] = [node() for node in group["intermediates"]]
            group["grads"] = [_first(grads) for grads in group["grads"]]
        return take_weights(weights, groups, *args, **kwargs)

    monkeypatch.setattr(torch_stage, "stage_backward_input", of_inputs)
    monkeypatch.setattr(torch_stage, "stage_backward_weight", of_weights)


def _weak(node: Any) -> Any:
    return weakref.ref(node) if isinstance(node, torch.autograd.function.BackwardCFunction) else lambda: node


def _first(grads: Any) -> Any:
    found = [grad for grad in grads if grad is not None]
    return (sum(found[1:], found[0]) if found else None, *[None] * (len(grads) - 1))


@pytest.mark.parametrize("model", MODELS)
def test_halves_of_backward_equal_the_whole(mesh, older, model):
    config = config_of(UNTIED, MODELS[model])
    whole, batch = model_of(config), batch_of(config)
    for router in whole.routers().values():
        router.reset()
    stages = stages_of(whole, config, mesh)
    want, seen = whole_passes(whole, batch, 2), split_passes(stages, config, mesh, batch, 2)
    assert want.keys() == seen.keys()
    assert all(torch.equal(seen[name], want[name]) for name in want)
