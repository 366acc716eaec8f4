import sys
from pathlib import Path

import numpy as np
import pytest
from data_cases import write_dataset

from megatron_mup.config import ConfigError
from megatron_mup.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_mup.data.inspection import document_tokens, summarize, verify
from megatron_mup.data.merge import merge_datasets

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import inspect_data
import merge_datasets as merge_tool


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "parts"
    write_dataset(folder / "b", [3, 0, 2], start=100)
    with IndexedDatasetWriter(folder / "a", np.uint16) as writer:
        writer.add_document(np.arange(6), np.array([4, 2]))
        writer.add_document(np.array([], int), np.array([], int))
    with IndexedDatasetWriter(folder / "c", np.uint16):
        pass
    return folder


def test_merge_is_writing_all_at_once(parts, tmp_path):
    merged = merge_datasets(parts, tmp_path / "m")
    with IndexedDatasetWriter(tmp_path / "whole", np.uint16) as writer:
        for name in "abc":
            part = IndexedDataset(parts / name)
            for i in range(part.num_documents):
                bounds = slice(*part.document_indices[i : i + 2])
                writer.add_document(document_tokens(part, i), part.sequence_lengths[bounds])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"m{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert (merged.num_documents, len(merged), merged.num_tokens) == (5, 5, 11)


def test_merge_refuses(parts, tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        merge_datasets(tmp_path / "none", tmp_path / "m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \.bin"):
        merge_datasets(tmp_path / "empty", tmp_path / "m")
    with pytest.raises(ConfigError, match="exists in the input folder"):
        merge_datasets(parts, parts / "a")
    write_dataset(parts / "d", [1], np.int32)
    with pytest.raises(ConfigError, match="stores int32"):
        merge_datasets(parts, tmp_path / "m")
    (parts / "d.idx").unlink()
    with pytest.raises(ConfigError, match=r"d.idx does not exist"):
        merge_datasets(parts, tmp_path / "m")
    assert not list(tmp_path.glob("m*"))


def test_merge_tool(parts, tmp_path, capsys):
    assert merge_tool.main(["--input", str(parts), "--output-prefix", str(tmp_path / "m")]) == 0
    assert "5 documents, 5 sequences, 11 tokens" in capsys.readouterr().out
    assert merge_tool.main(["--input", str(tmp_path / "none"), "--output-prefix", str(tmp_path / "m")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_summary(parts):
    write_dataset(parts / "s", [0, 1, 2, 3, 4, 100])
    summary = summarize(IndexedDataset(parts / "s"))
    assert (summary.documents, summary.empty_documents, summary.tokens) == (6, 1, 110)
    assert (summary.shortest, summary.longest, summary.percentiles[50]) == (0, 100, 2)
    assert summary.histogram == [(0, 1, 1), (1, 2, 1), (2, 4, 2), (4, 8, 1), (64, 128, 1)]
    assert summarize(IndexedDataset(parts / "a")).longest == 6
    assert summarize(IndexedDataset(parts / "c")).documents == 0


def test_verify(parts):
    dataset = IndexedDataset(parts / "b")
    result = verify(dataset, 105, eod=104)
    assert (result.lowest, result.highest, result.eod_count, result.unused_bytes) == (100, 104, 1, 0)
    with pytest.raises(ConfigError, match="document 2 holds token id 104, the vocabulary has 104"):
        verify(dataset, 104)
    with open(parts / "b.bin", "ab") as file:
        file.write(b"\0\0\0")
    assert verify(IndexedDataset(parts / "b")).unused_bytes == 3
    assert verify(IndexedDataset(parts / "c"), 5).highest == 0
    write_dataset(parts / "n", [2], np.int32)
    (parts / "n.bin").write_bytes(np.array([1, -7], "<i4").tobytes())
    with pytest.raises(ConfigError, match="document 0 holds token id -7"):
        verify(IndexedDataset(parts / "n"))


def test_inspect_tool(parts, capsys):
    assert inspect_data.main([str(parts / "a"), str(parts / "c"), "--samples", "3", "--max-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "document 0, 6 tokens: 0 1 ..." in out
    assert "documents  0 (0 empty)" in out
    assert inspect_data.main([str(parts / "a"), "--verify", "--vocab-size", "5"]) == 2
    assert "holds token id 5" in capsys.readouterr().err
