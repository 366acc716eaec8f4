"""With a key/value cache, in a batch and over ranks, the tokens are those of full forward passes."""

from __future__ import annotations

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch

from megatron_mup.data.indexed_dataset import IndexedDatasetWriter
from megatron_mup.inference import load_model, logits_of, stream
from tests.checkpoint.convert.hf_cases import tool
from tests.runs import VOCAB_SIZE, config_of, model_of, pretrain, words

ARCHITECTURES = {
    "llama": "--swiglu --disable-bias-linear --num-query-groups 2 --qk-layernorm",
    "gpt2": "--normalization LayerNorm --position-embedding-type learned_absolute",
    "window": "--swiglu --window-size 7 --use-rope-scaling --rotary-percent 0.5",
    "unfused": "--attention-backend unfused --num-query-groups 1",
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [35, 8, 9]]


def greedy(model, prompts, count, window):
    """The likeliest tokens by full forward passes, row by row."""
    texts = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(model(torch.tensor([ids[-window:]]))[-1, 0].argmax()))
        texts.append(ids[len(prompt) :])
    return texts


def columns(steps) -> list[list[int | None]]:
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_128_tokens_are_those_of_full_forward_passes(architecture):
    model = model_of(config_of(ARCHITECTURES[architecture], "--seq-length 144")).eval()
    steps = stream(logits_of(model), PROMPTS, 128, window=144, temperature=0)
    assert columns(steps) == greedy(model, PROMPTS, 128, 144)


def test_texts_longer_than_the_window_are_cut_at_their_front():
    model = model_of(config_of(ARCHITECTURES["llama"])).eval()
    steps = stream(logits_of(model), [PROMPTS[0] * 3, PROMPTS[1]], 30, window=16, temperature=0)
    assert columns(steps) == greedy(model, [PROMPTS[0] * 3, PROMPTS[1]], 30, 16)


def test_rows_end_on_their_own():
    model = model_of(config_of(ARCHITECTURES["llama"], "--seq-length 64")).eval()
    options = {"window": 64, "temperature": 1.0, "seed": 5}
    whole = columns(stream(logits_of(model), PROMPTS, 20, **options))
    end = whole[1][6]
    rows = columns(stream(logits_of(model), PROMPTS, 20, eod=end, **options))
    for row, before in zip(rows, whole, strict=True):
        cut = before.index(end) if end in before else len(before)
        assert row[:cut] == before[: min(cut, len(row))]
        assert set(row[cut:]) <= {None}
    # A row draws what it draws alone.
    assert columns(stream(logits_of(model), PROMPTS[1:2], 20, window=64, seed=6))[0] == whole[1]


RUN = "--swiglu --disable-bias-linear --num-query-groups 2 --seq-length 144 --num-layers 3"


@pytest.fixture(scope="module")
def checkpoints(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (outcome,) = pool.launch(1, pretrain, words(RUN, f"--save {folder}"))
    assert outcome.code == 0, outcome.err
    return folder


def generate(*argv: str) -> tuple[int, str]:
    """Runs tools/generate.py in a worker; returns its exit code and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = tool("generate").main([*argv, "--device", "cpu", "--tokenizer-type", "NullTokenizer"])
    return code, out.getvalue()


@pytest.mark.parametrize(
    ("tensor", "stages"),
    [pytest.param(2, 1, marks=pytest.mark.long), (1, 2), pytest.param(2, 2, marks=pytest.mark.long)],
)
def test_tensor_ranks_and_stages(pool, checkpoints, tensor, stages):
    sizes = ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(stages)]
    prompts = ["--prompt", *(" ".join(map(str, prompt)) for prompt in PROMPTS)]
    flags = ["--load", str(checkpoints), *prompts, "--max-tokens", "128", "--temperature", "0"]
    outcomes = pool.launch(tensor * stages, generate, *flags, *sizes)
    assert [code for code, _ in outcomes] == [0] * (tensor * stages), outcomes
    assert [out for _, out in outcomes[1:]] == [""] * (tensor * stages - 1)
    want = greedy(load_model(checkpoints).model, PROMPTS, 128, 144)
    end = VOCAB_SIZE - 1
    got = [[int(word) for word in line.split()] for line in outcomes[0][1].splitlines() if not line.startswith("---")]
    for prompt, row, text in zip(PROMPTS, got, want, strict=True):
        assert row == prompt + (text[: text.index(end)] if end in text else text)


def test_stages_of_a_model_with_experts(pool, tmp_path):
    """Their routers' biases come along."""
    experts = (
        "--num-experts 4 --swiglu --disable-bias-linear --moe-router-score-function sigmoid --train-iters 2 "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 1 --tokenizer-type NullTokenizer"
    )
    assert pretrain(words(experts, f"--save {tmp_path}")).code == 0
    flags = f"--load {tmp_path} --max-tokens 12 --temperature 0 --pipeline-model-parallel-size 2".split()
    outcomes = pool.launch(2, generate, *flags, "--prompt", "3 1 4")
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    (want,) = greedy(load_model(tmp_path).model, [[3, 1, 4]], 12, 16)
    assert outcomes[0][1].split() == list(map(str, [3, 1, 4, *want]))


def test_the_layout_must_have_its_processes(checkpoints):
    code, out = generate("--load", str(checkpoints), "--prompt", "1", "--tensor-model-parallel-size", "2")
    assert code == 2
    assert "torchrun --nproc-per-node 2" in out


def test_one_text_is_printed_as_it_grows(checkpoints):
    pieces = list(tool("generate").printed(Words(), ["a b"], iter([[1], [2], [3], [None]])))
    assert "".join(pieces) == "a b c \u00e9\n"
    assert len(pieces) == 3
    assert all("\ufffd" not in piece for piece in pieces)


class Words:
    """A tokenizer whose ids 2 and 3 are two halves of a character."""

    pieces = (b"a b", b" c", b" \xc3", b"\xa9")

    def tokenize(self, text: str) -> list[int]:
        return [0]

    def detokenize(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def test_evaluate(checkpoints, tmp_path, capsys):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, VOCAB_SIZE, size, dtype=np.uint16) for size in (100, 1, 300)]
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    flags = ["--load", str(checkpoints), "--data-path", str(tmp_path / "data"), "--device", "cpu"]
    assert tool("evaluate").main(flags) == 0
    result = json.loads(capsys.readouterr().out)
    ids, model = torch.from_numpy(np.concatenate(documents).astype(np.int64)), load_model(checkpoints).model
    total = 0.0
    for start in range(0, 400, 144):
        window = ids[start : start + 145]
        total -= float(model(window[None, :-1])[:, 0].log_softmax(-1).gather(-1, window[1:, None]).sum())
    assert result["tokens"] == 400
    assert result["loss"] == pytest.approx(total / 400, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / 400), rel=1e-4)
    assert tool("evaluate").main([*flags, "--max-tokens", "1"]) == 2
    assert "less than two tokens" in capsys.readouterr().err
