"""Plans of context-parallel ranks and of experts against closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.train_step import VOCAB_SIZE as PRESET_VOCAB
from benchmarks.train_step import preset
from megatron_mup.config import parse_config
from megatron_mup.planning.activations import layer_bytes
from megatron_mup.planning.cut import Cut
from megatron_mup.planning.estimate import complete, estimate
from megatron_mup.planning.hardware import GIB, HARDWARE
from megatron_mup.planning.inventory import Inventory
from megatron_mup.planning.memory import fullest_state, stage_memory
from megatron_mup.planning.report import layout
from megatron_mup.planning.search import suggest
from megatron_mup.planning.speed import traffic
from tests.runs import VOCAB_SIZE, words

H100 = HARDWARE["h100"]
HIDDEN, SEQ, LAYERS, BATCH, FP32 = 32, 16, 2, 2, 4
"""Of `tests.runs.TINY`; four heads, as many of keys, and all in fp32."""
EXPERTS = "--num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 16 --swiglu --disable-bias-linear"


def config_of(*flags):
    return complete(parse_config(words(*flags)).config)


def axes(world_size, *flags):
    config = config_of(*flags)
    inventory, cut = Inventory.of(config, VOCAB_SIZE), Cut.of(config, world_size)
    return traffic(config, inventory, cut, H100, 1.0)


def test_ranks_of_a_ring_hold_what_shorter_sequences_take():
    config = config_of("--context-parallel-size 4")
    short = replace(config, training=replace(config.training, seq_length=SEQ // 4))
    alone = replace(Cut.of(config, 4), context=1)
    for kept in ("input", "products", "all"):
        assert layer_bytes(config, Cut.of(config, 4), kept) == layer_bytes(short, alone, kept)


def test_gathering_keeps_keys_and_values_of_the_whole_sequence():
    ring, gathered = (config_of(f"--context-parallel-size 2 --cp-comm-type {kind}") for kind in ("p2p", "all_gather"))
    cut = Cut.of(ring, 2)
    others = BATCH * SEQ // 2 * 2 * HIDDEN * FP32
    assert layer_bytes(gathered, cut, "all") - layer_bytes(ring, cut, "all") == others


@pytest.mark.parametrize("again", [0, 1], ids=["", "recomputed"])
def test_keys_and_values_go_around(again):
    flags = "--context-parallel-size 4 --recompute-granularity full" if again else "--context-parallel-size 4"
    pair = BATCH * SEQ // 4 * 2 * HIDDEN * FP32
    steps = LAYERS * 4 // BATCH
    assert axes(4, flags)["context"].sent == steps * pair * (3 * (2 + again) + 4)
    assert axes(4, flags, "--cp-comm-type all_gather")["context"].sent == steps * pair * 3 * (2 + again)


def test_tokens_go_to_their_experts_and_back():
    found = axes(4, EXPERTS, "--expert-model-parallel-size 4 --global-batch-size 8")
    assert found["experts"].sent == LAYERS * 4 * BATCH * SEQ * 3 * HIDDEN * FP32 * 3 / 4
    # A rank holds a quarter of the experts, which nobody shares; all else is summed over four ranks.
    per_layer = 4 * HIDDEN * HIDDEN + 8 * HIDDEN + 2 * HIDDEN
    dense = LAYERS * per_layer + VOCAB_SIZE * HIDDEN + HIDDEN
    assert found["data, replicas"].sent == 2 * dense * 3 / 4 * FP32


def test_tokens_go_to_all_ranks_that_share_an_expert():
    sizes = "--expert-model-parallel-size 2 --expert-tensor-parallel-size 2 --global-batch-size 8"
    found, rows = axes(4, EXPERTS, sizes), LAYERS * 4 * BATCH * SEQ * 3 * HIDDEN * FP32
    assert (found["experts"].sent, found["expert tensor"].sent) == (rows / 2, rows)
    # As many rows come to a rank as go to two, each to half an expert: no more is kept of what is inside.
    kept = [
        layer_bytes(config, Cut.of(config, 4), "all", experts=True)
        for config in (config_of(EXPERTS, sizes), config_of(EXPERTS, "--expert-model-parallel-size 2"))
    ]
    gathered = BATCH * SEQ * 3
    assert kept[0] - kept[1] == gathered * (HIDDEN * FP32 + 2 * 8)


def test_experts_divide_among_their_ranks():
    """Weights and momentum of experts are a quarter each; only a token's own experts take time."""
    found = {}
    for ranks in (1, 4):
        config = config_of(EXPERTS, f"--expert-model-parallel-size {ranks} --global-batch-size 8")
        found[ranks] = estimate(config, Inventory.of(config, VOCAB_SIZE), 4, VOCAB_SIZE, H100).memory[0]
    experts = LAYERS * 8 * 3 * 16 * HIDDEN
    assert found[1].weights - found[4].weights == experts * 3 / 4 * FP32
    assert found[1].state - found[4].state == experts * 3 / 4 * 2 * FP32
    times = []
    for topk in (1, 3):
        config = config_of(EXPERTS, f"--moe-router-topk {topk} --moe-router-pre-softmax")
        speed = estimate(config, Inventory.of(config, VOCAB_SIZE), 1, VOCAB_SIZE, H100).speed
        times.append((speed.forward_backward, speed.flops_per_token))
    assert times[1][1] - times[0][1] == 6 * LAYERS * 2 * 3 * 16 * HIDDEN
    assert times[1][0] > times[0][0]


def test_momentum_of_experts_is_shared_by_those_who_hold_them():
    config = config_of(EXPERTS, "--optimizer muon --use-torch-fsdp2 --global-batch-size 8")
    inventory = Inventory.of(config, VOCAB_SIZE)
    matrices = LAYERS * (4 * HIDDEN * HIDDEN + 8 * 3 * 16 * HIDDEN)
    rest = VOCAB_SIZE * HIDDEN + LAYERS * (8 * HIDDEN + 2 * HIDDEN) + HIDDEN
    assert fullest_state(inventory, Cut.of(config, 1), 0) == FP32 * (matrices + 2 * rest)
    even = FP32 * (matrices + 2 * rest) / 2
    assert fullest_state(inventory, Cut.of(config, 2), 0) == pytest.approx(even, rel=0.01)


def test_suggestions_keep_context_and_expert_ranks():
    config = config_of(EXPERTS, "--context-parallel-size 2 --expert-model-parallel-size 4 --global-batch-size 8")
    found, _ = suggest(config, Inventory.of(config, VOCAB_SIZE), 8, VOCAB_SIZE, H100, 20)
    assert len(found) > 1
    for estimate_ in found:
        assert "cp 2, ep 4" in layout(estimate_)
        cut = estimate_.cut
        assert (cut.tp * cut.pp * cut.dp, cut.experts * cut.expert_replicate * cut.expert_shard * cut.pp) == (8, 8)


@pytest.mark.parametrize(("recompute", "measured"), [("none", 51.2), ("full", 15.8)])
def test_peaks_measured_on_two_h100s(recompute, measured):
    """benchmarks/results/long_context_h100.md."""
    flags = "--micro-batch-size 1 --seq-length 65536 --context-parallel-size 2 --cross-entropy-fusion-impl linear"
    again = f" --recompute-granularity {recompute}" if recompute != "none" else ""
    config = complete(parse_config([*preset("dense-1b"), *(flags + again).split()]).config)
    planned = stage_memory(config, Inventory.of(config, PRESET_VOCAB), Cut.of(config, 2), 0, PRESET_VOCAB)
    assert planned.peak / GIB == pytest.approx(measured, rel=0.1)
