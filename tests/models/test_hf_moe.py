"""Mixtral and Qwen3-MoE as Hugging Face has them give the same logits from the same weights."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.config import Config
from megatron_mup.models.gpt import GPT
from megatron_mup.parametrization.meta import Block
from tests.runs import VOCAB_SIZE, config_of, model_of

transformers = pytest.importorskip("transformers", reason="Hugging Face's models are the reference here")

COMMON = "--swiglu --disable-bias-linear --num-query-groups 2 --untie-embeddings-and-output-weights"
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def mixtral() -> tuple[Config, torch.nn.Module]:
    config = config_of(COMMON, "--num-experts 4 --rotary-base 1e6")
    theirs = transformers.MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=1e6
    )
    return config, transformers.MixtralForCausalLM(theirs)


def qwen3(normalised: bool) -> tuple[Config, torch.nn.Module]:
    """``norm_topk_prob`` divides the chosen probabilities by their sum: the softmax over the chosen logits."""
    config = config_of(
        COMMON,
        "--num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 24 --qk-layernorm --kv-channels 16 "
        "--norm-epsilon 1e-6 --moe-layer-freq [0]+[1]",
        "" if normalised else "--moe-router-pre-softmax",
    )
    theirs = transformers.Qwen3MoeConfig(
        **SIZES,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        norm_topk_prob=normalised,
        mlp_only_layers=[0],
    )
    return config, transformers.Qwen3MoeForCausalLM(theirs)


def split_blocks(tensor: torch.Tensor, blocks: tuple[Block, ...]) -> dict[str, torch.Tensor]:
    """Rows of each block, in order."""
    rows = torch.arange(len(tensor))
    inside = {b.name: (rows % b.period >= b.start) & (rows % b.period < b.start + b.size) for b in blocks}
    return {name: tensor[own] for name, own in inside.items()}


def to_hugging_face(model: GPT) -> dict[str, torch.Tensor]:
    """Our weights by their names."""
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    found = {
        "model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"],
        "model.norm.weight": tensors["decoder.final_layernorm.weight"],
        "lm_head.weight": tensors["output_layer.weight"],
    }
    plain = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "mlp.router": "mlp.gate",
        "mlp.linear_fc2": "mlp.down_proj",
    }
    for name, value in tensors.items():
        if not name.startswith("decoder.layers."):
            continue
        _, _, layer, rest = name.split(".", 3)
        module, there = rest.removesuffix(".weight"), f"model.layers.{layer}"
        blocks = split_blocks(value, model.metas[name].blocks)
        if module in plain:
            found[f"{there}.{plain[module]}.weight"] = value
        elif module == "self_attention.linear_qkv":
            found |= {f"{there}.self_attn.{part[0]}_proj.weight": rows for part, rows in blocks.items()}
        elif module == "mlp.linear_fc1":
            found |= {f"{there}.mlp.{part}_proj.weight": rows for part, rows in blocks.items()}
        elif module == "mlp.experts.linear_fc1":
            experts = model.config.moe.num_experts
            found[f"{there}.mlp.experts.gate_up_proj"] = torch.stack(
                [torch.cat([blocks["gate"].chunk(experts)[e], blocks["up"].chunk(experts)[e]]) for e in range(experts)]
            )
        else:
            assert module == "mlp.experts.linear_fc2", module
            found[f"{there}.mlp.experts.down_proj"] = value.unflatten(0, (model.config.moe.num_experts, -1))
    return found


@pytest.mark.parametrize(
    "make", [mixtral, lambda: qwen3(True), lambda: qwen3(False)], ids=["mixtral", "qwen3", "qwen3-unnormalised"]
)
def test_equal_logits(make):
    config, theirs = make()
    mine = model_of(config).eval()
    for router in mine.routers().values():
        router.reset()
    theirs.load_state_dict(to_hugging_face(mine))
    tokens = torch.randint(0, VOCAB_SIZE, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = mine(tokens).transpose(0, 1), theirs.eval()(tokens).logits
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
