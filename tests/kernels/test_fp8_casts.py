"""Casts to FP8 with transposes: kernels against their plain twins, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels import fp8_casts
from megatron_mup.kernels.fp8_casts import E4M3, E5M2
from tests.interpreter import interpreted


def compare(device: str, *types: torch.dtype) -> None:
    """On matrices that no tile fits, and with values beyond the ends of FP8's types."""
    generator = torch.Generator().manual_seed(0)
    for dtype in types:
        for shape in ((80, 288), (16, 32)):
            x = torch.randn(shape, generator=generator).mul(400).bfloat16().to(device)
            want = fp8_casts.saturated(x, dtype)
            for source in (x, want):
                out, rows = (torch.empty(size, dtype=dtype, device=device) for size in (shape[::-1], shape))
                fp8_casts._kernels().transpose(source, out, rows)
                assert torch.equal(rows.float(), want.float()), differences(rows, want)
                assert torch.equal(out.float(), want.float().t()), differences(out, want.t())
                out.zero_()
                fp8_casts._kernels().transpose(source, out)
                assert torch.equal(out.float(), want.float().t()), differences(out, want.t())


def differences(got: torch.Tensor, want: torch.Tensor) -> str:
    got, want = got.float(), want.float()
    wrong = got != want
    return f"{wrong.sum()} of {wrong.numel()}: {got[wrong][:8].tolist()} for {want[wrong][:8].tolist()}"


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
