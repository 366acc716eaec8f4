"""AdamW's kernel against PyTorch's, on a GPU, and in Triton's interpreter where there is none."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels import adamw
from megatron_mup.kernels.adamw import Stepped, adamw_
from tests.interpreter import interpreted

SHAPES = [(1,), (300, 41), (4096,), (8, 2048), (2049,)]
BETAS = (0.9, 0.95)


def compare(
    device: str,
    weight: torch.dtype,
    gradient: torch.dtype,
    moment: torch.dtype | None = None,
    half: torch.dtype = torch.bfloat16,
) -> None:
    """Tensors with numbers of their own, one of them where no vector fits, three steps with and without a factor."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    values = [drawn(shape, weight) for shape in SHAPES]
    values[2] = drawn((4097,), weight)[1:]
    plain = [torch.nn.Parameter(value.float()) for value in values]
    means, squares = ([torch.zeros_like(value, dtype=moment or weight) for value in values] for _ in range(2))
    copies = [torch.empty_like(value, dtype=half) if i % 2 else None for i, value in enumerate(values)]
    numbers = [{"lr": 1e-2 / (i + 1), "weight_decay": 0.1 * i, "eps": 1e-8} for i in range(len(values))]
    theirs = torch.optim.AdamW([{"params": [p], **n} for p, n in zip(plain, numbers, strict=True)], betas=BETAS)
    for step, scale in ((1, None), (2, torch.tensor(0.25, device=device)), (3, None)):
        grads = [drawn(shape, gradient) for shape in SHAPES]
        for p, grad in zip(plain, grads, strict=True):
            p.grad = grad.float() * (1 if scale is None else scale)
        theirs.step()
        tensors = [
            Stepped(*each, **n)
            for *each, n in zip(values, grads, means, squares, copies, numbers, strict=True)  # type: ignore[arg-type]
        ]
        sums = torch.empty(len(values), device=device)
        adamw_(tensors, betas=BETAS, step=step, scale=scale, squares=sums)
        torch.testing.assert_close(sums, torch.stack([grad.float().square().sum() for grad in grads]))
        once, again = (torch.empty_like(sums) for _ in range(2))
        for found in (once, again):
            adamw_(copied(tensors), betas=BETAS, step=step, squares=found)
        assert torch.equal(once, again)
    tight = (
        {"rtol": 1e-5, "atol": 1e-6} if weight is torch.float32 and moment is None else {"rtol": 2**-6, "atol": 2**-7}
    )
    for got, mean, square, want in zip(values, means, squares, plain, strict=True):
        state = theirs.state[want]
        for one, other in ((got, want.detach()), (mean, state["exp_avg"]), (square, state["exp_avg_sq"])):
            torch.testing.assert_close(one.float(), other, **tight)
    for copy, value in zip(copies, values, strict=True):
        assert copy is None or torch.equal(copy, value.to(half))


def copied(tensors: list[Stepped]) -> list[Stepped]:
    return [Stepped(*(part.clone() if isinstance(part, torch.Tensor) else part for part in each)) for each in tensors]


PRECISIONS = [
    (torch.float32, torch.float32, None),
    (torch.float32, torch.bfloat16, None),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.float32, torch.bfloat16, torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("weight", "gradient", "moment"), PRECISIONS)
def test_many_tensors_at_once(weight, gradient, moment):
    if not adamw.device_has_adamw(torch.device("cuda")):
        pytest.skip("needs Triton")
    compare("cuda", weight, gradient, moment)


@pytest.mark.long
def test_many_tensors_at_once_in_the_interpreter():
    """Which rounds to bf16 wrongly."""
    cases = "((torch.float32, half, None), (half, half, None), (torch.float32, half, half))"
    run = f"half = torch.float16; [t.compare('cpu', *each, half) for each in {cases}]"
    interpreted(__file__, f"import test_adamw_kernel as t, torch; {run}")
