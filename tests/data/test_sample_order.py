import numpy as np
import pytest
from data_cases import plain_indices, write_dataset

from megatron_mup.config import ConfigError
from megatron_mup.data import gpt_dataset
from megatron_mup.data.gpt_dataset import (
    DocumentOptions,
    GPTDataset,
    build_indices,
    make_sample,
    parse_split,
    split_range,
)


def _random_cases():
    random = np.random.default_rng(7)
    for case in range(250):
        lengths = random.integers(0, [2, 5, 40, 400][case % 4], random.integers(1, 40))
        lengths[random.random(len(lengths)) < 0.3] = 0
        first = int(random.integers(0, len(lengths)))
        last = int(random.integers(first, len(lengths))) + 1
        if lengths[first:last].sum() < 2:
            continue
        yield lengths.astype(np.int32), first, last, int(random.integers(1, 60)), int(random.integers(1, 30)), case


@pytest.mark.parametrize("block", [1 << 16, 3])
def test_indices_equal_the_definition(block, monkeypatch):
    monkeypatch.setattr(gpt_dataset, "_BLOCK", block)
    seen = set()
    for lengths, first, last, samples, seq, seed in _random_cases():
        arrays = build_indices(lengths, first, last, samples, seq, seed)
        documents, rows, shuffle, epochs, separate = plain_indices(lengths.tolist(), first, last, samples, seq, seed)
        assert arrays["document_index"].tolist() == documents
        assert arrays["sample_index"].tolist() == [list(row) for row in rows]
        assert arrays["shuffle_index"].tolist() == shuffle
        assert len(shuffle) >= samples
        seen.add((min(epochs, 3), separate))
    assert seen == {(1, False), (2, False), (2, True), (3, False), (3, True)}


def test_golden_order():
    """Worked by hand from the definition: 2 epochs of 9 tokens, the last one separate."""
    arrays = build_indices(np.array([5, 4], np.int32), 0, 2, 5, 2, 1234)
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "document_index": "int32",
        "sample_index": "int32",
        "shuffle_index": "uint32",
    }
    random = np.random.RandomState(1234)
    head, tail = np.arange(2, dtype=np.int32), np.arange(2, dtype=np.int32)
    random.shuffle(head)
    random.shuffle(tail)
    assert arrays["document_index"].tolist() == [*head, *tail]
    first, second = np.arange(4), np.arange(4, 8)
    random.shuffle(first)
    random.shuffle(second)
    assert arrays["shuffle_index"].tolist() == [*first, *second]


def test_samples_are_the_stream(tmp_path):
    lengths = [3, 0, 50, 1, 7, 0, 12]
    source = write_dataset(tmp_path / "d", lengths)
    dataset = GPTDataset(source, (0.0, 1.0), 30, 8, 5, vocab_size=73)
    stream = np.concatenate([source.get(int(d)) for d in dataset.document_index]).tolist()
    for i in range(len(dataset)):
        begin = int(dataset.shuffle_index[i]) * 8
        sample = dataset[i]
        assert sample["tokens"].tolist() == stream[begin : begin + 8]
        assert sample["labels"].tolist() == stream[begin + 1 : begin + 9]
        assert sample["position_ids"].tolist() == list(range(8))
        assert sample["document_ids"].tolist() == [0] * 8
        dtypes = {name: str(array.dtype) for name, array in sample.items()}
        assert dtypes == {"tokens": "int64", "labels": "int64", "position_ids": "int64", "document_ids": "int32"}


def test_documents_within_a_sample():
    text = np.array([3, 9, 9, 4, 5, 9, 6])
    plain = make_sample(text, DocumentOptions(eod=9))
    assert plain["labels"].tolist() == [9, 9, 4, 5, 9, 6]
    assert plain["document_ids"].tolist() == [0, 0, 1, 2, 2, 2]
    assert plain["position_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    reset = make_sample(text, DocumentOptions(eod=9, reset_position_ids=True, eod_mask_loss=True))
    assert reset["labels"].tolist() == [9, -100, -100, 5, 9, -100]
    assert reset["position_ids"].tolist() == [0, 1, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("969,30,1", [(0, 969), (969, 999), (999, 1000)]),
        ("1", [(0, 1000), (1000, 1000), (1000, 1000)]),
        ("0.9/0.1/0", [(0, 900), (900, 1000), (1000, 1000)]),
    ],
)
def test_split(split, expected):
    assert [split_range(part, 1000) for part in parse_split(split)] == expected


def test_split_rounds_half_to_even():
    assert [split_range(part, 5) for part in parse_split("1,1")][:2] == [(0, 2), (2, 5)]
    assert [split_range(part, 7) for part in parse_split("1,1")][:2] == [(0, 4), (4, 7)]


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,-1,1", "1,1,1,1", "nan", "inf,1"])
def test_split_that_is_none(split):
    with pytest.raises(ConfigError, match="--split"):
        parse_split(split)


def test_empty_split_is_an_error(tmp_path):
    source = write_dataset(tmp_path / "d", [4, 4, 4])
    with pytest.raises(ConfigError, match=r"validation split .* receives 0 of 3 sequences"):
        GPTDataset(source, parse_split("969,30,1")[1], 5, 4, 0, vocab_size=99, name="validation")


def test_split_of_empty_documents_is_an_error(tmp_path):
    source = write_dataset(tmp_path / "d", [0, 0])
    with pytest.raises(ConfigError, match="receives 2 of 2 sequences and no token"):
        GPTDataset(source, (0.0, 1.0), 5, 4, 0, vocab_size=99)


def test_corpus_shorter_than_a_sample_repeats(tmp_path):
    source = write_dataset(tmp_path / "d", [3])
    dataset = GPTDataset(source, (0.0, 1.0), 2, 7, 0, vocab_size=99)
    assert sorted(tuple(dataset[i]["tokens"].tolist()) for i in range(2)) == [
        (0, 1, 2, 0, 1, 2, 0),
        (1, 2, 0, 1, 2, 0, 1),
    ]
    with pytest.raises(ConfigError, match="has 3 tokens, fewer than one sample"):
        GPTDataset(source, (0.0, 1.0), None, 7, 0, vocab_size=99)


def test_id_outside_the_vocabulary_names_the_document(tmp_path):
    source = write_dataset(tmp_path / "d", [10, 10, 10])
    dataset = GPTDataset(source, (0.0, 1.0), 1, 29, 0, vocab_size=15)
    with pytest.raises(ConfigError, match=r"document [12] holds token id (15|20)") as caught:
        dataset[0]
    assert str(tmp_path / "d") in caught.value.what
