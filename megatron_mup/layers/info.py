"""What every transformer layer is told about the tokens it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

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


class TokenInfo(NamedTuple):
    """Facts about a micro-batch, computed once per pipeline stage.

    Attributes:
        cos, sin: rotary angles ``[seq (/ cp), batch or 1, rotated width]``, or None without RoPE.
        mask: ``[batch or 1, 1, seq (/ cp), seq]`` bool, True where a query may attend to a key; None for plain causal
            attention, and where context-parallel ranks form a ring.
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
