from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron_mup.checkpoint.background import BackgroundSaver
from megatron_mup.config import ConfigError
from megatron_mup.training.flight import last_collective, record_collectives
from megatron_mup.training.launch import Launch, first_host, shorten_timeouts
from tests.runs import config_of

NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
    "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_ID",
)
TASK = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "1234567",
}


@pytest.fixture
def launched(monkeypatch):
    """The launch that an environment makes."""

    def launch(**variables: str) -> Launch:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return Launch.from_environment()

    return launch


def test_alone(launched):
    assert launched() == Launch(0, 0, 1)
    assert launched(SLURM_JOB_ID="7", SLURM_NTASKS="4") == Launch(0, 0, 1), "a shell of salloc"
    assert launched(SLURM_PROCID="0", SLURM_NTASKS="1") == Launch(0, 0, 1), "a batch script"


def test_tasks_of_srun(launched):
    assert launched(**TASK) == Launch(9, 1, 16, ("gpu03", 24567))
    assert launched(**TASK, SLURM_STEP_NODELIST="gpu04").address == ("gpu04", 24567)
    assert launched(**TASK, MASTER_ADDR="head", MASTER_PORT="29500").address == ("head", 29500)
    assert launched(**TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}) == Launch(0, 0, 1)


def test_torchrun_inside_srun_wins(launched):
    assert launched(**TASK, RANK="2", LOCAL_RANK="2", WORLD_SIZE="4") == Launch(2, 2, 4)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK 4"),
        ({"RANK": "1"}, "WORLD_SIZE 1"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK 'one'"),
        (TASK | {"SLURM_PROCID": "16"}, "SLURM_PROCID 16"),
        (TASK | {"SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST"),
        (TASK | {"MASTER_PORT": "any"}, "MASTER_PORT 'any'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "srun"),
    ],
)
def test_contradictions(launched, variables, said):
    with pytest.raises(ConfigError, match=said):
        launched(**variables)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[07-09,12],login", "node07"),
        ("node[3,5]", "node3"),
        ("rack[1-2].cluster,node[1-9]", "rack1.cluster"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
DUMPS = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


@pytest.mark.parametrize("given", [{}, {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}])
def test_the_flight_recorder_is_on_unless_the_user_says_otherwise(monkeypatch, given):
    for name in RECORDER + DUMPS:
        monkeypatch.setenv(name, "")  # so that monkeypatch takes back what is set below
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    record_collectives(None)
    found = {name: os.environ[name] for name in RECORDER + DUMPS if name in os.environ}
    assert found == (given or {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"})
    record_collectives("/runs/1b")
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "/runs/1b/flight-recorder/rank_"


def wait_in_vain() -> tuple[str, float]:
    """What rank 0 waits for in a collective that rank 1 doesn't enter, and how that ends under a short timeout."""
    group, saver = dist.new_group(), BackgroundSaver()
    shorten_timeouts(config_of("--distributed-timeout-seconds-after-init 1"))
    patient = saver._group
    assert patient is not None
    if dist.get_rank() == 1:
        time.sleep(3)  # longer than the timeout; only the saver's group waits for that
        dist.all_reduce(torch.ones(1), group=patient)
        shorten_timeouts(config_of("--distributed-timeout-seconds-after-init 300"))
        return "", 0.0
    seen: list[str] = []
    observer = threading.Timer(0.5, lambda: seen.append(last_collective()))
    observer.start()
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timed out"):
        dist.all_reduce(torch.ones(3), group=group)
    seconds = time.monotonic() - begin
    observer.join()
    dist.all_reduce(torch.ones(1), group=patient)
    shorten_timeouts(config_of("--distributed-timeout-seconds-after-init 300"))
    return seen[0], seconds


def test_a_short_timeout_for_all_groups_but_that_of_saves(pool):
    said, seconds = pool.run(2, wait_in_vain)[0]
    assert said.startswith("waits in gloo:all_reduce number 1 of group")
    assert "[[3]]" in said
    assert seconds >= 1
