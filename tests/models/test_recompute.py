"""Recomputation changes memory, not a bit of the result; and it does recompute."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.config import ConfigError
from megatron_mup.layers.linear import RowLinear
from tests.runs import batch_of, config_of, model_of, relative_error, step_of

FEATURES = "--num-layers 4 --hidden-dropout 0.1 --attention-dropout 0.1 --swiglu --qk-layernorm"
VARIANTS = {
    "uniform": ("--recompute-granularity full", 4),
    "uniform-3": ("--recompute-granularity full --recompute-num-layers 3", 4),
    "block-2": ("--recompute-granularity full --recompute-method block --recompute-num-layers 2", 2),
    "selective": ("--recompute-activations", 4),
}


def run(*flags):
    """Loss, gradients and how often MLP outputs were computed."""
    config = config_of(FEATURES, *flags)
    model, batch, calls = model_of(config).train(), batch_of(config), []
    for module in model.modules():
        if isinstance(module, RowLinear):
            module.register_forward_hook(lambda *_: calls.append(1))
    loss = model(batch.pop("tokens"), **batch)
    loss[0, 0].backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, len(calls)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bitwise(variant):
    flags, layers = VARIANTS[variant]
    plain, recomputed = run(), run(flags)
    assert torch.equal(recomputed[0], plain[0])
    for name, grad in plain[1].items():
        assert torch.equal(recomputed[1][name], grad), name
    # The last of a chunk's matrix products isn't needed again, hence a little slack.
    assert plain[2] == 8
    assert recomputed[2] > plain[2] + layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_doesnt_recompute(variant):
    config = config_of(FEATURES, VARIANTS[variant][0])
    model, batch = model_of(config).eval(), batch_of(config)
    with torch.no_grad():
        assert model(batch["tokens"]).shape == (16, 4, 101)


def test_one_way_to_recompute_at_a_time():
    config_of("--torch-compile --activation-memory-budget 0.5")
    with pytest.raises(ConfigError, match="both say what is recomputed"):
        config_of("--torch-compile --activation-memory-budget 0.5 --recompute-activations")


def compiled(mesh, flags: str) -> tuple[set[tuple[int, ...]], int, list[torch.Tensor]]:
    """Shapes and bytes of what compiled layers keep for backward, and all gradients."""
    torch._dynamo.reset()
    config = config_of("--swiglu --hidden-dropout 0.1 --torch-compile", flags)
    step, batch, held = step_of(config, mesh), batch_of(config), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        step.forward_backward(batch, torch.ones(()))
    step.main.collect_grads()
    sizes = {t.data_ptr(): t.nbytes for t in held}
    return {tuple(t.shape) for t in held}, sum(sizes.values()), [main.grad for main in step.main.params]


@pytest.mark.long
@pytest.mark.parametrize("flags", ["--activation-memory-budget 0.2", "--recompute-granularity selective"])
def test_compiled_layers_keep_less(lone_mesh, flags):
    """Backward finds less, and the same gradients."""
    (_, most, want), (_, least, got) = compiled(lone_mesh, ""), compiled(lone_mesh, flags)
    assert least < 0.85 * most
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.long
def test_compiled_layers_keep_products(lone_mesh, monkeypatch):
    """Selective recomputation is the compiler's: the MLP's first product stays, what activation makes of it goes."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager_decomp_partition"))
    batches = "--micro-batch-size 4"  # no side of a weight is as long as that has tokens
    config = config_of("--swiglu", batches)
    tokens, ffn = config.training.seq_length * config.training.micro_batch_size, config.model.ffn_size
    plain, _, _ = compiled(lone_mesh, batches)
    kept, _, _ = compiled(lone_mesh, f"{batches} --recompute-granularity selective")
    assert (tokens, ffn) in plain
    assert (tokens, 2 * ffn) in kept
    assert (tokens, ffn) not in kept
