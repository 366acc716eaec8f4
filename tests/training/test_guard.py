"""Broken steps are left out to the bit, and a run that stays broken goes back to its checkpoint or stops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_mup.optim.clip import global_grad_norm
from megatron_mup.training.guard import Guard
from megatron_mup.training.main import EXIT_BROKEN
from tests.runs import config_of, pretrain, recorded, saved_tensors, words

GUARDED = "--max-skipped-steps 2 --save-interval 2 --log-interval 1 --optimizer muon --muon-lr 0.02"


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


def guard_of(*flags: str) -> Guard:
    return Guard(config_of("--max-skipped-steps 2", *flags))


@pytest.fixture
def run(tmp_path):
    """Runs main with checkpoints and metrics in a folder."""

    def run(*flags: str, name: str = "run"):
        folder = tmp_path / name
        files = f"--save {folder} --load {folder} --metrics-file {folder}.jsonl"
        return pretrain(words(GUARDED, files, *flags))

    return run


@pytest.fixture
def break_steps(monkeypatch):
    """Puts NaN into a gradient of some steps of the process, counted from 1."""

    def break_steps(*steps: int) -> None:
        count = itertools.count(1)

        def norm(params, mesh):
            if next(count) in steps:
                params[0].grad.fill_(math.nan)
            return global_grad_norm(params, mesh)

        monkeypatch.setattr("megatron_mup.training.step.global_grad_norm", norm)

    return break_steps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(value):
    guard = guard_of()
    assert guard.accepts(number(2.0), number(1.0))
    assert not guard.accepts(number(value), number(1.0))
    assert "loss" in guard.reason
    assert not guard.accepts(number(2.0), number(value))
    assert "gradient norm" in guard.reason
    assert not guard.exhausted
    assert not guard.accepts(number(value), number(value))
    assert guard.exhausted
    assert guard.accepts(number(2.0), number(1.0))
    assert guard.skipped == 0
    assert guard.reason is None


def test_spikes_are_measured_by_accepted_steps_alone():
    guard = guard_of("--spike-sigma 4 --spike-window 8")
    for i in range(3):
        assert guard.accepts(number(2.0 + 0.1 * (i % 2)), number(1.0 + 0.1 * (i % 2))), "no step is a spike yet"
        guard.accepts(number(math.nan), number(1.0))
    assert guard.accepts(number(9.0), number(9.0)), "three of eight are known"
    for i in range(8):
        assert guard.accepts(number(2.0 + 0.1 * (i % 2)), number(1.0 + 0.1 * (i % 2)))
    for _ in range(20):
        assert not guard.accepts(number(2.5), number(1.0))
        assert "spike" in guard.reason
    assert not guard.accepts(number(2.0), number(1.5))
    assert guard.accepts(number(2.2), number(1.2))
    other = guard_of("--spike-sigma 4 --spike-window 8")
    other.load_state(guard.state())
    assert not other.accepts(number(2.5), number(1.0))


def test_without_the_flag_nothing_is_looked_at():
    assert Guard(config_of()).accepts(number(math.nan), number(math.nan))


def test_a_step_left_out_changes_nothing(run, break_steps, tmp_path):
    """The last of three steps is broken: the third checkpoint is the second, but for its progress."""
    break_steps(3)
    outcome = run("--train-iters 3 --save-interval 1")
    assert outcome.code == 0
    assert "iteration 3 left out: its gradient norm is nan" in outcome.out + outcome.err
    before, after = (saved_tensors(tmp_path / "run" / f"iter_000000{i}") for i in (2, 3))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    assert list(recorded(tmp_path / "run.jsonl", "train/lm loss")) == [1, 2]
    assert recorded(tmp_path / "run.jsonl", "train/left out") == {3: 1.0}


def test_goes_back_to_the_checkpoint_and_past_the_data(run, break_steps, tmp_path):
    """Steps 4 to 6 are broken: back to the checkpoint of iteration 4, which holds the weights of 3, and on."""
    break_steps(4, 5, 6)
    outcome = run("--train-iters 8")
    assert outcome.code == 0
    assert "back to iteration 4, without samples 16 to 24" in outcome.out + outcome.err
    consumed = recorded(tmp_path / "run.jsonl", "train/consumed samples")
    # Two batches were passed over.
    assert [consumed[i] for i in (5, 6, 8)] == [28, 32, 40]
    assert list(recorded(tmp_path / "run.jsonl", "train/lm loss")) == [1, 2, 3, 5, 6, 7, 8]


def test_stops_when_going_back_did_not_help(run, break_steps):
    break_steps(*range(4, 99))
    outcome = run("--train-iters 8")
    assert outcome.code == EXIT_BROKEN
    assert "--max-rollbacks" in outcome.err
    assert "Traceback" not in outcome.err


def test_stops_when_there_is_nothing_to_go_back_to(run, break_steps):
    break_steps(1, 2, 3)
    outcome = run("--train-iters 8 --save-interval 4")
    assert outcome.code == EXIT_BROKEN
    assert "no checkpoint" in outcome.err


def test_resumes_with_what_it_remembers(run, tmp_path):
    flags = "--train-iters 8 --spike-sigma 0.5 --spike-window 2 --max-skipped-steps 100"
    assert run(flags, name="whole").code == 0
    assert run(flags, "--exit-interval 4", name="parts").code == 0
    assert run(flags, name="parts").code == 0
    whole, parts = (recorded(tmp_path / f"{name}.jsonl", "train/left out") for name in ("whole", "parts"))
    assert whole, "some step must be left out for the comparison to say anything"
    assert parts == whole


def test_a_save_under_way_is_finished_before_a_broken_run_stops(run, break_steps, tmp_path):
    break_steps(3)
    outcome = run("--train-iters 8 --max-skipped-steps 0 --async-save")
    assert outcome.code == EXIT_BROKEN
    assert "iteration 3" in outcome.err
    assert saved_tensors(tmp_path / "run" / "iter_0000002")
