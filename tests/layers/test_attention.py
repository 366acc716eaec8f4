"""Rotary positions, norms, attention kernels and the output layer's padding."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from megatron_mup.layers.attention import KERNELS, kernel_chosen, plain_attention
from megatron_mup.layers.dropout import drop
from megatron_mup.layers.embedding import OutputLayer
from megatron_mup.layers.info import attention_mask
from megatron_mup.layers.norm import LayerNorm, RMSNorm
from megatron_mup.layers.rope import rotary_angles, rotate
from megatron_mup.parallel.mesh import ALONE
from tests.reference_gpt import Norm, Shape, rope
from tests.runs import batch_of, config_of, model_of, relative_error


@pytest.mark.parametrize("percent", [1.0, 0.5, 0.25])
def test_rope_equals_the_complex_form(percent):
    x = torch.randn(9, 2, 3, 16)
    positions = torch.randint(0, 500, (9, 2))
    shape = Shape(vocab_size=1, seq_length=9, head_dim=16, rotary_dim=int(16 * percent), rotary_base=500.0)
    got = rotate(x, *rotary_angles(positions, int(16 * percent), 500.0))
    want = rope(x.transpose(0, 1), positions.t(), shape).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    unturned = got[..., int(16 * percent) :]
    assert torch.equal(unturned, x[..., int(16 * percent) :])


def test_rope_sees_only_distances():
    query, key = torch.randn(2, 1, 1, 1, 8)

    def logit(at_query: int, at_key: int) -> float:
        turned = [
            rotate(x, *rotary_angles(torch.tensor([[p]]), 8, 100.0)) for x, p in ((query, at_query), (key, at_key))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert logit(40, 33) == pytest.approx(logit(7, 0), abs=1e-5)
    assert abs(logit(40, 33) - logit(40, 34)) > 1e-4


def test_rope_keeps_its_precision_in_bf16():
    """Angles at far positions would be off by whole turns in bf16."""
    x, positions = torch.randn(1, 1, 1, 8), torch.tensor([[4001]])
    got = rotate(x.bfloat16(), *rotary_angles(positions, 8, 10000.0))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), rotate(x, *rotary_angles(positions, 8, 10000.0)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_norm_equals_the_formula(layer_norm):
    x = 3 * torch.randn(4, 5, 24) + 1
    shape = Shape(vocab_size=1, seq_length=1, layer_norm=layer_norm, eps=1e-2)
    want = Norm(24, shape)
    for param in want.parameters():
        nn.init.normal_(param)
    got = LayerNorm(24, want.weight, want.bias, 1e-2) if layer_norm else RMSNorm(24, want.weight, 1e-2)
    torch.testing.assert_close(got(x), want(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_plain_formula_equals_the_kernel(groups, documents):
    """Logits of the whole model with both, and their gradients."""
    seen = {}
    for backend in ("auto", "unfused"):
        config = config_of(f"--num-query-groups {groups} --attention-backend {backend}")
        model, batch = model_of(config), batch_of(config, 0, documents=documents)
        loss = model(batch.pop("tokens"), **batch)[0, 0]
        loss.backward()
        seen[backend] = loss.detach(), {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(*(s[0] for s in seen.values()), rtol=1e-6, atol=0)
    for name, grad in seen["auto"][1].items():
        if not name.endswith("linear_qkv.bias"):
            assert relative_error(seen["unfused"][1][name], grad) < 1e-5, name


def test_attention_dropout_zeroes_weights():
    """Identity values make the output the weights themselves."""
    seq, key = 16, torch.tensor(3)
    query = torch.randn(2, 1, seq, 8)
    value = torch.eye(seq).expand(2, 1, seq, seq)
    plain = plain_attention(query, query, value, 0.3, None, None)
    index = torch.arange(seq * seq).view(1, seq, seq)
    sample = torch.tensor([4, 5])[:, None, None, None]
    thin = partial(drop, probability=0.25, key=key, sample=sample, index=index)
    thinned = plain_attention(query, query, value, 0.3, None, thin)
    kept = thinned != 0
    torch.testing.assert_close(thinned[kept], (plain / 0.75)[kept])
    share = 1 - kept[plain > 0].double().mean().item()
    assert 0.15 < share < 0.35
    assert not torch.equal(kept[0], kept[1])


def test_document_mask():
    mask = attention_mask(torch.arange(4), torch.arange(4), torch.tensor([[5, 5, 6, 5]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
def test_padding_stays_in_the_output_layer(rows):
    """Whatever the GEMM is padded to, logits and gradients are those of the rows that exist."""
    weight, x = nn.Parameter(torch.randn(rows, 6)), torch.randn(3, 2, 6)
    seen = []
    for multiple in (1, 8, 128):
        logits = OutputLayer(weight, ALONE, False, multiple)(x)
        assert logits.shape == (3, 2, rows)
        logits.square().sum().backward()
        seen.append((logits.detach(), weight.grad))
        assert weight.grad.shape == weight.shape
        weight.grad = None
    for logits, grad in seen[1:]:
        torch.testing.assert_close(logits, seen[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, seen[0][1], rtol=1e-5, atol=1e-5)


def test_padding_never_reaches_parameters():
    for flags in ("", "--untie-embeddings-and-output-weights"):
        model = model_of(config_of("--make-vocab-size-divisible-by 128", flags))
        batch = batch_of(config_of())
        assert model(batch["tokens"]).shape[-1] == 101
        assert {len(p) for name, p in model.named_parameters() if "word" in name or "output_layer" in name} == {101}


def test_the_kernel_that_pytorch_takes_has_a_name():
    flags = "--num-attention-heads 4 --num-query-groups 2"
    device, dtype = torch.device("cpu"), torch.float32
    assert kernel_chosen(config_of(flags), device, dtype) in KERNELS.values()
    for settled in ("--attention-backend unfused", "--attention-dropout 0.1", "--window-size 2"):
        assert kernel_chosen(config_of(flags, settled), device, dtype) is None
