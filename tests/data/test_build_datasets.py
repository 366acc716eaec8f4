import dataclasses

import numpy as np
import pytest
from data_cases import plain_indices, write_dataset

from megatron_mup.config import Config, ConfigError, DataConfig, ModelConfig, TrainingConfig
from megatron_mup.data.blend import BlendedDataset
from megatron_mup.data.gpt_dataset import GPTDataset
from megatron_mup.data.loader import build_datasets


def _config(seq_length=4, **data):
    return Config(
        data=DataConfig(**data),
        training=TrainingConfig(seq_length=seq_length, seed=11),
        model=ModelConfig(vocab_size=900),
    )


@pytest.fixture
def prefix(tmp_path):
    write_dataset(tmp_path / "d", [9] * 40)
    return str(tmp_path / "d")


def test_splits_are_apart_and_in_order(prefix):
    train, valid, test = build_datasets(_config(data_path=(prefix,), split="8,1,1"), 50, 5, 5, 900)
    documents, _, shuffle, *_ = plain_indices([9] * 40, 0, 32, 50, 4, 11)
    assert train.document_index.tolist() == documents
    assert train.shuffle_index.tolist() == shuffle
    tokens = [{int(t) for i in range(len(d)) for t in d[i]["tokens"]} for d in (train, valid, test)]
    assert max(tokens[0]) < 32 * 9 <= min(tokens[1]) <= max(tokens[1]) < 36 * 9 <= min(tokens[2])


def test_nothing_asked_nothing_built(prefix):
    train, valid, test = build_datasets(_config(data_path=(prefix,), split="1,0,0"), 5, 0, 0, 900)
    assert isinstance(train, GPTDataset)
    assert (valid, test) == (None, None)
    with pytest.raises(ConfigError, match="validation split"):
        build_datasets(_config(data_path=(prefix,), split="1,0,0"), 5, 1, 0, 900)


def test_own_data_for_each_split(prefix, tmp_path):
    write_dataset(tmp_path / "v", [30, 30], start=600)
    config = _config(train_data_path=(prefix,), valid_data_path=("1", str(tmp_path / "v")))
    train, valid, test = build_datasets(config, 5, 5, 0, 900)
    assert isinstance(valid, GPTDataset)
    assert train[0]["tokens"].max() < 400 < valid[0]["tokens"].min()
    assert test is None
    with pytest.raises(ConfigError, match="--test-data-path"):
        build_datasets(config, 5, 5, 5, 900)


def test_blend_and_caches(prefix, tmp_path):
    write_dataset(tmp_path / "e", [9] * 40, start=400)
    config = _config(data_path=("0.25", prefix, "0.75", str(tmp_path / "e")), data_cache_path=str(tmp_path / "cache"))
    train, *_ = build_datasets(config, 100, 0, 0, 900)
    assert isinstance(train, BlendedDataset)
    assert len(train) == 100
    assert np.mean([train[i]["tokens"][0] >= 400 for i in range(100)]) == 0.75
    assert len(list((tmp_path / "cache").glob("*-description.txt"))) == 3
    again, *_ = build_datasets(config, 100, 0, 0, 900)
    assert all(np.array_equal(train[i]["tokens"], again[i]["tokens"]) for i in range(100))


def test_default_cache_lies_beside_the_data(prefix, tmp_path):
    build_datasets(_config(data_path=(prefix,), split="1"), 5, 0, 0, 900)
    assert len(list((tmp_path / "index_cache").glob("*.npy"))) == 3


def test_mock_data():
    train, valid, test = build_datasets(_config(mock_data=True), 5, 3, 0, 900)
    assert (len(train), len(valid), test) == (5, 3, None)
    assert not np.array_equal(train[0]["tokens"], valid[0]["tokens"])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({}, "no data is given"),
        ({"mock_data": True, "data_path": ("d",)}, "one kind of data"),
        ({"data_path": ("d",), "valid_data_path": ("d",)}, "--data-path is divided"),
        ({"data_path": ("nowhere",)}, "nowhere.idx does not exist"),
        ({"data_path": ("d",), "split": "x"}, "--split x"),
        ({"data_path": ("d",), "eod_mask_loss": True}, "end-of-document id is not known"),
        ({"data_path": ("d",), "eod_token_id": 900}, "the vocabulary has 900 ids"),
    ],
)
def test_contradictions(prefix, tmp_path, monkeypatch, data, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        build_datasets(_config(**data), 5, 5, 5, 900)


def test_eod_comes_from_the_tokenizer(prefix):
    config = _config(data_path=(prefix,), split="1", reset_position_ids=True, tokenizer_type="NullTokenizer")
    config = dataclasses.replace(config, model=ModelConfig(vocab_size=350))
    train, *_ = build_datasets(config, 80, 0, 0, 900)
    assert train.options.eod == 349
    positions = [sample["position_ids"].tolist() for sample in map(train.__getitem__, range(len(train)))]
    assert any(p != [0, 1, 2, 3] for p in positions)
