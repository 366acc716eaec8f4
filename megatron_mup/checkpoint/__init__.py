"""Checkpoints: saved all or nothing, found again, loaded into any layout. docs/checkpoints.md says how."""

from megatron_mup.checkpoint.compare import compare_configs, told_differences
from megatron_mup.checkpoint.load import find, load, load_rng
from megatron_mup.checkpoint.manifest import Manifest, layout_sizes, read_manifest
from megatron_mup.checkpoint.save import clean, save
from megatron_mup.checkpoint.state import Piece, checkpoint_pieces

__all__ = [
    "Manifest",
    "Piece",
    "checkpoint_pieces",
    "clean",
    "compare_configs",
    "find",
    "layout_sizes",
    "load",
    "load_rng",
    "read_manifest",
    "save",
    "told_differences",
]
