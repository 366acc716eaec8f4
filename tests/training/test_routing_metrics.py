"""What of the routing is recorded."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_mup.config import ModelConfig, MoEConfig
from megatron_mup.training.balancing import Balancing
from megatron_mup.training.flops import flops_per_token
from megatron_mup.training.routing import routing_metrics
from tests.runs import config_of, model_of, pretrain, words

TALLIES = torch.tensor([[10.0, 30.0, 20.0, 20.0, 1.5, 9.0, 8.0], [20.0, 20.0, 20.0, 20.0, 1.0, 3.0, 0.0]])


def test_numbers():
    found = routing_metrics(TALLIES, [1, 3], per_layer=True)
    assert found["moe/load balancing loss"] == 1.25
    assert found["moe/layer 1/MaxVio"] == 0.5
    assert found["moe/layer 3/MaxVio"] == 0
    assert found["moe/MaxVio"] == 0.25
    assert found["moe/MaxVio of the worst layer"] == 0.5
    assert found["moe/layer 1/max over mean load"] == 1.5
    assert found["moe/layer 1/min over mean load"] == 0.5
    assert found["moe/layer 1/dropped share"] == pytest.approx(0.1)
    assert found["moe/layer 1/tokens of expert 1"] == 30
    assert not any(name.startswith("moe/layer ") for name in routing_metrics(TALLIES, [1, 3], per_layer=False))


def test_a_run_records_them(tmp_path):
    file = tmp_path / "metrics.jsonl"
    flags = "--num-experts 4 --disable-bias-linear --moe-layer-freq [0]+[1] --moe-per-layer-logging --train-iters 2"
    outcome = pretrain(words(flags, f"--metrics-file {file} --moe-aux-loss-coeff 0.01"))
    assert outcome.code == 0, outcome.err
    start, *steps = map(json.loads, file.read_text().splitlines())
    assert start["run"]["ranks"] == 1
    assert len(steps) == 2
    for line in steps:
        tokens = [line[f"moe/layer 1/tokens of expert {e}"] for e in range(4)]
        assert sum(tokens) == 4 * 16 * 2
        assert line["moe/MaxVio"] == pytest.approx(max(tokens) / 32 - 1)
        assert 0.5 < line["moe/load balancing loss"] < 2
        assert line["moe/dropped share"] == 0


@pytest.mark.parametrize("by", ["global_aux_loss", "aux_loss", "seq_aux_loss", "bias"])
def test_balancing_balances(lone_mesh, by):
    """From one favoured expert, by each kind of loss and by the bias."""
    flags = "--moe-router-score-function sigmoid " + (
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.02"
        if by == "bias"
        else f"--moe-aux-loss-coeff 1 --moe-router-load-balancing-type {by}"
    )
    config = config_of("--num-experts 4 --disable-bias-linear --num-layers 1", flags)
    model = model_of(config)
    router, balancing = model.routers()[0], Balancing(model, config, lone_mesh)
    router.reset()
    x = torch.randn(64, 4, 32, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 3
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([0.5, 0.0, 0.0, 0.0])
    spread = []
    for _ in range(60):
        balancing.begin(1)
        (router(x).gates * 0).sum().backward()
        with torch.no_grad():
            router.weight -= 0.2 * router.weight.grad
        router.weight.grad = None
        spread.append(routing_metrics(balancing.finish(), [0], False)["moe/MaxVio"])
    assert spread[0] > 0.9
    assert max(spread[-5:]) < 0.2


def test_flops_count_the_chosen_experts():
    """Mixtral 8x7B: 12.9 billion parameters a token, by its paper (arXiv 2401.04088), embedding included."""
    model = ModelConfig(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, swiglu=True
    )
    matrices = flops_per_token(model, 1, 32000, "half", MoEConfig(num_experts=8)) / 6
    assert (matrices + 32000 * 4096) / 1e9 == pytest.approx(12.9, rel=2e-3)
    shared = MoEConfig(num_experts=8, moe_shared_expert_intermediate_size=100, moe_layer_freq="2")
    dense = flops_per_token(model, 1, 32000, "half")
    more = 16 * 6 * 4096 * (3 * (14336 + 100) + 8)
    assert flops_per_token(model, 1, 32000, "half", shared) == dense + more
