from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._functorch import config as partitioner

from megatron_mup.config import Config
from megatron_mup.models.gpt import GPT
from megatron_mup.planning.activations import layer_bytes
from megatron_mup.planning.cut import Cut
from megatron_mup.planning.memory import budgeted_bytes
from tests.runs import config_of, model_of

# PyTorch's own RMSNorm keeps other tensors on a CPU than on a GPU; LayerNorm has one kernel on each.
BASE = "--normalization LayerNorm"
# On a CPU, values of another width than queries run by the formula.
LATENT = (
    "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6 "
    "--disable-bias-linear --attention-backend unfused"
)

EXPERTS = "--num-experts 4 --moe-ffn-hidden-size 24 --disable-bias-linear"


def saved_bytes(config: Config, budget: float | None = None) -> int:
    """Bytes of everything that autograd saves in a forward pass, parameters left out, shared memory counted once.

    With a budget layers are cut into forward and backward as a compiler does under it.
    """
    model: GPT = model_of(config)
    for layer in model.decoder.layers.values() if budget is not None else ():
        layer.compile(backend="aot_eager_decomp_partition")
    params = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            saved[storage.data_ptr()] = storage
        return tensor

    batch = config.training.micro_batch_size
    tokens = torch.zeros(batch, config.training.seq_length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, labels=tokens, sample_index=torch.arange(batch))
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def one_layer(config: Config, budget: float | None = None) -> int:
    """Saved bytes that a second layer adds."""
    two = replace(config, model=replace(config.model, num_layers=2))
    one = replace(config, model=replace(config.model, num_layers=1))
    return saved_bytes(two, budget) - saved_bytes(one, budget)


@pytest.mark.parametrize(
    "flags",
    [
        "--disable-bias-linear",
        "--swiglu --disable-bias-linear",
        "--swiglu --disable-bias-linear --num-query-groups 2",
        "--squared-relu --micro-batch-size 1",
        "--qk-layernorm --disable-bias-linear",
        "--position-embedding-type none",
        "--position-embedding-type none --num-query-groups 2",
        "--kv-channels 16 --ffn-hidden-size 96",
        "--hidden-dropout 0.1",
        "--attention-backend unfused",
        "--attention-backend unfused --num-query-groups 2",
        f"{EXPERTS} --moe-router-topk 3",
        f"{EXPERTS} --swiglu --moe-shared-expert-intermediate-size 48",
        f"{LATENT} --q-lora-rank 24",
        f"{LATENT} --qk-layernorm",
    ],
)
def test_layers_keep_what_autograd_saves(flags):
    config = config_of(BASE, flags)
    experts = config.moe.num_experts is not None
    # What a router keeps is counted roughly: it is little.
    rel = 0.05 if experts else 0.01
    assert layer_bytes(config, Cut.of(config, 1), "all", experts) == pytest.approx(one_layer(config), rel=rel)


def test_recomputed_layers_keep_their_input():
    config = config_of(BASE, "--recompute-granularity full")
    # PyTorch's checkpoint saves a few empty tensors beside it.
    assert layer_bytes(config, Cut.of(config, 1), "input") == pytest.approx(one_layer(config), rel=0.01)


def test_selective_recomputation_keeps_less_than_all_and_more_than_the_input():
    config = config_of("--swiglu --disable-bias-linear")
    cut = Cut.of(config, 1)
    sizes = [layer_bytes(config, cut, kept) for kept in ("input", "products", "all")]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


@pytest.mark.long
@pytest.mark.parametrize("budget", [1.0, 0.7, 0.5])
def test_a_compiled_layer_keeps_what_its_budget_leaves(budget):
    sizes = "--hidden-size 256 --ffn-hidden-size 1024 --num-query-groups 2 --seq-length 128"
    config = config_of("--swiglu --disable-bias-linear --num-attention-heads 4", sizes)
    config = replace(config, training=replace(config.training, torch_compile=True))
    torch._dynamo.reset()
    everything, *less = (layer_bytes(config, Cut.of(config, 1), kept) for kept in ("all", "products", "input"))
    planned = everything if budget == 1 else budgeted_bytes(budget, everything, *less)
    with partitioner.patch(activation_memory_budget=budget):
        # It gives up whole tensors, so it hits no number.
        assert planned == pytest.approx(one_layer(config, budget), rel=0.01 if budget == 1 else 0.15)
    torch._dynamo.reset()


def test_tensor_ranks_divide_everything_with_sequence_parallelism_but_the_gathered_inputs():
    config = config_of("--swiglu --disable-bias-linear")
    cut = Cut.of(config, 1)
    alone = layer_bytes(config, cut, "all")
    split = layer_bytes(config, replace(cut, tp=2, sequence=2), "all")
    gathered = 2 * cut.tokens * config.model.hidden_size * 4
    assert split - gathered == pytest.approx((alone - gathered) / 2)
    assert layer_bytes(config, replace(cut, tp=2), "all") > split
