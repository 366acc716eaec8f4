"""Logits of two models compared, layer by layer, so that neither is ever whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_mup.checkpoint.convert.architectures import ARCHITECTURES
from megatron_mup.checkpoint.convert.hf_files import HFWeights, hf_library
from megatron_mup.checkpoint.convert.names import EMBEDDING, HEAD
from megatron_mup.checkpoint.whole import SavedModel
from megatron_mup.models.gpt import GPT, Stage

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, by the coarser of both precisions: rounding alone makes such a one."""


# Its grouped products want strides of 16 bytes.
_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@dataclass(frozen=True)
class Comparison:
    """Logits of both models on the same tokens.

    Attributes:
        difference: largest difference of two logits.
        scale: largest absolute logit, at least 1.
        tolerance: largest difference allowed, relative to the scale.
    """

    difference: float
    scale: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the models are equal; never where a logit is not a number."""
        return self.difference <= self.tolerance * self.scale

    def __str__(self) -> str:
        """In words."""
        return (
            f"largest difference of logits {self.difference:.2e} (allowed: {self.tolerance * self.scale:.2e}; "
            f"largest logit {self.scale:.4g})"
        )


def random_tokens(vocab_size: int, count: int = 64, seed: int = 0) -> list[int]:
    """Token ids to compare on."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()


def compare(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> Comparison:
    """Compares ``[seq, vocab]`` logits."""
    scale = max(1.0, theirs.abs().max().item())
    return Comparison((ours.double() - theirs.double()).abs().max().item(), scale, tolerance)


@torch.inference_mode()
def our_logits(saved: SavedModel, tokens: list[int]) -> torch.Tensor:
    """``[seq, vocab]`` of the model in a checkpoint, computed in fp32."""
    with torch.device("meta"):
        model = GPT(saved.config, saved.vocab_size, Stage(0, saved.config.model.num_layers)).eval()
    units: list[nn.Module] = list(model.decoder.layers.values())
    units += [m for m in (model.embedding, model.decoder.final_layernorm, model.output_layer) if m is not None]
    biases = set(model.expert_biases())
    if saved.config.model.untie_embeddings_and_output_weights:
        _stream(model, units, saved.tensor, biases)
    else:
        # The output layer reads the embedding's own weight.
        assert model.embedding is not None
        _fill(model.embedding, "embedding", saved.tensor)
        _stream(model, [unit for unit in units if unit is not model.embedding], saved.tensor, biases)
    logits: torch.Tensor = model(torch.tensor([tokens]))[:, 0]
    return logits


@torch.inference_mode()
def hf_logits(config: Any, weights: HFWeights, tokens: list[int]) -> torch.Tensor:
    """``[seq, vocab]`` of a model of transformers, computed in fp32.

    Args:
        config: its ``PreTrainedConfig``.
        weights: its tensors.
        tokens: ids.
    """
    library = hf_library("transformers").AutoModelForCausalLM
    with torch.device("meta"):
        model = library.from_config(config, dtype=torch.float32, **_EAGER).eval()
    # Its tables are no parameters; without the meta device they have values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)

    experts = ARCHITECTURES[config.model_type].experts

    def read(name: str) -> torch.Tensor:
        names = experts.of_module(name, config.num_local_experts) if experts is not None else None
        if names is None:
            return weights.tensor(EMBEDDING if name == HEAD and config.tie_word_embeddings else name)
        if len(names) == 1:
            return weights.tensor(names[0][0])
        return torch.stack([torch.cat([weights.tensor(part) for part in parts]) for parts in names])

    _stream(model, [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head], read)
    logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def _stream(
    model: nn.Module, units: Iterable[nn.Module], read: Callable[[str], torch.Tensor], buffers: Container[str] = ()
) -> None:
    """Gives each unit of a model on the meta device its values, these buffers too, for as long as its forward takes."""
    names = {module: name for name, module in model.named_modules()}
    for unit in units:

        def before(module: nn.Module, _: Any) -> None:
            _fill(module, names[module], read, buffers)

        def after(module: nn.Module, _inputs: Any, _output: Any) -> None:
            module.to("meta")

        unit.register_forward_pre_hook(before)
        unit.register_forward_hook(after)


def _fill(module: nn.Module, prefix: str, read: Callable[[str], torch.Tensor], buffers: Container[str] = ()) -> None:
    for name, submodule in module.named_modules():
        for leaf in list(submodule._buffers):
            if (full := ".".join(part for part in (prefix, name, leaf) if part)) in buffers:
                submodule.register_buffer(leaf, read(full).float())
        for leaf in list(submodule._parameters):
            if submodule._parameters[leaf] is not None:
                full = ".".join(part for part in (prefix, name, leaf) if part)
                setattr(submodule, leaf, nn.Parameter(read(full).float(), requires_grad=False))
