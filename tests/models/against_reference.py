"""Our parameters and those of the plain reference GPT: which is which."""

from __future__ import annotations

import torch

from megatron_mup.config import Config
from megatron_mup.parametrization.meta import ParamMeta
from tests.reference_gpt import ReferenceGPT, Shape
from tests.runs import VOCAB_SIZE

OUTSIDE = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "embedding.position_embeddings.weight": "position.weight",
    "decoder.final_layernorm.weight": "final_norm.weight",
    "decoder.final_layernorm.bias": "final_norm.bias",
    "output_layer.weight": "head.weight",
}
INSIDE = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_proj": "attention_output",
    "self_attention.q_layernorm": "query_norm",
    "self_attention.k_layernorm": "key_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "up",
    "mlp.linear_fc2": "mlp_output",
}


def shape_of(config: Config) -> Shape:
    """The reference's architecture."""
    model = config.model
    return Shape(
        vocab_size=VOCAB_SIZE,
        seq_length=config.training.seq_length,
        hidden=model.hidden_size,
        ffn=model.ffn_size,
        layers=model.num_layers,
        heads=model.num_attention_heads,
        groups=model.query_groups,
        head_dim=model.head_dim,
        activation="swiglu" if model.swiglu else "squared_relu" if model.squared_relu else "gelu",
        layer_norm=model.normalization == "LayerNorm",
        qk_norm=model.qk_layernorm,
        positions=model.position_embedding_type,
        rotary_dim=model.rotary_dim,
        rotary_base=model.rotary_base,
        rotary_stretch=model.rope_scaling_factor if model.use_rope_scaling else None,
        window=model.window_size,
        biases=not model.disable_bias_linear,
        qkv_biases=model.add_qkv_bias or not model.disable_bias_linear,
        tied=not model.untie_embeddings_and_output_weights,
        eps=model.norm_epsilon,
    )


def split(name: str, tensor: torch.Tensor, metas: dict[str, ParamMeta]) -> dict[str, torch.Tensor]:
    """One of our tensors as the reference's, by the reference's names; biases are cut as their weights are."""
    if name in OUTSIDE:
        return {OUTSIDE[name]: tensor}
    _, _, layer, rest = name.split(".", 3)
    module, _, part = rest.rpartition(".")
    blocks = metas[f"decoder.layers.{layer}.{module}.weight"].blocks
    if not blocks:
        return {f"layers.{layer}.{INSIDE[module]}.{part}": tensor}
    rows = torch.arange(len(tensor))
    place = [(block, rows % block.period) for block in blocks]
    return {
        f"layers.{layer}.{block.name}.{part}": tensor[(block.start <= at) & (at < block.start + block.size)]
        for block, at in place
    }


def split_all(tensors: dict[str, torch.Tensor], metas: dict[str, ParamMeta]) -> dict[str, torch.Tensor]:
    """All our tensors as the reference's."""
    return {part: value for name, tensor in tensors.items() for part, value in split(name, tensor, metas).items()}


@torch.no_grad()
def copy_from_reference(tensors: dict[str, torch.Tensor], metas: dict[str, ParamMeta], reference: ReferenceGPT) -> None:
    """Writes the reference's values into our tensors; both must have exactly the same parameters."""
    state = dict(reference.named_parameters())
    places = {name: torch.arange(tensor.numel()).view_as(tensor) for name, tensor in tensors.items()}
    parts = {name: split(name, place, metas) for name, place in places.items()}
    assert {part for mine in parts.values() for part in mine} == set(state)
    for name, mine in parts.items():
        for part, place in mine.items():
            tensors[name].view(-1)[place.flatten()] = state[part].flatten()
