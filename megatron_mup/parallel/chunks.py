"""How a dimension is cut into chunks, and a parameter into shards."""

from __future__ import annotations

from megatron_mup.parametrization.meta import ParamMeta


def chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """Offset and length of one of ``parts`` chunks of ``ceil(length / parts)``; the last ones may be short or empty."""
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)


def shard_bounds(
    meta: ParamMeta, cuts: int, cut_rank: int, shards: int, shard_rank: int, parts: int = 1, part: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and shape of one rank's shard of a parameter.

    Args:
        meta: the parameter.
        cuts, cut_rank: tensor-parallel ranks (expert-parallel ones for experts), and the one in question.
        shards, shard_rank: data shards, and the one in question.
        parts, part: expert tensor-parallel ranks, and the one in question; they share experts alone. Where they share
            rows, the shard's rows are runs of `expert_runs`, and the offset is that of the first.
    """
    offsets, local = [0] * len(meta.shape), list(meta.shape)
    if meta.cut_dim is not None:
        offsets[meta.cut_dim], local[meta.cut_dim] = chunk(local[meta.cut_dim], cuts, cut_rank)
    if meta.experts is not None and parts > 1:
        if meta.tp_dim == 0:
            local[0] //= parts
        else:
            offsets[1], local[1] = chunk(local[1], parts, part)
    start, local[0] = chunk(local[0], shards, shard_rank)
    if splits_rows(meta, parts):
        runs = expert_runs(meta, start, min(1, local[0]), parts, part)
        start = runs[0][0] if runs else 0
    offsets[0] += start
    return tuple(offsets), tuple(local)


def splits_rows(meta: ParamMeta, parts: int) -> bool:
    """Whether ``parts`` expert tensor-parallel ranks share the rows of each expert's matrix."""
    return meta.experts is not None and parts > 1 and meta.tp_dim == 0


def expert_runs(meta: ParamMeta, start: int, length: int, parts: int, part: int) -> list[tuple[int, int]]:
    """Rows that one of ``parts`` ranks has of experts whose rows they share: an equal run of each block.

    Args:
        meta: the experts'.
        start, length: rows among those of this rank, which lie one after another there.
        parts, part: ranks, and the one in question.

    Returns:
        First row, among those of whole experts, and number of rows of each run.
    """
    block = meta.blocks[0].size
    each, runs = block // parts, []
    while length > 0:
        number, inside = divmod(start, each)
        count = min(each - inside, length)
        runs.append((number * block + part * each + inside, count))
        start, length = start + count, length - count
    return runs
