"""Models of Hugging Face's transformers with awkward shapes, and a command line over the conversion tool."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

TOOLS = Path(__file__).parents[3] / "tools"
VOCAB_SIZE = 101
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0156,
}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases-llama3-rope": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama-one-group": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 10}),
    "qwen2": ("qwen2", {"num_key_value_heads": 6}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 12, "rms_norm_eps": 1e-3}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 16}),
    "granite": ("granite", GRANITE),
    "granite-tied-biases": (
        "granite",
        {**GRANITE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mixtral": ("mixtral", {**EXPERTS, "intermediate_size": 90}),
    "mixtral-tied-window": ("mixtral", {**EXPERTS, "tie_word_embeddings": True, "sliding_window": 7, "head_dim": 10}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 20, "norm_topk_prob": True, "head_dim": 12}),
    "qwen3_moe-dense-layer": (
        "qwen3_moe",
        {**EXPERTS, "moe_intermediate_size": 24, "mlp_only_layers": [1], "head_dim": 8, "tie_word_embeddings": True},
    ),
    "granitemoe": ("granitemoe", {**GRANITE, **EXPERTS}),
    "granitemoe-tied": ("granitemoe", {**GRANITE, **EXPERTS, "tie_word_embeddings": True, "num_key_value_heads": 6}),
}


def make(name: str, folder: Path, **more: Any) -> Path:
    """A model folder with random weights, gains and biases too."""
    kind, fields = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **fields, **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """``[batch, seq, vocab]`` by transformers itself, in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(tokens).logits


def tokens(seq: int = 40) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, seq), generator=torch.Generator().manual_seed(7))


def tool(name: str) -> ModuleType:
    """A module of ``tools/``."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convert(*words: object) -> int:
    """Runs ``tools/convert_checkpoint.py``."""
    return tool("convert_checkpoint").main([str(word) for word in words])
