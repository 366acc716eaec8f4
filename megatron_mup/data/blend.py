"""Blends: several datasets in given proportions, in Megatron-LM's order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mup.config.errors import ConfigError
from megatron_mup.data.greedy import greedy_blend
from megatron_mup.data.index_cache import load_or_build
from megatron_mup.data.indexed_dataset import idx_path

SURPLUS = 0.005
MAX_DATASETS = 32766


class Dataset(Protocol):
    """What the loader reads: samples by number."""

    seq_length: int
    """Tokens per sample."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """One sample: tokens, labels, position_ids and document_ids, each [seq]."""
        ...


def parse_data_path(items: Sequence[str], flag: str = "--data-path") -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a data path.

    Args:
        items: prefixes, or weights and prefixes in turn.
        flag: name of the setting, for messages.

    Returns:
        Prefixes, and their weights as given; None where only prefixes were given.

    Raises:
        ConfigError: weights for some prefixes only, or a weight that is not a finite number above zero.
    """
    shown = f"{flag} {' '.join(items)}"
    pairs = [_as_float(item) for item in items[::2]]
    if len(items) % 2 or all(weight is None for weight in pairs):
        for item in items:
            if _as_float(item) is not None and not idx_path(item).exists():
                raise ConfigError(
                    shown, f"{item} looks like a weight, but weights and prefixes do not alternate", "e.g. 0.3 a 0.7 b"
                )
        return [item.strip() for item in items], None
    weights = []
    for item, weight in zip(items[::2], pairs, strict=True):
        if weight is None:
            raise ConfigError(shown, f"{item} stands where a weight is expected", "give every prefix a weight, or none")
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(shown, f"weight {item} is not a finite number above zero", "leave the dataset out")
        weights.append(weight)
    return [item.strip() for item in items[1::2]], weights


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def normalize(weights: Sequence[float]) -> NDArray[np.float64]:
    """Weights divided by their sum, in double precision."""
    array = np.asarray(weights, dtype=np.float64)
    return array / np.sum(array)


class BlendedDataset:
    """Samples of several datasets, interleaved so that each prefix of the order keeps the proportions.

    Args:
        datasets: the parts.
        weights: [datasets] shares.
        size: number of samples.
        cache: folder of the index cache; None keeps the index in memory.
    """

    def __init__(
        self, datasets: Sequence[Dataset], weights: Sequence[float], size: int, cache: Path | None = None
    ) -> None:
        """Builds the order, or finds it in the cache."""
        if len(datasets) > MAX_DATASETS:
            raise ConfigError(
                f"a blend of {len(datasets)} datasets", f"the limit is {MAX_DATASETS}", "tools/merge_datasets.py"
            )
        self.datasets = list(datasets)
        self.seq_length = self.datasets[0].seq_length
        shares = normalize(weights)
        arrays = load_or_build(
            cache,
            {"version": 1, "class": "BlendedDataset", "weights": [share.hex() for share in shares], "size": size},
            lambda: dict(zip(("dataset_index", "dataset_sample_index"), greedy_blend(shares, size), strict=True)),
        )
        self.dataset_index = arrays["dataset_index"]
        self.dataset_sample_index = arrays["dataset_sample_index"]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """One sample of one of the parts."""
        part = self.datasets[int(self.dataset_index[index])]
        # In very small blends the greedy order can ask a part for a sample more than it was built with.
        return part[int(self.dataset_sample_index[index]) % len(part)]


def build_blend(
    prefixes: Sequence[str],
    weights: Sequence[float] | None,
    num_samples: int,
    build: Callable[[str, int | None], Dataset],
    cache: Path | None,
) -> Dataset:
    """The dataset of one split: a single one, or a blend, with Megatron-LM's sizes.

    With weights w, part j is built for ``ceil(ceil(num_samples * w[j]) * 1.005)`` samples and the blend holds the sum
    of ``ceil(num_samples * w[j])``. Without, each part is one epoch long, the lengths are the weights, and the blend
    holds ``num_samples``; where that is more than one epoch of all parts, they repeat as if the lengths were given as
    weights (Megatron-LM runs out of data there).

    Args:
        prefixes: the parts.
        weights: their weights, or None.
        num_samples: samples the run needs.
        build: makes the dataset of one prefix for a number of samples (None: one epoch).
        cache: folder for the blend's index; None keeps it in memory.
    """
    if weights is None and len(prefixes) == 1:
        return build(prefixes[0], num_samples)
    if weights is None:
        parts = [build(prefix, None) for prefix in prefixes]
        lengths = [len(part) for part in parts]
        if num_samples <= sum(lengths):
            return BlendedDataset(parts, lengths, num_samples, cache)
        weights = lengths
    shares = normalize(weights)
    targets = [math.ceil(num_samples * share) for share in shares.tolist()]
    parts = [build(prefix, math.ceil(target * (1 + SURPLUS))) for prefix, target in zip(prefixes, targets, strict=True)]
    return BlendedDataset(parts, shares.tolist(), sum(targets), cache)
