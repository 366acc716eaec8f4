from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks.train_step import VOCAB_SIZE as PRESET_VOCAB
from benchmarks.train_step import preset
from megatron_mup.config import Config, parse_config
from megatron_mup.optim.build import MATRIX_OPTIMIZERS, SCALAR_OPTIMIZERS
from megatron_mup.optim.clip import scale_grads
from megatron_mup.optim.main_params import local_part
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.planning.cut import Cut
from megatron_mup.planning.hardware import GIB, HARDWARE
from megatron_mup.planning.inventory import Inventory, parameters
from megatron_mup.planning.memory import fullest_state, stage_memory, stage_plan, state_bytes
from megatron_mup.planning.speed import stage_seconds, traffic
from tests.runs import VOCAB_SIZE, batch_of, config_of, step_of, words

fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")


@contextmanager
def rank_of(config: Config, rank: int, world_size: int) -> Iterator[Mesh]:
    """The mesh as one rank of many sees it; its collectives do nothing."""
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Mesh.build(config, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


EXPERTS = "--num-experts 4 --moe-ffn-hidden-size 16 --moe-layer-freq [0,1] --swiglu --disable-bias-linear"
LAYOUTS = {
    "alone": ("", 1),
    "tp": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "pp-tied": ("--pipeline-model-parallel-size 2", 2),
    "replicas": ("--swiglu --disable-bias-linear", 2),
    "sharded": ("--use-torch-fsdp2", 3),
    "kept-gathered": ("--use-distributed-optimizer --swiglu --disable-bias-linear --num-query-groups 2", 2),
    "hsdp-tp": (
        "--tensor-model-parallel-size 2 --data-parallel-sharding-strategy optim_grads "
        "--num-distributed-optimizer-instances 2 --untie-embeddings-and-output-weights",
        8,
    ),
    "pp-interleaved": ("--pipeline-model-parallel-size 2 --num-layers 5 --pipeline-schedule Interleaved1F1B", 2),
    "pp-v-tied": ("--pipeline-model-parallel-size 2 --num-layers 5 --pipeline-schedule ZBVZeroBubble", 4),
    "context": ("--context-parallel-size 2 --use-torch-fsdp2", 4),
    "context-replicas": ("--context-parallel-size 2", 2),
    "experts": (f"{EXPERTS} --expert-model-parallel-size 2 --use-torch-fsdp2", 4),
    "experts-tp-context": (
        f"{EXPERTS} --expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
        "--context-parallel-size 2 --use-torch-fsdp2",
        4,
    ),
    "experts-cut": (f"{EXPERTS} --expert-tensor-parallel-size 2 --use-torch-fsdp2", 4),
    "experts-cut-tp-context": (
        f"{EXPERTS} --expert-tensor-parallel-size 2 --expert-model-parallel-size 2 --tensor-model-parallel-size 2 "
        "--sequence-parallel --context-parallel-size 2",
        8,
    ),
    "experts-tp": (f"{EXPERTS} --tensor-model-parallel-size 2 --sequence-parallel", 2),
    "pp-fsdp": ("--pipeline-model-parallel-size 2 --use-torch-fsdp2 --untie-embeddings-and-output-weights", 4),
}
PRECISIONS = {"fp32": "", "bf16": "--bf16", "bf16-main": "--bf16 --main-params-dtype bf16"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_what_is_planned(layout, precision):
    flags, world_size = LAYOUTS[layout]
    optimizer = "--optimizer normuon" if "hsdp" in layout or layout in ("replicas", "pp-fsdp") else ""
    config = parse_config(
        words(flags, PRECISIONS[precision], optimizer, f"--global-batch-size {4 * world_size}")
    ).config
    inventory, cut = Inventory.of(config, VOCAB_SIZE), Cut.of(config, world_size)
    largest = dict.fromkeys(("weights", "main", "state"), 0.0)
    for rank in range(world_size):
        with rank_of(config, rank, world_size) as mesh:
            step = step_of(config, mesh)
            stage = mesh.rank("pp")
            held = nbytes(state for _, state in step.optimizer.state_tensors().values())
            number = rank % (world_size // cut.pp)
            assert state_bytes(inventory, cut, stage, number, stage_plan(inventory, cut, stage)) == held
            if stage == 0:
                modules = nbytes(local_part(p.detach()) for p in step.model.parameters())
                copies = nbytes(main.value for main, _ in step.main.copied)
                for name, value in (("weights", modules), ("main", copies), ("state", held)):
                    largest[name] = max(largest[name], value)
    planned = stage_memory(config, inventory, cut, 0, VOCAB_SIZE)
    assert (planned.weights, planned.main) == (largest["weights"], largest["main"])
    assert planned.state == largest["state"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [("alone", "adam"), *((name, "muon") for name in ("alone", "tp", "sharded", "kept-gathered"))],
)
def test_gradients_are_as_planned(layout, precision, optimizer):
    """Muon's are clipped in place, in the precision of what it updates; AdamW's stay as they come."""
    flags, world_size = LAYOUTS[layout]
    extra = f"--global-batch-size {2 * world_size} --optimizer {optimizer}"
    config = parse_config(words(flags, PRECISIONS[precision], extra)).config
    with rank_of(config, 0, world_size) as mesh:
        step = step_of(config, mesh)
        batch = {name: value[:2] for name, value in batch_of(config).items()}
        step.forward_backward(batch, torch.ones(()))
        step.main.collect_grads()
        if optimizer == "muon":
            scale_grads(step.main.params, torch.ones(()))
        held = nbytes(main.grad for main in step.main.params)
    planned = stage_memory(config, Inventory.of(config, VOCAB_SIZE), Cut.of(config, world_size), 0, VOCAB_SIZE)
    assert planned.gradients == held


@pytest.mark.parametrize(
    ("optimizer", "scalar"),
    [
        *((optimizer, "adam") for optimizer in MATRIX_OPTIMIZERS),
        *(("muon", scalar) for scalar in SCALAR_OPTIMIZERS[1:]),
    ],
)
def test_every_optimizer_is_known(optimizer, scalar):
    config = config_of(f"--optimizer {optimizer} --scalar-optimizer {scalar} --untie-embeddings-and-output-weights")
    inventory, cut = Inventory.of(config, VOCAB_SIZE), Cut.of(config, 1)
    with rank_of(config, 0, 1) as mesh:
        step = step_of(config, mesh)
        held = nbytes(state for _, state in step.optimizer.state_tensors().values())
        assert parameters(inventory.whole()) == sum(main.value.numel() for main in step.main.params)
    assert fullest_state(inventory, cut, 0) == held
    assert state_bytes(inventory, cut, 0, 0, stage_plan(inventory, cut, 0)) == held


MEASURED = {
    "dense-1b": (1, 16.8),
    "dense-1b --cross-entropy-fusion-impl linear": (1, 16.86),
    "dense-1b --micro-batch-size 4 --recompute-granularity full": (1, 9.91),
    "dense-1b --micro-batch-size 4 --recompute-granularity selective": (1, 20.2),
    "dense-1b --micro-batch-size 4 --activation-memory-budget 0.7": (1, 20.2),
    "dense-1b --use-torch-fsdp2": (2, 14.10),
    "dense-1b --pipeline-model-parallel-size 2 --global-batch-size 16": (2, 14.68),
    "block-8b --tensor-model-parallel-size 2 --sequence-parallel": (2, 6.3),
}
"""GPUs and peaks in GiB of presets with further flags: benchmarks/results/plan_memory_h100.md, train_step_h100.md."""


@pytest.mark.parametrize("flags", MEASURED)
def test_peaks_measured_on_h100s(flags):
    (name, *more), (gpus, measured) = flags.split(), MEASURED[flags]
    config = parse_config([*preset(name), *more]).config
    inventory, cut = Inventory.of(config, PRESET_VOCAB), Cut.of(config, gpus)
    planned = [stage_memory(config, inventory, cut, stage, PRESET_VOCAB).peak for stage in range(cut.pp)]
    assert max(planned) / GIB == pytest.approx(measured, rel=0.05)


def test_many_homes_share_what_they_keep_evenly():
    config = config_of("--optimizer dion --num-layers 8")
    inventory, cut = Inventory.of(config, VOCAB_SIZE), replace(Cut.of(config, 1), replicate=2, shard=8)
    plan = stage_plan(inventory, cut, 0)
    exact = max(state_bytes(inventory, cut, 0, rank, plan) for rank in range(16))
    assert fullest_state(inventory, cut, 0) == pytest.approx(exact, rel=0.1)


def test_replicas_that_keep_dions_momentum_of_their_own_gradients():
    """Each replica has all of it, and factors travel in the place of gradients."""
    flags = "--optimizer dion --clip-grad 0 --micro-batch-size 1 --swiglu"
    plain, compressed = config_of(flags), config_of(flags, "--dion-compressed-sync")
    inventory, hardware = Inventory.of(compressed, VOCAB_SIZE), HARDWARE["h100"]
    alone, pair, shared = Cut.of(plain, 1), Cut.of(compressed, 2), Cut.of(plain, 2)
    assert fullest_state(inventory, pair, 0) == fullest_state(inventory, alone, 0) > fullest_state(inventory, shared, 0)
    axes, others = (traffic(c, inventory, cut, hardware, 1.0) for c, cut in ((compressed, pair), (plain, shared)))
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert others["data, replicas"].sent - axes["data, replicas"].sent == 4 * matrices
    # Both factors of rank 8, in bf16: what `CompressedDion.describe_sync` counts.
    assert axes["factors"].sent == 2 * 2 * 8 * (4 * (32 + 32) + 3 * (32 + 64))
    assert "optimizer" not in axes
    assert "factors" not in others


def test_front_stages_hold_more_micro_batches():
    flags = "--pipeline-model-parallel-size 4 --num-layers 8 --global-batch-size 16"
    config = parse_config(words(flags)).config
    inventory, cut = Inventory.of(config, VOCAB_SIZE), Cut.of(config, 4)
    assert [cut.in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    held = [stage_memory(config, inventory, cut, stage, VOCAB_SIZE).activations for stage in range(4)]
    assert held == sorted(held, reverse=True)


def test_gradients_of_several_micro_batches_stay_whole_under_fsdp():
    one, many = (config_of(f"--use-torch-fsdp2 --global-batch-size {4 * n}") for n in (1, 4))
    inventory = Inventory.of(one, VOCAB_SIZE)
    small, large = (stage_memory(c, inventory, Cut.of(c, 2), 0, VOCAB_SIZE) for c in (one, many))
    assert small.unreduced == 0
    assert large.unreduced == 4 * parameters(inventory.whole())


def test_a_memory_budget_costs_what_is_recomputed():
    def seconds(more: str) -> float:
        config = parse_config([*preset("dense-1b"), *f"--micro-batch-size 4 {more}".split()]).config
        return stage_seconds(config, Cut.of(config, 1), 0, PRESET_VOCAB, HARDWARE["h100"])

    budgets = [seconds(f"--activation-memory-budget {budget}") for budget in (1, 0.7, 0.5, 0.2, 0)]
    assert budgets == sorted(set(budgets))
    # At first it is elementwise work, at last all of the layer.
    assert seconds("") == budgets[0]
    assert seconds("--recompute-granularity selective") == budgets[1]
    assert seconds("--recompute-granularity full") == pytest.approx(budgets[-1], rel=0.05)


def test_static_fp8_keeps_casts_of_the_weights_it_multiplies_until_backward():
    flags = "--parametrization umup --untie-embeddings-and-output-weights --disable-bias-linear --no-norm-affine"
    layer = sum(h.meta.numel for h in Inventory.of(config_of(flags), VOCAB_SIZE).kinds[0] if len(h.meta.shape) == 2)

    def activations(*more: str, world_size: int = 1) -> float:
        config = config_of(flags, *more)
        cut = Cut.of(config, world_size)
        return stage_memory(config, Inventory.of(config, VOCAB_SIZE), cut, 0, VOCAB_SIZE).activations

    fp8 = "--fp8-format e4m3"
    assert activations(fp8) - activations() == 2 * layer
    assert activations(fp8, "--first-last-layers-bf16 --num-layers-at-end-in-bf16 0") - activations() == layer
    assert 0 < activations(fp8, "--fp8-critical-bf16") - activations() < 2 * layer
    # Where a rank holds a part of the weights, their casts are made anew.
    assert activations(fp8, world_size=2) == activations(world_size=2)
