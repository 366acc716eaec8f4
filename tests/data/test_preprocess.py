import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_mup.config import ConfigError
from megatron_mup.data import corpus
from megatron_mup.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]


def _lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


WRITERS = {
    "c.jsonl": lambda path, texts: path.write_bytes(_lines(texts)),
    "unended.jsonl": lambda path, texts: path.write_bytes(_lines(texts).rstrip(b"\n")),
    "blank.jsonl": lambda path, texts: path.write_bytes(_lines(texts).replace(b"\n", b"\n \r\n\n")),
    "c.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(_lines(texts))),
    "c.jsonl.zst": lambda path, texts: path.write_bytes(
        zstandard.compress(_lines(texts[:50])) + zstandard.compress(_lines(texts[50:]))
    ),
    "c.parquet": lambda path, texts: pq.write_table(
        pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=40
    ),
}


def _options(path, prefix, model, **changes):
    settings = {
        "input": [str(path)],
        "output_prefix": str(prefix),
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(model),
        "append_eod": True,
    }
    return PreprocessOptions(**{**settings, **changes})


def _expected(prefix, texts, tokenizer, dtype=np.uint16, eod=True):
    """The dataset, written document by document; an empty one is an entry without a sequence."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for text in texts:
            ids = tokenizer.tokenize(text)
            ids += [tokenizer.eod] if ids and eod else []
            writer.add_document(np.array(ids, dtype=np.int64), np.array([len(ids)] if ids else [], dtype=np.int64))
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def _result(prefix):
    return Path(f"{prefix}_text_document.bin").read_bytes(), Path(f"{prefix}_text_document.idx").read_bytes()


@pytest.mark.parametrize("name", WRITERS)
def test_every_format(tmp_path, texts, sentencepiece_model, monkeypatch, name):
    monkeypatch.setattr(corpus, "BATCH_BYTES", 3000)
    WRITERS[name](tmp_path / name, texts)
    reports = []
    progress = preprocess(
        _options(tmp_path / name, tmp_path / "out", sentencepiece_model),
        lambda p: reports.append((p.documents, p.bytes)),
    )
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model))
    assert _result(tmp_path / "out") == _expected(tmp_path / "expected", texts, tokenizer)
    assert progress.documents == len(texts)
    assert progress.tokens == IndexedDataset(tmp_path / "out_text_document").num_tokens
    assert len(reports) > 2 or name.endswith("zst")
    assert abs(progress.bytes - progress.total_bytes) <= 2


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer", "NullTokenizer"])
def test_every_tokenizer(tmp_path, texts, sentencepiece_model, huggingface_folder, tiktoken_file, kind):
    files = {
        "SentencePieceTokenizer": str(sentencepiece_model),
        "HuggingFaceTokenizer": str(huggingface_folder),
        "TikTokenizer": str(tiktoken_file),
        "NullTokenizer": None,
    }
    if kind == "NullTokenizer":
        texts = ["1 2 3", "", "69998 0"]
    WRITERS["c.jsonl"](tmp_path / "c.jsonl", texts)
    vocabulary = {"vocab_size": 70_000} if kind == "NullTokenizer" else {}
    options = _options(tmp_path / "c.jsonl", tmp_path / "out", None, tokenizer_type=kind, **vocabulary)
    preprocess(PreprocessOptions(**{**vars(options), "tokenizer_model": files[kind]}))
    tokenizer = build_tokenizer(kind, files[kind], 70_000)
    dtype = np.int32 if kind == "NullTokenizer" else np.uint16
    assert _result(tmp_path / "out") == _expected(tmp_path / "expected", texts, tokenizer, dtype)


def test_workers_do_not_change_a_byte(tmp_path, texts, sentencepiece_model, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_BYTES", 2000)
    WRITERS["c.jsonl"](tmp_path / "c.jsonl", texts * 3)
    results = []
    for workers in (1, 4):
        preprocess(_options(tmp_path / "c.jsonl", tmp_path / f"w{workers}", sentencepiece_model, workers=workers))
        results.append(_result(tmp_path / f"w{workers}"))
    assert results[0] == results[1]


def test_several_keys_and_files(tmp_path, sentencepiece_model):
    for name, word in (("b", "second"), ("a", "first")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"title": word, "body": f"{word} body"}) + "\n")
    options = _options(
        tmp_path / "*.jsonl",
        tmp_path / "new" / "out",
        sentencepiece_model,
        json_keys=["title", "body"],
        append_eod=False,
    )
    assert preprocess(options).documents == 2
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model))
    for key, words in (("title", ["first", "second"]), ("body", ["first body", "second body"])):
        dataset = IndexedDataset(tmp_path / "new" / f"out_{key}_document")
        assert [tokenizer.detokenize(dataset.get(i).tolist()) for i in range(2)] == words


def test_reading_does_not_run_ahead(tmp_path, texts, sentencepiece_model, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_BYTES", 500)
    WRITERS["c.jsonl"](tmp_path / "c.jsonl", texts)
    ahead, read = [], 0
    original = corpus._read_lines

    def counted(path):
        nonlocal read
        for batch in original(path):
            read += 1
            yield batch

    written = 0

    def report(progress):
        nonlocal written
        written += 1
        ahead.append(read - written)

    monkeypatch.setattr(corpus, "_read_lines", counted)
    preprocess(_options(tmp_path / "c.jsonl", tmp_path / "out", sentencepiece_model, workers=2), report)
    assert read > 30
    assert max(ahead) <= 6


def test_lone_surrogates_are_replaced(tmp_path, sentencepiece_model):
    (tmp_path / "c.jsonl").write_text('{"text": "ab \\ud800 c"}\n')
    assert preprocess(_options(tmp_path / "c.jsonl", tmp_path / "out", sentencepiece_model)).documents == 1


def _file(name, content):
    def make(folder):
        if content is not None:
            (folder / name).write_bytes(content)
        return folder / name

    return make


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_file("c.jsonl", GOOD * 4 + b'{"text": "cut\n' + GOOD), "c.jsonl line 5: is not JSON"),
        (_file("c.jsonl", GOOD + b"\xff\xfe\n"), "line 2: is not JSON"),
        (_file("c.jsonl", GOOD + b'["text"]\n'), "line 2: is a JSON list"),
        (_file("c.jsonl", GOOD + b'\n{"body": "x"}\n'), "line 3: has no key 'text', only 'body'"),
        (_file("c.jsonl", GOOD + b'{"text": 3}\n'), "line 2: 'text' holds int"),
        (_file("c.jsonl", b""), "holds 0 documents"),
        (_file("c.jsonl", b'{"text": ""}\n'), "holds 1 documents and no token"),
        (_file("c.jsonl", None), "no such file"),
        (_file("*.jsonl", None), "no such file"),
        (_file("c.jsonl.gz", gzip.compress(GOOD * 999)[:-12]), "cannot be read"),
        (_file("c.jsonl.gz", GOOD), "cannot be read"),
        (_file("c.jsonl.zst", GOOD), "cannot be read"),
        (_file("c.parquet", GOOD), "cannot be read"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, sentencepiece_model, make, reason):
    path = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=reason.replace("*", r"\*")):
        preprocess(_options(path, tmp_path / "out", sentencepiece_model))
    assert sorted(tmp_path.iterdir()) == before


def test_an_error_comes_through_from_a_worker(tmp_path, sentencepiece_model):
    (tmp_path / "c.jsonl").write_bytes(GOOD * 4 + b"{\n" + GOOD)
    with pytest.raises(ConfigError, match="line 5: is not JSON"):
        preprocess(_options(tmp_path / "c.jsonl", tmp_path / "out", sentencepiece_model, workers=2))
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_parquet_without_the_column_or_with_nulls(tmp_path, sentencepiece_model):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="no column 'text', only 'body'"):
        preprocess(_options(tmp_path / "a.parquet", tmp_path / "out", sentencepiece_model))
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="row 2: 'text' holds NoneType"):
        preprocess(_options(tmp_path / "b.parquet", tmp_path / "out", sentencepiece_model))


def test_ids_outside_the_vocabulary(tmp_path):
    WRITERS["c.jsonl"](tmp_path / "c.jsonl", ["1 2", "3 50", "4"])
    null = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 50}
    with pytest.raises(ConfigError, match="document 2 after line 0: holds token id 50"):
        preprocess(_options(tmp_path / "c.jsonl", tmp_path / "out", None, **null))


def test_a_tokenizer_without_an_end(tmp_path, huggingface_folder, texts):
    text = (huggingface_folder / "tokenizer.json").read_text().replace("</s>", "<sep>")
    (tmp_path / "tokenizer.json").write_text(text)
    WRITERS["c.jsonl"](tmp_path / "c.jsonl", texts)
    options = _options(
        tmp_path / "c.jsonl", tmp_path / "out", tmp_path / "tokenizer.json", tokenizer_type="HuggingFaceTokenizer"
    )
    with pytest.raises(ConfigError, match="--append-eod"):
        preprocess(options)


def _tool(name, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_command_line(tmp_path, texts, sentencepiece_model):
    WRITERS["c.jsonl"](tmp_path / "c.jsonl", texts)
    common = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sentencepiece_model]
    flags = ["--output-prefix", tmp_path / "out", *common, "--workers", 2, "--append-eod", "--log-interval", 10]
    done = _tool("preprocess_data.py", "--input", tmp_path / "c.jsonl", *flags)
    assert done.returncode == 0, done.stderr
    assert f"{len(texts)} documents" in done.stdout
    assert "tokens/s" in done.stderr
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model))
    assert _result(tmp_path / "out") == _expected(tmp_path / "expected", texts, tokenizer)

    shown = _tool("inspect_data.py", tmp_path / "out_text_document", "--verify", "--samples", 2, *common)
    assert shown.returncode == 0, shown.stderr
    assert f"documents  {len(texts)} (1 empty)" in shown.stdout
    assert "Implementation of" in shown.stdout or "JSON" in shown.stdout
    assert f"all below {tokenizer.vocab_size}, {len(texts) - 1} end-of-document ids" in shown.stdout


def test_command_line_mistakes_are_one_message(tmp_path, sentencepiece_model):
    (tmp_path / "c.jsonl").write_bytes(GOOD + b"{\n")
    (tmp_path / "file").write_text("")
    common = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sentencepiece_model, "--workers", 1]
    for arguments, reason in [
        (["--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out"], "line 2: is not JSON"),
        (["--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "file" / "out"], "cannot be written"),
        (["--input", tmp_path / "c.jsonl", "--output-prefix", "out", "--partitions", 4], "no such flag"),
    ]:
        done = _tool("preprocess_data.py", *arguments, *common)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_leaves_the_old_files(tmp_path, sentencepiece_model, monkeypatch):
    WRITERS["c.jsonl"](tmp_path / "c.jsonl", ["one"])
    options = _options(tmp_path / "c.jsonl", tmp_path / "out", sentencepiece_model)
    preprocess(options)
    before = _result(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(OSError, match="No space left"):
        preprocess(options)
    assert _result(tmp_path / "out") == before
    assert len(list(tmp_path.iterdir())) == 3


def _no_space(_):
    raise OSError(28, "No space left on device")


def test_tools_start_without_torch():
    for tool in ("preprocess_data", "merge_datasets", "inspect_data"):
        code = f"import sys; sys.path.insert(0, 'tools'); import {tool}; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
