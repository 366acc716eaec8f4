import itertools
import threading

import numpy as np
import pytest
import torch

from megatron_mup.config import ConfigError
from megatron_mup.data.gpt_dataset import DocumentOptions
from megatron_mup.data.loader import BatchLoader
from megatron_mup.data.mock import MockDataset


class Counting:
    """Sample i is all i."""

    seq_length = 3

    def __init__(self, length=1000):
        self.length = length
        self.broken = None

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        if index == self.broken:
            raise ConfigError("data", "broken", "mend it")
        full = np.full(3, index)
        return {"tokens": full, "labels": full, "position_ids": full, "document_ids": full.astype(np.int32)}


def _run(dp, steps, mbs=2, workers=2, consumed=0, kind="single", length=1000):
    """Samples per step, in the run's order; each rank's rows are put back where Megatron's sampler takes them from."""
    dataset = Counting(length)
    loaders = [BatchLoader(dataset, mbs, rank, dp, 7, kind, workers) for rank in range(dp)]
    result = []
    for size in steps:
        ranks = [loader.batches(consumed, size) for loader in loaders]
        for batch in ranks:
            assert batch["tokens"].shape == (size // dp, 3)
            assert torch.equal(batch["tokens"], batch["labels"])
        rows = torch.stack([batch["tokens"][:, 0].view(-1, mbs) for batch in ranks], dim=1).reshape(-1)
        numbers = torch.stack([batch["sample_index"].view(-1, mbs) for batch in ranks], dim=1).reshape(-1)
        assert numbers.tolist() == list(range(consumed, consumed + size))
        result.append(rows.tolist())
        consumed += size
    for loader in loaders:
        loader.close()
    return result


RAMP = [8, 8, 16, 16, 24, 8]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_every_layout_sees_the_same_steps(dp, workers):
    expected = iter(range(1000))
    assert _run(dp, RAMP, workers=workers) == [[next(expected) for _ in range(size)] for size in RAMP]


def test_micro_batches_of_a_rank():
    with BatchLoader(Counting(), 2, 1, 4, 0) as loader:
        batch = loader.batches(16, 16)
    assert batch["tokens"][:, 0].tolist() == [18, 19, 26, 27]
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "tokens": ((4, 3), torch.int64),
        "labels": ((4, 3), torch.int64),
        "position_ids": ((4, 3), torch.int64),
        "document_ids": ((4, 3), torch.int32),
        "sample_index": ((4,), torch.int64),
    }


@pytest.mark.parametrize("kind", ["single", "cyclic"])
def test_resume_with_another_data_parallel_size(kind):
    whole = _run(1, [8] * 9, kind=kind, length=72 if kind == "single" else 30)
    for dp in (1, 2, 4):
        assert _run(dp, [8] * 5, kind=kind, consumed=32, length=72 if kind == "single" else 30) == whole[4:]


def test_cyclic_shuffles_each_epoch_anew():
    seen = list(itertools.chain(*_run(2, [8] * 15, kind="cyclic", length=40)))
    epochs = [seen[i : i + 40] for i in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_going_back_is_allowed():
    with BatchLoader(Counting(), 1, 0, 1, 0) as loader:
        first = loader.batches(0, 4)["tokens"]
        loader.batches(4, 4)
        assert torch.equal(loader.batches(0, 4)["tokens"], first)


def test_batch_that_does_not_divide():
    with BatchLoader(Counting(), 2, 0, 3, 0) as loader, pytest.raises(ConfigError, match=r"no multiple of .* 2 x 3"):
        loader.batches(0, 8)


def test_data_used_up():
    with BatchLoader(Counting(20), 1, 0, 1, 0) as loader:
        assert loader.batches(12, 8)["tokens"][-1, 0] == 19
        with pytest.raises(ConfigError, match="built with 20"):
            loader.batches(16, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_in_their_step(workers):
    dataset = Counting()
    dataset.broken = 9
    with BatchLoader(dataset, 1, 0, 1, 0, num_workers=workers) as loader:
        loader.batches(0, 4)
        loader.batches(4, 4)
        with pytest.raises(ConfigError, match="broken"):
            loader.batches(8, 4)
        assert loader.batches(12, 4)["tokens"][0, 0] == 12


def test_close_ends_the_threads():
    before = threading.active_count()
    loader = BatchLoader(Counting(), 1, 0, 1, 0, num_workers=3)
    loader.batches(0, 8)
    assert threading.active_count() > before
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_mock_data_is_learnable_and_by_counter():
    def make(split=0, seed=1, eod=None):
        return MockDataset(4000, 1000, 10, seed, split, DocumentOptions(eod=eod))

    sample = make()[3]
    assert np.array_equal(sample["tokens"], make()[3]["tokens"])
    for other in (make()[4], make(split=1)[3], make(seed=2)[3]):
        assert not np.array_equal(sample["tokens"], other["tokens"])
    tokens, labels = sample["tokens"], sample["labels"]
    assert np.array_equal(tokens[1:], labels[:-1])
    assert (tokens.min(), tokens.max()) == (0, 255)
    assert 0.87 < np.mean(labels == (5 * tokens + 3) % 256) < 0.93
    documents = make(eod=7)[0]
    assert documents["document_ids"][-1] == np.sum(documents["tokens"][:-1] == 7) > 5
    assert set(make()[0]["tokens"]) == set(range(256))
    assert set(MockDataset(50, 2, 1, 0, 0, DocumentOptions())[0]["tokens"]) == {0, 1}
