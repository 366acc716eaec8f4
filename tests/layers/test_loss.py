"""The loss against `F.cross_entropy`, and over a vocabulary that ranks share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_mup.config import Config, ParallelConfig
from megatron_mup.kernels.cross_entropy import cross_entropy_backward_reference
from megatron_mup.layers import loss as loss_module
from megatron_mup.layers.loss import IGNORE, vocab_parallel_cross_entropy
from megatron_mup.layers.scale import scale
from megatron_mup.parallel.mesh import ALONE, Mesh

SEQ, BATCH, VOCAB = 5, 3, 37
Z_LOSS = 0.1


def case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(SEQ, BATCH, VOCAB, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCAB, (SEQ, BATCH), generator=generator)
    labels[0, 0] = labels[4, 2] = IGNORE
    return logits, labels


def objective(loss, normalizer, weights):
    return (weights * loss).sum() + Z_LOSS * normalizer.square().sum()


WEIGHTS = torch.arange(SEQ * BATCH).view(SEQ, BATCH) / 10


def reference(dtype=torch.float32):
    """Loss, normalizer and gradient of the objective."""
    logits, labels = case(dtype)
    logits = logits.float().requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(SEQ, BATCH)
    normalizer = torch.where(labels != IGNORE, logits.logsumexp(-1), 0.0)
    objective(loss, normalizer, WEIGHTS).backward()
    return loss.detach(), normalizer.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch(dtype):
    logits, labels = case(dtype)
    logits.requires_grad_()
    loss, normalizer = vocab_parallel_cross_entropy(logits, labels, 0, ALONE)
    objective(loss, normalizer, WEIGHTS).backward()
    want = reference(dtype)
    assert loss.dtype == normalizer.dtype == torch.float32
    torch.testing.assert_close(loss, want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normalizer, want[1], rtol=1e-6, atol=1e-6)
    assert logits.grad.dtype == dtype
    tolerance = 1e-6 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(logits.grad.float(), want[2], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_s_twin_gives_the_gradient(monkeypatch, compiled):
    """With factors as muP has them on the logits and u-muP another one on their gradient."""
    logits, labels = case()
    factors = (0.5, 3.0)
    leaf, want = (logits.clone().requires_grad_() for _ in range(2))
    scaled = scale(want, *factors)
    objective(*vocab_parallel_cross_entropy(scaled, labels, 0, ALONE), WEIGHTS).backward()

    def total(x: torch.Tensor) -> torch.Tensor:
        return objective(*vocab_parallel_cross_entropy(x, labels, 0, ALONE, *factors), WEIGHTS)

    calls = []

    def counted(*args):
        calls.append(args)
        return cross_entropy_backward_reference(*args)

    if compiled:
        monkeypatch.setattr(loss_module, "cross_entropy_backward", counted)
        monkeypatch.setattr(loss_module, "on_kernel", lambda _logits: True)
    (torch.compile(total, backend="aot_eager") if compiled else total)(leaf).backward()
    assert len(calls) == compiled
    torch.testing.assert_close(leaf.grad, want.grad, rtol=1e-5, atol=1e-6)


def test_ignored_tokens_have_no_gradient():
    logits, labels = case()
    logits.requires_grad_()
    objective(*vocab_parallel_cross_entropy(logits, labels, 0, ALONE), WEIGHTS + 1).backward()
    assert torch.equal(logits.grad.abs().sum(-1) == 0, labels == IGNORE)


def test_large_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss, _ = vocab_parallel_cross_entropy(logits, torch.tensor([[1]]), 0, ALONE)
    loss.sum().backward()
    assert loss.item() == 2e4
    assert logits.grad.tolist() == [[[1, -1, 0]]]


def share(size: int):
    """Loss, normalizer and gradient from this rank's part of the vocabulary; 37 ids don't divide by two."""
    config = Config(parallel=ParallelConfig(tensor_model_parallel_size=size))
    axis = Mesh.build(config, torch.device("cpu")).tp
    start, length = axis.local(VOCAB)
    logits, labels = case()
    part = logits[..., start : start + length].clone().requires_grad_()
    loss, normalizer = vocab_parallel_cross_entropy(part, labels, start, axis)
    objective(loss, normalizer, WEIGHTS).backward()
    return loss.detach(), normalizer.detach(), part.grad


def test_shared_vocabulary(pool):
    want = reference()
    parts = pool.run(2, share, 2)
    for loss, normalizer, _ in parts:
        torch.testing.assert_close(loss, want[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(normalizer, want[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([p[2] for p in parts], -1), want[2], rtol=1e-6, atol=1e-6)
