import os
import threading
import time

import numpy as np
import pytest
from data_cases import write_dataset

from megatron_mup.data.gpt_dataset import GPTDataset
from megatron_mup.data.index_cache import load_or_build

KEY = {"what": 1}


def _arrays():
    return {"a": np.arange(5), "b": np.ones((2, 3), np.int32)}


def _never():
    raise AssertionError("built although it is cached")


def test_second_time_comes_from_disk(tmp_path):
    first = load_or_build(tmp_path / "new" / "folder", KEY, _arrays)
    again = load_or_build(tmp_path / "new" / "folder", KEY, _never)
    assert isinstance(again["a"], np.memmap)
    assert all(np.array_equal(first[name], again[name]) for name in "ab")
    text = next((tmp_path / "new" / "folder").glob("*description.txt")).read_text()
    assert '"what": 1' in text
    assert not list((tmp_path / "new" / "folder").glob("*.tmp*"))


def test_another_key_is_another_entry(tmp_path):
    load_or_build(tmp_path, KEY, _arrays)
    with pytest.raises(AssertionError, match="built"):
        load_or_build(tmp_path, {"what": 2}, _never)


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble", "shape"])
def test_damaged_entries_are_built_again(tmp_path, damage):
    load_or_build(tmp_path, KEY, _arrays)
    array, marker = next(tmp_path.glob("*-a.npy")), next(tmp_path.glob("*.txt"))
    if damage == "truncate":
        array.write_bytes(array.read_bytes()[:-3])
    elif damage == "remove":
        array.unlink()
    elif damage == "garble":
        marker.write_text("{")
    else:
        np.save(array, np.arange(4))
    assert load_or_build(tmp_path, KEY, _arrays)["a"].tolist() == list(range(5))
    load_or_build(tmp_path, KEY, _never)


def test_unwritable_folder_warns(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        arrays = load_or_build(tmp_path / "file" / "cache", KEY, _arrays)
    assert arrays["a"].tolist() == list(range(5))


def test_builders_at_the_same_time(tmp_path):
    results = []

    def build():
        time.sleep(0.01)
        return _arrays()

    threads = [threading.Thread(target=lambda: results.append(load_or_build(tmp_path, KEY, build))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result["a"].tolist() == list(range(5)) for result in results)
    assert len(results) == 8
    assert len(os.listdir(tmp_path)) == 3


def test_dataset_finds_its_cache_and_new_data_does_not(tmp_path):
    def order(lengths):
        source = write_dataset(tmp_path / "d", lengths)
        dataset = GPTDataset(source, (0.0, 1.0), 20, 4, 0, vocab_size=999, cache=tmp_path / "cache")
        return [dataset[i]["tokens"].tolist() for i in range(20)]

    first = order([7, 9, 30])
    assert order([7, 9, 30]) == first
    assert len(list((tmp_path / "cache").glob("*.txt"))) == 1
    order([9, 7, 30])
    assert len(list((tmp_path / "cache").glob("*.txt"))) == 2
