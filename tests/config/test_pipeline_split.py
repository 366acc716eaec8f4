import itertools

import pytest
from config_cases import build

from megatron_mup.config import ConfigError, stage_layers


def counts(layers: int, stages: int, flags: str = "") -> list[int]:
    config = build("--num-layers", str(layers), "--pipeline-model-parallel-size", str(stages), *flags.split())
    return [end - start for start, end in stage_layers(config)]


EMBEDDING, LOSS = "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"


@pytest.mark.parametrize(
    ("layers", "stages", "flags", "expected"),
    [
        (12, 1, "", [12]),
        (12, 1, f"{EMBEDDING} {LOSS} {FIRST} 3", [12]),
        (12, 4, "", [3, 3, 3, 3]),
        (13, 4, "", [3, 4, 3, 3]),
        (14, 4, "", [3, 4, 4, 3]),
        (15, 4, "", [4, 4, 4, 3]),
        (3, 2, "", [2, 1]),
        (14, 4, f"{EMBEDDING} {LOSS}", [3, 4, 4, 3]),
        (15, 4, EMBEDDING, [3, 4, 4, 4]),
        (15, 4, LOSS, [4, 4, 4, 3]),
        (12, 4, f"{EMBEDDING} {LOSS}", [2, 4, 4, 2]),
        (2, 4, f"{EMBEDDING} {LOSS}", [0, 1, 1, 0]),
        (3, 4, EMBEDDING, [0, 1, 1, 1]),
        (12, 4, f"{FIRST} 2", [2, 4, 3, 3]),
        (12, 4, f"{FIRST} 2 {LAST} 1", [2, 5, 4, 1]),
        (12, 4, f"{FIRST} 0 {LAST} 0", [0, 6, 6, 0]),
        (12, 2, f"{FIRST} 5 {LAST} 7", [5, 7]),
        (12, 2, f"{LAST} 4", [8, 4]),
        (12, 3, f"{FIRST} 2 {LOSS}", [2, 6, 4]),
    ],
)  # fmt: skip
def test_layers_of_each_stage(layers, stages, flags, expected):
    assert counts(layers, stages, flags) == expected


@pytest.mark.parametrize(
    ("layers", "stages", "flags", "parts"),
    [
        (3, 4, "", ["--pipeline-model-parallel-size 4", "--num-layers 3", "at most 3 stages"]),
        (12, 4, f"{FIRST} 8 {LAST} 5", [f"{FIRST} 8", f"{LAST} 5", "13 of 12"]),
        (12, 4, f"{FIRST} 8 {LAST} 3", [f"{FIRST} 8", "1 layers", "2 stages", "at most 3"]),
        (12, 4, f"{FIRST} 12", ["0 layers", "3 stages", "at most 1 stages"]),
        (12, 2, f"{FIRST} 5 {LAST} 6", ["11 of 12", "add up"]),
        (12, 4, f"{FIRST} 3 {EMBEDDING}", [FIRST, EMBEDDING]),
        (12, 4, f"{LAST} 3 {LOSS}", [LAST, LOSS]),
    ],
)
def test_splits_that_cannot_be(layers, stages, flags, parts):
    with pytest.raises(ConfigError) as caught:
        counts(layers, stages, flags)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_stages_cover_the_layers_in_order():
    for layers, stages, first, last in itertools.product((1, 5, 12), (2, 3, 4), (None, 0, 2), (None, 1, 9)):
        flags = (f"{FIRST} {first} " if first is not None else EMBEDDING) + (
            f" {LAST} {last}" if last is not None else ""
        )
        config = build("--num-layers", str(layers), "--pipeline-model-parallel-size", str(stages), *flags.split())
        try:
            split = stage_layers(config)
        except ConfigError:
            continue
        assert len(split) == stages
        assert (split[0][0], split[-1][1]) == (0, layers)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(split))
        assert all(end > start for start, end in split[1:-1])
