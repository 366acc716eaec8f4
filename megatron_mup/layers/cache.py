"""Keys and values of the tokens that a model has read, so that generating reads each token once."""

from __future__ import annotations

import torch
from torch import nn


class KeyValueCache:
    """A growing text per row of a batch, all of one length; shorter rows start late (padding on the left).

    Args:
        starts: ``[batch]`` place of each row's first token.
        length: tokens that it can take, padding included.

    Attributes:
        filled: tokens taken.
    """

    def __init__(self, starts: torch.Tensor, length: int) -> None:
        self.starts, self.length, self.filled = starts, length, 0
        self._stored: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def positions(self, seq: int) -> torch.Tensor:
        """Positions of the next ``seq`` tokens, ``[seq, batch]``; padding has position 0."""
        places = torch.arange(self.filled, self.filled + seq, device=self.starts.device)
        return (places[:, None] - self.starts).clamp(min=0)

    def mask(self, seq: int, window: int | None = None) -> torch.Tensor:
        """Which of all tokens the next ``seq`` may attend to, ``[batch, 1, seq, filled + seq]`` bool.

        Causal, inside the window if there is one, not to padding; padding attends to itself, for a softmax over
        nothing is not a number.
        """
        keys = torch.arange(self.filled + seq, device=self.starts.device)
        queries = keys[self.filled :, None]
        allowed = (keys <= queries) & (keys >= self.starts[:, None, None])
        if window is not None:
            allowed &= queries - keys <= window
        return (allowed | (keys == queries))[:, None]

    def extend(self, layer: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes a layer's new keys and values ``[batch, groups, seq, width of each]``; returns all that it has."""
        if layer not in self._stored:
            whole = [t.new_empty(*t.shape[:2], self.length, t.shape[3]) for t in (key, value)]
            self._stored[layer] = whole[0], whole[1]
        end = self.filled + key.shape[2]
        keys, values = self._stored[layer]
        keys[:, :, self.filled : end], values[:, :, self.filled : end] = key, value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, seq: int) -> None:
        """Says that all layers have taken ``seq`` tokens."""
        self.filled += seq
