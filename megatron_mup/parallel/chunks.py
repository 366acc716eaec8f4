"""How a dimension is cut into chunks, and a parameter into shards."""

from __future__ import annotations

from megatron_mup.parametrization.meta import ParamMeta


def chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """Offset and length of one of ``parts`` chunks of ``ceil(length / parts)``; the last ones may be short or empty."""
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)


def shard_bounds(
    meta: ParamMeta, cuts: int, cut_rank: int, shards: int, shard_rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and shape of one rank's shard of a parameter.

    Args:
        meta: the parameter.
        cuts, cut_rank: tensor-parallel ranks (expert-parallel ones for experts), and the one in question.
        shards, shard_rank: data shards, and the one in question.
    """
    offsets, local = [0] * len(meta.shape), list(meta.shape)
    if meta.cut_dim is not None:
        offsets[meta.cut_dim], local[meta.cut_dim] = chunk(local[meta.cut_dim], cuts, cut_rank)
    start, local[0] = chunk(local[0], shards, shard_rank)
    offsets[0] += start
    return tuple(offsets), tuple(local)
