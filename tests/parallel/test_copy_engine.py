"""FSDP2's messages by copies, over files that ranks share in the place of GPUs' memory, against its own messages."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from megatron_mup.config import parse_config, validate
from megatron_mup.kernels.row_sum import row_sum
from megatron_mup.parallel import copy_engine
from megatron_mup.parallel.data_parallel import transport_of_auto
from megatron_mup.parallel.mesh import Mesh
from tests.interpreter import interpreted
from tests.pool import Pool
from tests.runs import batch_of, step_of, values, words
from tests.shared_file import shared_through

STEPS = 3
ONE = "--global-batch-size 4"
TWO = "--global-batch-size 8"
FSDP = "--use-torch-fsdp2 --num-layers 5 --vocab-size 104"


def train(folder: str, flags: str) -> tuple[list[float], dict[str, torch.Tensor], list[torch.dtype]]:
    """Losses and gradient norms of a few steps, the values at their end, and what gradients travelled as."""
    config = parse_config(words(flags)).config
    validate(config, dist.get_world_size())
    sent: list[torch.dtype] = []

    class Watched(copy_engine.CopyReduceScatter):
        def __call__(
            self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: object, **kw: object
        ) -> None:
            sent.append(input_tensor.dtype)
            super().__call__(output_tensor, input_tensor, *args, **kw)  # type: ignore[arg-type]

    with shared_through(folder) as patch:
        patch.setattr(copy_engine, "CopyReduceScatter", Watched)
        mesh = Mesh.build(config, torch.device("cpu"))
        step = step_of(config, mesh)
        found = []
        for number in range(STEPS):
            batch = {name: part.chunk(mesh.dp_size)[mesh.dp_rank] for name, part in batch_of(config, number).items()}
            result = step(batch, 1.0)
            found += [result.loss.item(), result.grad_norm.item()]
            step.evaluate(batch)
            # What a pass without gradients kept whole would be stale after a step that a CUDA graph replays.
            assert all(isinstance(parameter, DTensor) for parameter in step.model.parameters())
    return found, values(step), sent


CASES = {
    "one-micro-batch": (2, f"{FSDP} {ONE} --bf16 --untie-embeddings-and-output-weights", torch.bfloat16),
    "several": (2, f"{FSDP} {TWO} --bf16 --main-params-dtype bf16", torch.float32),
    "uneven": (2, f"{FSDP} {ONE} --vocab-size 101 --make-vocab-size-divisible-by 1 --bf16", torch.bfloat16),
    "kept": (2, f"{FSDP} {ONE} --no-use-torch-fsdp2 --use-distributed-optimizer", torch.float32),
    "recomputed": (
        2,
        f"{FSDP} {ONE} --recompute-granularity full --recompute-num-layers 3",
        torch.float32,
    ),
    "replicas": (
        4,
        f"{FSDP} {ONE} --micro-batch-size 1 --bf16 --num-distributed-optimizer-instances 2",
        torch.bfloat16,
    ),
    "experts": (
        2,
        f"{FSDP} {ONE} --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --swiglu --disable-bias-linear",
        torch.float32,
    ),
}


QUICK = ("one-micro-batch", "recomputed")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_equal_to_collectives(pool: Pool, case: str) -> None:
    """Two ranks' sums don't depend on their order: equal to the bit."""
    ranks, flags, wire = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        mine = pool.run(ranks, train, folder, f"{flags} --fsdp-transport auto")
    theirs = pool.run(ranks, train, "", f"{flags} --fsdp-transport collective")
    for (found, ends, sent), (wanted, wanted_ends, unsent) in zip(mine, theirs, strict=True):
        assert found == wanted
        for name, value in wanted_ends.items():
            assert torch.equal(ends[name], value), name
        assert set(sent) == {wire}
        assert not unsent


def transport(flags: str) -> str | None:
    config = parse_config(words(flags)).config
    return transport_of_auto(config, Mesh.build(config, torch.device("cpu")))


@pytest.mark.parametrize(("flag", "begin"), [("auto", "collectives"), ("collective", "None")])
def test_what_auto_comes_to_is_told(pool: Pool, flag: str, begin: str) -> None:
    assert all(str(told).startswith(begin) for told in pool.run(2, transport, f"{FSDP} {ONE} --fsdp-transport {flag}"))


def test_more_whole_units_than_places() -> None:
    """Overwriting parameters that are still wanted would be silent."""

    class Unit:
        is_whole = True

    places = copy_engine.Places(2, torch.float32, torch.device("cpu"))
    first, third = Unit(), Unit()
    places.enter(0, first)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="2 places"):
        places.enter(0, third)  # type: ignore[arg-type]
    first.is_whole = False
    places.enter(0, third)  # type: ignore[arg-type]


def test_row_sum_rounds_once() -> None:
    """In bf16, 1 + 2**-8 + 2**-8 is 1 if it is rounded after each addition."""
    first, small = torch.ones(3, dtype=torch.bfloat16), torch.full((2, 3), 2.0**-8, dtype=torch.bfloat16)
    out = torch.empty(3, dtype=torch.bfloat16)
    row_sum(first, small, out)
    assert torch.equal(out, torch.full((3,), 1 + 2.0**-7, dtype=torch.bfloat16))


KERNEL = """
import torch
from megatron_mup.kernels import row_sum, row_sum_triton
for rows, count, dtype in ((1, 1, torch.float32), (3, 5000, torch.bfloat16), (7, 2048, torch.bfloat16)):
    first, others = torch.randn(count).to(dtype), torch.randn(rows, count).to(dtype)
    got, wanted = torch.empty(count), torch.empty(count)
    row_sum_triton.launch(first, others, got)
    row_sum.row_sum(first, others, wanted)
    assert torch.equal(got, wanted)
"""


def test_row_sum_kernel() -> None:
    """The kernel in Triton's interpreter: ends of blocks, one element, many rows."""
    interpreted(__file__, KERNEL)
