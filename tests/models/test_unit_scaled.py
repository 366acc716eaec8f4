"""u-muP and munit scaling as whole models: the authors' library, sizes at the start, recomputation, optimizers."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.runs import VOCAB_SIZE, batch_of, config_of, relative_error, step_of

UMUP = "--parametrization umup --swiglu --disable-bias-linear --untie-embeddings-and-output-weights"
MUNIT = (
    "--parametrization munit --norm-position post-branch --residual-tau 0.3 --disable-bias-linear "
    "--untie-embeddings-and-output-weights"
)


# ---- The authors' library

LIBRARY = (
    f"{UMUP} --num-layers 3 --ffn-hidden-size 128 --position-embedding-type none --no-norm-affine --lr 0.3 "
    "--adam-eps 1e-8 --weight-decay 0.01 --decay-embeddings --clip-grad 0 "
    "--mup-residual-mult 1.7 --mup-residual-attention-ratio 0.6"
)
LOSSES = [4.6205297, 4.6478834, 4.6365032, 4.6348753, 4.6432519, 4.6146431]
GRADIENT_RMS = {
    "embedding.word_embeddings.weight": 1.7397901,
    "decoder.layers.0.self_attention.linear_qkv.weight": 1.1161381,
    "decoder.layers.0.self_attention.linear_proj.weight": 1.8836778,
    "decoder.layers.0.mlp.linear_fc1.weight": 1.2223543,
    "decoder.layers.0.mlp.linear_fc2.weight": 1.2477814,
    "decoder.layers.1.self_attention.linear_qkv.weight": 1.0350636,
    "decoder.layers.1.self_attention.linear_proj.weight": 1.7631439,
    "decoder.layers.1.mlp.linear_fc1.weight": 1.0191098,
    "decoder.layers.1.mlp.linear_fc2.weight": 1.0365577,
    "decoder.layers.2.self_attention.linear_qkv.weight": 0.98107451,
    "decoder.layers.2.self_attention.linear_proj.weight": 1.8224834,
    "decoder.layers.2.mlp.linear_fc1.weight": 0.99294478,
    "decoder.layers.2.mlp.linear_fc2.weight": 1.0648016,
    "output_layer.weight": 0.97825998,
}


def tokens_of(number: int) -> dict[str, torch.Tensor]:
    tokens = (torch.arange(4 * 17) ** 2 * (number + 3) + 5 * number) % VOCAB_SIZE
    tokens = tokens.view(4, 17)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "sample_index": torch.arange(4)}


def rms(tensor: torch.Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


def gradients_of(step, batch) -> dict[str, torch.Tensor]:
    """Gradients as the optimizer gets them; takes the step."""
    seen = {}
    take = step.optimizer.step

    def spy(factor, scale, *more):
        seen.update({main.meta.name: main.grad * (1 if scale is None else scale) for main in step.main.params})
        take(factor, scale, *more)

    step.optimizer.step = spy
    step(batch, 1.0)
    step.optimizer.step = take
    return seen


def test_umup_trains_as_the_authors_library(lone_mesh):
    """unit-scaling 0.3.5: `TransformerDecoder` and `optim.AdamW` with the weights that this package starts from."""
    step = step_of(config_of(LIBRARY), lone_mesh)
    losses = []
    for number in range(len(LOSSES)):
        batch = tokens_of(number)
        if number == 0:
            gradients = gradients_of(step_of(config_of(LIBRARY), lone_mesh), batch)
        losses.append(step(batch, 1.0).loss.item())
    assert losses == pytest.approx(LOSSES, rel=1e-6)
    assert {name: rms(grad) for name, grad in gradients.items()} == pytest.approx(GRADIENT_RMS, rel=1e-6)


def test_dropout_multiplies_as_the_authors_library(lone_mesh):
    """``functional.dropout(p=0.3)`` makes kept ones 1.1952286, forward and backward, and in evaluation 0.8366600."""
    step = step_of(config_of(UMUP, "--hidden-dropout 0.3"), lone_mesh)
    seen: dict[str, torch.Tensor] = {}

    def watch(name):
        def hook(_module, _inputs, output):
            seen[name] = output.detach().clone()
            if output.requires_grad:
                output.register_hook(lambda grad: seen.__setitem__(f"{name} gradient", grad.clone()))

        return hook

    embedding = step.model.embedding
    handles = [embedding.register_forward_hook(watch("after"))]
    handles.append(embedding.word_embeddings.register_forward_hook(watch("before")))
    step(batch_of(step.config, 0), 0.0)
    kept = seen["after"] != 0
    assert 0.6 < kept.double().mean() < 0.8
    torch.testing.assert_close(seen["after"], seen["before"] * kept * 1.1952286, rtol=1e-6, atol=0)
    torch.testing.assert_close(seen["before gradient"], seen["after gradient"] * kept * 1.1952286, rtol=1e-6, atol=0)
    step.evaluate(batch_of(step.config, 0))
    torch.testing.assert_close(seen["after"], seen["before"] * 0.8366600, rtol=1e-6, atol=0)
    for handle in handles:
        handle.remove()


# ---- Sizes at the start

WIDE = "--num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --seq-length 64"


def sizes(mesh, *flags) -> tuple[dict[str, float], dict[str, float]]:
    """Root mean squares of weights and of modules' outputs, and those of all their gradients."""
    step = step_of(config_of(WIDE, *flags), mesh)
    values = {main.meta.name: rms(main.value) for main in step.main.params}
    gradients: dict[str, float] = {}
    names = {module: name for name, module in step.model.named_modules()}

    def watch(module, _inputs, output):
        values[names[module]] = rms(output)
        if output.requires_grad:
            output.register_hook(lambda grad: gradients.__setitem__(names[module], rms(grad)))

    handles = [module.register_forward_hook(watch) for name, module in step.model.named_modules() if name]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (4, 65), generator=generator)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "sample_index": torch.arange(4)}
    gradients |= {name: rms(grad) for name, grad in gradients_of(step, batch).items()}
    for handle in handles:
        handle.remove()
    return values, gradients


