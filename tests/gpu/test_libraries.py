"""Kernels of Apex and Transformer Engine do what PyTorch's do, in the places where runs take them."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels.libraries import obstacle
from megatron_mup.layers.norm import LayerNorm, RMSNorm
from tests.gpu.gpu_runs import gpu_config, train
from tests.runs import pretrain, recorded, relative_error, words

pytestmark = pytest.mark.gpu

PRECISIONS = {"fp32": "", "bf16": "--bf16"}


def need(library: str) -> None:
    if (why := obstacle(library)) is not None:
        pytest.skip(f"{library}: {why}")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("library", ["apex", "transformer_engine"])
def test_fused_adam_is_adamw(meshes, library, precision):
    need(library)
    mesh = meshes["cuda"]
    want = train(gpu_config(PRECISIONS[precision]), mesh)
    got = train(gpu_config(PRECISIONS[precision], f"--adam-impl {library}"), mesh)
    torch.testing.assert_close(got["losses"], want["losses"], rtol=1e-5 if precision == "fp32" else 1e-3, atol=0)
    for name, weight in want["weights"].items():
        moved, expected = got["weights"][name] - want["initial"][name], weight - want["initial"][name]
        assert relative_error(moved, expected) < (2e-3 if precision == "fp32" else 5e-2), name


@pytest.mark.parametrize("library", ["apex", "transformer_engine"])
def test_fused_adam_resumes(tmp_path, library):
    """From its own checkpoint, and from one of our kernel: they are of one form."""
    need(library)

    def losses(name: str, adam: str, *flags: str) -> dict[int, float]:
        folder, file = tmp_path / name, tmp_path / f"{name}.jsonl"
        argv = words(f"--save {folder} --load {folder} --metrics-file {file} --log-interval 1", adam, *flags)
        outcome = pretrain(argv)
        assert outcome.code == 0, outcome.err
        return recorded(file, "train/lm loss")

    fused = f"--adam-impl {library}"
    whole = losses("whole", fused)
    losses("own", fused, "--exit-interval 4")
    assert losses("own", fused) == pytest.approx(whole, rel=1e-6)
    losses("changed", "", "--exit-interval 4")
    assert losses("changed", fused) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_apex_norms(kind, dtype, affine):
    need("apex")
    generator = torch.Generator(device="cuda").manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)

    x, upstream = values(6, 3, 256).requires_grad_(), values(6, 3, 256)
    vectors = [torch.nn.Parameter(1 + 0.1 * values(256)) for _ in range(1 if kind is RMSNorm else 2)]
    if not affine:
        vectors = [None] * len(vectors)
    wanted = [x, *(vector for vector in vectors if vector is not None)]
    results = []
    for impl in ("native", "apex"):
        y = kind(256, *vectors, 1e-5, impl=impl)(x)
        results.append([y.detach(), *torch.autograd.grad(y, wanted, upstream)])
    for native, apex in zip(*results, strict=True):
        assert relative_error(apex, native) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("flags", ["", "--bf16 --torch-compile", "--normalization LayerNorm"])
def test_a_model_with_apex_norms(meshes, flags):
    need("apex")
    torch._dynamo.reset()
    want = train(gpu_config(flags), meshes["cuda"])
    torch._dynamo.reset()
    got = train(gpu_config(flags, "--norm-impl apex"), meshes["cuda"])
    torch.testing.assert_close(got["losses"], want["losses"], rtol=2e-2 if "bf16" in flags else 1e-5, atol=0)
