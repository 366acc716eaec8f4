"""A checkpoint of any layout as whole tensors, read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_mup.checkpoint.dcp import read_tensor
from megatron_mup.checkpoint.load import find, open_checkpoint
from megatron_mup.checkpoint.manifest import Manifest
from megatron_mup.checkpoint.state import MODEL
from megatron_mup.config import Config, ConfigError, ParallelConfig, from_dict
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parametrization.meta import ParamMeta


@dataclass(frozen=True)
class SavedModel:
    """The model in a checkpoint.

    Attributes:
        path: the checkpoint's folder.
        manifest: its facts.
        config: the run's configuration, for one process.
        metas: facts of every parameter, by name.
    """

    path: Path
    manifest: Manifest
    config: Config
    metas: Mapping[str, ParamMeta]
    _metadata: Metadata

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        assert self.config.model.vocab_size is not None
        return self.config.model.vocab_size

    def tensor(self, name: str) -> torch.Tensor:
        """Value of a parameter, or of a buffer by its name, in the precision in which it was saved."""
        return read_tensor(self.path, self._metadata, self._key(name))

    def dtype(self, name: str) -> torch.dtype:
        """The precision in which a parameter was saved."""
        dtype = self._metadata.state_dict_metadata[self._key(name)].properties.dtype  # type: ignore[union-attr]
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _key(self, name: str) -> str:
        meta = self.metas.get(name)
        return f"{MODEL}/{(meta.tied_to if meta else None) or name}"


def open_model(folder: str | Path, step: int | None = None) -> SavedModel:
    """Opens the model of a checkpoint without reading its tensors.

    Args:
        folder: what ``--save`` named.
        step: iteration; default: the latest.

    Raises:
        ConfigError: no checkpoint, or a damaged one.
    """
    path = find(folder, step)
    if path is None:
        raise ConfigError(f"--load {folder}", "holds no checkpoint", "give the folder that --save named")
    manifest, metadata = open_checkpoint(path)
    config = alone(from_dict(manifest.config, str(path)))
    assert config.model.vocab_size is not None
    metas = {meta.name: meta for meta in parameter_metas(config, config.model.vocab_size)}
    return SavedModel(path, manifest, config, metas, metadata)


def alone(config: Config) -> Config:
    """The same model on one rank, with nothing recomputed, PyTorch's products and norms, attention that takes any mask,
    and room for every token."""
    training = replace(
        config.training,
        recompute_granularity="none",
        recompute_activations=False,
        transformer_impl="local",
        norm_impl="native",
        attention_backend="unfused" if config.training.attention_backend == "unfused" else "auto",
    )
    moe = replace(config.moe, moe_expert_capacity_factor=None, moe_pad_expert_input_to_capacity=False)
    return replace(config, parallel=ParallelConfig(), training=training, moe=moe)
