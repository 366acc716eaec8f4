import pickle
import struct

import numpy as np
import pytest
from data_cases import write_dataset

from megatron_mup.config import ConfigError
from megatron_mup.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, token_dtype

GOLDEN = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0300000000000000 0300000000000000"
    "05000000 02000000 04000000 0000000000000000 0a00000000000000 0e00000000000000"
    "0000000000000000 0200000000000000 0300000000000000"
)


@pytest.fixture
def golden(tmp_path):
    prefix = tmp_path / "golden"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(7), np.array([5, 2]))
        writer.add_document(np.arange(7, 11))
    return prefix


def test_writes_the_golden_bytes(golden):
    assert len(GOLDEN) == 94
    assert golden.with_suffix(".idx").read_bytes() == GOLDEN
    assert golden.with_suffix(".bin").read_bytes() == np.arange(11, dtype="<u2").tobytes()
    assert sorted(p.name for p in golden.parent.iterdir()) == ["golden.bin", "golden.idx"]


def test_reads_the_golden_bytes(tmp_path):
    (tmp_path / "g.idx").write_bytes(GOLDEN)
    (tmp_path / "g.bin").write_bytes(np.arange(11, dtype="<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "g")
    assert dataset.dtype == np.uint16
    assert dataset.sequence_lengths.tolist() == [5, 2, 4]
    assert dataset.document_indices.tolist() == [0, 2, 3]
    assert [dataset.get(i).tolist() for i in range(3)] == [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9, 10]]
    assert dataset.get(2, 1, 2).tolist() == [8, 9]
    assert dataset.get(0, offset=5).tolist() == []
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (3, 2, 11)
    assert [dataset.document_of(i) for i in range(3)] == [0, 0, 1]
    again = pickle.loads(pickle.dumps(dataset))
    assert again.get(1).tolist() == [5, 6]


def test_multimodal_modes_are_ignored(golden):
    with open(golden.with_suffix(".idx"), "ab") as file:
        file.write(bytes(3))
    assert IndexedDataset(golden).get(1).tolist() == [5, 6]


@pytest.mark.parametrize(("args", "part"), [((3,), "sequence 3"), ((-1,), "sequence -1"), ((0, 4, 2), "4:6")])
def test_get_refuses_what_is_not_there(golden, args, part):
    with pytest.raises(IndexError, match=part):
        IndexedDataset(golden).get(*args)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_every_integer_type(tmp_path, dtype):
    assert write_dataset(tmp_path / "d", [3, 0, 4], dtype).get(2).tolist() == [3, 4, 5, 6]


def test_empty_documents_and_empty_sets(tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", np.int32) as writer:
        writer.add_document(np.array([], dtype=int), np.array([], dtype=int))
        writer.add_document(np.array([4, 5]))
        writer.add_document(np.array([], dtype=int))
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.document_indices.tolist() == [0, 0, 1, 2]
    assert dataset.sequence_lengths.tolist() == [2, 0]
    with IndexedDatasetWriter(tmp_path / "none", np.int32):
        pass
    assert len(IndexedDataset(tmp_path / "none")) == 0


def test_batches_equal_single_documents(tmp_path):
    with IndexedDatasetWriter(tmp_path / "batch", np.uint16) as writer:
        writer.add_documents(np.arange(9), np.array([2, 3, 4]), np.array([1, 0, 2]))
    with IndexedDatasetWriter(tmp_path / "single", np.uint16) as writer:
        writer.add_document(np.arange(2))
        writer.add_document(np.array([], dtype=int), np.array([], dtype=int))
        writer.add_document(np.arange(2, 9), np.array([3, 4]))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"batch{suffix}").read_bytes() == (tmp_path / f"single{suffix}").read_bytes()
    with pytest.raises(ValueError, match="add up"), IndexedDatasetWriter(tmp_path / "wrong", np.uint16) as writer:
        writer.add_documents(np.arange(9), np.array([2]), np.array([1]))
    assert not list(tmp_path.glob("wrong*"))


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "tokens", "named"),
    [(np.uint16, None, [65536], "65536"), (np.uint16, 100, [5, 100], "100"), (np.int32, 10**6, [-1], "-1")],
)
def test_writer_refuses_ids_that_do_not_fit(tmp_path, dtype, vocab_size, tokens, named):
    with (
        pytest.raises(ConfigError, match=f"token id {named}"),
        IndexedDatasetWriter(tmp_path / "d", dtype, vocab_size) as writer,
    ):
        writer.add_document(np.array(tokens))
    assert not list(tmp_path.iterdir())


def test_writer_refuses_types_and_places(tmp_path):
    with pytest.raises(ConfigError, match="no code"):
        IndexedDatasetWriter(tmp_path / "d", np.float32)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        IndexedDatasetWriter(tmp_path / "file" / "d", np.int32)


def test_an_interrupted_writer_leaves_the_old_files(golden):
    before = golden.with_suffix(".bin").read_bytes()
    writer = IndexedDatasetWriter(golden, np.uint16)
    writer.add_document(np.arange(3))
    writer.__exit__(RuntimeError, RuntimeError("stop"), None)
    assert golden.with_suffix(".bin").read_bytes() == before
    assert len(list(golden.parent.iterdir())) == 2


def _patch(path, offset, value):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("suffix", "damage", "reason"),
    [
        (".idx", lambda p: p.unlink(), "does not exist"),
        (".bin", lambda p: p.unlink(), "does not exist"),
        (".idx", lambda p: p.write_bytes(b""), "truncated: 0 bytes"),
        (".idx", lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated: 93 bytes, 94 expected"),
        (".idx", lambda p: p.write_bytes(p.read_bytes() + b"1"), "too long"),
        (".idx", lambda p: _patch(p, 0, b"MMAP"), "wrong magic"),
        (".idx", lambda p: _patch(p, 9, struct.pack("<Q", 2)), "version 2"),
        (".idx", lambda p: _patch(p, 17, b"\x07"), "dtype code 7"),
        (".idx", lambda p: _patch(p, 34, struct.pack("<i", -5)), "sequence 0 has a negative length"),
        (".idx", lambda p: _patch(p, 34 + 12 + 16, struct.pack("<q", 15)), "sequence 2 ends past the end"),
        (".idx", lambda p: _patch(p, 34 + 12 + 8, struct.pack("<q", -2)), "sequence 1 ends past the end"),
        (".idx", lambda p: _patch(p, 34 + 36 + 16, struct.pack("<q", 2)), "boundaries end at 2 but there are 3"),
        (".idx", lambda p: _patch(p, 34 + 36 + 8, struct.pack("<q", 9)), "boundaries decrease"),
        (".bin", lambda p: p.write_bytes(p.read_bytes()[:-1]), "sequence 2 ends past the end"),
        (".bin", lambda p: p.write_bytes(b""), "sequence 0 ends past the end of the file \\(0 bytes\\)"),
    ],
)
def test_damaged_files_are_named(golden, suffix, damage, reason):
    damage(golden.with_suffix(suffix))
    with pytest.raises(ConfigError, match=reason) as caught:
        IndexedDataset(golden)
    assert str(golden) in caught.value.what + caught.value.why
    assert caught.value.fix


def test_dtype_rule():
    assert [token_dtype(n) for n in (65499, 65500)] == [np.dtype("uint16"), np.dtype("int32")]
