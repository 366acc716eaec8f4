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
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(?:_(\d\d\d))?")
_EXPERTS = re.compile(
    r"(?P<prefix>.*\.mlp\.experts)\.(?:local_experts\.(?P<module>\d+)\.(?P<layer>linear_fc[12])\.weight"
    r"|(?P<linear>linear_fc[12])\.weight(?P<number>\d+)|weight(?P<grouped>[12]))"
)
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

    def buffer(self, name: str, layer: int) -> torch.Tensor:
        """A tensor of a layer that is no parameter."""
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


def experts_of(meta: ParamMeta) -> list[str]:
    """The name of each expert's matrix in a parameter of experts, as this module calls it."""
    return [meta.name.replace(".experts.", f".experts.{number}.") for number in range(meta.experts or 0)]


class LegacyWeights:
    """``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt``: one file per tensor rank, stage and expert rank."""

    def __init__(self, path: Path) -> None:
        found = {
            tuple(int(number) for number in match.groups() if number is not None): read_torch(folder / LEGACY_FILE)
            for folder in sorted(path.iterdir())
            if (match := _RANK.fullmatch(folder.name))
        }
        first = next(iter(found.values()))
        self.arguments, self.iteration = first["args"], int(first["iteration"])
        tensor_ranks = {tp for tp, *_ in found}
        own = getattr(self.arguments, "expert_tensor_parallel_size", None)
        if getattr(self.arguments, "num_experts", None) and own not in (None, 1, len(tensor_ranks)):
            raise ConfigError(
                f"--load: --expert-tensor-parallel-size {own}",
                f"with {len(tensor_ranks)} tensor ranks, legacy files can't be put together here",
                "save as torch_dist, or with one of the two sizes",
            )
        # A second number is the stage's where there are stages, else the expert rank's.
        staged = getattr(self.arguments, "pipeline_model_parallel_size", max(map(len, found))) > 1
        self.ranks: dict[tuple[int, int, int], Any] = {}
        for (tp, *others), content in found.items():
            stage, expert_rank = ([*others, 0, 0] if staged else [0, *others, 0])[:2]
            self.ranks[tp, stage, expert_rank] = content

    @cached_property
    def _places(self) -> dict[str, list[tuple[int, torch.Tensor]]]:
        """Shards of each parameter by its name in the whole model, with their tensor ranks; each expert by itself."""
        stages = 1 + max(stage for _, stage, _ in self.ranks)
        chunks = sum(re.fullmatch(r"model\d+", key) is not None for key in next(iter(self.ranks.values()))) or 1
        found: dict[str, list[tuple[int, torch.Tensor]]] = {}
        first = 0
        # Interleaved stages hold chunks in turn: the first of each stage, then the second.
        for chunk in range(chunks):
            for stage in range(stages):
                layers = 0
                for (tp, _, expert_rank), content in ((r, c) for r, c in self.ranks.items() if r[1] == stage):
                    state = content["model" if chunks == 1 else f"model{chunk}"]
                    for name, value in state.items():
                        if not isinstance(value, torch.Tensor):
                            continue
                        match = re.match(r"decoder\.layers\.(\d+)\.", name)
                        if match:
                            layers = max(layers, 1 + int(match[1]))
                            name = f"decoder.layers.{first + int(match[1])}.{name[match.end() :]}"
                        for whole, part in legacy_parts(name, value, self.arguments, expert_rank):
                            found.setdefault(whole, []).append((tp, part))
                first += layers
        return found

    def tensor(self, meta: ParamMeta) -> torch.Tensor:
        """See `MegatronWeights`."""
        if meta.experts is not None:
            sharded = getattr(self.arguments, "expert_tensor_parallel_size", None) != 1
            dim = meta.tp_dim if sharded else None
            return torch.cat([self._joined([name], dim, is_gated(meta), meta) for name in experts_of(meta)])
        return self._joined(names_of(meta), meta.tp_dim, is_gated(meta), meta)

    def buffer(self, name: str, layer: int) -> torch.Tensor:
        """See `MegatronWeights`."""
        if name not in self._places:
            raise _missing(name)
        return self._places[name][0][1]

    def _joined(self, names: list[str], dim: int | None, gated: bool, meta: ParamMeta) -> torch.Tensor:
        """The shards of the first of these names that is there, whole again."""
        shards = next((self._places[name] for name in names if name in self._places), None)
        if shards is None:
            raise _missing(meta.name)
        # The last stage has a copy of a tied embedding; one value per tensor rank is enough.
        values = [value for _, value in sorted(dict(shards).items())]
        if dim is None:
            return values[0]
        if gated:
            halves = [value.chunk(2) for value in values]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(values, dim)


