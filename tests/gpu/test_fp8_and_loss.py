"""One GPU: FP8 products against their plain twin, static FP8 and the fused loss in compiled bf16 models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_mup.kernels.fp8 import (
    E4M3,
    E5M2,
    device_has_fp8,
    fp8_linear,
    fp8_product,
    fp8_product_reference,
    fp8_swiglu_mlp,
    saturated,
)
from megatron_mup.parallel.mesh import Mesh
from tests.gpu.gpu_runs import BF16, COMPLETEP, MUNIT, UMUP, gpu_config, train
from tests.runs import relative_error, step_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
NO_FP8 = "this GPU has no FP8"


@pytest.fixture(autouse=True)
def compile_anew():
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("result", [torch.bfloat16, torch.float32])
def test_product_equals_its_twin(dtype, result):
    if not device_has_fp8(DEVICE):
        pytest.skip(NO_FP8)
    generator = torch.Generator(DEVICE).manual_seed(0)
    a = saturated(torch.randn(80, 256, generator=generator, device=DEVICE), dtype)
    b = saturated(torch.randn(144, 256, generator=generator, device=DEVICE), E4M3)
    seen = fp8_product(a, b, 0.125, result, fast=False)
    want = fp8_product_reference(a, b, 0.125, result)
    # Hopper's tensor cores keep some 14 bits of an FP8 product's partial sums.
    assert relative_error(seen, want) < (2**-8 if result is torch.bfloat16 else 2**-11)
    # With fewer bits in its sums it is near enough for a forward pass.
    assert relative_error(fp8_product(a, b, 0.125, result, fast=True), want) < 1e-2


def compare_with_cpu(layer: Callable[..., torch.Tensor], shapes: tuple[tuple[int, int], ...], allowed: float) -> None:
    """Result and gradients of all inputs; the last shape is that of the result."""
    generator, seen = torch.Generator().manual_seed(0), []
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    for device in (torch.device("cpu"), DEVICE):
        *inputs, grad = (value.to(device, torch.bfloat16).requires_grad_() for value in values)
        y = layer(*inputs)
        seen.append((y, *torch.autograd.grad(y, inputs, grad)))
    for want, got in zip(*seen, strict=True):
        assert relative_error(got.cpu(), want) < allowed


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("gradient", [E4M3, E5M2])
def test_layer_equals_the_emulation_of_cpus(gradient, keep):
    """Result and both gradients, on sides that no tile of the transposing kernel fits; a loss hardly sees one wrong."""
    if not device_has_fp8(DEVICE):
        pytest.skip(NO_FP8)

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, weight, (0.2, 1.0, 0.15), gradient, 4.0, keep)

    compare_with_cpu(layer, ((80, 208), (144, 208), (80, 144)), 1e-2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("gradient", "keep"), [(E4M3, True), (E5M2, False)])
def test_mlp_equals_the_emulation_of_cpus(gradient, keep, compiled):
    """Both weights' gradients read transposes that SwiGLU's kernels write."""
    if not device_has_fp8(DEVICE):
        pytest.skip(NO_FP8)

    def mlp(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        factors = (0.07, 1.0, 0.05), (0.05, 1.0, 0.07)
        call = torch.compile(fp8_swiglu_mlp) if compiled and x.is_cuda else fp8_swiglu_mlp
        return call(x, (first, second), factors, gradient, 4.0, 8, 1.3, 1.7, keep)

    # What lies in the middle between two of FP8's values goes to the other one in places.
    compare_with_cpu(mlp, ((208, 208), (544, 208), (144, 272), (208, 144)), 5e-2)


@pytest.mark.parametrize("scheme", [UMUP, MUNIT], ids=["umup", "munit"])
@pytest.mark.parametrize("kind", ["hybrid", "e4m3"])
def test_static_fp8_trains_as_bf16(process_group, scheme, kind):
    if not device_has_fp8(DEVICE):
        pytest.skip(NO_FP8)
    seen = {}
    for flags in ("", f"--fp8-format {kind}"):
        torch._dynamo.reset()
        config = gpu_config(BF16, flags, scheme=scheme)
        seen[flags] = train(config, Mesh.build(config, DEVICE), steps=5)["losses"]
    want, got = seen.values()
    assert not torch.equal(got, want), "nothing was cast"
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0)


def test_static_fp8_in_a_graph(process_group):
    if not device_has_fp8(DEVICE):
        pytest.skip(NO_FP8)
    seen = []
    for flags in ("", "--cuda-graph-impl local"):
        config = gpu_config("--bf16 --fp8-format hybrid --attention-backend unfused", flags, scheme=UMUP)
        seen.append(train(config, Mesh.build(config, DEVICE), steps=7)["losses"])
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("scheme", [COMPLETEP, UMUP], ids=["completep", "umup"])
def test_fused_loss_trains_as_the_plain_one(process_group, scheme):
    seen = []
    for flags in ("", "--cross-entropy-fusion-impl linear --loss-chunk-size 96"):
        torch._dynamo.reset()
        config = gpu_config(BF16, "--cross-entropy-z-loss 1e-3", flags, scheme=scheme)
        seen.append(train(config, Mesh.build(config, DEVICE)))
    torch.testing.assert_close(seen[1]["losses"], seen[0]["losses"], rtol=1e-3, atol=0)
    torch.testing.assert_close(seen[1]["norms"][0], seen[0]["norms"][0], rtol=2e-2, atol=0)


def test_fused_loss_takes_less_memory(process_group):
    """4096 tokens by 65536 ids: logits alone take 0.5 GiB."""
    peaks = []
    for flags in ("", "--cross-entropy-fusion-impl linear --loss-chunk-size 512"):
        torch._dynamo.reset()
        config = gpu_config(BF16, "--seq-length 2048 --vocab-size 65536 --global-batch-size 2", flags)
        mesh = Mesh.build(config, DEVICE)
        step = step_of(config, mesh, vocab_size=65536)
        tokens = torch.randint(0, 65536, (2, 2048), device=DEVICE)
        step({"tokens": tokens, "labels": tokens}, 1.0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step({"tokens": tokens, "labels": tokens}, 1.0)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del step
    # Logits and their gradient in bf16 take 1 GiB; what chunks and the sum of the weight's gradient take is 0.3.
    assert peaks[0] - peaks[1] > 0.7 * 2**30, peaks
