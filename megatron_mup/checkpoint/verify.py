"""Whether a checkpoint is what was written: its files by size and checksum, its tensors by their places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mup.checkpoint import files
from megatron_mup.checkpoint.load import open_checkpoint
from megatron_mup.config import ConfigError
from megatron_mup.progress import track


@dataclass(frozen=True)
class Verdict:
    """What was found of one checkpoint.

    Attributes:
        path: the checkpoint.
        problems: one sentence each; empty: it is good.
        checked: bytes whose checksum was compared.
    """

    path: Path
    problems: list[str]
    checked: int


def verify(path: Path) -> Verdict:
    """Reads a whole checkpoint and compares it with its manifest."""
    try:
        facts, metadata = open_checkpoint(path)
    except ConfigError as error:
        return Verdict(path, [f"{error.what}: {error.why}"], 0)
    problems = [
        problem
        for number in track(range(len(facts.checksums)), f"comparing {path.name}")
        if (problem := files.flipped(path, facts, number, len(facts.checksums)))
    ]
    if not facts.checksums:
        problems.append(f"{path}: it has no checksums; an older version saved it")
    problems += [f"{path}: {problem}" for problem in _gaps(metadata)]
    return Verdict(path, problems, sum(facts.files[name] for name in facts.checksums))


def verify_all(folder: Path) -> list[Verdict]:
    """Verdicts on the checkpoints of a folder, oldest first."""
    return [verify(path) for path in files.checkpoints(folder).values()]


def _gaps(metadata: Metadata) -> list[str]:
    """Tensors whose shards don't fill them."""
    return [
        f"{key} is not whole: its shards hold {held:,} of {size:,} elements"
        for key, facts in metadata.state_dict_metadata.items()
        if isinstance(facts, TensorStorageMetadata)
        and (held := sum(torch.Size(chunk.sizes).numel() for chunk in facts.chunks)) != (size := facts.size.numel())
    ]
