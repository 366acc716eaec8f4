"""Small models of this package for tests: configurations, batches, whole steps and whole runs."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp

from megatron_mup.checkpoint.dcp import read_metadata
from megatron_mup.config import Config, parse_config, validate
from megatron_mup.layers.loss import IGNORE
from megatron_mup.models.build import build_model
from megatron_mup.models.gpt import GPT, Stage
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.main import main
from megatron_mup.training.step import TrainStep

VOCAB_SIZE = 101
"""Odd, so that the output layer's GEMM is padded."""

TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 16 "
    f"--vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 8 --global-batch-size 4 --micro-batch-size 2 "
    "--train-iters 8 --mock-data --num-workers 0 --init-method-std 0.1 --lr 1e-2 --adam-eps 1e-5 "
    "--lr-decay-style constant"
)


def words(*flags: str) -> list[str]:
    """A command line."""
    return " ".join([TINY, *flags]).split()


def config_of(*flags: str) -> Config:
    """The tiny model's configuration with further flags, valid on one rank unless the layout needs more."""
    config = parse_config(words(*flags)).config
    parallel = config.parallel
    if {parallel.model_parallel_size, parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size} == {1}:
        validate(config, 1)
    return config


def model_of(config: Config, seed: int = 0) -> GPT:
    """The whole model without a process group, with normal random values everywhere, gains and biases too."""
    model = GPT(config, VOCAB_SIZE, Stage(0, config.model.num_layers)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(0.0, 0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                param += 1
    return model


def step_of(config: Config, mesh: Mesh, vocab_size: int = VOCAB_SIZE) -> TrainStep:
    """Model and optimizer with their initial values."""
    step = TrainStep(build_model(config, vocab_size, mesh), config, mesh)
    step.initialise()
    return step


def values(step: TrainStep) -> dict[str, torch.Tensor]:
    """Copies of the main parameters by name; the whole ones on one rank."""
    return {main.meta.name: main.value.clone() for main in step.main.params}


def batch_of(config: Config, step: int = 0, documents: bool = False) -> dict[str, torch.Tensor]:
    """A global batch: learnable sequences, some labels ignored; documents that end anywhere on request."""
    samples, seq = config.global_batch_size(1), config.training.seq_length
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(0, VOCAB_SIZE, (samples, 1), generator=generator)
    tokens = (first + 3 * torch.arange(seq + 1)) % VOCAB_SIZE
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    batch = {"tokens": tokens[:, :-1], "labels": labels, "sample_index": torch.arange(samples) + samples * step}
    if documents:
        starts = torch.rand(samples, seq, generator=generator) < 0.2
        starts[:, 0] = True
        place = torch.arange(seq)
        batch["document_ids"] = starts.cumsum(1)
        batch["position_ids"] = place - torch.where(starts, place, 0).cummax(1).values
    return batch


def without_model(batch: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    """A batch without some of its fields."""
    return {name: value for name, value in batch.items() if name not in names}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Distance over the length of the second, both in Frobenius norm."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


class Outcome(NamedTuple):
    """How a run ended and what it printed."""

    code: int
    out: str
    err: str


def pretrain(argv: Sequence[str]) -> Outcome:
    """Runs `pretrain.py`'s main in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return Outcome(code, out.getvalue(), err.getvalue())


def recorded(file: Path, name: str) -> dict[int, float]:
    """One curve of a metrics file."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["iteration"]: line[name] for line in lines if name in line}


def saved_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    sizes = {key: tensor.size for key, tensor in read_metadata(path).state_dict_metadata.items()}
    state: dict[str, Any] = {key: torch.empty(size) for key, size in sizes.items()}
    dcp.load(state, checkpoint_id=str(path), no_dist=True)
    return state
