from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels.rank_one import shifted_polynomial, shifted_polynomial_reference
from megatron_mup.optim.coefficients import coefficient_schedule


def problem(batch: int, s: int, device: str) -> tuple[torch.Tensor, ...]:
    """Z ``[batch, s, 3 s]``, v, u and shifts."""
    torch.manual_seed(0)
    z, v, u = (torch.randn(batch, *size, dtype=torch.float64) for size in ((s, 3 * s), (3 * s,), (s,)))
    v, u = (torch.nn.functional.normalize(x, dim=-1) for x in (v, u))
    shift = torch.linspace(-2, 2, 5, dtype=torch.float64).expand(batch, -1)
    return tuple(x.to(device) for x in (z, v, u, shift))


def test_twin_is_newton_schulz_of_the_changed_matrix():
    z, v, u, shift = problem(2, 6, "cpu")
    schedule, unseen = coefficient_schedule("polar_express", 8), torch.tensor([0.5, 0.0], dtype=torch.float64)
    q, h = shifted_polynomial(z @ z.mT, (z @ v[..., None])[..., 0], u, unseen, shift, schedule, 1e-7)
    for i in range(2):
        for j, d in enumerate(shift[i]):
            changed = z[i] + d * torch.outer(u[i], v[i])
            x = changed / (changed.square().sum() + unseen[i]).sqrt()
            for a, b, c in schedule:
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            torch.testing.assert_close(q[i, j] @ changed, x, atol=1e-9, rtol=0)
            torch.testing.assert_close(h[i, j], u[i] @ x @ v[i], atol=1e-9, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("batch", "s"), [(1, 1), (3, 7), (4, 16), (2, 21), (2, 32), (2, 41)])
def test_shifted_kernel(batch, s):
    z, v, u, shift = problem(batch, s, "cuda")
    schedule, unseen = coefficient_schedule("polar_express", 8), shift[:, 4] / 2
    operands = (z @ z.mT, (z @ v[..., None])[..., 0], u, unseen, shift)
    settings = {"schedule": schedule, "smallest": 1e-7}
    pairs = zip(
        shifted_polynomial(*operands, **settings), shifted_polynomial_reference(*operands, **settings), strict=True
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
