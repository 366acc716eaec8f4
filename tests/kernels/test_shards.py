"""Passes over many shards: the twins against plain formulas, and the kernels against the twins."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_mup.kernels.shards import (
    TILE,
    Momentum,
    Piece,
    Pieces,
    Shards,
    advance,
    advance_reference,
    apply,
    apply_reference,
    move,
    move_reference,
    tile_tables,
)
from tests.interpreter import interpreted

STYLES = [Momentum(beta, ema, nesterov) for beta in (0.95, 0.3) for ema in (True, False) for nesterov in (True, False)]
# Two tensors, in pieces that change places; tiles that are whole, short, and begin at odd elements.
SIZES = (3 * TILE + 40, 2 * TILE)
PIECES = (
    Piece(0, 0, TILE, 2 * TILE, 0),
    Piece(0, 2 * TILE, 3 * TILE, TILE + 40, 1),
    Piece(1, 1, 0, TILE, 2),
    Piece(1, 0, 4 * TILE + 40, 1, 0),
)


def shards(seed: int, dtype: torch.dtype, device: str = "cpu") -> Shards:
    generator = torch.Generator().manual_seed(seed)
    found = Shards(len(SIZES), torch.device(device))
    found.set([torch.randn(size, generator=generator).to(device, dtype) for size in SIZES])
    return found


@pytest.mark.parametrize("style", STYLES)
def test_momentum(style):
    grads, momenta = shards(0, torch.float32), shards(1, torch.float32)
    before = [m.double() for m in momenta.tensors]
    out = torch.full((4 * TILE + 41,), torch.nan)
    advance(grads, momenta, out, Pieces(PIECES, out.device), style)
    for piece in PIECES:
        own = slice(piece.start, piece.start + piece.length)
        grad, old = grads.tensors[piece.tensor][own].double(), before[piece.tensor][own]
        share = 1 - style.beta if style.ema else 1.0
        new = style.beta * old + share * grad
        torch.testing.assert_close(momenta.tensors[piece.tensor][own].double(), new, rtol=1e-6, atol=1e-6)
        update = style.beta * new + share * grad if style.nesterov else new
        got = out[piece.place : piece.place + piece.length]
        torch.testing.assert_close(got.double(), update, rtol=1e-6, atol=1e-6)


def test_without_momenta_gradients_are_packed():
    grads, out = shards(0, torch.float32), torch.zeros(4 * TILE + 41, dtype=torch.bfloat16)
    advance(grads, None, out, Pieces(PIECES, out.device), STYLES[0])
    for piece in PIECES:
        want = grads.tensors[piece.tensor][piece.start : piece.start + piece.length].bfloat16()
        assert torch.equal(out[piece.place : piece.place + piece.length], want)


def test_move():
    pieces = [Piece(0, 2, 1, 3, 0), Piece(0, 7, 5, 1, 0)]
    source, out = torch.arange(9.0), torch.zeros(7)
    assert move(source, out, Pieces([], out.device)) is None  # what is whole at home leaves nothing to arrive
    assert not out.any()
    assert move(source, out, Pieces(pieces, out.device)) is None
    assert out.tolist() == [0, 2, 3, 4, 0, 7, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_rounds_once(dtype):
    values, results = shards(0, dtype), torch.randn(4 * TILE + 41, dtype=torch.float64).to(torch.bfloat16)
    before = [v.double() for v in values.tensors]
    gain, change = torch.tensor([0.5, -2.0, 1.0]), torch.tensor([0.0, -0.1, 0.2])
    apply(values, results, Pieces(PIECES, results.device), gain, change)
    for piece in PIECES:
        own = slice(piece.start, piece.start + piece.length)
        old, result = before[piece.tensor][own], results[piece.place : piece.place + piece.length].double()
        want = old + gain[piece.matrix] * result + change[piece.matrix].double() * old
        got = values.tensors[piece.tensor][own].double()
        torch.testing.assert_close(got, want, rtol=2**-8 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
    assert torch.equal(values.tensors[1][TILE + 1 :].double(), before[1][TILE + 1 :]), "no piece, no change"


def test_tiles_cover_the_pieces():
    tables = dict(tile_tables(PIECES, torch.device("cpu"), {0}))
    assert len(tables[False]) == 2 + 2 + 1 + 1
    assert True not in tables, "tensor 0 is not aligned, nor do the pieces of tensor 1 begin at a multiple of 8"
    assert len(dict(tile_tables(PIECES, torch.device("cpu"), ()))[True]) == 3
    assert sum(int(table[:, 3].sum()) for table in tables.values()) == sum(piece.length for piece in PIECES)


def test_tiles_of_several_buffers_are_mixed():
    """Three times as many in the first one: one of the second follows three of the first."""
    pieces = [Piece(0, 0, 0, 6 * TILE, 0, 0), Piece(1, 0, 0, 2 * TILE, 1, 1)]
    ((_, tiles),) = tile_tables(pieces, torch.device("cpu"), ())
    assert tiles[:, 5].tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
    assert tiles[tiles[:, 5] == 0, 2].tolist() == [TILE * place for place in range(6)]


def test_tiles_of_matrices():
    """Two matrices in one buffer: each tile is listed with its own, wherever its table has it; a third one has none."""
    size = 2 * TILE + 48
    pieces = Pieces(
        [Piece(0, 0, TILE, TILE + 48, 0), Piece(1, 0, size, 2 * TILE, 1), Piece(1, 2 * TILE, 0, TILE, 0)],
        torch.device("cpu"),
    )
    pieces.tables = tile_tables(pieces.pieces, torch.device("cpu"), ())
    found = pieces.tiles_of_matrices(size, 3)
    rows = torch.cat([table for _, table in pieces.tables])
    for matrix, row in enumerate(found):
        tiles = row[row >= 0]
        assert set(tiles.tolist()) == set(torch.nonzero(rows[:, 2] // size == matrix)[:, 0].tolist())
    assert len(found) == 3
    assert (found >= 0).sum() == len(rows)


def test_other_gradients_are_copied():
    grads = Shards(2, torch.device("cpu"))
    scattered = torch.randn(4, 6).bfloat16().t()
    grads.set_copies([scattered, torch.ones(3)])
    assert grads.dtype is torch.float32
    assert torch.equal(grads.tensors[0], scattered.float().reshape(-1))


def compare(device: str) -> None:
    """The kernels against their twins: within rounding, for the compiler contracts products and sums."""
    from megatron_mup.kernels import shards_triton

    types = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32, torch.float16)
    for dtype in types:
        for style in STYLES:
            for keeps in (True, False):
                results = []
                for run in (partial(shards_triton.advance, squared=True), advance_reference):
                    grads, momenta = (on_tables(shards(seed, dtype, device)) for seed in (0, 1))
                    out = torch.zeros(4 * TILE + 41, dtype=types[1], device=device)
                    squares = run(grads, momenta if keeps else None, out, on_tables(Pieces(PIECES, out.device)), style)
                    results.append([*momenta.tensors, out])
                    if squares is not None:
                        want = out.double().square().sum()
                        torch.testing.assert_close(squares.double().sum(), want, rtol=1e-5, atol=0)
                check(*results)
        results = []
        for run in (partial(shards_triton.move, squared=True), move_reference):
            source, out = shards(0, dtype, device).tensors[0], torch.zeros(4 * TILE + 41, dtype=dtype, device=device)
            squares = run(source, out, on_tables(Pieces(PIECES[:2], out.device)))
            results.append(out)
            if squares is not None:
                torch.testing.assert_close(squares.double().sum(), out.double().square().sum(), rtol=1e-5, atol=0)
        assert torch.equal(*results)
        results = []
        for run in (shards_triton.apply, apply_reference):
            values, packed = on_tables(shards(0, dtype, device)), torch.cat(shards(3, types[1], device).tensors)
            gain, change = torch.tensor([[0.5, -2.0, 1.0], [0.0, -0.1, 0.2]], device=device)
            run(values, packed, on_tables(Pieces(PIECES, packed.device)), gain, change)
            results.append(values.tensors)
        check(*results)
        compare_several_buffers(dtype, device)


def compare_several_buffers(dtype: torch.dtype, device: str) -> None:
    """The same kernels with a buffer for every second piece."""
    from megatron_mup.kernels import shards_triton

    pieces = [replace(piece, buffer=number % 2) for number, piece in enumerate(PIECES)]
    gain, change = torch.tensor([[0.5, -2.0, 1.0], [0.0, -0.1, 0.2]], device=device)
    results = []
    for pack, use in ((shards_triton.advance, shards_triton.apply), (advance_reference, apply_reference)):
        grads, momenta, values = (on_tables(shards(seed, dtype, device)) for seed in range(3))
        buffers = Shards(2, torch.device(device))
        buffers.set([torch.zeros(4 * TILE + 41, dtype=dtype, device=device) for _ in range(2)])
        table = on_tables(Pieces(pieces, torch.device(device)))
        pack(grads, momenta, on_tables(buffers), table, STYLES[0])
        use(values, buffers, table, gain, change)
        results.append([*momenta.tensors, *values.tensors, *buffers.tensors])
    check(*results)


def on_tables(what):
    """With the tables that only a GPU has otherwise."""
    if isinstance(what, Pieces):
        what.tables = what.tables or tile_tables(what.pieces, torch.device("cpu"), ())
    elif what.table is None:
        what.table = torch.tensor([tensor.data_ptr() for tensor in what.tensors])
    return what


def check(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        rough = one.dtype is not torch.float32
        torch.testing.assert_close(one, other, rtol=2**-7 if rough else 1e-6, atol=2**-6 if rough else 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_equal_their_twins():
    compare("cuda")


@pytest.mark.long
def test_kernels_in_the_interpreter():
    interpreted(__file__, "import test_shards; test_shards.compare('cpu')")
