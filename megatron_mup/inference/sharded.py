"""A checkpoint as one model over tensor ranks and pipeline stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mup.checkpoint import Piece, load
from megatron_mup.checkpoint.state import MODEL, whole_piece
from megatron_mup.checkpoint.whole import open_model
from megatron_mup.config import Config, ParallelConfig
from megatron_mup.config.rules import check_layout
from megatron_mup.inference.sample import Logits
from megatron_mup.layers.cache import KeyValueCache
from megatron_mup.models.build import build_stage
from megatron_mup.models.gpt import GPT
from megatron_mup.parallel.data_parallel import compute_dtype
from megatron_mup.parallel.layout import Layout, gather_chunks
from megatron_mup.parallel.mesh import Mesh


def load_sharded(
    folder: str | Path, tensor: int, stages: int, device: torch.device, step: int | None = None
) -> tuple[GPT, Mesh, Config]:
    """This rank's part of the model of a checkpoint. Collective over ``tensor x stages`` ranks.

    Raises:
        ConfigError: no checkpoint, a damaged one, or a model that so many ranks can't share.
    """
    saved = open_model(folder, step)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=stages)
    config = replace(saved.config, parallel=parallel, training=replace(saved.config.training, torch_compile=False))
    check_layout(config, tensor * stages)
    mesh = Mesh.build(config, device)
    model = build_stage(config, saved.vocab_size, mesh, mesh.rank("pp")).eval().requires_grad_(False)
    pieces = []
    for name, param in model.named_parameters():
        meta, layout = model.metas[name], Layout.of(model.metas[name], mesh)
        key = f"{MODEL}/{meta.tied_to or name}"
        pieces += [Piece(key, part, layout.shape, offsets) for offsets, part in layout.rectangles(param)]
    pieces += [whole_piece(f"{MODEL}/{name}", bias) for name, bias in model.expert_biases().items()]
    load(saved.path, pieces, config)
    return model.to(compute_dtype(config)), mesh, config


def sharded_logits(model: GPT, mesh: Mesh, vocab_size: int) -> Logits:
    """The whole model's function, the same on every rank. Collective."""
    hidden, dtype = model.config.model.hidden_size, compute_dtype(model.config)
    group, rank, stages = mesh.group("pp"), mesh.rank("pp"), mesh.size("pp")

    def last(ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        batch, seq = ids.shape
        x = ids
        if not mesh.is_first_stage:
            x = torch.empty(seq, batch, hidden, dtype=dtype, device=ids.device)
            dist.recv(x, group=group, group_src=rank - 1)
        x = model(x, cache=cache)
        scores = torch.empty(batch, vocab_size, device=ids.device)
        if mesh.is_last_stage:
            scores = gather_chunks(x[-1].float(), 1, vocab_size, mesh.group("tp"))
        else:
            dist.send(x.contiguous(), group=group, group_dst=rank + 1)
        if stages > 1:
            dist.broadcast(scores, group=group, group_src=stages - 1)
        return scores

    return last