def legacy_parts(name: str, value: torch.Tensor, arguments: Any, expert_rank: int) -> list[tuple[str, torch.Tensor]]:
    """A tensor of a legacy file under the name it has in the whole model; several where it holds several experts.

    Megatron-LM's classes of experts: one module each (``local_experts.N``), Transformer Engine's grouped linear layer
    (``weightN``), and the older grouped product, whose ``weight1`` and ``weight2`` are the experts' matrices one after
    the other, each ``[in, out]``.
    """
    if (match := _EXPERTS.fullmatch(name)) is None:
        return [(name, value)]
    here = arguments.num_experts // getattr(arguments, "expert_model_parallel_size", 1)
    first, prefix = expert_rank * here, match["prefix"]
    if match["grouped"] is not None:
        layer = f"linear_fc{match['grouped']}"
        shape = (here, arguments.hidden_size, -1) if match["grouped"] == "1" else (here, -1, arguments.hidden_size)
        return [
            (f"{prefix}.{first + number}.{layer}.weight", matrix.T) for number, matrix in enumerate(value.view(shape))
        ]
    number, layer = (match["module"], match["layer"]) if match["module"] else (match["number"], match["linear"])
    return [(f"{prefix}.{first + int(number)}.{layer}.weight", value)]


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
            # The experts of a layer are one tensor, behind a name of their module's and one of their own.
            stacked = name if meta.experts is None else name.replace(".experts.", ".experts.experts.")
            if (value := self._whole(stacked, meta.layer)) is not None:
                return value if meta.experts is None else value.flatten(0, 1)
        apart = [self._whole(name.replace(".experts.", ".experts.experts."), meta.layer) for name in experts_of(meta)]
        values = [value for value in apart if value is not None]
        if not values or len(values) < len(apart):
            raise _missing(meta.name)
        return torch.cat(values)

    def buffer(self, name: str, layer: int) -> torch.Tensor:
        """See `MegatronWeights`."""
        value = self._one(name, layer)
        if value is None:
            raise _missing(name)
        return value

    def _whole(self, name: str, layer: int | None) -> torch.Tensor | None:
        """A tensor; gate above up where they are two."""
        if (value := self._one(name, layer)) is not None:
            return value
        gate, up = (self._one(f"{name}_{part}", layer) for part in "wv")
        return None if gate is None or up is None else torch.cat([gate, up])

    def _one(self, name: str, layer: int | None) -> torch.Tensor | None:
        """A tensor under its name, or a layer's of one that stacks all layers."""
        for key, index in ((name, None), (re.sub(r"\.layers\.\d+\.", ".layers.", name), layer)):
            facts = self._metadata.state_dict_metadata.get(key)
            if isinstance(facts, TensorStorageMetadata):
                return self._read(key, facts, index)
        return None

    def _read(self, key: str, facts: TensorStorageMetadata, layer: int | None) -> torch.Tensor:
        """A tensor; of one that stacks all layers, a layer's."""
        shape, first = tuple(facts.size), (0,) * len(facts.size)
        wanted = shape
        if layer is not None:
            wanted, first = (1, *shape[1:]), (layer, *first[1:])
        value = torch.empty(wanted, dtype=facts.properties.dtype)
        read(self.path, self._metadata, [Piece(key, value, shape, first)], None)
        return value if layer is None else value[0]


def _missing(name: str) -> ConfigError:
    return ConfigError(name, "is missing in the checkpoint", "convert another one, or restore its files")
