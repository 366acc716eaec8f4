"""Checkpoints that megatron-core itself writes, on a CPU, become ours and give its own logits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mup.inference import load_model
from tests.checkpoint.convert.hf_cases import convert

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"),
]

SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 16,
    "moe_router_topk": 2,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
}
ARGUMENTS = {
    "group_query_attention": True,
    "kv_channels": 8,
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "max_position_embeddings": 64,
    "seq_length": 64,
    "padded_vocab_size": 104,
    "make_vocab_size_divisible_by": 8,
    "pipeline_model_parallel_size": 1,
}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 2.5}
CASES = {
    "dense": {"num_experts": None},
    "stacked": {"num_experts": 4, "moe_layer_freq": 1, **SIGMOID},
    "by-layer": {"num_experts": 4, "moe_layer_freq": [0, 1, 1, 1]},
    "singleton": {"num_experts": 4, "moe_layer_freq": 1, "moe_router_pre_softmax": True},
    "groups": {"num_experts": 4, "moe_layer_freq": 2, **SIGMOID, **GROUPS},
}
CUDA = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": lambda *_: None,
    "is_current_stream_capturing": lambda: False,
}
"""What it asks of CUDA, answered on a CPU."""


def write(name: str, folder: Path) -> None:
    """Has it write a model of random weights, in both formats, and its logits. In a process of its own."""
    import contextlib
    from argparse import Namespace

    import torch.distributed as dist

    for asked, answer in CUDA.items():
        setattr(torch.cuda, asked, answer)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    random.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()
    moe_utils.te_general_gemm = None  # asked for, though it isn't there without Transformer Engine
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    case = dict(CASES[name])
    experts = case.pop("num_experts")
    sizes = {key: size for key, size in SIZES.items() if experts or not key.startswith("moe_")}
    config = TransformerConfig(
        **sizes,
        **case,
        num_moe_experts=experts,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        moe_token_dispatcher_type="allgather",
        moe_router_dtype="fp32",
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
    )
    if experts is None:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    else:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    model = GPTModel(config, spec, 104, 64, share_embeddings_and_output_weights=False, position_embedding_type="rope")
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for value in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("expert_bias"))]:
        value.normal_(0.0, 0.15, generator=generator)
    arguments = Namespace(**{**sizes, **ARGUMENTS, **case, "num_experts": experts})
    common = {"args": arguments, "iteration": 12, "checkpoint_version": 3.0}
    dist_folder, legacy = folder / "torch_dist" / "iter_0000012", folder / "torch" / "iter_0000012" / "mp_rank_00"
    for made in (dist_folder, legacy):
        made.mkdir(parents=True)
    sharded = model.sharded_state_dict(metadata={"singleton_local_shards": True} if name == "singleton" else None)
    dist_checkpointing.save({**common, "model": sharded}, str(dist_folder))
    torch.save({**common, "model": model.state_dict_for_save_checkpoint()}, legacy / "model_optim_rng.pt")
    tokens = 7 * torch.arange(12)[None]
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]
    torch.save((tokens, model(tokens, torch.arange(12)[None], mask)), folder / "logits.pt")


def state_in(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "iter_0000012" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)["model"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", CASES)
def test_gives_its_logits(tmp_path, name):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    tokens, want = torch.load(tmp_path / "logits.pt")
    for kind in ("torch_dist", "torch"):
        (tmp_path / kind / "latest_checkpointed_iteration.txt").write_text("12")
        assert convert("from-megatron", "--load", tmp_path / kind, "--save", tmp_path / f"ours-{kind}") == 0
        logits = load_model(tmp_path / f"ours-{kind}").model(tokens)
        assert (logits.transpose(0, 1) - want).abs().max() < 2e-6
    # Back it has its own names and values.
    assert convert("to-megatron", "--load", tmp_path / "ours-torch", "--save", tmp_path / "back") == 0
    theirs, back = (state_in(tmp_path / folder) for folder in ("torch", "back"))
    assert back.keys() == theirs.keys()
    assert [name for name, value in theirs.items() if not torch.equal(back[name], value)] == []


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
