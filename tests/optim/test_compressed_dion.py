"""Dion's compressed synchronization: the momentum, weights and state of Dion of summed gradients, with less sent."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import ConfigError, parse_config, validate
from megatron_mup.models.build import build_model
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.checkpointing import Checkpointer, Progress
from megatron_mup.training.guard import Guard
from megatron_mup.training.step import TrainStep
from tests.runs import VOCAB_SIZE, batch_of, relative_error, words

PLAIN = "--optimizer dion --dion-rank-fraction 0.25 --muon-lr 0.02 --clip-grad 0 --micro-batch-size 1"
COMPRESSED = f"{PLAIN} --dion-compressed-sync"
HSDP = "--use-torch-fsdp2 --num-distributed-optimizer-instances 2"
STEPS = 4


class Counted:
    """Elements that this rank puts into sums over replicas."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.elements, self._sum = group, 0, dist.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: Any, **named: Any) -> Any:
        if named.get("group") is self.group:
            self.elements += tensor.numel()
        return self._sum(tensor, *args, **named)


class Run:
    """Model, optimizer and checkpoints of a rank."""

    def __init__(self, *flags: str) -> None:
        config = parse_config(words(*flags)).config
        validate(config, dist.get_world_size())
        self.config, self.mesh = config, Mesh.build(config, torch.device("cpu"))
        self.step = TrainStep(build_model(config, VOCAB_SIZE, self.mesh), config, self.mesh)

    def checkpointer(self, **flags: str) -> Checkpointer:
        config = replace(self.config, checkpoint=replace(self.config.checkpoint, **flags))
        return Checkpointer(config, VOCAB_SIZE, self.mesh, self.step, Guard(config))

    def train(self, steps: range) -> int:
        """Elements that the last step put into sums over replicas."""
        samples = torch.arange(4)[self.mesh.dp_rank :: self.mesh.dp_size]
        for number in steps:
            batch = {name: value[samples] for name, value in batch_of(self.config, number).items()}
            with mock.patch.object(dist, "all_reduce", Counted(self.mesh.group("dp_replicate"))) as counted:
                self.step(batch, 1.0)
        return counted.elements

    def weights(self) -> dict[str, torch.Tensor]:
        return {main.meta.name: main.layout.gather(main.value) for main in self.step.main.params}


def train(*flags: str) -> dict[str, Any]:
    """A few steps: weights, this rank's state, and what its last step summed over replicas."""
    run = Run(*flags)
    run.step.initialise()
    sent = run.train(range(STEPS))
    optimizer = run.step.optimizer
    optimizer.gather_state()
    matrices = sum(a.meta.numel for a in optimizer.matrix_plan.assignments)
    return {
        "weights": run.weights(),
        "state": {key: value.clone() for key, (_, value) in optimizer.state_tensors().items() if "dion" in key},
        "sent": sent,
        "matrices": matrices,
        "others": sum(main.meta.numel for main in run.step.main.params) - matrices,
        "plan": optimizer.plan(),
    }


def save_and_go_on(folder: str, *flags: str) -> dict[str, torch.Tensor]:
    """Weights of a run that has saved after two of four steps."""
    run = Run(*flags)
    run.step.initialise()
    run.train(range(2))
    run.checkpointer(save=folder).save(Progress(2, 8))
    run.train(range(2, STEPS))
    return run.weights()


def load_and_go_on(folder: str, *flags: str) -> dict[str, torch.Tensor]:
    """Weights of a run that has trained two steps of its own, loads the above, and takes the last two."""
    run = Run(*flags)
    run.step.initialise()
    run.train(range(7, 9))
    assert run.checkpointer(load=folder).resume_or_initialise() == Progress(2, 8)
    run.train(range(2, STEPS))
    return run.weights()


