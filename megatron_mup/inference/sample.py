"""Sampling with a key/value cache: many texts at once, token by token as they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_mup.layers.cache import KeyValueCache
from megatron_mup.models.gpt import GPT

Logits = Callable[[torch.Tensor, KeyValueCache], torch.Tensor]
"""Ids ``[batch, seq]`` and what was read before them to the logits of the last, ``[batch, vocab]``."""


def logits_of(model: GPT) -> Logits:
    """The function of a whole model in one process."""

    def last(ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        logits: torch.Tensor = model(ids, cache=cache)[-1]
        return logits

    return last


@torch.inference_mode()
def stream(
    logits: Logits,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    window: int,
    device: torch.device | str = "cpu",
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eod: int | None = None,
) -> Iterator[list[int | None]]:
    """Continues prompts together; yields each row's next token, None once the row has ended.

    Texts longer than ``window`` are cut at their front; from there on each token reads the window anew.

    Args:
        logits: the model.
        prompts: token ids, at least one each.
        max_tokens: tokens to add at most.
        window: tokens that the model can read, the training length.
        device: where the model lives.
        temperature: divisor of the logits; 0 takes the likeliest token.
        top_p: share of probability from which is drawn, likeliest tokens first (Holtzman et al., arXiv 1904.09751).
        seed: of the draws of the first row; each row has the next.
        eod: id that ends a text; it is not yielded.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt holds no token")
    # Drawn on the host, so that a seed means the same on every device.
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    rows = [list(prompt) for prompt in prompts]
    live = [True] * len(rows)
    capacity = min(window, max(map(len, rows)) + max_tokens)
    cache: KeyValueCache | None = None
    for _ in range(max_tokens):
        if cache is None or cache.filled == cache.length:
            width = min(window, max(map(len, rows)))
            shown = [row[-width:] for row in rows]
            cache = KeyValueCache(torch.tensor([width - len(row) for row in shown], device=device), capacity)
            ids = torch.tensor([[0] * (width - len(row)) + row for row in shown], device=device)
        else:
            ids = torch.tensor([row[-1:] for row in rows], device=device)
        scores = logits(ids, cache).float().cpu()
        tokens = [draw(scores[i], temperature, top_p, generators[i]) if live[i] else 0 for i in range(len(rows))]
        live = [is_live and token != eod for is_live, token in zip(live, tokens, strict=True)]
        if not any(live):
            return
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        yield [token if is_live else None for is_live, token in zip(live, tokens, strict=True)]


def sample(
    model: GPT,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eod: int | None = None,
) -> list[int]:
    """The new ids of one continued prompt; arguments as in `stream`.

    Args:
        model: whole, in evaluation mode.
    """
    steps = stream(
        logits_of(model),
        [prompt],
        max_tokens,
        window=model.config.training.seq_length,
        device=next(model.parameters()).device,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eod=eod,
    )
    return [token for (token,) in steps if token is not None]


def draw(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id from logits ``[vocab]``, see `stream`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    # The token that crosses the share belongs to it; the first always does.
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[0] = False
    return int(ids[torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)])
