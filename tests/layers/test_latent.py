"""Multi-head latent attention against Hugging Face's DeepSeek-V3, and how its matrices describe themselves."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.checkpoint.convert.architectures import to_hf_config
from megatron_mup.config import Config, ConfigError, from_dict, parse_config, resolved, validate
from megatron_mup.inference import logits_of, stream
from megatron_mup.models.gpt import GPT, parameter_metas
from megatron_mup.optim.blocks import MatrixSettings, block_shape, logical_blocks
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.table import scaling
from megatron_mup.training.flops import flops_per_token
from megatron_mup.transfer.proxy import make_proxy
from tests.models.test_hf_moe import split_blocks
from tests.runs import VOCAB_SIZE, batch_of, config_of, model_of, step_of, values, words

LATENT = (
    "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 6 --qk-layernorm --disable-bias-linear --swiglu --untie-embeddings-and-output-weights"
)
"""All widths differ."""
STREAM_QUERIES = LATENT.replace("--q-lora-rank 24", "")
ATTENTION = "decoder.layers.0.self_attention"


def hugging_face(config: Config) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers", reason="Hugging Face's model is the reference here")
    model = config.model
    theirs = transformers.DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        first_k_dense_replace=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_attention_heads,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_nope_head_dim=model.qk_head_dim,
        qk_rope_head_dim=model.qk_pos_emb_head_dim,
        v_head_dim=model.v_head_dim,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_interleave=False,
        max_position_embeddings=64,
    )
    return transformers.DeepseekV3ForCausalLM(theirs)


NAMES = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.linear_q_proj": "self_attn.q_proj",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.q_layernorm": "self_attn.q_a_layernorm",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}


def to_hugging_face(model: GPT) -> dict[str, torch.Tensor]:
    """Our weights by their names; but for gate and up, and the shared key, they lie alike."""
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    found = {
        "model.embed_tokens.weight": tensors.pop("embedding.word_embeddings.weight"),
        "model.norm.weight": tensors.pop("decoder.final_layernorm.weight"),
        "lm_head.weight": tensors.pop("output_layer.weight"),
    }
    for name, value in tensors.items():
        _, _, layer, rest = name.split(".", 3)
        module = rest.removesuffix(".weight")
        if module == "mlp.linear_fc1":
            blocks = split_blocks(value, model.metas[name].blocks)
            found |= {f"model.layers.{layer}.mlp.{part}_proj.weight": rows for part, rows in blocks.items()}
        elif module == "self_attention.linear_kv_down_proj":
            shared = tensors[name.replace("linear_kv_down_proj", "linear_k_pos_proj")]
            found[f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"] = torch.cat([value, shared])
        elif module != "self_attention.linear_k_pos_proj":
            found[f"model.layers.{layer}.{NAMES[module]}.weight"] = value
    return found


@pytest.mark.parametrize("flags", [LATENT, STREAM_QUERIES], ids=["latent queries", "queries from the stream"])
@pytest.mark.parametrize("backend", ["auto", "unfused"])
def test_equal_logits_and_gradients(flags, backend):
    config = config_of(flags, f"--norm-epsilon 1e-6 --attention-backend {backend}")
    mine, theirs = model_of(config), hugging_face(config)
    theirs.load_state_dict(to_hugging_face(mine))
    tokens = torch.randint(0, VOCAB_SIZE, (3, 16), generator=torch.Generator().manual_seed(0))
    got, want = mine(tokens).transpose(0, 1), theirs.eval()(tokens).logits
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    grads = {name: param.grad for name, param in theirs.named_parameters()}
    for name, part in mine.named_parameters():
        if "self_attention" not in name:
            continue
        layer, module = name.removesuffix(".weight").split(".", 3)[2:]
        if module in ("self_attention.linear_kv_down_proj", "self_attention.linear_k_pos_proj"):
            both = grads[f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"]
            expected = both[:16] if "kv_down" in module else both[16:]
        else:
            expected = grads[f"model.layers.{layer}.{NAMES[module]}.weight"]
        assert (part.grad - expected).norm() < 1e-5 * expected.norm(), name


def test_generation_with_a_cache():
    model = model_of(config_of(LATENT, "--seq-length 48")).eval()
    prompts = [[3, 1, 4, 1, 5], [9]]
    steps = stream(logits_of(model), prompts, 32, window=48, temperature=0)
    for row, prompt in zip(zip(*steps, strict=True), prompts, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in row:
                ids.append(int(model(torch.tensor([ids]))[-1, 0].argmax()))
        assert list(row) == ids[len(prompt) :]


def metas_of(*flags: str) -> tuple[Config, dict[str, ParamMeta]]:
    config = config_of(LATENT, *flags)
    return config, model_of(config).metas


GROWN = (
    "--parametrization mup --mup-base-hidden-size 8 --mup-base-q-lora-rank 12 --mup-base-kv-lora-rank 4 "
    "--mup-base-num-attention-heads 2 --mup-base-head-dim 6"
)


def test_fans_are_those_of_each_matrix():
    """Hidden 32 over 8, latents 24 over 12 and 16 over 4, heads 4 x (8 + 4, values 6) over 2 x (4 + 2, values 3)."""
    config, metas = metas_of(GROWN)
    facts = {
        "linear_q_down_proj": (32, 24, 8, 12),
        "linear_q_up_proj": (24, 48, 12, 12),
        "linear_kv_down_proj": (32, 16, 8, 4),
        "linear_k_pos_proj": (32, 4, 8, 2),
        "linear_kv_up_proj": (16, 56, 4, 14),
        "linear_proj": (24, 32, 6, 8),
    }
    for part, fans in facts.items():
        meta = metas[f"{ATTENTION}.{part}.weight"]
        assert (meta.fan_in, meta.fan_out, meta.base_fan_in, meta.base_fan_out) == fans, part
        ratio = fans[0] / fans[2]
        assert scaling(meta, config).lr == pytest.approx(config.optimizer.lr / ratio), part
    assert metas[f"{ATTENTION}.kv_layernorm.weight"].base_fan_out == 4
    attention = model_of(config).decoder.layers["0"].self_attention
    assert attention.scale == pytest.approx(6**0.5 / 12), "sqrt(h0)/h of the whole width of a query"


def test_what_is_orthonormalized():
    """Keys and values are matrices of their own, and heads on request; down projections are whole."""
    _, metas = metas_of()

    def shapes(part: str, **flags: bool) -> list[tuple[str, int, tuple[int, int]]]:
        meta = metas[f"{ATTENTION}.{part}.weight"]
        blocks = logical_blocks(meta, MatrixSettings(**flags))
        return [(b.name, b.matrices(meta.shape[0])[0], block_shape(meta, b)) for b in blocks]

    assert shapes("linear_kv_down_proj", split_heads=True) == [("whole", 1, (16, 32))]
    assert shapes("linear_k_pos_proj", split_heads=True) == [("whole", 1, (4, 32))]
    assert shapes("linear_q_down_proj", split_heads=True) == [("whole", 1, (24, 32))]
    assert shapes("linear_kv_up_proj", split_qkv=False) == [("whole", 1, (56, 16))]
    assert shapes("linear_kv_up_proj") == [("key", 1, (32, 16)), ("value", 1, (24, 16))]
    assert shapes("linear_kv_up_proj", split_heads=True) == [("key.0", 4, (8, 16)), ("value.0", 4, (6, 16))]
    assert shapes("linear_q_up_proj", split_heads=True) == [("query.0", 4, (12, 24))]


def test_steps_of_heads_follow_each_heads_own_width():
    for mode, exponent in (("unit_rms_norm", 0.0), ("spectral", 0.5)):
        config, metas = metas_of(
            GROWN, f"--optimizer muon --muon-lr 0.02 --muon-split-heads --muon-scale-mode {mode} --q-lora-rank 64"
        )
        meta = metas[f"{ATTENTION}.linear_q_up_proj.weight"]
        # A head's matrix is wide here and there: sqrt(12 / 64) over sqrt(6 / 12), over the root of 64 / 12.
        wanted = (12 / 64 * 12 / 6 * 12 / 64) ** exponent
        assert scaling(meta, config).lr == pytest.approx(0.02 * wanted), mode


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_own_size_is_the_standard_model(lone_mesh, optimizer):
    def trained(*flags: str) -> dict[str, torch.Tensor]:
        config = config_of(LATENT, f"--optimizer {optimizer}", *flags)
        step = step_of(config, lone_mesh)
        losses = [step(batch_of(config, number), 1.0).loss for number in range(2)]
        return values(step) | {f"loss {n}": loss for n, loss in enumerate(losses)}

    standard = trained()
    own = "--mup-base-hidden-size 32 --mup-base-q-lora-rank 24 --mup-base-kv-lora-rank 16 --mup-base-head-dim 12"
    for scheme in ("mup", "depth-mup", "completep", "spectral"):
        other = trained(f"--parametrization {scheme}", own)
        assert all(torch.equal(other[name], value) for name, value in standard.items()), scheme


def test_operations_are_those_of_its_matrices():
    model = config_of(LATENT).model
    metas = model_of(config_of(LATENT)).metas
    counted = [m.numel for m in metas.values() if m.layer is not None and len(m.shape) == 2]
    pairs = 2 * 4 * (12 + 6) * 16  # layers, heads, widths of queries and values, sequence
    want = 6 * (sum(counted) + 32 * VOCAB_SIZE) + 3 * pairs
    assert flops_per_token(model, 16, VOCAB_SIZE, "half") == want


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--kv-lora-rank", "give --kv-lora-rank"),
        ("--num-query-groups 2", "drop --num-query-groups"),
        ("--kv-channels 8", "--qk-head-dim"),
        ("--add-qkv-bias", "no biases"),
        ("--qk-pos-emb-head-dim 3", "pairs of channels"),
        ("--attention-backend flash", "one width for all heads"),
        ("--attention-backend flash4 --bf16", "one width for all heads"),
        ("--parametrization umup", "no rule for latents"),
    ],
)
def test_what_cannot_work_is_refused(flags, told):
    given = LATENT.replace("--kv-lora-rank 16", "") if flags == "--kv-lora-rank" else f"{LATENT} {flags}"
    with pytest.raises(ConfigError, match=told):
        validate(parse_config(words(given)).config, 1)


def test_latents_without_latent_attention_are_told():
    parsed = parse_config(words("--kv-lora-rank 16 --v-head-dim 8"))
    told = validate(parsed.config, 1, parsed.explicit)
    assert [line for line in told if "no --multi-latent-attention" in line]


def test_resolved_settings_are_the_same_run():
    config = config_of(LATENT, "--parametrization completep --mup-base-hidden-size 16")
    recipe = resolved(config, 1)
    assert recipe["model"]["kv_channels"] is None
    assert recipe["parametrization"]["mup_base_q_lora_rank"] == 12
    again = from_dict(recipe, "these settings")
    validate(again, 1)
    assert parameter_metas(again, VOCAB_SIZE) == parameter_metas(config, VOCAB_SIZE)


def test_a_proxy_has_narrower_latents():
    proxy = make_proxy(config_of(LATENT), 2, 1)
    assert (proxy.model.q_lora_rank, proxy.model.kv_lora_rank, proxy.model.num_attention_heads) == (12, 8, 2)
    assert proxy.parametrization.mup_base_kv_lora_rank == 8
    assert (proxy.model.head_dim, proxy.model.v_head_dim) == (12, 6)
    validate(proxy, 1)


def test_no_format_takes_it_yet():
    with pytest.raises(ConfigError, match="--multi-latent-attention True"):
        to_hf_config(config_of(LATENT))
