from __future__ import annotations

import pytest

from megatron_mup.config import ConfigError
from megatron_mup.training.launch import Launch, first_host

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
