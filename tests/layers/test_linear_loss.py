"""Output layer and loss in one, against the two of them: the same numbers, without the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mup.config import Config, ParallelConfig
from megatron_mup.layers import linear_loss
from megatron_mup.layers.linear_loss import Head, linear_cross_entropy
from megatron_mup.models.gpt import GPT, Stage
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.observe import watch
from tests.runs import VOCAB_SIZE, batch_of, config_of, relative_error

LINEAR = "--cross-entropy-fusion-impl linear"
MODELS = {
    "tied": "--cross-entropy-z-loss 1e-2",
    "mup": "--parametrization mup --mup-base-hidden-size 12 --untie-embeddings-and-output-weights",
    "umup": "--parametrization umup --disable-bias-linear --untie-embeddings-and-output-weights",
}
TOKENS = 4 * 16


def model_of(config, dtype=torch.float32) -> GPT:
    model = GPT(config, VOCAB_SIZE, Stage(0, config.model.num_layers), dtype=dtype).to_empty(device="cpu")
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(number))
    return model


def learn(*flags: str, dtype=torch.float32):
    """Sums and gradients of one batch of uneven masks."""
    config = config_of(*flags)
    model, batch = model_of(config, dtype), batch_of(config)
    sums = model(batch["tokens"], labels=batch["labels"])
    (sums[0, 0] / 50).backward()
    return sums.detach(), {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 20, TOKENS, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_equals_output_layer_and_loss(name, chunk):
    """Chunks of any length, also of one that doesn't divide the tokens; the padded vocabulary has no gradient."""
    want, want_grads = learn(MODELS[name])
    seen, grads = learn(MODELS[name], LINEAR, f"--loss-chunk-size {chunk}")
    torch.testing.assert_close(seen, want, rtol=1e-6, atol=0)
    for key, value in want_grads.items():
        assert relative_error(grads[key], value) < 2e-6, key


def test_in_bf16_it_is_as_near_to_fp32():
    """Weights of a bf16 model get bf16 gradients, whose chunks were added in fp32."""
    truth = learn(MODELS["mup"])[1]["output_layer.weight"]
    apart = learn(MODELS["mup"], dtype=torch.bfloat16)[1]["output_layer.weight"]
    fused = learn(MODELS["mup"], LINEAR, "--loss-chunk-size 7", dtype=torch.bfloat16)[1]["output_layer.weight"]
    assert fused.dtype == apart.dtype == torch.bfloat16
    assert relative_error(fused, truth) < 1.2 * relative_error(apart, truth) < 0.1


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("flags", ["", f"{LINEAR} --loss-chunk-size 8"])
def test_no_tensor_is_tokens_by_vocabulary(flags):
    config = config_of("--seq-length 64", flags)
    model, batch = model_of(config), batch_of(config)
    kept = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id_of):
        model(batch["tokens"], labels=batch["labels"])[0, 0].backward()
    logits = 4 * 64 * VOCAB_SIZE
    assert (largest.elements < logits) == (max(kept) < logits) == bool(flags)


def id_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_without_gradients_none_are_computed():
    config = config_of(LINEAR)
    model, batch = model_of(config), batch_of(config)
    with torch.no_grad(), Products() as products:
        model(batch["tokens"], labels=batch["labels"])
    forward = products.count
    products = Products()
    with products:
        model(batch["tokens"], labels=batch["labels"])
    assert products.count == forward + 2  # of hidden states and weight


class Products(TorchDispatchMode):
    """Number of matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_logits():
    config = config_of(LINEAR)
    model, batch = model_of(config), batch_of(config)
    seen = {}
    with watch(model, lambda name, module, inputs, output: seen.update({name: output.shape})):
        model(batch["tokens"], labels=batch["labels"])
    assert seen["output_layer"] == (16, 4, VOCAB_SIZE)
    assert not model.watched


@pytest.mark.long
def test_compiled_chunks():
    """The graph compiler's own steps, without its code generator."""
    want, grads = learn(MODELS["mup"], LINEAR)
    compiled = torch.compile(linear_loss._chunk, backend="aot_eager", fullgraph=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss, "_compiled_chunk", lambda: compiled)
        seen, compiled_grads = learn(MODELS["mup"], LINEAR, "--torch-compile", "--loss-chunk-size 24")
    torch.testing.assert_close(seen, want, rtol=1e-6, atol=0)
    for key, value in grads.items():
        assert relative_error(compiled_grads[key], value) < 2e-6, key


def on_two_ranks(compiled: bool):
    """Sums, and gradients of hidden states and of this rank's rows, over a vocabulary that two ranks share."""
    axis = Mesh.build(Config(parallel=ParallelConfig(tensor_model_parallel_size=2)), torch.device("cpu")).tp
    first, rows = axis.local(37)
    head = Head(axis, first, rows, 0.5, 0.5, 0.1, 8, compiled)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, 6, generator=generator), torch.randn(37, 6, generator=generator)
    part = F.pad(weight[first : first + rows], (0, 0, 0, 3)).requires_grad_()
    objective, total = linear_cross_entropy(x.requires_grad_(), part, torch.arange(20) * 2 - 1, head)
    objective.backward()
    return objective.detach(), total, x.grad, part.grad


@pytest.mark.long
def test_compiled_chunks_on_two_ranks(pool):
    """Collectives inside a compiled chunk."""
    for seen, want in zip(pool.run(2, compiled_on_two_ranks), pool.run(2, on_two_ranks, False), strict=True):
        for one, other in zip(seen, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def compiled_on_two_ranks():
    compiled = torch.compile(linear_loss._chunk, backend="aot_eager", fullgraph=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss, "_compiled_chunk", lambda: compiled)
        return on_two_ranks(True)
