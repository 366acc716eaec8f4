from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels import symmetric
from megatron_mup.kernels.late import kernels_of
from megatron_mup.kernels.symmetric import has_whole_rows, kernel_takes, symmetric_product, symmetric_product_reference

FORMS = ("rows", "columns", "symmetric")


def operands(
    form: str, batch: int, n: int, k: int, device: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two operands with a symmetric product: the same one twice, or two polynomials of one symmetric matrix."""
    if form == "symmetric":
        a = torch.randn(batch, n, n, device=device, dtype=torch.float64) / n**0.5
        a = a + a.mT
        return a.to(dtype), (a @ a).to(dtype)
    a = (torch.randn(batch, *((n, k) if form == "rows" else (k, n)), device=device) / k**0.5).to(dtype)
    return a, a


def exact(a, b, form, alpha=1.0, beta=0.0, d=None, diagonal=0.0, scale=None) -> torch.Tensor:
    left, right = a.double(), b.double()
    out = alpha * (left.mT @ right if form == "columns" else left @ right.mT)
    out = out + diagonal * torch.eye(out.shape[-1], device=out.device)
    out = out if d is None else out + beta * d.double()
    return out if scale is None else out * scale.double().view(-1, 1, 1)


def extras(batch: int, n: int, device: str, dtype: torch.dtype) -> dict[str, object]:
    d = torch.randn(batch, n, n, device=device)
    scale = torch.rand(batch, device=device) + 0.5
    return {"alpha": 0.5, "beta": -1.5, "d": (d + d.mT).to(dtype), "diagonal": 2.0, "scale": scale}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("full", [False, True])
def test_twin_against_the_formula(form, full):
    torch.manual_seed(0)
    a, b = operands(form, 2, 24, 40, "cpu", torch.float32)
    terms = extras(2, 24, "cpu", torch.float32) if full else {}
    got = symmetric_product(a, b, form, **terms)
    torch.testing.assert_close(got.double(), exact(a, b, form, **terms), rtol=0, atol=1e-5)
    assert torch.equal(got, got.mT)


def test_twin_rounds_once():
    torch.manual_seed(0)
    a = torch.randn(1, 8, 256).half()
    got = symmetric_product(a, a, "rows", dtype=torch.bfloat16)
    assert torch.equal(got, exact(a, a, "rows").bfloat16())


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("batch", "n", "k"), [(1, 8, 8), (2, 200, 72), (3, 264, 136), (2, 384, 128), (1, 1160, 520), (5, 1024, 1000)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kernel", ["the device's", "symmetric"])
def test_kernel_against_the_formula(form, batch, n, k, dtype, full, kernel, monkeypatch):
    a, b = operands(form, batch, n, k, "cuda", dtype)
    terms = extras(batch, n, "cuda", dtype) if full else {}
    if not kernel_takes(a, b):
        pytest.skip("no kernel for this device")
    if kernel == "symmetric":
        monkeypatch.setattr(symmetric, "_kernel_of", lambda *_: kernel)
    poison = torch.full((batch, n, n), float("nan"), device="cuda", dtype=dtype)
    del poison  # the allocator hands this memory to the result
    got = symmetric_product(a, b, form, **terms)
    want = exact(a, b, form, **terms)
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < (4e-4 if dtype is torch.float16 else 3e-3) * (2 if form == "symmetric" else 1)
    assert torch.equal(got, got.mT)
    twin = symmetric_product_reference(a, b, form, **terms)
    torch.testing.assert_close(got.float(), twin.float(), rtol=1e-2, atol=1e-2 * want.abs().max().item())


@pytest.mark.gpu
@gpu
def test_kernel_at_every_number_of_cells():
    """Each cell is some program's, whatever their number; those that come out even and those that leave one over."""
    for side in range(1, 36):
        a = torch.randn(1 + side % 3, 64, 128 * side - 8 * (side % 2), device="cuda").half()
        if not kernel_takes(a):
            pytest.skip("no kernel for this device")
        poison = torch.full((len(a), a.shape[2], a.shape[2]), float("nan"), device="cuda", dtype=a.dtype)
        del poison  # the allocator hands this memory to the result
        got, want = symmetric_product(a, a, "columns"), exact(a, a, "columns")
        assert ((got.double() - want).norm() / want.norm()).item() < 4e-4, side
        assert torch.equal(got, got.mT), side


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("batch", "n"), [(1, 2048), (1, 2040), (2, 1184), (3, 264), (1, 200)])
@pytest.mark.parametrize("form", ["rows", "columns"])
def test_kernel_of_few_cells(batch, n, form):
    """With more programs than there are cells, with fewer, and with those that leave all cells of diagonals to cut."""
    a, _ = operands(form, batch, n, 136, "cuda", torch.float16)
    if symmetric._kernel_of(a.device, 1, 128) != "symmetric_hopper":
        pytest.skip("no kernel for this device")
    terms = extras(batch, n, "cuda", torch.float16)
    want = exact(a, a, form, **terms)
    side = -(-n // 128)
    cells = batch * side * (side + 1) // 2
    for programs in (cells, max(1, cells - 3), max(1, cells - batch * side)):
        out = torch.full((batch, n, n), float("nan"), device="cuda", dtype=torch.float16)
        factors = (terms[name] for name in ("d", "scale", "alpha", "beta", "diagonal"))
        kernels_of("symmetric_cells").launch(symmetric.Product(a, a, out, *factors, form == "columns"), programs)
        assert ((out.double() - want).norm() / want.norm()).item() < 4e-4, programs
        assert torch.equal(out, out.mT), programs


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("batch", [1, 20])
def test_kernel_beside_messages(batch):
    """The programs are others; the results are the same to the bit."""
    a = torch.randn(batch, 136, 1160, device="cuda").half()
    if not kernel_takes(a):
        pytest.skip("no kernel for this device")
    with symmetric.beside_messages(True):
        beside = symmetric_product(a, a, "columns")
    assert torch.equal(beside, symmetric_product(a, a, "columns"))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("types", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_kernel_with_an_addend_of_another_type(types):
    a, b = operands("symmetric", 3, 640, 640, "cuda", types[0])
    terms = extras(3, 640, "cuda", types[1])
    if not kernel_takes(a, b):
        pytest.skip("no kernel for this device")
    for dtype in types:
        got, want = symmetric_product(a, b, "symmetric", **terms, dtype=dtype), exact(a, b, "symmetric", **terms)
        assert ((got.double() - want).norm() / want.norm()).item() < 6e-3


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", ["the device's", "symmetric"])
def test_kernel_on_part_of_a_memory(form, kernel, monkeypatch):
    """Rows that others lie between, of all operands, as in Gram space before a correction."""
    n, k = 264, 264 if form == "symmetric" else 384
    a, b = operands(form, 3, n, k, "cuda", torch.bfloat16)
    if not kernel_takes(a, b):
        pytest.skip("no kernel for this device")
    if kernel == "symmetric":
        monkeypatch.setattr(symmetric, "_kernel_of", lambda *_: kernel)
    terms = extras(3, n, "cuda", torch.bfloat16)
    want = symmetric_product(a, b, form, **terms)
    terms["d"] = part_of_a_memory(terms["d"], 16, 8)
    out = part_of_a_memory(torch.zeros_like(want), 0, 128)
    a, b = part_of_a_memory(a, 8, 136), part_of_a_memory(b, 0, 8)
    assert torch.equal(symmetric_product(a, b, form, **terms, out=out), want)


def part_of_a_memory(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A copy among numbers that spoil what reads them."""
    batch, m, n = x.shape
    part = x.new_full((batch, m + rows, n + columns), float("nan"))[:, :m, :n]
    return part.copy_(x)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
@pytest.mark.parametrize("room", [(0, 128), (128, 0)])
def test_result_in_part_of_a_memory(room, device):
    a = torch.randn(3, 200, 264, device=device).half()
    memory = torch.full((3, 264 + room[0], 264 + room[1]), 7.0, device=device, dtype=torch.bfloat16)
    out = memory[:, :264, :264]
    assert symmetric_product(a, a, "columns", out=out) is out
    torch.testing.assert_close(out, symmetric_product(a, a, "columns", dtype=torch.bfloat16), rtol=8e-3, atol=1e-2)
    assert (memory[:, 264:] == 7).all()
    assert (memory[..., 264:] == 7).all()


def test_whole_rows():
    x = torch.empty(3, 520, 392)
    assert all(has_whole_rows(part) for part in (x, x[:, :384, :264]))
    assert not any(has_whole_rows(part) for part in (x.mT, x[..., ::2], x[:1].expand(3, -1, -1), torch.empty(2, 9, 12)))


@pytest.mark.gpu
@gpu
def test_kernel_past_two_to_the_31_elements():
    batch, n = 34, 8192
    a = torch.randn(batch, n, 64, device="cuda").to(torch.bfloat16)
    if not kernel_takes(a):
        pytest.skip("no kernel for this device")
    got = symmetric_product(a, a, "rows")
    want = a[-1].double() @ a[-1].double().mT
    assert ((got[-1].double() - want).norm() / want.norm()).item() < 3e-3


@pytest.mark.gpu
@gpu
def test_kernel_in_a_graph():
    a = torch.randn(2, 512, 256, device="cuda").to(torch.bfloat16)
    want = symmetric_product(a, a, "rows")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = symmetric_product(a, a, "rows")
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, want)
