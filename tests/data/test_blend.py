import math

import numpy as np
import pytest
from data_cases import plain_blend

from megatron_mup.config import ConfigError
from megatron_mup.data.blend import BlendedDataset, build_blend, normalize, parse_data_path
from megatron_mup.data.greedy import greedy_blend


class Numbers:
    seq_length = 1

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        return (self.name, index)


@pytest.mark.parametrize("datasets", [1, 2, 3, 7, 70])
@pytest.mark.parametrize("kind", ["random", "equal", "skewed", "counts"])
def test_order_equals_the_greedy_loop(datasets, kind):
    random = np.random.default_rng(datasets)
    raw = {
        "random": random.random(datasets),
        "equal": np.ones(datasets),
        "skewed": 10.0 ** random.uniform(-5, 0, datasets),
        "counts": random.integers(1, 9, datasets).astype(float),
    }[kind]
    weights = normalize(raw)
    for size in (1, 2, 257, 12_345 if datasets < 70 else 5_000):
        index, samples = greedy_blend(weights, size)
        expected = plain_blend(weights.tolist(), size)
        assert index.tolist() == expected[0]
        assert samples.tolist() == expected[1]
    assert (index.dtype, samples.dtype) == (np.int16, np.int64)


def test_long_skewed_blend_equals_the_greedy_loop():
    weights = normalize([1.0, 0.3, 1e-3, 2e-6])
    index, samples = greedy_blend(weights, 300_000)
    expected = plain_blend(weights.tolist(), 300_000)
    assert np.array_equal(index, expected[0])
    assert np.array_equal(samples, expected[1])


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["a"], (["a"], None)),
        (["a", "b"], (["a", "b"], None)),
        (["a", "b", "c"], (["a", "b", "c"], None)),
        (["0.3", "a", "7", "b"], (["a", "b"], [0.3, 7.0])),
        (["1", "a"], (["a"], [1.0])),
    ],
)
def test_data_path(items, expected):
    assert parse_data_path(items) == expected


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        (["0.3", "a", "b"], "0.3 looks like a weight"),
        (["0.3", "a", "b", "c"], "b stands where a weight"),
        (["a", "0.3", "b", "0.7"], "looks like a weight"),
        (["0", "a", "1", "b"], "weight 0 is not"),
        (["-1", "a", "1", "b"], "weight -1 is not"),
        (["nan", "a", "1", "b"], "weight nan is not"),
    ],
)
def test_data_path_that_is_none(items, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_data_path(items)


def _blend(prefixes, weights, size, epoch=10):
    asked = {}

    def build(prefix, count):
        asked[prefix] = count
        return Numbers(prefix, count or epoch)

    return build_blend(prefixes, weights, size, build, None), asked


def test_weighted_sizes():
    dataset, asked = _blend(["a", "b", "c"], [2, 3, 5], 999)
    targets = [math.ceil(999 * w) for w in (0.2, 0.3, 0.5)]
    assert len(dataset) == sum(targets) == 1000
    assert list(asked.values()) == [math.ceil(t * 1.005) for t in targets]
    names, samples = plain_blend(normalize([0.2, 0.3, 0.5]).tolist(), 1000)
    assert [dataset[i] for i in range(1000)] == [("abc"[n], s) for n, s in zip(names, samples, strict=True)]


def test_a_lone_prefix_is_no_blend():
    dataset, asked = _blend(["a"], None, 7)
    assert isinstance(dataset, Numbers)
    assert asked == {"a": 7}
    dataset, asked = _blend(["a"], [1.0], 7)
    assert isinstance(dataset, BlendedDataset)
    assert asked == {"a": 8}


def test_without_weights_lengths_weigh():
    dataset, asked = _blend(["a", "b"], None, 15)
    assert len(dataset) == 15
    assert asked == {"a": None, "b": None}
    dataset, asked = _blend(["a", "b"], None, 50)
    assert len(dataset) == 50
    assert asked == {"a": 26, "b": 26}


def test_every_sample_of_small_blends_exists():
    for size in range(1, 30):
        dataset, _ = _blend(["a", "b", "c", "d"], [1, 1e-3, 1e-3, 1e-3], size)
        assert [dataset[i][0] for i in range(len(dataset))]
