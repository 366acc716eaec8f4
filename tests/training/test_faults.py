"""Faults from outside: data, clocks and memory. What a run has saved it keeps, and goes on from there."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_mup.config import parse_config
from megatron_mup.data.indexed_dataset import IndexedDatasetWriter
from megatron_mup.data.loader import build_datasets
from megatron_mup.training.memory import is_out_of_memory, savings
from tests.runs import Outcome, pretrain, recorded, saved_tensors, words

LOSS = "train/lm loss"
TOKENS = 800


def test_a_corrupt_record_costs_nothing_that_was_saved(tmp_path):
    """A token of iteration 5 is garbage: the run names the document. Mended, it goes on as if nothing had been."""
    prefix = tmp_path / "data"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for start in range(0, TOKENS, 20):
            writer.add_document(np.arange(start, start + 20))

    def flags(name: str) -> list[str]:
        folder = tmp_path / name
        files = f"--save {folder} --load {folder} --save-interval 2 --metrics-file {folder}.jsonl --log-interval 1"
        argv = words(files, f"--data-path {prefix} --split 100,0,0 --vocab-size {TOKENS}")
        argv.remove("--mock-data")
        return argv

    assert pretrain(flags("whole")).code == 0
    samples = build_datasets(parse_config(flags("whole")).config, 32, 0, 0, TOKENS)[0]
    assert samples is not None
    token = int(samples[17]["tokens"][5])  # of the second sample of iteration 5; it says where in the file it is
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(2 * token)
        file.write(b"\xff\xff")
    outcome = pretrain(flags("broken"))
    assert outcome.code == 2
    assert f"document {token // 20} holds token id 65535" in outcome.err
    assert "Traceback" not in outcome.err
    assert (tmp_path / "broken" / "iter_0000004").is_dir()
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(2 * token)
        file.write(token.to_bytes(2, "little"))
    outcome = pretrain(flags("broken"))
    assert outcome.code == 0, outcome.err
    assert "iteration 4" in outcome.out
    assert recorded(tmp_path / "broken.jsonl", LOSS) == recorded(tmp_path / "whole.jsonl", LOSS)


def with_wrong_clock(argv: list[str], skew: float) -> Outcome:
    """A run on hosts of which the second is a day ahead, and was started at another time."""
    clock, uptime, ahead = time.time, time.monotonic, skew * int(os.environ["RANK"])

    def wrong_clock() -> float:
        return clock() + ahead

    def wrong_uptime() -> float:
        return uptime() + ahead / 2

    with mock.patch("time.time", wrong_clock), mock.patch("time.monotonic", wrong_uptime):
        return pretrain(argv)


def test_clocks_that_disagree_change_nothing(pool, tmp_path):
    def run(name: str, skew: float, *flags: str) -> None:
        files = f"--save {tmp_path}/{name} --load {tmp_path}/{name} --metrics-file {tmp_path}/{name}.jsonl"
        more = "--train-iters 6 --save-interval 2 --keep-last 2 --log-interval 1 --exit-duration-in-mins 60"
        for outcome in pool.launch(2, with_wrong_clock, words(files, more, *flags), skew):
            assert outcome.code == 0, outcome.err

    run("right", 0)
    run("wrong", 86400, "--exit-interval 4")
    os.utime(tmp_path / "wrong" / "iter_0000002", (2e9, 2e9))  # as if it were the younger one
    run("wrong", -86400)
    assert recorded(tmp_path / "wrong.jsonl", LOSS) == recorded(tmp_path / "right.jsonl", LOSS)
    tensors, want = (saved_tensors(tmp_path / name / "iter_0000006") for name in ("wrong", "right"))
    assert tensors.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(tensors[key], value), key
    assert sorted(path.name for path in (tmp_path / "wrong").glob("iter_*")) == ["iter_0000004", "iter_0000006"]


def short_of_memory(argv: list[str], mebibytes: int) -> Outcome:
    """A run that may take so much more address space than its process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (mebibytes << 20), limits[1]))
    try:
        return pretrain(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to know the size of a process")
def test_out_of_memory_names_the_settings_to_change(pool):
    """Logits of 64 samples are 1.3 GB."""
    big = "--vocab-size 5000 --seq-length 1024 --micro-batch-size 64 --global-batch-size 64"
    (outcome,) = pool.launch(1, short_of_memory, words(big, "--watchdog-minutes 0"), 600)
    assert outcome.code == 2, outcome.err
    assert "error on rank 0: memory of cpu: the run doesn't fit: " in outcome.err
    assert "allocate" in outcome.err
    assert "--micro-batch-size 32, at the same --global-batch-size" in outcome.err
    assert "--recompute-granularity" in outcome.err
    assert "tools/plan.py" in outcome.err
    assert "Traceback" not in outcome.err


def test_savings_are_those_that_the_run_does_not_use_yet():
    def told(flags: str, ranks: int = 2) -> str:
        return ", ".join(savings(parse_config(flags.split()).config, ranks))

    first = told("--micro-batch-size 4")
    for flag in ("--micro-batch-size 2", "selective", "full", "--data-parallel-sharding-strategy", "--bf16"):
        assert flag in first
    assert "--data-parallel" not in told("--micro-batch-size 4", ranks=1)
    last = told("--micro-batch-size 1 --bf16 --recompute-granularity full --use-torch-fsdp2")
    assert last == "more GPUs, or a larger --tensor-model-parallel-size with --sequence-parallel"
    assert "selective" not in told("--recompute-activations")


def test_what_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    wrapped = RuntimeError("stage 0 failed")
    with contextlib.suppress(RuntimeError):
        try:
            raise MemoryError
        except MemoryError as error:
            raise wrapped from error
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert"))
