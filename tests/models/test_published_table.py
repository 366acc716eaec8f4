"""muP and CompleteP models against the reference GPT trained with numbers set by hand from the published tables.

The numbers are written out here, class by class, and owe nothing to `parametrization.table`: Tensor Programs V (arXiv
2203.03466) table 8 in the form with the logits' 1 / m_N; CompleteP (2505.01618) table 1 for depth, weight decay and
epsilon inside the layers; Complete(d)P (2512.22382) for the epsilons outside and for query and key gains.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.models.against_reference import copy_from_reference, shape_of, split_all
from tests.reference_gpt import Factors, Numbers, ReferenceGPT, Training, initialise
from tests.runs import batch_of, config_of, relative_error, step_of, values

STD, LR, DECAY, EPS = 0.1, 1e-2, 0.3, 1e-5
WIDTH, FFN, DEPTH, BASE_LAYERS, BASE_HEAD = 2.0, 4.0, 2.0, 2, 4
EMBEDDING_MULT, OUTPUT_MULT, ATTENTION_MULT = 3.0, 0.5, 1.5

FLAGS = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --kv-channels 8 --swiglu "
    "--ffn-hidden-size 128 --qk-layernorm --disable-bias-linear --add-qkv-bias "
    f"--init-method-std {STD} --lr {LR} --weight-decay {DECAY} --adam-eps {EPS} "
    "--mup-base-hidden-size 16 --mup-base-ffn-hidden-size 32 --mup-base-head-dim 4 --mup-base-num-attention-heads 4 "
    f"--mup-embedding-mult {EMBEDDING_MULT} --mup-output-mult {OUTPUT_MULT} --mup-attention-mult {ATTENTION_MULT} "
)
SCHEMES = {"mup": (1.0, None), "completep-1": (DEPTH, 1.0), "completep-0.5": (DEPTH, 0.5)}
"""Depth ratio as the scheme sees it, and exponent."""


def by_hand(name: str, depth: float, alpha: float) -> Numbers:
    """Learning rate, weight decay in PyTorch's convention, epsilon."""
    in_layer, vector = name.startswith("layers."), name.endswith("bias") or "norm" in name
    if name == "embedding.weight":
        return Numbers(LR, 0.0, EPS / WIDTH)
    if name == "head.weight":
        return Numbers(LR, DECAY, EPS / WIDTH)
    if not in_layer:
        return Numbers(LR, 0.0, EPS / WIDTH)
    if "query_norm" in name or "key_norm" in name:
        return Numbers(LR * depth ** (alpha - 1), 0.0, EPS * depth**-alpha)
    eps = EPS / WIDTH * depth**-alpha
    if vector:
        return Numbers(LR * depth ** (alpha - 1), 0.0, eps)
    # Fan-in of the attention output: heads x head width, 4 x 8 over 4 x 4.
    growth = FFN if "mlp_output" in name else WIDTH
    return Numbers(LR / growth * depth ** (alpha - 1), DECAY * growth, eps)


def std_by_hand(name: str, depth: float) -> float | None:
    """CompleteP's output projections start at the base model's 1 / sqrt(2 L0): the depth is in the branch factor."""
    if name.endswith("bias") or "norm" in name:
        return None
    if not name.startswith("layers."):
        return STD
    layers = BASE_LAYERS if depth > 1 else 4
    std = STD / math.sqrt(2 * layers) if "output" in name else STD
    return std / math.sqrt(FFN if "mlp_output" in name else WIDTH)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied", [True, False])
def test_published_numbers(lone_mesh, scheme, tied):
    depth, alpha = SCHEMES[scheme]
    flags = f"--parametrization {scheme.split('-')[0]}"
    if alpha is not None:
        flags += f" --base-num-layers {BASE_LAYERS} --depth-alpha {alpha}"
    config = config_of(FLAGS, flags, "" if tied else "--untie-embeddings-and-output-weights")
    alpha = alpha or 1.0
    factors = Factors(
        embedding=EMBEDDING_MULT,
        attention=ATTENTION_MULT * math.sqrt(BASE_HEAD) / 8,
        branch=depth**-alpha,
        logits=OUTPUT_MULT / WIDTH,
    )
    reference = ReferenceGPT(shape_of(config), factors)
    step = step_of(config, lone_mesh)
    for name, value in split_all(values(step), step.model.metas).items():
        std = std_by_hand(name, depth)
        if std is not None:
            assert value.std().item() == pytest.approx(std, rel=5 / (2 * value.numel()) ** 0.5), name

    initialise(reference, lambda name: std_by_hand(name, depth), jitter=0.1)
    training = Training(reference, lambda name: by_hand(name, depth, alpha))
    copy_from_reference({main.meta.name: main.value for main in step.main.params}, step.model.metas, reference)
    before = values(step)
    for number in range(5):
        batch = batch_of(config, number)
        result = step(batch, 1.0)
        loss, norm = training.step(batch)
        assert result.loss.item() == pytest.approx(loss, rel=1e-5)
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-4)
    moved = split_all({name: value - before[name] for name, value in values(step).items()}, step.model.metas)
    start = split_all(before, step.model.metas)
    for name, param in training.model.named_parameters():
        # The change alone: a wrong decay or epsilon is a small part of the weight.
        assert relative_error(moved[name], param.detach() - start[name]) < 1e-4, name
    assert torch.isfinite(result.loss)
