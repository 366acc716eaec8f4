"""Megatron-LM's greedy blend order, computed in vectorised NumPy with exactly the result of its loop.

The definition: sample i comes from the dataset j with the largest ``w[j] * max(i, 1) - count[j]`` (double precision,
the lowest j on ties), where ``count[j]`` is how often j was taken before. Each step needs the counts of the step
before, so the loop cannot be vectorised over samples directly.

But the greedy rule forgets: it is error diffusion with a constant input, whose states settle into one trajectory
whatever valid state they start from. So the samples are cut into equal stretches ("lanes") that run side by side, each
from a guess of the counts at its start. Then every lane whose start differs from the end of the lane before runs again
from there, until it meets what it wrote earlier. When no lane differs, the result is the loop's, step by step: nothing
rests on the guess but the time it takes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_STATE = 1 << 15  # counts over all lanes, about what a core's cache holds


def greedy_blend(weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Order in which a blend takes its datasets.

    Args:
        weights: [datasets] shares, normalised.
        size: number of samples.

    Returns:
        [size] dataset of each sample and [size] number of the sample within its dataset.
    """
    weights = np.asarray(weights, dtype=np.float64)
    # Steps between comparisons with the earlier run. More for many datasets, to bound the memory of ``states``.
    steps = 256 * math.ceil(len(weights) / 64)
    lanes = max(1, min(4096, _STATE // len(weights), size // (4 * steps)))
    chunks = max(1, math.ceil(size / (lanes * steps)))
    span = chunks * steps
    picks = np.empty((lanes, span), dtype=np.int16)
    # states[c, l]: counts at the start of chunk c of lane l; the last row is the end of the lane
    states = np.zeros((chunks + 1, lanes, len(weights)), dtype=np.float64)
    states[0] = _guess(weights, np.arange(lanes) * span)
    active = np.arange(lanes)
    first_run = True
    while len(active):
        lane, counts = active, states[0, active]
        for chunk in range(chunks):
            begin = chunk * steps
            picks[lane, begin : begin + steps] = _advance(weights, counts, lane * span + begin, steps)
            if not first_run:
                moved = (states[chunk + 1, lane] != counts).any(axis=1)
                lane, counts = lane[moved], counts[moved]
                if not len(lane):
                    break
            states[chunk + 1, lane] = counts
        first_run = False
        active = 1 + np.flatnonzero((states[0, 1:] != states[-1, :-1]).any(axis=1))
        states[0, active] = states[-1, active - 1]
    dataset_index = picks.reshape(-1)[:size]
    return dataset_index, _running_counts(dataset_index, len(weights))


def _advance(
    weights: NDArray[np.float64], counts: NDArray[np.float64], start: NDArray[np.int64], steps: int
) -> NDArray[np.int16]:
    """Runs greedy steps in each lane; updates ``counts`` [lanes, datasets] in place; returns picks [lanes, steps]."""
    lanes = np.arange(len(counts))
    taken = np.empty((steps, len(counts)), dtype=np.int16)
    error = np.empty_like(counts)
    position = start.astype(np.float64)[:, None]
    flat, rows = counts.reshape(-1), lanes * counts.shape[1]
    for step in range(steps):
        np.multiply(weights, np.maximum(position, 1.0), out=error)
        error -= counts
        pick = error.argmax(axis=1)
        taken[step] = pick
        flat[rows + pick] += 1.0
        position += 1.0
    return taken.T


def _guess(weights: NDArray[np.float64], start: NDArray[np.int64]) -> NDArray[np.float64]:
    """Counts near ``weights * start`` that sum to ``start``: [lanes, datasets], by largest remainder."""
    ideal = start[:, None] * weights
    counts: NDArray[np.float64] = np.floor(ideal)
    missing = start - counts.sum(axis=1).astype(np.int64)
    order = np.argsort(-(ideal - counts), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(len(weights))[None, :], axis=1)
    counts += rank < missing[:, None]
    return counts


def _running_counts(dataset_index: NDArray[np.int16], datasets: int) -> NDArray[np.int64]:
    """For each entry, how often its value came before it."""
    result = np.empty(len(dataset_index), dtype=np.int64)
    counts = np.zeros(datasets, dtype=np.int64)
    block = 1 << 20
    for start in range(0, len(dataset_index), block):
        part = dataset_index[start : start + block]
        order = np.argsort(part, kind="stable")
        sizes = np.bincount(part, minlength=datasets)
        firsts = np.cumsum(sizes) - sizes
        result[start + order] = np.arange(len(part)) + np.repeat(counts - firsts, sizes)
        counts += sizes
    return result
