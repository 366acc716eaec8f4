"""FSDP2's messages by copy engines, on two GPUs, against NCCL's collectives: two ranks' sums are equal to the bit."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.config import Config
from megatron_mup.parallel.mesh import Mesh
from tests.gpu.gpu_runs import gpu_config, share, train_many_on_rank
from tests.runs import step_of

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

FSDP = "--use-torch-fsdp2 --attention-backend unfused --num-layers 5"
"""Attention whose gradient has no atomic sums."""
BF16 = "--bf16 --micro-batch-size 4"
RUNS = {
    "one-micro-batch": f"{FSDP} {BF16}",
    "pure-bf16": f"{FSDP} {BF16} --main-params-dtype bf16",
    "compiled": f"{FSDP} {BF16} --torch-compile",
    "several": f"{FSDP} --bf16",
    "fp32": FSDP,
    "kept": f"{FSDP} {BF16} --no-use-torch-fsdp2 --use-distributed-optimizer",
    "recomputed": f"{FSDP} {BF16} --recompute-granularity full --recompute-num-layers 2",
}


def configs() -> dict[str, Config]:
    """Each run by copies, by collectives, and by collectives again."""
    ways = {"copies": "auto", "collectives": "collective", "again": "collective"}
    return {
        f"{run} {way}": gpu_config(f, f"--fsdp-transport {t}") for run, f in RUNS.items() for way, t in ways.items()
    }


def differences(seen: dict[str, object], run: str) -> list[str]:
    """What is not equal to the bit, and an error's text."""
    parts = [seen[f"{run} {way}"] for way in ("copies", "collectives", "again")]
    errors = [part for part in parts if isinstance(part, str)]
    if errors:
        return errors
    copies, collectives, again = parts
    return [
        f"{name}: {copies[name]} {collectives[name]} {again[name]}"
        for name in ("losses", "norms")
        if not torch.equal(copies[name], collectives[name])
    ]


@pytest.fixture(scope="module")
def ranks(gpus):
    """What each of two ranks saw of every run."""
    return gpus.run(2, train_many_on_rank, configs(), timeout=200)


@pytest.mark.parametrize("run", RUNS)
def test_equal_to_nccl(ranks, run):
    for seen in ranks:
        assert not differences(seen, run)


GRAPHED = {
    "copies": "--fsdp-transport auto",
    "pure-bf16": "--fsdp-transport auto --main-params-dtype bf16 --micro-batch-size 4",
    "kept": "--fsdp-transport auto --no-use-torch-fsdp2 --use-distributed-optimizer",
    "collectives": "--fsdp-transport collective",
}


def numbers_of_steps(config: Config) -> list[torch.Tensor]:
    """Losses, gradient norms, sums of requests and evaluations of seven steps, of which a graph replays four."""
    torch._dynamo.reset()
    mesh = Mesh.build(config, torch.device("cuda", torch.cuda.current_device()))
    step, seen = step_of(config, mesh), []
    for number in range(7):
        found = step(share(config, mesh, number), 1.0, request=number)
        seen += [found.loss, found.grad_norm, found.request]
        if number > 3:
            seen.append(step.evaluate(share(config, mesh, 99)))
    step.close()
    return [tensor.cpu() for tensor in seen]


@pytest.mark.parametrize("run", GRAPHED)
def test_a_graph_replays_messages(gpus, run):
    """Evaluations between replays see the weights of then, though FSDP2 has no notice of replays."""
    flags = f"{FSDP} --bf16 {GRAPHED[run]}"
    eager = gpus.run(2, numbers_of_steps, gpu_config(flags), timeout=100)
    graphed = gpus.run(2, numbers_of_steps, gpu_config(flags, "--cuda-graph-impl local"), timeout=100)
    for seen, wanted in zip(graphed, eager, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
