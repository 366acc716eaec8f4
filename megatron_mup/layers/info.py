"""What every transformer layer is told about the tokens it sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from megatron_mup.kernels.segments import Segments
from megatron_mup.layers.cache import KeyValueCache
from megatron_mup.parallel.mesh import ContextAxis


def attention_mask(
    queries: torch.Tensor, keys: torch.Tensor, document_ids: torch.Tensor | None = None, window: int | None = None
) -> torch.Tensor:
    """Causal attention between places of a sequence, inside each document and to a few tokens back if asked.

    Args:
        queries, keys: ``[queries]`` and ``[keys]``, places in the sequence.
        document_ids: ``[batch, seq]``, of the whole sequence, equal for tokens of one document.
        window: how many tokens before itself a token may attend to.

    Returns:
        ``[batch or 1, 1, queries, keys]`` bool, True where a query may attend to a key.
    """
    back = queries[:, None] - keys
    mask = (back >= 0)[None]
    if window is not None:
        mask = mask & (back <= window)
    if document_ids is not None:
        mask = mask & (document_ids[:, queries, None] == document_ids[:, None, keys])
    return mask.unsqueeze(1)


@dataclass(frozen=True)
class Documents:
    """Documents of a micro-batch, counted.

    Attributes:
        numbers: ``[batch, seq]``, number of each token's document, rising over the sequence and then over samples.
        count: of the documents.
        longest: length of the longest one.
    """

    numbers: torch.Tensor
    count: int
    longest: int

    @classmethod
    def of(cls, document_ids: torch.Tensor) -> Documents:
        """From ids ``[batch, seq]``, equal for neighbours of one document. Waits for the device, once."""
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        numbers = starts.flatten().cumsum(0) - 1
        place = torch.arange(document_ids.shape[1], device=document_ids.device)
        within = place - torch.where(starts, place, 0).cummax(1).values
        count, longest = torch.stack([numbers[-1] + 1, within.max() + 1]).tolist()
        return cls(numbers.view_as(document_ids), count, longest)


@dataclass(frozen=True)
class Context:
    """How context-parallel ranks share the sequences of a micro-batch.

    Attributes:
        axis: these ranks.
        ring: whether keys and values travel around a ring; if not, they are gathered.
        places: ``[ranks, seq / ranks]``, places in the sequence of each rank's tokens, rising.
        document_ids: ``[batch, seq]`` of the whole sequences where attention stays inside documents.
        window: see `attention_mask`.
    """

    axis: ContextAxis
    ring: bool
    places: torch.Tensor
    document_ids: torch.Tensor | None = None
    window: int | None = None

    @property
    def seq(self) -> int:
        """Length of the whole sequence."""
        return self.places.numel()

    @property
    def here(self) -> torch.Tensor:
        """Places of this rank's tokens."""
        return self.places[self.axis.rank]

    @property
    def masked(self) -> bool:
        """Whether attention is more than causal."""
        return self.document_ids is not None or self.window is not None

    def mask(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """`attention_mask` between places."""
        return attention_mask(queries, keys, self.document_ids, self.window)

    @cached_property
    def mask_here(self) -> torch.Tensor:
        """`mask` between this rank's tokens and all: one for all layers."""
        return self.mask(self.here, torch.arange(self.seq, device=self.places.device))

    @cached_property
    def documents(self) -> Documents | None:
        """The documents, counted once for all layers; None where attention isn't kept inside them."""
        return None if self.document_ids is None else Documents.of(self.document_ids)

    def segments(self, batch: int, queries: torch.Tensor, keys: torch.Tensor, causal: bool) -> Segments:
        """Where documents, or else samples, lie among the tokens at these places, sample after sample.

        The last query of each must be at its last key, if ``causal``; the window is then minded too.
        """
        documents = self.documents
        if documents is None:
            numbers = torch.arange(batch, device=self.places.device)[:, None].expand(batch, self.seq)
            documents = Documents(numbers, batch, self.seq)
        rows, columns = (documents.numbers[:, places].flatten() for places in (queries, keys))
        window = self.window if causal else None
        return Segments.between(rows, columns, documents.count, documents.longest, causal, window)


class TokenInfo(NamedTuple):
    """Facts about a micro-batch, computed once per pipeline stage.

    Attributes:
        cos, sin: rotary angles ``[seq (/ cp), batch or 1, rotated width]``, or None without RoPE.
        mask: ``[batch or 1, 1, seq, seq]`` bool, True where a query may attend to a key; None for plain causal
            attention, and where context-parallel ranks share the sequence (`Context.mask`).
        sample_index: ``[batch]`` running number of each sample in the run; the counter that dropout draws from. None
            without dropout.
        cache: what was read before, when generating.
        places: ``[seq (/ cp) (/ tp)]`` places in the sequence of the rows of the residual stream, for dropout.
        context: how ranks share the sequences; None where they are whole.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    sample_index: torch.Tensor | None = None
    cache: KeyValueCache | None = None
    places: torch.Tensor | None = None
    context: Context | None = None
