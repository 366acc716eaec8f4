"""Slow ranks are named, with their hosts."""

from __future__ import annotations

import os
import time
from unittest import mock

import pytest

from megatron_mup.training.stragglers import Stragglers, summary
from megatron_mup.training.trainer import Trainer
from tests.runs import Outcome, pretrain, recorded, words


def test_only_what_a_rank_does_alone_accuses_it():
    hosts = ["node1", "node1", "node2", "node2"]
    times = {
        "data": [0.001, 0.001, 0.002, 0.0015],
        "forward-backward": [0.5, 0.5, 0.9, 0.5],
        "probe": [0.010, 0.010, 0.011, 0.014],
    }
    ratios, lines = summary(times, hosts)
    assert lines == ["straggler: rank 3 on node2, probe took 14 ms, the median 10 ms"], "a ms of data is nothing here"
    assert ratios["forward-backward slowest over median"] == pytest.approx(1.8)
    _, lines = summary({**times, "data": [0.001, 0.3, 0.001, 0.1]}, hosts)
    assert [line.split(",")[0] for line in lines] == [
        f"straggler: rank {r}" + f" on node{n}" for r, n in [(1, 1), (3, 2)]
    ] + ["straggler: rank 3 on node2"]


def test_none_where_all_are_alike():
    assert summary({"data": [0.1, 0.1], "probe": [0.01, 0.0101]}, ["a", "b"])[1] == []


def slow_second_rank(argv: list[str]) -> Outcome:
    """A run in which rank 1 waits for its data, and whose device is slow."""
    batch, slow = Trainer.batch, os.environ["RANK"] == "1"

    def late_batch(self: Trainer, consumed_samples: int, size: int):
        time.sleep(0.3 if slow else 0)
        return batch(self, consumed_samples, size)

    def probe(_self: Stragglers) -> float:
        return 1.0 + slow

    with mock.patch.object(Trainer, "batch", late_batch), mock.patch.object(Stragglers, "_probe", probe):
        return pretrain(argv)


def test_a_run_names_them(pool, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    flags = words(f"--log-straggler --log-interval 2 --train-iters 4 --metrics-file {metrics}")
    outcome = pool.launch(2, slow_second_rank, flags)[0]
    assert outcome.code == 0, outcome.err
    said = outcome.out + outcome.err
    assert said.count("straggler: rank 1 on") == 4, "twice two"
    assert "straggler: rank 0" not in said
    assert "data took 3" in said
    assert recorded(metrics, "straggler/probe slowest over median") == {2: 2.0, 4: 2.0}
    assert recorded(metrics, "straggler/data slowest over median")[4] > 1.25
    assert recorded(metrics, "straggler/optimizer slowest over median")[4] >= 1
