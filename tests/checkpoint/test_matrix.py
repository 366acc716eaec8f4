"""Trained in one layout, gone on with in another: the state is the same bit for bit, the next loss to rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.config.validate import validate
from megatron_mup.models.build import build_model
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.checkpointing import Checkpointer, Progress
from megatron_mup.training.guard import Guard
from megatron_mup.training.step import TrainStep
from tests.checkpoint.cases import part
from tests.parity import cases, test_experts
from tests.parity.cases import Case
from tests.runs import saved_tensors

STEPS = 2
MODELS = {"dense": "", "experts": f"{test_experts.EXPERTS} {test_experts.BALANCING['sequence']}"}
OPTIMIZERS = {
    ("dense", "adam"): "",
    ("dense", "muon"): "--optimizer muon",
    ("dense", "dion"): "--optimizer dion --dion-rank-fraction 0.5",
    ("dense", "spectral_sphere"): "--optimizer spectral_sphere --scalar-optimizer ademamix",
    ("experts", "adam"): "",
    ("experts", "muon"): "--optimizer muon --muon-moe-router",
    ("experts", "spectral_sphere"): "--optimizer spectral_sphere",
    ("experts", "dion"): "--optimizer dion --dion-rank-fraction 0.5",
}
ONE = Case(1, "")
EXPERT_LAYOUTS = ("ep2", "ep2-tp2", "ep2-fsdp2", "ep2-hsdp2", "ep2-pp2", "etp2", "etp2-fsdp2", "etp2-ep2")
LAYOUTS = {
    "dense": {
        "one": ONE,
        **{
            name: cases.LAYOUTS[name]
            for name in ("dp2", "fsdp2", "hsdp2x2", "tp2-sp", "pp2", "tp2-pp2", "tp2-fsdp2", "pp2-fsdp2")
        },
        "pp2-virtual2": Case(2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    },
    "experts": {
        "one": ONE,
        **{name: test_experts.LAYOUTS[name] for name in EXPERT_LAYOUTS},
    },
}
DAILY = [
    ("dense", "adam", "pp2", "tp2-sp"),
    ("dense", "muon", "fsdp2", "pp2"),
    ("dense", "spectral_sphere", "fsdp2", "tp2-sp"),
    ("experts", "muon", "ep2-tp2", "one"),
]
"""Model, optimizer, layout that saves, layout that loads."""


@dataclass(frozen=True)
class Saved:
    """A folder of checkpoints, and the loss that the run which saved there had next."""

    folder: str
    loss: float


class Run:
    """Model, optimizer and checkpoints of a rank."""

    def __init__(self, config: Config) -> None:
        validate(config, dist.get_world_size())
        self.config, self.mesh = config, Mesh.build(config, torch.device("cpu"))
        self.step = TrainStep(build_model(config, cases.VOCAB_SIZE, self.mesh), config, self.mesh)

    def checkpointer(self, **flags: str) -> Checkpointer:
        config = replace(self.config, checkpoint=replace(self.config.checkpoint, **flags))
        return Checkpointer(config, cases.VOCAB_SIZE, self.mesh, self.step, Guard(config))

    def train(self, number: int) -> float:
        self.step.optimizer.advance(number)
        return self.step(cases.local_batch(self.config, self.mesh, number), 1.0).loss.item()


def train_and_save(config: Config, folder: str) -> Saved:
    run = Run(config)
    run.step.initialise()
    for number in range(STEPS):
        run.train(number)
    run.checkpointer(save=folder).save(Progress(STEPS, STEPS * cases.SAMPLES))
    return Saved(folder, run.train(STEPS))


def load_and_train(config: Config, saved: dict[str, Saved]) -> list[str]:
    """What is wrong after loading each of the checkpoints."""
    run, problems = Run(config), []
    for name, there in saved.items():
        checkpointer = run.checkpointer(load=there.folder)
        for piece in checkpointer._pieces(with_optimizer=True):
            piece.tensor.fill_(float("nan"))
        assert checkpointer.resume_or_initialise() == Progress(STEPS, STEPS * cases.SAMPLES)
        pieces = checkpointer._pieces(with_optimizer=True)
        # Read by PyTorch alone, whole.
        want = saved_tensors(Path(there.folder) / f"iter_{STEPS:07}")
        problems += [f"{name}: {p.key}" for p in pieces if not torch.equal(p.tensor, part(p, want[p.key]))]
        loss = run.train(STEPS)
        if abs(loss / there.loss - 1) > 1e-6:
            problems.append(f"{name}: next loss {loss!r}, not {there.loss!r}")
    return problems


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """What each layout saved, made when it is first wanted."""
    made: dict[tuple[str, str, str], Saved] = {}

    def get(model: str, optimizer: str, layout: str) -> Saved:
        key = model, optimizer, layout
        if key not in made:
            folder = str(tmp_path_factory.mktemp("-".join(key)))
            made[key] = pool.run(LAYOUTS[model][layout].ranks, train_and_save, config_of(*key), folder)[0]
        return made[key]

    return get


def config_of(model: str, optimizer: str, layout: str) -> Config:
    config = cases.config_of(MODELS[model], OPTIMIZERS[model, optimizer])
    return cases.with_layout(config, LAYOUTS[model][layout])


def assert_goes_on(pool, saved, model: str, optimizer: str, sources: list[str], target: str) -> None:
    there = {name: saved(model, optimizer, name) for name in sources}
    ranks = LAYOUTS[model][target].ranks
    assert pool.run(ranks, load_and_train, config_of(model, optimizer, target), there) == [[]] * ranks


@pytest.mark.parametrize(("model", "optimizer", "source", "target"), DAILY)
def test_goes_on_in_another_layout(pool, saved, model, optimizer, source, target):
    assert_goes_on(pool, saved, model, optimizer, [source], target)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "optimizer", "target"),
    [(model, optimizer, layout) for model, optimizer in OPTIMIZERS for layout in LAYOUTS[model]],
)
def test_goes_on_from_every_layout(pool, saved, model, optimizer, target):
    assert_goes_on(pool, saved, model, optimizer, list(LAYOUTS[model]), target)
