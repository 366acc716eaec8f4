"""The readable half of a checkpoint: what it is, of which run, and which files belong to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from megatron_mup import __version__
from megatron_mup.checkpoint.agree import reason
from megatron_mup.config import ConfigError
from megatron_mup.parallel.mesh import AXES, EXPERT_AXES, Mesh

FORMAT_VERSION = 1
FILE = "manifest.json"


def layout_sizes(mesh: Mesh) -> dict[str, int]:
    """Ranks along each axis of the mesh."""
    expert_axes = EXPERT_AXES if mesh.experts is not None else ()
    sizes = {axis: mesh.size(axis) for axis in (*AXES, *expert_axes)}
    # Checkpoints of versions that had no such axis are of the same layout.
    return {axis: size for axis, size in sizes.items() if axis != "etp" or size > 1}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of ``manifest.json``, of JSON's types only.

    Attributes:
        iteration: optimizer steps done.
        consumed_samples: training samples consumed.
        config: settings by section, as `config.to_dict` gives them, with the true vocabulary size.
        parametrization: rows of the parametrization table.
        optimizer: the optimizer's scalars.
        layout: ranks along each axis (`layout_sizes`).
        extra: whatever else a run wants to find again.
        files: name to size in bytes, of every other file of the checkpoint; set when it is saved.
        checksums: name to CRC-32 in hexadecimal of the same files; empty in checkpoints of versions that made none.
        versions: of the programs that wrote it.
        format_version: of this layout of files.
    """

    iteration: int
    consumed_samples: int
    config: Mapping[str, Any]
    parametrization: list[dict[str, Any]]
    layout: Mapping[str, int]
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(
        default_factory=lambda: {"torch": torch.__version__, "megatron_mup": __version__}
    )
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """As the file's text."""
        values = asdict(self)
        return json.dumps({"format_version": values.pop("format_version"), **values}, indent=1) + "\n"


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the checkpoint folder ``path``.

    Raises:
        ConfigError: the file is missing, no JSON, of another format version or without a field.
    """
    file = Path(path) / FILE
    other = "load another checkpoint (--ckpt-step), or restore the file"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(file), "missing, so this is no complete checkpoint", other) from None
    except OSError as error:
        raise ConfigError(str(file), f"can't be read: {reason(error)}", other) from None
    except ValueError as error:
        raise ConfigError(str(file), f"not readable as JSON: {error}", other) from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(
            str(file),
            f"has format version {version!r}; this megatron_mup {__version__} reads version {FORMAT_VERSION}",
            "load it with the megatron_mup that wrote it",
        )
    known = {f.name for f in fields(Manifest)}
    values.setdefault("checksums", {})
    missing = known - set(values)
    if missing or not isinstance(values["files"], dict):
        raise ConfigError(str(file), f"lacks {', '.join(sorted(missing)) or 'its list of files'}", other)
    return Manifest(**{name: values[name] for name in known})
