"""Mistakes on the command line: one clear message and exit code 2, before any process group starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import pretrain, words

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(monkeypatch):
    """Runs main with flags in a world, expects a refusal and returns its message."""

    def run(*flags: str, world_size: int = 1, rank: int = 0) -> str:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr("megatron_mup.training.main.init_process_group", start)
        outcome = pretrain(words(*flags))
        assert outcome.code == 2
        assert outcome.out == ""
        return outcome.err

    def start(*_):
        raise AssertionError("a process group was started")

    return run


def assert_clear(message: str, *parts: str) -> None:
    """One error that names what is wrong and what to do."""
    assert message.startswith("error: ")
    assert message.count("error: ") == message.count("fix: ") == 1
    assert "Traceback" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("flags", "world_size", "parts"),
    [
        pytest.param("--num-layer 2", 1, ["--num-layer", "--num-layers"], id="misspelt"),
        pytest.param("--lr fast", 1, ["--lr fast"], id="no-number"),
        pytest.param("--tensor-model-parallel-size 2", 3, ["--tensor-model-parallel-size 2", "3"], id="world"),
        pytest.param("--pipeline-model-parallel-size 4 --num-layers 2", 4, ["--pipeline"], id="more-stages"),
        pytest.param(
            "--num-attention-heads 4 --tensor-model-parallel-size 8", 8, ["--num-attention-heads 4"], id="heads"
        ),
        pytest.param(
            "--num-query-groups 1 --tensor-model-parallel-size 2", 2, ["--num-query-groups 1"], id="key-value-heads"
        ),
        pytest.param("--sequence-parallel --seq-length 15 --tensor-model-parallel-size 2", 2, ["15"], id="sequence"),
        pytest.param("--global-batch-size 6", 2, ["--global-batch-size 6"], id="batch"),
        pytest.param("--config no/such.yaml", 1, ["no/such.yaml"], id="recipe"),
        pytest.param("--vocab-size 1 --tensor-model-parallel-size 2", 2, ["--vocab-size 1"], id="empty-ranks"),
        pytest.param("--eod-token-id 101", 1, ["--eod-token-id 101", "100"], id="end-of-document"),
        pytest.param("--load no/such --finetune", 1, ["--load no/such"], id="nothing-to-load"),
    ],
)
def test_mistakes(refused, flags, world_size, parts):
    assert_clear(refused(flags, world_size=world_size), *parts)


def test_only_the_first_rank_speaks(refused):
    assert refused("--num-layer 2", world_size=2, rank=1) == ""


def test_save_folder_that_cant_be_written(refused, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert_clear(refused(f"--save {file}/run"), f"--save {file}/run", "can't be written")


def test_tokenizer_that_cant_be_read(refused, tmp_path):
    pytest.importorskip("sentencepiece")
    file = tmp_path / "garbage.model"
    file.write_bytes(b"this is no model" * 10)
    flags = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {file}"
    assert_clear(refused(flags), f"--tokenizer-model {file}")
    assert_clear(refused(flags.replace("garbage", "missing")), "no such file")


def test_vocabulary_smaller_than_the_tokenizer(refused, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    file = tmp_path / "tokenizer.model"
    with open(file, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 10),
            model_writer=model,
            vocab_size=40,
            model_type="char",
            hard_vocab_limit=False,
            minloglevel=2,
        )
    flags = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {file} --vocab-size 20"
    assert_clear(refused(flags), "--vocab-size 20", "the tokenizer has")


def test_missing_device_is_told_too():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    outcome = pretrain(words("--distributed-backend nccl"))
    assert outcome.code == 2
    assert "PyTorch sees no GPU here" in outcome.err


def test_print_config_starts_nothing():
    outcome = pretrain(words("--print-config", "--lr 3e-3"))
    assert outcome.code == 0
    assert "lr: 0.003" in outcome.out


def test_pretrain_as_a_program():
    command = [sys.executable, str(ROOT / "pretrain.py"), *words("--hiden-size 8")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert_clear(done.stderr, "--hiden-size", "--hidden-size")


@pytest.mark.long
def test_a_reader_of_the_help_may_have_seen_enough():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / "pretrain.py"), "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == -signal.SIGPIPE
