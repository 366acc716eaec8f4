"""What guards a run on CPUs guards it under NCCL too, where the host runs ahead of what hangs on the device."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.training.flight import FOLDER
from megatron_mup.training.main import EXIT_BROKEN
from megatron_mup.training.signals import EXIT_STOPPED
from megatron_mup.training.stragglers import Stragglers
from megatron_mup.training.trainer import Trainer
from tests.parity import cases
from tests.parity.test_skipped_steps import LAYOUTS, broken_and_whole
from tests.runs import Outcome, pretrain, words
from tests.training.test_replicas import corrupted_run
from tests.training.test_watchdog import stop_and_go_on

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

SECONDS = 120
"""Within which each of these is over, its hang included."""


def broken_and_whole_on_gpu(config: Config) -> tuple[list[str], list[str]]:
    """The same on this rank's GPU, with kernels that give the same twice."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    return broken_and_whole(config, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize(("layout", "optimizer"), [("fsdp2", "muon"), ("tp2", "adam"), ("pp2", "muon")])
def test_a_step_left_out_changes_nothing(gpus, layout, optimizer):
    case, features = LAYOUTS[layout]
    config = cases.config_of(features, cases.OPTIMIZERS[optimizer], "--max-skipped-steps 1")
    for changed, later in gpus.run(2, broken_and_whole_on_gpu, cases.with_layout(config, case), timeout=SECONDS):
        assert changed == []
        assert later == []


def test_a_rank_that_is_stopped_is_named_with_the_collective_that_waits_for_it(gpus):
    argv = words("--watchdog-minutes 0.05 --train-iters 3")
    waiting, stopped = gpus.launch(2, stop_and_go_on, argv, timeout=SECONDS)
    assert (waiting.code, stopped.code) == (0, 0), waiting.err + stopped.err
    assert re.search(
        r"rank 0 \(process \d+ on \S+\) has been in [\w -]+ of iteration 2 for \d+ s; "
        r"it waits in nccl:all_reduce number \d+ of group default_pg",
        waiting.err,
    ), waiting.err
    assert re.search(r"rank 1 .* on .*: silent: its process is stopped", waiting.err), waiting.err


def hanging_run(argv: list[str]) -> Outcome:
    """A run whose second rank never comes to its third step."""
    batch = Trainer.batch

    def hanging(self: Trainer, consumed_samples: int, size: int):
        if os.environ["RANK"] == "1" and self.progress.iteration == 2:
            time.sleep(10 * SECONDS)
        return batch(self, consumed_samples, size)

    with mock.patch.object(Trainer, "batch", hanging):
        return pretrain(argv)


def test_a_hang_ends_by_the_short_timeout_and_leaves_the_flight_recorder_s_dump(gpus, tmp_path):
    flags = f"--train-iters 4 --distributed-timeout-seconds-after-init 5 --save {tmp_path}"
    with pytest.raises(RuntimeError, match="exit codes"):
        gpus.launch(2, hanging_run, words(flags), timeout=SECONDS)
    dump = pickle.loads((tmp_path / FOLDER / "rank_0").read_bytes())
    waiting = [entry for entry in dump["entries"] if not entry["retired"]]
    assert waiting[0]["profiling_name"] == "nccl:all_reduce"
    assert waiting[0]["timeout_ms"] == 5000
    assert any(entry["timeout_ms"] == 600_000 for entry in dump["entries"]), "the first step may take longer"


def slow_rank(work: int) -> list[str]:
    """What all ranks say of the second, which has so many times the work of a probe."""
    found = Stragglers(torch.device("cuda", torch.cuda.current_device()))
    if dist.get_rank() == 1:
        found._matrix = found._matrix.repeat(work, work)
    found.compare({"data": 0.0})  # cuBLAS and NCCL start
    return found.compare({"data": 0.0})[1]


def test_a_slow_gpu_is_named(gpus):
    for lines in gpus.run(2, slow_rank, 2, timeout=SECONDS):
        assert len(lines) == 1
        assert lines[0].startswith("straggler: rank 1 on ")
        assert ", probe took " in lines[0]


def test_equal_gpus_are_not_accused(gpus):
    for lines in gpus.run(2, slow_rank, 1, timeout=SECONDS):
        assert lines == []


def test_a_bit_that_flips_on_a_replica(gpus, tmp_path):
    flags = f"--check-weight-hash-across-dp-replicas-interval 2 --save {tmp_path} --save-interval 2"
    for outcome in gpus.launch(2, corrupted_run, words(flags), timeout=SECONDS):
        assert outcome.code == EXIT_BROKEN, outcome.err
        if outcome.err:
            assert "iteration 4: weights differ" in outcome.err
            assert "embedding.word_embeddings.weight on ranks 0-1 (" in outcome.err
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]


def signalled_run(argv: list[str]) -> Outcome:
    """A run of which the second rank alone gets SIGTERM, before its second step."""
    batch = Trainer.batch

    def terminating(self: Trainer, consumed_samples: int, size: int):
        if os.environ["RANK"] == "1" and self.progress.iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, consumed_samples, size)

    with mock.patch.object(Trainer, "batch", terminating):
        return pretrain(argv)


def test_sigterm_on_one_rank_stops_all_a_step_later(gpus, tmp_path):
    for outcome in gpus.launch(2, signalled_run, words(f"--save {tmp_path}"), timeout=SECONDS):
        assert outcome.code == EXIT_STOPPED, outcome.err
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000003"]
