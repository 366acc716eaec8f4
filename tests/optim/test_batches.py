"""Rows of tensors in batches of equal shapes, from whole tensors and from shards, against `take_block`."""

from __future__ import annotations

import pytest
import torch
from optim_cases import GATE_UP_BLOCKS, QKV_BLOCKS

from megatron_mup.kernels.shards import Pieces, move
from megatron_mup.optim import batches
from megatron_mup.optim.batches import Run, make_batches, pieces_of_parcel, pieces_of_runs, runs_of_block
from megatron_mup.optim.exchange import Load
from megatron_mup.optim.matrix import take_block
from megatron_mup.parametrization.meta import Block

EXPERTS = (Block("gate", 0, 3, 8, apart=True), Block("up", 3, 5, 8, apart=True))
WHOLE = (Block("whole", 0, 32, 32),)
COLUMNS = 6


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
