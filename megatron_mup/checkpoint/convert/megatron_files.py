"""Weights in Megatron-LM's checkpoints, whole tensor by whole tensor: legacy ``torch`` and ``torch_dist``."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mup.checkpoint.agree import reason
from megatron_mup.checkpoint.convert.pickles import read_pickle, read_torch
from megatron_mup.checkpoint.dcp import METADATA_FILE, read
from megatron_mup.checkpoint.files import POINTER, folder_name
from megatron_mup.checkpoint.state import Piece
from megatron_mup.config import ConfigError
from megatron_mup.parametrization.meta import ParamMeta

LEGACY_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
# Transformer Engine keeps a norm in the linear layer behind it.
_FUSED_NORMS = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_",
}


class MegatronWeights(Protocol):
    """The model of a checkpoint.

    Attributes:
        arguments: the run's command line, as Megatron stores it.
        iteration: optimizer steps done.
    """

    arguments: Any
    iteration: int

    def tensor(self, meta: ParamMeta) -> torch.Tensor:
        """The whole of a parameter, in Megatron's storage: gate above up, vocabulary padded."""
        ...


def open_megatron(folder: Path) -> MegatronWeights:
    """Opens the latest checkpoint of a folder, or the folder itself.

    Raises:
        ConfigError: there is none, or it is of another kind.
    """
    path = folder
    pointer = folder / POINTER
    if pointer.is_file():
        latest = pointer.read_text(encoding="utf-8").strip()
        path = folder / (folder_name(int(latest)) if latest.isdecimal() else latest)
    try:
        if (path / METADATA_FILE).is_file() and (path / "common.pt").is_file():
            return DistWeights(path)
        if any(_RANK.fullmatch(rank.name) for rank in path.iterdir()):
            return LegacyWeights(path)
    except OSError as error:
        raise ConfigError(f"--load {folder}", f"can't be read: {reason(error)}", "correct the path") from None
    raise ConfigError(
        f"--load {folder}",
        "holds no checkpoint of Megatron-LM in the formats torch and torch_dist",
        "give the folder that Megatron's --save named",
    )


def names_of(meta: ParamMeta) -> list[str]:
    """Names that a parameter may have in Megatron-LM."""
    names = [meta.name]
    if meta.layer is not None:
        prefix = f"decoder.layers.{meta.layer}."
        module, _, part = meta.name.removeprefix(prefix).rpartition(".")
        if module in _FUSED_NORMS:
            names.append(f"{prefix}{_FUSED_NORMS[module]}{part}")
    return names


def is_gated(meta: ParamMeta) -> bool:
    """Whether a weight, or a bias by its length, holds gate and up."""
    return any(block.name == "gate" for block in meta.blocks)


class LegacyWeights:
    """``mp_rank_TT[_PPP]/model_optim_rng.pt``: one file per tensor rank and stage."""

    def __init__(self, path: Path) -> None:
        self.ranks: dict[tuple[int, int], Any] = {}
        for folder in sorted(path.iterdir()):
            match = _RANK.fullmatch(folder.name)
            if match:
                self.ranks[int(match[1]), int(match[2] or 0)] = read_torch(folder / LEGACY_FILE)
        first = self.ranks[0, 0]
        self.arguments, self.iteration = first["args"], int(first["iteration"])

    @cached_property
    def _places(self) -> dict[str, list[tuple[int, torch.Tensor]]]:
        """Shards of each parameter by its name in the whole model, with their tensor ranks."""
        stages = 1 + max(stage for _, stage in self.ranks)
        chunks = sum(re.fullmatch(r"model\d+", key) is not None for key in self.ranks[0, 0]) or 1
        found: dict[str, list[tuple[int, torch.Tensor]]] = {}
        first = 0
        # Interleaved stages hold chunks in turn: the first of each stage, then the second.
        for chunk in range(chunks):
            for stage in range(stages):
                layers = 0
                for tp in range(1 + max(tp for tp, _ in self.ranks)):
                    state = self.ranks[tp, stage]["model" if chunks == 1 else f"model{chunk}"]
                    for name, value in state.items():
                        if not isinstance(value, torch.Tensor):
                            continue
                        match = re.match(r"decoder\.layers\.(\d+)\.", name)
                        if match:
                            layers = max(layers, 1 + int(match[1]))
                            name = f"decoder.layers.{first + int(match[1])}.{name[match.end() :]}"
                        found.setdefault(name, []).append((tp, value))
                first += layers
        return found

    def tensor(self, meta: ParamMeta) -> torch.Tensor:
        """See `MegatronWeights`."""
        shards = next((self._places[name] for name in names_of(meta) if name in self._places), None)
        if shards is None:
            raise _missing(meta)
        # The last stage has a copy of a tied embedding; one value per tensor rank is enough.
        values = list(dict(shards).values())
        if meta.tp_dim is None:
            return values[0]
        if is_gated(meta):
            halves = [value.chunk(2) for value in values]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(values, meta.tp_dim)


class DistWeights:
    """``.metadata`` and ``.distcp`` files of torch.distributed.checkpoint, with ``common.pt`` beside them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        common, facts = read_torch(path / "common.pt"), read_pickle(path / METADATA_FILE)
        self.arguments, self.iteration = common["args"], int(common["iteration"])
        # Megatron may store a class of its own with more in it.
        self._metadata = Metadata(facts.state_dict_metadata, storage_data=facts.storage_data)

    def tensor(self, meta: ParamMeta) -> torch.Tensor:
        """See `MegatronWeights`."""
        for name in names_of(meta):
            for key, layer in ((name, None), (re.sub(r"\.layers\.\d+\.", ".layers.", name), meta.layer)):
                facts = self._metadata.state_dict_metadata.get(key)
                if isinstance(facts, TensorStorageMetadata):
                    return self._read(key, facts, layer)
        raise _missing(meta)

    def _read(self, key: str, facts: TensorStorageMetadata, layer: int | None) -> torch.Tensor:
        """A tensor; of one that stacks all layers, a layer's."""
        shape, first = tuple(facts.size), (0,) * len(facts.size)
        wanted = shape
        if layer is not None:
            wanted, first = (1, *shape[1:]), (layer, *first[1:])
        value = torch.empty(wanted, dtype=facts.properties.dtype)
        read(self.path, self._metadata, [Piece(key, value, shape, first)], None)
        return value if layer is None else value[0]


def _missing(meta: ParamMeta) -> ConfigError:
    return ConfigError(meta.name, "is missing in the checkpoint", "convert another one, or restore its files")
