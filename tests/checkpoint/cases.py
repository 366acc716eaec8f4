"""What the workers of the checkpoint tests do: models of known values, saved and loaded in a layout."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_mup import checkpoint
from megatron_mup.checkpoint import Manifest, Piece
from megatron_mup.config import Config, ConfigError, ModelConfig, OptimizerConfig, ParallelConfig, to_dict
from megatron_mup.models.build import build_model
from megatron_mup.optim.main_params import MainParams
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parallel.mesh import Mesh

VOCAB_SIZE = 101

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    # Six channels: over four data shards of its gain, one is empty.
    kv_channels=6,
    swiglu=True,
    ffn_hidden_size=32,
    qk_layernorm=True,
    vocab_size=VOCAB_SIZE,
)
FSDP: dict[str, Any] = {"data_parallel_sharding_strategy": "optim_grads_params"}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "fsdp2": (2, FSDP),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, PP),
    "fsdp4": (4, FSDP),
    "hsdp2x2": (4, {**FSDP, "num_distributed_optimizer_instances": 2}),
    "tp2-fsdp2": (4, {**FSDP, "tensor_model_parallel_size": 2}),
    "pp2-fsdp2": (4, {**FSDP, **PP}),
    "tp2-pp2": (4, {**PP, "tensor_model_parallel_size": 2}),
}


def config_of(layout: str, **model: Any) -> Config:
    return Config(
        model=replace(MODEL, **model),
        parallel=ParallelConfig(**LAYOUTS[layout][1]),
        optimizer=OptimizerConfig(optimizer="muon", muon_ns_dtype="fp32"),
    )


class Run:
    """A model and its optimizer on this rank."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.mesh = Mesh.build(config, torch.device("cpu"))
        model = build_model(config, config.model.vocab_size or VOCAB_SIZE, self.mesh)
        self.main = MainParams(model, model.metas, config, self.mesh)
        self.optimizer = Optimizer(self.main.params, config, self.mesh)

    def pieces(self, optimizer: bool = True) -> list[Piece]:
        state = self.optimizer.state_tensors() if optimizer else None
        return checkpoint.checkpoint_pieces(self.main.params, state)

    def manifest(self, iteration: int) -> Manifest:
        return Manifest(
            iteration=iteration,
            consumed_samples=8 * iteration,
            config=to_dict(self.config),
            parametrization=[{"class": "embedding", "lr": 1e-3}],
            layout=checkpoint.layout_sizes(self.mesh),
            optimizer=self.optimizer.state_scalars(),
        )

    def save(self, folder: str, iteration: int, **options: Any) -> Path:
        return checkpoint.save(folder, self.pieces(options.pop("optimizer", True)), self.manifest(iteration), **options)

    def step(self, number: int) -> None:
        """One optimizer step on gradients that depend on the number only."""
        for param in self.main.params:
            name = param.meta.tied_to or param.meta.name
            param.grad = param.layout.shard(known(f"grad{number}/{name}", param.meta.shape)).clone()
        self.optimizer.step(1.0)


def known(key: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """The global tensor that belongs to a key."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}".encode())))


def part(piece: Piece, whole: torch.Tensor) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(piece.offsets, piece.tensor.shape, strict=True)):
        whole = whole.narrow(dim, min(offset, whole.shape[dim] - size), size)
    return whole


def fill(pieces: list[Piece], seed: int = 0) -> None:
    for piece in pieces:
        piece.tensor.copy_(part(piece, known(piece.key, piece.shape, seed)))


def wrong(pieces: list[Piece], seed: int = 0) -> list[str]:
    """Keys whose values aren't bitwise the known ones."""
    return [p.key for p in pieces if not torch.equal(p.tensor, part(p, known(p.key, p.shape, seed)))]


# Jobs: functions that the ranks of a pool run.


def save_known(layout: str, folder: str, iterations: list[int], **options: Any) -> str:
    """Saves known values, with the iteration as their seed."""
    run = Run(config_of(layout))
    for iteration in iterations:
        fill(run.pieces(), iteration)
        path = run.save(folder, iteration, **options)
    return str(path)


def load_all(layout: str, paths: dict[str, str], seed: int) -> dict[str, list[str]]:
    """Wrong keys of each checkpoint, loaded in a layout."""
    run, found = Run(config_of(layout)), {}
    pieces = run.pieces()
    for name, path in paths.items():
        for piece in pieces:
            piece.tensor.fill_(float("nan"))
        checkpoint.load(path, pieces, run.config)
        found[name] = wrong(pieces, seed)
    return found


def load_latest(layout: str, folder: str) -> tuple[str, list[str]]:
    """The checkpoint that is found and the wrong keys in it."""
    run = Run(config_of(layout))
    path = checkpoint.find(folder)
    assert path is not None
    pieces = run.pieces()
    return path.name, wrong_after(path, pieces, run.config)


def wrong_after(path: Path, pieces: list[Piece], config: Config) -> list[str]:
    manifest = checkpoint.load(path, pieces, config)
    return wrong(pieces, manifest.iteration)


def load_error(layout: str, folder: str, model: dict[str, Any]) -> str:
    """The error of loading; empty without one."""
    run = Run(config_of(layout, **model))
    try:
        path = checkpoint.find(folder)
        assert path is not None
        checkpoint.load(path, run.pieces(), run.config)
    except ConfigError as error:
        return str(error)
    return ""
