"""Weights in Hugging Face's files (safetensors), read tensor by tensor and written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mup.checkpoint.agree import reason
from megatron_mup.config import ConfigError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def hf_library(name: str) -> Any:
    """A package of the extra ``hf``, imported when it is first needed.

    Raises:
        ConfigError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            "conversion", f"the package {name.partition('.')[0]} is not installed", "pip install 'megatron-mup[hf]'"
        ) from None


class HFWeights:
    """The tensors in a model folder.

    Args:
        folder: holds ``model.safetensors``, or several files with an index.

    Raises:
        ConfigError: there are none, or the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = hf_library("safetensors").safe_open
        try:
            if (folder / INDEX).exists():
                self.files: Mapping[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            else:
                with self._file(FILE) as file:
                    self.files = dict.fromkeys(file.keys(), FILE)
        except FileNotFoundError:
            raise ConfigError(
                f"--load {folder}",
                f"holds neither {FILE} nor {INDEX}",
                "save it in this format: model.save_pretrained(FOLDER)",
            ) from None
        except Exception as error:
            raise ConfigError(f"--load {folder}", f"can't be read: {reason(error)}", "restore its files") from None

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, in the precision in which it is stored."""
        try:
            with self._file(self.files[name]) as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except Exception as error:
            raise ConfigError(
                str(self.folder / self.files[name]), f"{name} can't be read: {reason(error)}", "restore the file"
            ) from None

    def facts(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and precision of a tensor, without reading it."""
        with self._file(self.files[name]) as file:
            part = file.get_slice(name)
            first = part[tuple(slice(0, 1) for _ in part.get_shape())]
            return tuple(part.get_shape()), first.dtype

    def _file(self, name: str) -> Any:
        return self._open(str(self.folder / name), framework="pt", device="cpu")


@dataclass(frozen=True)
class Planned:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    folder: Path, planned: list[Planned], tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> None:
    """Writes a model's weights; at most one shard is in memory.

    Args:
        folder: where to.
        planned: what will come.
        tensors: names and values in the same order.
        shard_bytes: size of a file, unless one tensor alone is larger.
    """
    save_file = hf_library("safetensors.torch").save_file
    shards = _shards(planned, shard_bytes)
    values = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        state = {}
        for plan, (key, value) in zip(shard, _take(values, len(shard)), strict=True):
            if (plan.name, plan.shape, plan.dtype) != (key, tuple(value.shape), value.dtype):
                raise ValueError(f"{key} is not what was planned: {plan}")
            state[key] = value.contiguous()
        save_file(state, str(folder / name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(p.size for p in planned)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(planned: list[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for plan in planned:
        if shards[-1] and filled + plan.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(plan)
        filled += plan.size
    return shards


def _take(values: Iterator[tuple[str, torch.Tensor]], count: int) -> Iterator[tuple[str, torch.Tensor]]:
    for _ in range(count):
        yield next(values)
