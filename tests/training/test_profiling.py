from __future__ import annotations

import gc
import gzip
import json

import pytest

from megatron_mup.config import ConfigError, validate
from megatron_mup.training.profiling import StepTrace, collect_garbage, garbage_collection
from tests.runs import config_of, pretrain


def test_a_run_traces_its_steps_and_collects_by_itself(tmp_path):
    done = pretrain(
        "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --vocab-size 64 --mock-data "
        "--train-iters 4 --lr 1e-3 --lr-decay-style constant --manual-gc --manual-gc-interval 2 --no-progress "
        f"--profile --profile-step-start 2 --profile-step-end 3 --profile-dir {tmp_path}".split()
    )
    assert done.code == 0, done.err
    (file,) = tmp_path.iterdir()
    assert file.name == "rank0-steps2-3.json.gz"
    assert str(file) in done.out + done.err
    names = [event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    # One layer's attention, in two steps.
    assert names.count("aten::scaled_dot_product_attention") == 2
    assert gc.isenabled()


def test_ranks_that_are_not_named_trace_nothing(tmp_path):
    config = config_of(f"--profile --profile-step-start 1 --profile-step-end 1 --profile-dir {tmp_path}")
    with StepTrace(config, 1) as trace:
        trace.begin(1)
        assert trace.end(1) is None
    with StepTrace(config, 0) as trace:
        trace.begin(1)  # a run that stops inside leaves no half of a trace
    assert not list(tmp_path.iterdir())


def test_garbage_waits_for_its_interval(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(gc.isenabled()))
    config = config_of("--manual-gc --manual-gc-interval 3")
    with garbage_collection(config):
        for iteration in range(1, 7):
            collect_garbage(config, iteration)
            assert not gc.isenabled()
    assert collected == [True, False, False]
    assert gc.isenabled()
    with garbage_collection(config_of()):
        collect_garbage(config_of(), 3)
        assert gc.isenabled()
    assert len(collected) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--profile --profile-step-start 5 --profile-step-end 4", "before it begins"),
        ("--profile --profile-ranks 0 1", "there are 1 ranks"),
    ],
)
def test_traces_that_cannot_be(flags, words):
    with pytest.raises(ConfigError, match=words):
        validate(config_of(flags), 1)


def test_idle_flags_are_told():
    config = config_of("--profile-step-end 20 --manual-gc-interval 5")
    told = " ".join(validate(config, 1, frozenset({"profile_step_end", "manual_gc_interval"})))
    assert "there is no --profile" in told
    assert "there is no --manual-gc" in told
