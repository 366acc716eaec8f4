"""Pieces to and from the files of torch.distributed.checkpoint (DCP): the one module that knows its interfaces.

The planners tell DCP where each shard lies from the piece's own offsets. DTensor would compute them again, and for an
empty shard it gives an index at which another rank's shard may begin, which DCP takes for a copy of the same shard.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_mup.checkpoint.agree import Alone, Group
from megatron_mup.checkpoint.state import Piece

METADATA_FILE = ".metadata"

ShapeDifference = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Key, global shape in the checkpoint, global shape here."""


class ShardError(Exception):
    """Reading or writing failed on a rank.

    Attributes:
        rank: the lowest rank on which it did.
        cause: what was raised there.
    """

    def __init__(self, rank: int, cause: BaseException) -> None:
        """Joins both to the message."""
        super().__init__(f"rank {rank}: {cause}")
        self.rank, self.cause = rank, cause


class MismatchError(Exception):
    """The checkpoint's tensors are not the model's: ``missing`` keys, ``unread`` keys, ``shapes`` that differ."""

    def __init__(self, missing: list[str], unread: list[str], shapes: list[ShapeDifference]) -> None:
        """Keeps all three as arguments, so that it crosses process boundaries whole."""
        super().__init__(missing, unread, shapes)
        self.missing, self.unread, self.shapes = missing, unread, shapes


def write(folder: Path, pieces: list[Piece], group: Group) -> None:
    """Writes the pieces of all ranks, each shard once, and syncs the files. Collective.

    Raises:
        ShardError: the same on all ranks.
    """
    with _same_error_everywhere():
        save({}, storage_writer=FileSystemWriter(folder), planner=_Save(pieces), **_ranks(group))


def read(folder: Path, metadata: Metadata, pieces: list[Piece], group: Group) -> None:
    """Fills the pieces of all ranks. Collective.

    Raises:
        ShardError: the same on all ranks; its cause is a `MismatchError` where keys or shapes don't fit, and then
            nothing has been filled.
    """
    with _same_error_everywhere():
        load({}, storage_reader=_Reader(folder, metadata), planner=_Load(pieces), **_ranks(group))


def _ranks(group: Group) -> dict[str, Any]:
    """The group in DCP's words."""
    return {"no_dist": True} if isinstance(group, Alone) else {"process_group": group}


def read_metadata(folder: Path) -> Metadata:
    """Shapes and places of the tensors in a checkpoint. It is a pickle: read it from folders that you trust."""
    return FileSystemReader(folder).read_metadata()


def read_tensor(folder: Path, metadata: Metadata, key: str) -> torch.Tensor:
    """One whole tensor of a checkpoint, in the precision in which it is stored. Not collective.

    Raises:
        KeyError: there is none of this name.
        ShardError: its file can't be read.
    """
    facts = metadata.state_dict_metadata[key]
    assert isinstance(facts, TensorStorageMetadata)
    state = {key: torch.empty(facts.size, dtype=facts.properties.dtype)}
    with _same_error_everywhere():
        load(state, storage_reader=_Reader(folder, metadata), no_dist=True)
    return state[key]


def chunk_of(piece: Piece) -> ChunkStorageMetadata:
    """Place of a piece in its global tensor."""
    return ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=piece.tensor.shape)


@contextmanager
def _same_error_everywhere() -> Iterator[None]:
    """Turns DCP's error, which carries every rank's, into one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank = min(error.failures)
        raise ShardError(rank, error.failures[rank][0]) from None


class _Save(DefaultSavePlanner):
    """Plans the writing of pieces. Shards that several ranks offer are dealt out by DCP, each to one of them."""

    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {(piece.key, piece.offsets): piece for piece in pieces if piece.is_saved}

    def create_local_plan(self) -> SavePlan:
        items = []
        for piece in self.pieces.values():
            data = TensorWriteData(
                chunk=chunk_of(piece),
                properties=TensorProperties.create_from_tensor(piece.tensor),
                size=torch.Size(piece.shape),
            )
            index = MetadataIndex(piece.key, torch.Size(piece.offsets))
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def lookup_object(self, index: MetadataIndex) -> Any:
        assert index.offset is not None
        return self.pieces[index.fqn, tuple(index.offset)].value()


class _Load(DefaultLoadPlanner):
    """Plans the reading of pieces; several pieces of a rank may have one key."""

    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shapes = {piece.key: piece.shape for piece in pieces}
        self.pieces: dict[str, list[Piece]] = {}
        for piece in pieces:
            if piece.tensor.numel():
                self.pieces.setdefault(piece.key, []).append(piece)

    def create_local_plan(self) -> LoadPlan:
        saved = self._saved()
        missing = [key for key in self.shapes if key not in saved]
        sizes = {key: tuple(saved[key].size) for key in self.shapes if key in saved}
        differ = [(key, size, self.shapes[key]) for key, size in sizes.items() if size != self.shapes[key]]
        if missing or differ:
            raise MismatchError(missing, [], differ)
        items = []
        for key, pieces in self.pieces.items():
            items += create_read_items_for_chunk_list(key, saved[key], [chunk_of(piece) for piece in pieces])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Refuses, on rank 0, a checkpoint that holds more than all ranks together ask for."""
        wanted = {item.dest_index.fqn for plan in global_plan for item in plan.items}
        parts = {key.partition("/")[0] for key in wanted}
        unread = [key for key in self._saved() if key.partition("/")[0] in parts and key not in wanted]
        if unread:
            raise MismatchError([], unread, [])
        return super().create_global_plan(global_plan)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        # The place in the list of chunks that the read items were made from.
        assert index.index is not None
        return self.pieces[index.fqn][index.index].tensor

    def _saved(self) -> dict[str, TensorStorageMetadata]:
        assert self.metadata is not None
        return self.metadata.state_dict_metadata  # type: ignore[return-value]


class _Reader(FileSystemReader):
    """Reads with metadata at hand: where only some ranks found the file, DCP would leave the others waiting."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata
