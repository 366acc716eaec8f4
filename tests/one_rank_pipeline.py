"""A pipeline whose stages all lie on one rank: a schedule that splits backward, without a second process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mup.config import Config
from megatron_mup.models.chunks import Chunks
from megatron_mup.models.gpt import GPT, Stage
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training import pipeline

Batch = dict[str, torch.Tensor]
Found = dict[str, torch.Tensor]


def as_pipeline(config: Config) -> Config:
    """The run on as many ranks as it has layers."""
    parallel = replace(
        config.parallel,
        pipeline_model_parallel_size=config.model.num_layers,
        pipeline_schedule="InterleavedZeroBubble",
        num_virtual_stages_per_pipeline_rank=1,
    )
    return replace(config, parallel=parallel)


def stages_of(whole: GPT, config: Config, mesh: Mesh) -> Chunks:
    """A stage for each layer of a model, with its values."""
    config = as_pipeline(config)
    last, values, dtype = config.model.num_layers - 1, whole.state_dict(), next(whole.parameters()).dtype
    parts = []
    for layer in range(last + 1):
        with torch.device("meta"):
            part = GPT(config, whole.vocab_size, Stage(layer, layer + 1, layer == 0, layer == last), dtype=dtype)
        part.to_empty(device=mesh.device)
        part.load_state_dict({name: values[name] for name in part.state_dict()})
        parts.append(part)
    return Chunks(parts)


def whole_passes(model: GPT, batch: Batch, count: int) -> Found:
    """Gradients and routers' tallies by name, after all micro-batches went through the model."""
    for index in range(count):
        part = {name: value.chunk(count)[index] for name, value in batch.items()}
        model(part.pop("tokens"), **part)[0, 0].backward()
    return _found(model)


def split_passes(model: Chunks, config: Config, mesh: Mesh, batch: Batch, count: int) -> Found:
    """The same by a schedule that splits backward."""
    number, config = len(model.parts), as_pipeline(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "stages_of_rank", lambda *_: tuple(range(number)))
        patch.setattr(pipeline, "stages_per_rank", lambda _: number)
        # PyTorch 2.11 has neighbours greet each other first.
        patch.setattr(pipeline._Stage, "_get_init_p2p_neighbors_ops", lambda _: [], raising=False)
        passes = pipeline.Pipeline(model, config, mesh, lambda: None)
        inputs = [{n: v.chunk(count)[index] for n, v in batch.items() if n != "tokens"} for index in range(count)]
        # PyTorch detaches the objective in place, which a view doesn't allow.
        passes.train(batch["tokens"].contiguous(), inputs, lambda loss: loss[0, 0] / 1)
    return _found(model)


def _found(model: GPT | Chunks) -> Found:
    found = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    found.update({f"tally of layer {layer}": router.tally.clone() for layer, router in model.routers().items()})
    return found
