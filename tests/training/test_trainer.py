"""The training loop on one rank, from command line to checkpoint, on synthetic data."""

from __future__ import annotations

import math
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.checkpointing import Progress
from megatron_mup.training.main import EXIT_BROKEN
from megatron_mup.training.trainer import Trainer
from tests.runs import VOCAB_SIZE, config_of, pretrain, recorded, saved_tensors, words


@pytest.fixture
def run(tmp_path):
    """Runs main, saving to and loading from one folder, and returns the outcome."""

    def run(*flags: str):
        folder = tmp_path / "run"
        return pretrain(
            words(f"--save {folder} --load {folder} --metrics-file {tmp_path}/metrics.jsonl --log-interval 1", *flags)
        )

    return run


@pytest.fixture
def lone_trainer():
    """Makes a trainer in a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def make(*flags: str) -> Trainer:
        config = config_of(*flags)
        return Trainer(config, VOCAB_SIZE, Mesh.build(config, torch.device("cpu")))

    yield make
    dist.destroy_process_group()


def checkpoints(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run").glob("iter_*"))


def test_from_start_to_end(run, tmp_path):
    flags = "--train-iters 30 --eval-interval 10 --eval-iters 2 --save-interval 20 --optimizer muon --muon-lr 0.02"
    outcome = run(flags)
    assert outcome.code == 0
    losses = recorded(tmp_path / "metrics.jsonl", "train/lm loss")
    assert list(losses) == list(range(1, 31))
    assert losses[30] < losses[1] - 0.5
    # The embedding's deviation makes a first loss near that of a uniform guess.
    assert losses[1] == pytest.approx(math.log(101), rel=0.1)
    evaluations = recorded(tmp_path / "metrics.jsonl", "validation/lm loss")
    assert list(evaluations) == [10, 20, 30]
    assert evaluations[30] < evaluations[10]
    assert checkpoints(tmp_path) == ["iter_0000020", "iter_0000030"]
    assert "muon" in outcome.out, "the parametrization table is printed"

    again = run(flags)
    assert again.code == 0
    assert "resumed" in again.out
    assert recorded(tmp_path / "metrics.jsonl", "train/lm loss") == losses, "nothing is trained again"


def test_a_graph_ends_with_the_training(lone_trainer):
    """Whoever captures the step's work holds the step, so nothing else would free it before process groups end."""
    trainer = lone_trainer("--train-iters 1")
    trainer.step._gradients = partial(trainer.step._gradients)
    captured = weakref.ref(trainer.step._gradients)
    with trainer:
        trainer.train()
        assert captured() is not None
    assert captured() is None


def test_length_in_samples(run, tmp_path):
    """2, 2, then 4 samples a step, until less than a batch is left."""
    assert run("--train-iters None --train-samples 15 --rampup-batch-size 2 2 4").code == 0
    assert recorded(tmp_path / "metrics.jsonl", "train/batch size") == {1: 2, 2: 2, 3: 4, 4: 4}


def test_no_evaluation_as_megatron_says_it(run, tmp_path):
    assert run("--train-iters 2 --eval-interval 1 --eval-iters 0").code == 0
    assert recorded(tmp_path / "metrics.jsonl", "validation/lm loss") == {}


def test_stops_before_saving_a_broken_run(run, tmp_path):
    """The step with the absurd learning rate is seen in the next loss."""
    outcome = run("--lr 1e30 --clip-grad 0 --save-interval 2 --log-interval 100")
    assert outcome.code == EXIT_BROKEN
    assert outcome.err.count("\n") == 1
    assert "iteration 2: loss" in outcome.err
    assert checkpoints(tmp_path) == []
    assert not torch.distributed.is_initialized(), "the process group is closed"


@pytest.fixture
def trained(run, tmp_path):
    """A run of three iterations out of eight, as its checkpoint."""
    assert run("--exit-interval 3").code == 0
    assert checkpoints(tmp_path) == ["iter_0000003"]
    return tmp_path / "run" / "iter_0000003"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        pytest.param("--lr 2e-2", ["schedule is another", "--lr was 0.01 and is 0.02"], id="peak"),
        pytest.param("--lr-decay-style cosine", ["--lr-decay-style"], id="style"),
        pytest.param("--lr-warmup-iters 2", ["--lr-warmup-iters"], id="warm-up"),
        pytest.param("--weight-decay 0", ["--weight-decay"], id="decay"),
        pytest.param("--ffn-hidden-size 96", ["another architecture", "--ffn-hidden-size was 64 and is 96"], id="mlp"),
        pytest.param("--num-layers 3", ["--num-layers was 2 and is 3"], id="layers"),
        pytest.param("--untie-embeddings-and-output-weights", ["--untie-embeddings"], id="head"),
        pytest.param("--rotary-base 500", ["--rotary-base was 10000.0 and is 500.0"], id="function-not-shape"),
        pytest.param(
            "--optimizer muon",
            ["another optimizer: --optimizer was adam and is muon", "--optimizer-switch-at 3"],
            id="optimizer",
        ),
        pytest.param("--ckpt-step 2", ["no such checkpoint"], id="step"),
    ],
)
def test_refuses_another_run(run, trained, flags, parts):
    outcome = run(flags)
    assert outcome.code == 2
    assert outcome.err.startswith("error on rank 0: ")
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


def test_refuses_state_of_other_shapes_or_size(run):
    assert run("--optimizer dion --exit-interval 2").code == 0
    assert "--dion-rank-fraction was 0.25 and is 0.5" in run("--optimizer dion --dion-rank-fraction 0.5").err
    assert run("--optimizer dion --muon-momentum-style sum --exit-interval 3").code == 0, "Dion's has no style"


def test_refuses_momenta_of_the_other_style(run):
    assert run("--optimizer muon --optimizer-switch-at 2 --exit-interval 2").code == 0
    flags = "--optimizer muon --optimizer-switch-at 2 --muon-momentum-style sum"
    assert run(f"{flags} --exit-interval 3").code == 0, "AdamW's state has no style"
    outcome = run(flags.replace("sum", "ema"))
    assert outcome.code == 2
    assert "--muon-momentum-style was sum and is ema" in outcome.err
    assert "give --muon-momentum-style sum" in outcome.err


def test_schedule_can_be_changed_on_request(run, trained, tmp_path):
    assert run("--lr 2e-2 --override-opt-param-scheduler --exit-interval 4").code == 0
    assert checkpoints(tmp_path) == ["iter_0000003", "iter_0000004"]


def test_finetune_takes_weights_only(trained, lone_trainer):
    trainer = lone_trainer(f"--load {trained.parent} --finetune --lr 3e-3")
    saved = saved_tensors(trained)
    for main in trainer.step.main.params:
        assert torch.equal(main.value, saved[f"model/{main.meta.name}"])
    assert trainer.progress == Progress(0, 0)
    assert trainer.step.optimizer.state_scalars()["step"] == 0
    assert all(not tensor.any() for _, tensor in trainer.step.optimizer.state_tensors().values())


def test_resume_takes_everything(trained, lone_trainer):
    trainer = lone_trainer(f"--load {trained.parent}")
    saved = saved_tensors(trained)
    for name, (_, tensor) in trainer.step.optimizer.state_tensors().items():
        assert torch.equal(tensor, saved[f"optimizer/{name}"])
        assert tensor.any()
    assert trainer.progress == Progress(3, 12)
    assert trainer.step.optimizer.state_scalars()["step"] == 3
