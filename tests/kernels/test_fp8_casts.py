"""Casts to FP8 by kernels against their plain twins, on a GPU, and in Triton's interpreter where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_mup.kernels import fp8_casts
from megatron_mup.kernels.fp8_casts import E4M3, E5M2, Scale
from megatron_mup.kernels.late import kernels_of
from tests.interpreter import interpreted

RUN = 8


def compare(device: str, *types: torch.dtype) -> None:
    """All kernels, on matrices that no tile fits, and with values beyond the ends of FP8's types."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device)

    for dtype in types:
        for m, ffn in ((208, 144), (16, 16)):
            x, grad = normal(m, 2 * ffn) * 4, normal(m, ffn)
            x[0, 0] = x[0, RUN] = 200
            check_transpose(x, dtype)
            check(fp8_casts.swiglu_cast, fp8_casts.swiglu_cast_reference, (x,), dtype)
            check(fp8_casts.swiglu_backward_cast, fp8_casts.swiglu_backward_cast_reference, (x, grad), dtype)


def check_transpose(x: torch.Tensor, dtype: torch.dtype) -> None:
    want = fp8_casts.saturated(x, dtype)
    for source in (x, want):
        out, rows = (torch.empty(shape, dtype=dtype, device=x.device) for shape in (x.shape[::-1], x.shape))
        kernels_of("fp8_casts").transpose(source, out, rows)
        assert torch.equal(rows.float(), want.float()), differences(rows, want)
        assert torch.equal(out.float(), want.float().t()), differences(out, want.t())
        out.zero_()
        kernels_of("fp8_casts").transpose(source, out)
        assert torch.equal(out.float(), want.float().t()), differences(out, want.t())


def differences(got: torch.Tensor, want: torch.Tensor) -> str:
    got, want = got.float(), want.float()
    wrong = got != want
    return f"{wrong.sum()} of {wrong.numel()}: {got[wrong][:8].tolist()} for {want[wrong][:8].tolist()}"


def check(kernel: Any, twin: Any, values: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    got, want = (Scale(*torch.tensor([[3.0], [0.5]], device=values[0].device), dtype) for _ in range(2))
    seen, expected = kernel(*values, RUN, got), twin(*values, RUN, want)
    torch.testing.assert_close(got.largest, want.largest)
    torch.testing.assert_close(seen.inverse, expected.inverse)
    # Sigmoids differ in their last bits, so what lies in the middle between two values may go to the other one.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(seen.rows.float(), expected.rows.float(), rtol=step, atol=2**-6 * step)
    if dtype != torch.float16:
        right = (seen.rows.float() == expected.rows.float()).float().mean()
        assert right > 0.99, differences(seen.rows, expected.rows)
    assert torch.equal(seen.columns.float(), seen.rows.float().t()), differences(seen.columns, seen.rows.t())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_equal_their_twins():
    compare("cuda", E4M3, E5M2)


@pytest.mark.long
def test_kernels_in_the_interpreter():
    """Which rounds to FP8 wrongly."""
    interpreted(__file__, "import test_fp8_casts, torch; test_fp8_casts.compare('cpu', torch.float16)")


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_transpose_of_a_cast(dtype):
    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) * 300
    want = fp8_casts.saturated(x, dtype)
    for source in (x, want):
        seen = fp8_casts.transposed(source, dtype)
        assert seen.is_contiguous()
        assert torch.equal(seen.float(), want.float().t())
    rows, columns = fp8_casts.both_ways(x, dtype)
    assert torch.equal(rows.float(), want.float())
    assert torch.equal(columns.float(), want.float().t())
