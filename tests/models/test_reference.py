"""The standard model is the plain PyTorch GPT: logits, loss, gradients, weights after three steps, initial values."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.models.against_reference import copy_from_reference, shape_of, split_all
from tests.reference_gpt import ReferenceGPT, Training, initialise, standard_numbers, standard_std
from tests.runs import batch_of, config_of, model_of, relative_error, step_of, values, without_model

LLAMA = "--swiglu --disable-bias-linear --num-query-groups 2 --untie-embeddings-and-output-weights"
DOCUMENTS = "--reset-attention-mask --reset-position-ids --eod-token-id 0"
ARCHITECTURES = {
    "gelu": "",
    "llama": LLAMA,
    "one-group": "--num-query-groups 1 --swiglu",
    "gpt2": "--normalization LayerNorm --position-embedding-type learned_absolute",
    "no-positions": "--position-embedding-type none --squared-relu --untie-embeddings-and-output-weights",
    "qk-norm": f"{LLAMA} --qk-layernorm",
    "qk-layer-norm": "--qk-layernorm --normalization LayerNorm",
    "partial-rotary": "--rotary-percent 0.5 --rotary-base 500 --disable-bias-linear --add-qkv-bias",
    "long-context": f"{LLAMA} --rotary-base 500000 --kv-channels 16 --use-rope-scaling",
    "window": f"{LLAMA} --window-size 5",
    "window-documents": f"{LLAMA} --window-size 3 {DOCUMENTS}",
    "wide-heads": "--kv-channels 12 --num-query-groups 2 --norm-epsilon 1e-3",
    "z-loss": f"{LLAMA} --cross-entropy-z-loss 0.01",
    "documents": f"{LLAMA} {DOCUMENTS}",
    "gpt2-documents": f"--position-embedding-type learned_absolute --normalization LayerNorm {DOCUMENTS}",
}


def pair(flags, mesh):
    """Our step and the reference's training, with equal weights."""
    config = config_of(flags)
    reference = ReferenceGPT(shape_of(config))
    initialise(reference, partial(standard_std, std=0.1, layers=2), jitter=0.1)
    optimizer = config.optimizer
    numbers = partial(standard_numbers, lr=optimizer.lr, weight_decay=optimizer.weight_decay, eps=optimizer.adam_eps)
    training = Training(reference, numbers, z_loss=config.training.cross_entropy_z_loss)
    step = step_of(config, mesh)
    copy_from_reference({main.meta.name: main.value for main in step.main.params}, step.model.metas, reference)
    return config, step, training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_reference(lone_mesh, architecture):
    config, step, training = pair(ARCHITECTURES[architecture], lone_mesh)
    metas, documents = step.model.metas, config.data.reset_attention_mask
    batches = [batch_of(config, number, documents) for number in range(3)]
    inputs = without_model(batches[0], "tokens", "labels")
    with torch.no_grad():
        logits = step.model(batches[0]["tokens"], **inputs).transpose(0, 1)
        want = training.model(batches[0]["tokens"], inputs.get("position_ids"), inputs.get("document_ids"))
    assert relative_error(logits, want) < 1e-6

    gradients = training.gradients(batches[0])
    step.forward_backward(batches[0], (batches[0]["labels"] != -100).sum())
    step.main.collect_grads()
    mine = split_all({main.meta.name: main.grad for main in step.main.params}, metas)
    step.main.zero_grad()
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        # A key's bias moves all logits of a query alike: its gradient is zero in truth, hence the floor.
        assert (mine[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7 * total, name

    for number, batch in enumerate(batches):
        result = step(batch, 1.0)
        loss, norm = training.step(batch)
        assert result.loss.item() == pytest.approx(loss, rel=1e-6 if number == 0 else 1e-5)
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-5)
    after = split_all(values(step), metas)
    for name, param in training.model.named_parameters():
        assert relative_error(after[name], param.detach()) < 1e-5, name


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_initial_values_have_the_same_law(lone_mesh, architecture):
    config = config_of(ARCHITECTURES[architecture], "--hidden-size 128 --ffn-hidden-size 256 --num-layers 3")
    step = step_of(config, lone_mesh)
    for name, value in split_all(values(step), step.model.metas).items():
        std = standard_std(name, 0.1, 3)
        if std is None:
            assert torch.equal(value, torch.full_like(value, 0.0 if name.endswith("bias") else 1.0)), name
            continue
        # Five standard errors of the estimates.
        assert abs(value.mean()) < 5 * std / value.numel() ** 0.5, name
        assert value.std().item() == pytest.approx(std, rel=5 / (2 * value.numel()) ** 0.5), name


@pytest.mark.parametrize("architecture", ["documents", "gpt2-documents"])
def test_documents_are_as_if_alone(architecture):
    config = config_of(ARCHITECTURES[architecture])
    model = model_of(config).eval()
    batch = batch_of(config, 1, documents=True)
    with torch.no_grad():
        logits = model(batch["tokens"], document_ids=batch["document_ids"], position_ids=batch["position_ids"])
        across = model(batch["tokens"], position_ids=batch["position_ids"])
        for sample, ids in enumerate(batch["document_ids"]):
            for document in ids.unique():
                here = ids == document
                alone = model(batch["tokens"][sample, here][None])[:, 0]
                torch.testing.assert_close(logits[here, sample], alone, rtol=1e-5, atol=1e-5)
    assert relative_error(across, logits) > 1e-3, "the mask makes a difference"
