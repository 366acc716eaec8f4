"""Diagnostics of the steady state: right on one rank, and the same in every layout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import Config, validate
from megatron_mup.models.build import build_model
from megatron_mup.optim.blocks import block_shape, take_block
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import Block
from megatron_mup.training.diagnostics import Diagnostics
from megatron_mup.training.step import TrainStep
from tests.parity.cases import FSDP, VOCAB_SIZE, config_of, local_batch
from tests.runs import pretrain, recorded, words

FLAGS = "--parametrization completep --mup-base-hidden-size 16 --base-num-layers 2 --adam-eps 1e-4"


def diagnosed(config: Config) -> dict[str, float]:
    """Diagnoses of the parity model's third step, on the ranks of the process group."""
    validate(config, dist.get_world_size())
    mesh = Mesh.build(config, torch.device("cpu"))
    step = TrainStep(build_model(config, VOCAB_SIZE, mesh), config, mesh)
    step.initialise()
    for number in range(2):
        step(local_batch(config, mesh, number), 1.0)
    batch = local_batch(config, mesh, 2)
    _, (names, values) = Diagnostics(step, config, mesh).around(batch, lambda: step(batch, 1.0))
    return dict(zip(names, values.tolist(), strict=True))


@pytest.fixture(scope="module")
def alone(pool):
    """Diagnoses on one rank by further flags."""
    known = {}

    def get(flags: str) -> dict[str, float]:
        if flags not in known:
            known[flags] = pool.run(1, diagnosed, config_of(FLAGS, flags))[0]
        return known[flags]

    return get


LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "fsdp2": FSDP,
    "pp2": "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1",
    "cp2": "--context-parallel-size 2",
    "pp2-v": "--pipeline-model-parallel-size 2 --pipeline-schedule ZBVZeroBubble",
}
LONG = ("cp2", "pp2-v")


@pytest.mark.parametrize("layout", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in LAYOUTS])
@pytest.mark.parametrize(
    "flags", ["--optimizer muon", pytest.param("--untie-embeddings-and-output-weights", marks=pytest.mark.long)]
)
def test_no_layout_changes_a_number(pool, alone, layout, flags):
    want = alone(flags)
    for got in pool.run(2, diagnosed, config_of(FLAGS, flags, LAYOUTS[layout])):
        assert set(got) == set(want)
        # Signs of small gradients differ by rounding, and AdamW steps by the sign.
        assert got == pytest.approx(want, rel=2e-3), layout


def test_numbers_are_what_they_say(lone_mesh):
    config = config_of(FLAGS, "--untie-embeddings-and-output-weights")
    step = TrainStep(build_model(config, VOCAB_SIZE, lone_mesh), config, lone_mesh)
    step.initialise()
    batch = local_batch(config, lone_mesh, 0)
    before = {m.meta.name: m.value.clone() for m in step.main.params}
    _, (names, values) = Diagnostics(step, config, lone_mesh).around(batch, lambda: step(batch, 1.0))
    found = dict(zip(names, values.tolist(), strict=True))
    after = {m.meta.name: m for m in step.main.params}

    head = after["output_layer.weight"].value
    assert found["head norm"] == pytest.approx(head.norm(dim=1).max().item() * math.sqrt(32) / 2)
    change = head - before["output_layer.weight"]
    assert found["update to weight/readout"] == pytest.approx(
        (change.norm() / before["output_layer.weight"].norm()).item()
    )
    moments = step.optimizer.state_tensors()["exp_avg_sq/output_layer.weight"][1] / (1 - 0.95)
    share = (moments.sqrt() < 1e-4 / 2).double().mean().item()
    assert found["second moments below eps/readout"] == pytest.approx(share, abs=1e-4)
    assert 0 < share < 1

    values = []
    for main in after.values():
        for block in main.meta.blocks if main.meta.role.value == "mlp_in" else ():
            if block.name == "gate":
                rows, columns = block_shape(main.meta, block)
                matrix = take_block(main.value, block).reshape(rows, columns)
                values.append(torch.linalg.matrix_norm(matrix, ord=2).item() * math.sqrt(columns / rows))
    assert found["singular value over target, largest/gate"] == pytest.approx(max(values), rel=0.03)
    assert found["singular value over target, largest/gate"] <= max(values) * (1 + 1e-6)
    assert found["activation rms/final_layernorm"] == pytest.approx(1, rel=0.02)


def test_a_block_is_found_on_shards_of_rows(lone_mesh):
    """Power iteration finds the top singular value of each block of a fused tensor."""
    config = config_of("--num-layers 1")
    step = TrainStep(build_model(config, VOCAB_SIZE, lone_mesh), config, lone_mesh)
    step.initialise()
    main = next(m for m in step.main.params if m.meta.role.value == "qkv")
    key = next(block for block in main.meta.blocks if block.name == "key")
    assert isinstance(key, Block)
    take_block(main.value, key).fill_(1.0)
    batch = local_batch(config, lone_mesh, 0)
    _, (names, values) = Diagnostics(step, config, lone_mesh).around(batch, lambda: step(batch, 0.0))
    found = dict(zip(names, values.tolist(), strict=True))
    rows, columns = block_shape(main.meta, key)
    assert found["singular value over target/key"] == pytest.approx(columns, rel=1e-3), (rows, columns)


def test_a_run_records_them_and_trains_the_same(pool, tmp_path):
    losses = []
    for name, flags in (("with", "--diagnostics-interval 3"), ("without", "")):
        file = tmp_path / f"{name}.jsonl"
        argv = words("--train-iters 7 --log-interval 5 --hidden-dropout 0.1", flags, f"--metrics-file {file}")
        assert pool.launch(1, pretrain, argv)[0].code == 0
        losses.append(recorded(file, "train/lm loss"))
        seen = recorded(file, "diagnostics/attention logit max")
        assert list(seen) == ([3, 6] if flags else [])
    assert losses[0] == losses[1]
