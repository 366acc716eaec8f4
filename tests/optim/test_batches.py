"""Rows of tensors in batches of equal shapes, from whole tensors and from shards, against `take_block`."""

from __future__ import annotations

import pytest
import torch
from optim_cases import GATE_UP_BLOCKS, QKV_BLOCKS

from megatron_mup.kernels.shards import Pieces, move
from megatron_mup.optim import batches
from megatron_mup.optim.batches import Run, make_batches, pieces_of_parcel, pieces_of_runs, runs_of_block
from megatron_mup.optim.blocks import take_block
from megatron_mup.optim.exchange import Load, Way
from megatron_mup.parametrization.meta import Block

EXPERTS = (Block("gate", 0, 3, 8, apart=True), Block("up", 3, 5, 8, apart=True))
WHOLE = (Block("whole", 0, 32, 32),)
COLUMNS = 6
CPU = torch.device("cpu")


def runs_of(blocks: tuple[Block, ...], rows: int) -> dict[int, list[Run]]:
    """Runs by block, each block a batch of its own."""
    found, first = {}, 0
    for number, block in enumerate(blocks):
        count = block.matrices(rows)[0]
        runs = runs_of_block(block, rows, range(first, first + count))
        found[number] = [Run(number, r.row, r.start, r.count, r.matrix) for r in runs]
        first += count
    return found


@pytest.mark.parametrize("blocks", [QKV_BLOCKS, GATE_UP_BLOCKS, EXPERTS, WHOLE])
def test_pieces_of_whole_tensors(blocks):
    tensor = torch.arange(32 * COLUMNS).view(32, COLUMNS)
    matrices = []
    for number, runs in runs_of(blocks, 32).items():
        block = blocks[number]
        flat = torch.full((take_block(tensor, block).numel(),), -1)
        for piece in pieces_of_runs(0, runs, COLUMNS):
            flat[piece.place : piece.place + piece.length] = tensor.view(-1)[piece.start : piece.start + piece.length]
            matrices.append(piece.matrix)
        assert torch.equal(flat, take_block(tensor, block).reshape(-1))
    assert sorted(set(matrices)) == list(range(sum(block.matrices(32)[0] for block in blocks)))


@pytest.mark.parametrize("blocks", [QKV_BLOCKS, GATE_UP_BLOCKS, EXPERTS, WHOLE])
@pytest.mark.parametrize("cut", ["rows", "columns", "both", "empty"])
def test_shards_to_batches_and_back(blocks, cut):
    tensor = torch.arange(32.0 * COLUMNS).view(32, COLUMNS)
    rows = {"rows": [(0, 5), (5, 27)], "empty": [(0, 32), (32, 0)]}.get(cut, [(0, 32)])
    rows = [(0, 13), (13, 19)] if cut == "both" else rows
    columns = [(0, 4), (4, 2)] if cut in ("columns", "both") else [(0, COLUMNS)]
    shards = [((r, c), (height, width)) for r, height in rows for c, width in columns]
    load = Load.of([("w", bounds)] for bounds in shards)
    assert load.counts == tuple(height * width for _, (height, width) in shards)
    buffer = torch.cat([tensor[r : r + h, c : c + w].reshape(-1) for (r, c), (h, w) in shards])
    runs = runs_of(blocks, 32)
    every = {"w": [r for own in runs.values() for r in own]}
    back = torch.full_like(buffer, -1.0)
    for number, (block, own) in enumerate(zip(blocks, runs.values(), strict=True)):
        batch = torch.full((sum(r.count for r in own) * COLUMNS,), -1.0)
        pieces = batches.arriving_pieces(number, COLUMNS, every, load.parcels)
        move(buffer, batch, Pieces(pieces, batch.device))
        assert torch.equal(batch, take_block(tensor, block).reshape(-1))
        move(batch, back, Pieces(batches.turned(pieces), batch.device))
    assert torch.equal(back, buffer)
    numbers = torch.full((32,), -1)
    for own in runs.values():
        for r in own:
            numbers[r.start : r.start + r.count] = r.matrix
    for parcel in load.parcels:
        width, covered = parcel.shape[1], 0
        for piece in pieces_of_parcel(3, every["w"], parcel):
            first = parcel.offsets[0] + piece.start // width
            assert (piece.tensor, piece.place) == (3, parcel.place + piece.start)
            assert (numbers[first : first + piece.length // width] == piece.matrix).all()
            covered += piece.length
        assert covered == parcel.numel


def test_what_stays_on_a_rank_does_not_travel():
    """The first rank gets one part from the second and sends one; its own is in neither buffer."""
    top, bottom = ((0, 0), (5, 3)), ((5, 0), (2, 3))
    ways = [
        Way.of([[("w", top)], [("v", top)]], [[("w", top)], [("w", bottom)]], 0),
        Way.of([[("w", bottom)], [("v", bottom)]], [[("v", top)], [("v", bottom)]], 1),
    ]
    for rank, way in enumerate(ways):
        assert way.sent.counts[rank] == way.got.counts[rank] == 0
        assert way.sent.numel <= way.begin
        assert way.numel == way.begin + way.got.numel
        assert [p.place for p in way.got.parcels] == [way.begin]
        assert [(p.name, p.offsets) for p in way.kept.parcels] == [("wv"[rank], (top, bottom)[rank][0])]
    assert ways[0].sent.counts == (0, 15)
    assert ways[1].got.counts == (15, 0)


def test_a_gpu_has_matrices_for_each_lane():
    gpu, large, small = torch.device("cuda"), batches.BATCH_BYTES // 16, batches.BATCH_BYTES // 256
    assert [batches.matrices_at_once(large, gpu, 2, count) for count in (1, 2, 3, 8, 100)] == [1, 1, 2, 4, 4]
    assert [batches.matrices_at_once(small, gpu, 2, count) for count in (1, 16, 48, 1000)] == [16, 16, 24, 64]
    assert batches.matrices_at_once(small, gpu) == 256
    assert batches.matrices_at_once(10 * batches.BATCH_BYTES, gpu, 2, 8) == 1
    assert batches.matrices_at_once(1, CPU, 2, 8) == 1


def test_batches_hold_equal_shapes_up_to_a_limit():
    shapes = {("a", 0): (4, 8), ("a", 1): (2, 8), ("b", 0): (4, 8), ("c", 0): (4, 8), ("d", 0): (2, 8)}
    counts = dict.fromkeys(shapes, 1) | {("c", 0): 5}
    made = make_batches(shapes, counts, {(4, 8): 2, (2, 8): 1})
    assert [batch.places for batch in made] == [
        (("a", 0), ("b", 0)),
        (("c", 0),),
        (("a", 1),),
        (("d", 0),),
    ]
    assert [batch.numel for batch in made] == [64, 160, 16, 16]