def outside(seen: dict[str, float], *exempt: str) -> dict[str, float]:
    return {
        name: value
        for name, value in seen.items()
        if not 0.5 <= value <= 2 and not any(part in name for part in exempt)
    }


def test_umup_starts_at_unit_scale(lone_mesh):
    values, gradients = sizes(lone_mesh, UMUP)
    # The head's product comes before its 1/n. Attention's formula is for values that don't resemble one another, and in
    # deeper layers they do: the authors' library gives the same sizes.
    beyond = [f"layers.{n}.self_attention" for n in (1, 2, 3)]
    assert outside(values, "output_layer", *beyond) == {}
    assert outside(gradients, *beyond, "layernorm") == {}


def test_munit_starts_at_unit_scale(lone_mesh):
    """Weights, norms, stream and what linear layers make of unit input; attention's average shrinks its output.

    Gradients are those of a true mean over tokens: what reaches the last layer, all others have as well. Behind an
    average or a GELU they are smaller, in a branch's last norm by the root of tau, and those of weights have no factor.
    """
    values, gradients = sizes(lone_mesh, MUNIT)
    assert outside(values, "output_layer", "self_attention.linear_proj", "self_attention") == {}
    assert values["decoder.layers.0.self_attention.linear_qkv"] == pytest.approx(1, abs=0.1)
    stream = [values[f"decoder.layers.{n}"] for n in range(4)]
    assert stream == pytest.approx([1] * 4, abs=0.05)
    shares = {name: gradient / gradients["decoder"] for name, gradient in gradients.items()}
    assert outside(shares, "output_layer", "linear_qkv", "linear_fc1", "post_", ".weight") == {}


def test_standard_starts_elsewhere(lone_mesh):
    """What the two tests above see is theirs alone."""
    values, gradients = sizes(lone_mesh, "--swiglu --untie-embeddings-and-output-weights")
    assert len(outside(values)) > len(values) / 2
    assert len(outside(gradients)) == len(gradients)


# ---- Together with the rest


@pytest.mark.parametrize("flags", [UMUP, MUNIT], ids=["umup", "munit"])
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_changes_nothing(lone_mesh, flags, granularity):
    dropout = "--hidden-dropout 0.1 --attention-dropout 0.1"
    plain, recomputed = (
        gradients_of(step_of(config_of(flags, dropout, more), lone_mesh), batch_of(config_of(flags)))
        for more in ("", f"--recompute-granularity {granularity}")
    )
    assert all(torch.equal(recomputed[name], grad) for name, grad in plain.items())


@pytest.mark.parametrize("flags", [UMUP, MUNIT], ids=["umup", "munit"])
def test_micro_batches_change_nothing(lone_mesh, flags):
    """The factor 1/sqrt(tokens) is that of the global batch, whatever the micro-batches."""
    one, four = (
        gradients_of(step_of(config_of(flags, f"--micro-batch-size {size}"), lone_mesh), batch_of(config_of(flags)))
        for size in (4, 1)
    )
    assert max(relative_error(four[name], grad) for name, grad in one.items()) < 1e-5


@pytest.mark.parametrize("optimizer", ["muon", "normuon", "muonsphere", "spectral_sphere"])
@pytest.mark.parametrize("flags", [UMUP, MUNIT], ids=["umup", "munit"])
def test_orthonormal_steps_learn(lone_mesh, flags, optimizer):
    """And have the size that they should: spectral norm lr sqrt(out/in) on the matrix that acts."""
    config = config_of(flags, f"--optimizer {optimizer} --lr 0.05 --muon-lr 0.02 --weight-decay 0")
    step = step_of(config, lone_mesh)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    weight = next(main for main in step.main.params if main.meta.name == name)
    losses = [step(batch_of(config, 0), 1.0).loss]
    if "sphere" in optimizer:
        # Norms are on the sphere from the first step on: sqrt(out/in) x sqrt(in).
        norm = torch.linalg.matrix_norm(weight.value, 2) / weight.meta.fan_in**0.5
        assert norm == pytest.approx((32 / 64) ** 0.5, rel=0.03)
    before = weight.value.clone()
    losses += [step(batch_of(config, 0), 1.0).loss for _ in range(7)]
    assert losses[-1] < losses[0] - 0.1
    if optimizer == "muon":
        step_ = torch.linalg.matrix_norm(weight.value - before, 2) / weight.meta.fan_in**0.5
        depth = 2**0.5 if "umup" in flags else 1.0
        assert step_ < 7 * 1.3 * 0.02 * (32 / 64) ** 0.5 / depth
        assert step_ > 0.02 * (32 / 64) ** 0.5 / depth


def test_layers_share_a_compiled_graph(lone_mesh):
    """Layers differ in the residual rule's weights alone, which are data: ten are one graph."""
    flags = (UMUP, "--num-layers 10")
    plain, traced = (step_of(config_of(*flags), lone_mesh) for _ in range(2))
    counters.clear()
    for layer in traced.model.decoder.layers.values():
        layer.compile(backend="aot_eager")
    got = gradients_of(traced, batch_of(config_of(*flags)))
    assert counters["stats"]["unique_graphs"] == 1
    for name, grad in gradients_of(plain, batch_of(config_of(*flags))).items():
        assert relative_error(got[name], grad) < 1e-5, name
