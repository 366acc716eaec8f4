"""Pickles of others read without running their code: unknown classes become empty shells."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

_ALLOWED = {
    "argparse": {"Namespace"},
    "collections": {"OrderedDict", "defaultdict"},
    "_codecs": {"encode"},
    "builtins": {"set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "str", "bytes", "slice"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "device", *(name for name in dir(torch) if name.endswith("Storage"))},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


class Shell:
    """Stands for an object of a class that is not read."""

    def __new__(cls, *_arguments: Any, **_values: Any) -> Shell:
        """Takes any arguments."""
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_values: Any) -> None:
        """Keeps none of them."""

    def __setstate__(self, state: Any) -> None:
        """Keeps what can be looked at."""
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})


class Unpickler(pickle.Unpickler):
    """Builds tensors and plain values only."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is harmless; a shell otherwise."""
        if name in _ALLOWED.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        return Shell


def _load(file: IO[bytes], **options: Any) -> Any:
    return Unpickler(file, **options).load()


_MODULE = SimpleNamespace(Unpickler=Unpickler, load=_load, __name__="pickle")


def read_torch(file: Path) -> Any:
    """A file of ``torch.save``; its tensors stay on the disk until they are used."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False, pickle_module=_MODULE)


def read_pickle(file: Path) -> Any:
    """A plain pickle."""
    with open(file, "rb") as stream:
        return _load(stream)