def assert_near(seen: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert seen.keys() == want.keys()
    for name, value in want.items():
        # The gradient of a bias of keys is zero but for rounding.
        assert relative_error(seen[name], value) < (1e-4 if "bias" in name else 1e-6), name


@pytest.fixture(scope="module")
def trained(pool):
    """What each rank of a run found."""
    return functools.cache(lambda ranks, *flags: pool.run(ranks, train, *flags))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, ""), *(pytest.param(4, each, marks=pytest.mark.long) for each in (HSDP, "--tensor-model-parallel-size 2"))],
)
def test_equals_dion_of_summed_gradients(trained, ranks, layout):
    (alone,), results = trained(1, PLAIN), trained(ranks, COMPRESSED, layout)
    state = {}
    for result in results:
        assert_near(result["weights"], alone["weights"])
        for name, value in results[0]["weights"].items():
            assert torch.equal(result["weights"][name], value), f"{name}: replicas differ"
        for key, value in result["state"].items():
            assert key not in state or torch.equal(state[key], value), f"{key}: replicas differ"
            assert key not in state or key.startswith("dion_basis/"), f"{key} would be saved twice"
            state[key] = value
    assert state.keys() == alone["state"].keys()
    for key, want in alone["state"].items():
        assert relative_error(state[key], want) < 1e-5, key


@pytest.mark.long
def test_products_in_bf16(trained):
    """Factors travel in bf16, and replicas stay the same to the bit."""
    want = trained(1, PLAIN, "--muon-ns-dtype bf16")[0]["weights"]
    first, second = (result["weights"] for result in trained(2, COMPRESSED, "--muon-ns-dtype bf16"))
    for name, value in want.items():
        assert torch.equal(first[name], second[name]), f"{name}: replicas differ"
        assert relative_error(first[name], value) < (0.1 if "bias" in name else 1e-2), name


def test_replicas_sum_factors_only(trained):
    """What is summed over replicas: both factors, the gradients of all that is no hidden matrix, and one norm."""
    seen = trained(2, COMPRESSED, "")[0]
    # Query, key, value, projection and both of the MLP, in two layers; a quarter of the short side of 32.
    factors = 2 * 8 * (4 * (32 + 32) + 2 * (32 + 64))
    assert seen["sent"] == factors + seen["others"] + 1
    assert f"2 replicas, each with these homes, sum {4e-6 * factors:.3g} MB of factors per step" in seen["plan"]
    assert f"{4e-6 * seen['matrices']:.3g} MB of gradients" in seen["plan"]
    assert "replicas" not in trained(1, PLAIN)[0]["plan"]


@pytest.mark.long
def test_without_compression_replicas_sum_gradients(trained):
    """So the count above counts."""
    seen = trained(2, PLAIN)[0]
    assert seen["sent"] == seen["matrices"] + seen["others"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("dp2", "dp2"),
        pytest.param("dp2", "one", marks=pytest.mark.long),
        pytest.param("one", "dp2", marks=pytest.mark.long),
        pytest.param("hsdp2x2", "dp2", marks=pytest.mark.long),
        pytest.param("dp2", "hsdp2x2", marks=pytest.mark.long),
    ],
)
def test_goes_on(pool, tmp_path, before, after):
    """Bitwise in the same layout, though a save sums momenta; to rounding in another, without the flag too."""
    layouts = {"one": (1, PLAIN), "dp2": (2, COMPRESSED), "hsdp2x2": (4, f"{COMPRESSED} {HSDP}")}
    want = pool.run(layouts[before][0], save_and_go_on, str(tmp_path), layouts[before][1])[0]
    seen = pool.run(layouts[after][0], load_and_go_on, str(tmp_path), layouts[after][1])[0]
    assert_near(seen, want)
    assert before != after or all(torch.equal(seen[name], value) for name, value in want.items())


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--clip-grad 1", ["--clip-grad 1", "--dion-compressed-sync"]),
        ("--optimizer-switch-at 2", ["--optimizer-switch-at 2"]),
        ("--use-torch-fsdp2", ["optim_grads_params", "no_shard"]),
        ("--use-distributed-optimizer", ["optim_grads", "no_shard"]),
    ],
)
def test_what_it_cannot_do(flags, names):
    with pytest.raises(ConfigError) as caught:
        validate(parse_config(words(COMPRESSED, flags)).config, 2)
    assert all(name in str(caught.value) for name in names)


def test_without_replicas_it_says_so():
    parsed = parse_config(words(COMPRESSED))
    assert any("--dion-compressed-sync" in warning for warning in validate(parsed.config, 1, parsed.explicit))
    assert not any("--dion-compressed-sync" in warning for warning in validate(parsed.config, 2, parsed.explicit))
