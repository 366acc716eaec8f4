"""FlashAttention-4 as an operation: on CPUs with a stand-in for the package, on a GPU the package itself."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from megatron_mup.kernels import flash4 as module
from megatron_mup.kernels.flash4 import flash4, flash4_backward
from megatron_mup.kernels.libraries import obstacle
from megatron_mup.models.recompute import keeping_products
from tests.runs import batch_of, config_of, model_of

SCALE = 0.3


def wanted(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)


def with_gradients(function, tensors, grad):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad)


def inputs(seq, batch, heads, groups, width, **options):
    """Queries, keys, values and a gradient, as layers have them: memory is sequence first."""
    sizes = (heads, groups, groups, heads)
    *tensors, grad = (torch.randn(seq, batch, n, width, **options).permute(1, 2, 0, 3) for n in sizes)
    return tensors, grad


def repeated(x, query):
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def stand_in_forward(q, k, v, *, softmax_scale, causal, return_lse, out):
    assert causal
    assert return_lse
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = q @ repeated(k, q).transpose(-1, -2) * softmax_scale
    logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    out.copy_((logits.softmax(-1) @ repeated(v, q)).transpose(1, 2))
    return out, logits.logsumexp(-1), None, None, None


def stand_in_backward(q, k, v, out, dout, lse, *, softmax_scale, causal, deterministic, dq, dk, dv):
    assert causal
    assert not deterministic
    groups = k.shape[2]
    q, k, v, out, dout = (x.transpose(1, 2) for x in (q, k, v, out, dout))
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    weights = (q @ repeated(k, q).transpose(-1, -2) * softmax_scale - lse[..., None]).exp() * seen
    inner = weights * (dout @ repeated(v, q).transpose(-1, -2) - (dout * out).sum(-1, keepdim=True)) * softmax_scale
    dq.copy_((inner @ repeated(k, q)).transpose(1, 2))
    for into, whole in ((dk, inner.transpose(-1, -2) @ q), (dv, weights.transpose(-1, -2) @ dout)):
        into.copy_(whole.unflatten(1, (groups, -1)).sum(2).transpose(1, 2))


@pytest.fixture
def stand_in(monkeypatch):
    """The package by its formulas, and the operation on CPUs."""
    package = ModuleType(module.INTERFACE)
    package._flash_attn_fwd, package._flash_attn_bwd = stand_in_forward, stand_in_backward
    for name in ("flash_attn", "flash_attn.cute", module.INTERFACE):
        monkeypatch.setitem(sys.modules, name, package)
    with torch.library._scoped_library("megatron_mup", "IMPL") as library:
        for op in (flash4, flash4_backward):
            library.impl(op._opoverload.name().split("::")[1], op._init_fn, "CPU")
        yield


def test_as_an_operation(stand_in):
    """Output and gradients in the layers' layout; what the compiler is told of shapes is so."""
    tensors, grad = inputs(12, 2, 4, 2, 8)
    seen = with_gradients(lambda *x: flash4(*x, SCALE)[0], tensors, grad)
    torch.testing.assert_close(seen, with_gradients(wanted, tensors, grad), rtol=1e-5, atol=1e-5)
    assert seen[0].permute(2, 0, 1, 3).is_contiguous()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(flash4, (*(x.detach().requires_grad_() for x in tensors), SCALE), test_utils=checks)
    given = (grad, *tensors, *flash4(*tensors, SCALE), SCALE)
    torch.library.opcheck(flash4_backward, given, test_utils=checks)


@pytest.mark.long
def test_compiled(stand_in):
    tensors, grad = inputs(12, 2, 4, 2, 8)
    compiled = torch.compile(lambda *x: flash4(*x, SCALE)[0] * 2, backend="aot_eager", fullgraph=True)
    plain = with_gradients(lambda *x: wanted(*x) * 2, tensors, grad)
    torch.testing.assert_close(with_gradients(compiled, tensors, grad), plain, rtol=1e-5, atol=1e-5)


def counted(monkeypatch):
    """A list that grows with each forward of the stand-in."""
    package, calls = sys.modules[module.INTERFACE], []
    forward = package._flash_attn_fwd
    monkeypatch.setattr(package, "_flash_attn_fwd", lambda *x, **more: calls.append(1) or forward(*x, **more))
    return calls


def test_layers_take_it(stand_in, monkeypatch):
    logits = []
    for backend in ("auto", "flash4"):
        calls = counted(monkeypatch)
        config = config_of("--bf16 --num-attention-heads 4 --num-query-groups 2", f"--attention-backend {backend}")
        logits.append(model_of(config)(batch_of(config)["tokens"]))
        assert len(calls) == (config.model.num_layers if backend == "flash4" else 0)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_selective_recomputation_keeps_it(stand_in, monkeypatch):
    tensors, grad = inputs(12, 1, 2, 2, 8)
    calls = counted(monkeypatch)
    keep = with_gradients(lambda *x: keeping_products(lambda *y: flash4(*y, SCALE)[0] * 2, *x), tensors, grad)
    assert len(calls) == 1
    torch.testing.assert_close(keep, with_gradients(lambda *x: wanted(*x) * 2, tensors, grad), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_the_same_sums_in_every_run():
    """With `torch.use_deterministic_algorithms`, gradients that many blocks add to are equal to the bit."""
    if (why := obstacle("flash4")) is not None:
        pytest.skip(why)
    tensors, grad = inputs(1024, 2, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [with_gradients(lambda *x: flash4(*x, SCALE)[0], tensors, grad) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 2, 8, 2, 64), (384, 1, 4, 4, 128), (200, 2, 4, 1, 96)])
def test_on_a_gpu(shape):
    """Errors no larger than twice those of PyTorch's formula in bf16, against fp32."""
    if (why := obstacle("flash4")) is not None:
        pytest.skip(why)
    tensors, grad = inputs(*shape, device="cuda", dtype=torch.bfloat16)
    exact = with_gradients(wanted, [x.float() for x in tensors], grad.float())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = with_gradients(wanted, tensors, grad)
    compiled = torch.compile(lambda *x: flash4(*x, SCALE)[0], fullgraph=True)
    for function in (lambda *x: flash4(*x, SCALE)[0], compiled):
        for seen, formula, truth in zip(with_gradients(function, tensors, grad), plain, exact, strict=True):
            assert (seen.float() - truth).norm() <= 2 * (formula.float() - truth).norm() + 1e-3 * truth.norm()
