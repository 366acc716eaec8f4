"""Replicas that differ in one bit are found, with parameter and ranks."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import parse_config, validate
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.guard import BrokenRunError
from megatron_mup.training.main import EXIT_BROKEN
from megatron_mup.training.replicas import check_replicas, fingerprint
from megatron_mup.training.trainer import Trainer
from tests.runs import Outcome, pretrain, step_of, words

HSDP = "--data-parallel-sharding-strategy optim_grads_params --num-distributed-optimizer-instances 2"
EXPERTS = "--num-experts 2 --disable-bias-linear"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprints(dtype):
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert fingerprint(values) == fingerprint(values.clone())
    assert fingerprint(values.view(30, 100).t()) != fingerprint(values)
    swapped, negative = values.clone(), values.clone()
    swapped[[3, 7]] = swapped[[7, 3]]
    negative[2999] = -negative[2999]
    assert len({int(fingerprint(each)) for each in (values, swapped, negative)}) == 3
    assert fingerprint(torch.zeros(2)) != fingerprint(-torch.zeros(2)), "bits, not values"


def flip(value: torch.Tensor) -> None:
    """Changes the lowest bit of the first element."""
    value.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def check(flags: str, name: str, corrupted: int) -> tuple[str, str]:
    """What a check says before and after a bit of a weight changes on one rank."""
    config = parse_config(words(flags, f"--global-batch-size {2 * dist.get_world_size()}")).config
    validate(config, dist.get_world_size())
    mesh = Mesh.build(config, torch.device("cpu"))
    step = step_of(config, mesh)
    said = []
    for _ in range(2):
        try:
            check_replicas(step.main.params, mesh, 7)
            said.append("")
        except BrokenRunError as error:
            said.append(str(error))
        if dist.get_rank() == corrupted:
            flip(next(main.value for main in step.main.params if main.meta.name == name))
    return said[0], said[1]


LAYERNORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("ranks", "flags", "corrupted", "name", "told"),
    [
        pytest.param(3, "", 1, LAYERNORM, "ranks 1 ", id="no_shard"),
        pytest.param(4, HSDP, 3, LAYERNORM, "ranks 1, 3 ", id="hsdp", marks=pytest.mark.long),
        pytest.param(
            4, EXPERTS + " --expert-model-parallel-size 2", 2, "", "ranks 0, 2 ", id="ep", marks=pytest.mark.long
        ),
    ],
)
def test_one_bit(pool, ranks, flags, corrupted, name, told):
    name = name or "decoder.layers.1.mlp.experts.linear_fc2.weight"
    for before, after in pool.run(ranks, check, flags, name, corrupted):
        assert before == ""
        assert after.startswith("iteration 7: weights differ from those of their replicas: ")
        assert f"{name} on {told}(" in after
        assert after.count(" on ranks ") == 1


def corrupted_run(argv: list[str]) -> Outcome:
    """A run in which a bit of a weight changes on rank 1 before the third step."""
    batch = Trainer.batch

    def flipping(self: Trainer, consumed_samples: int, size: int):
        if self.progress.iteration == 2 and os.environ["RANK"] == "1":
            flip(self.step.main.params[0].value)
        return batch(self, consumed_samples, size)

    with mock.patch.object(Trainer, "batch", flipping):
        return pretrain(argv)


def test_a_run_stops_before_it_saves_such_weights(pool, tmp_path):
    flags = f"--check-weight-hash-across-dp-replicas-interval 2 --save {tmp_path}/run --save-interval 2"
    first, second = pool.launch(2, corrupted_run, words(flags))
    assert first.code == second.code == EXIT_BROKEN
    assert "iteration 4: weights differ" in first.err
    assert "embedding.word_embeddings.weight on ranks 0-1 (" in first.err
    assert [path.name for path in (tmp_path / "run").glob("iter_*")] == ["iter_0000002"]
