from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mup.config import ConfigError
from megatron_mup.inference import bits_per_byte, load_model, sample, total_loss
from megatron_mup.inference.sample import draw
from megatron_mup.models.gpt import GPT
from tests.runs import pretrain

GENERATE = Path(__file__).parents[2] / "tools" / "generate.py"
FLAGS = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--num-query-groups", "2", "--swiglu"),
    *("--ffn-hidden-size", "64", "--seq-length", "16", "--vocab-size", "64", "--micro-batch-size", "2", "--mock-data"),
    *("--parametrization", "mup", "--mup-base-hidden-size", "16", "--mup-base-head-dim", "8", "--num-workers", "0"),
    *("--train-iters", "2", "--lr", "1e-2", "--no-progress"),
]


@pytest.fixture(scope="module")
def checkpoints(pool, tmp_path_factory) -> Path:
    """Two iterations on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    flags = [*FLAGS, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--save", str(folder)]
    outcomes = pool.launch(2, pretrain, flags)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    return folder


@pytest.fixture(scope="module")
def model(checkpoints) -> GPT:
    return load_model(checkpoints).model


def generate(folder: Path, *flags: str) -> int:
    """Runs tools/generate.py in this process; returns its exit code."""
    spec = importlib.util.spec_from_file_location("generate", GENERATE)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.main(["--load", str(folder), "--tokenizer-type", "NullTokenizer", "--device", "cpu", *flags])


def test_a_checkpoint_of_another_layout_becomes_a_whole_model(checkpoints):
    loaded = load_model(checkpoints)
    assert loaded.iteration == 2
    assert loaded.config.parallel.tensor_model_parallel_size == 1
    assert loaded.model.embedding.word_embeddings.weight.shape == (64, 32)
    assert all(torch.isfinite(p).all() for p in loaded.model.parameters())
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_a_folder_without_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        load_model(tmp_path)


def test_greedy_sampling_takes_the_likeliest_token_each_time(model):
    ids = [3, 1, 4]
    new = sample(model, ids, 20, temperature=0)
    assert len(new) == 20
    for token in new:
        # Longer than the training length, the text is cut at its front.
        assert token == int(model(torch.tensor([ids[-16:]]))[-1, 0].argmax())
        ids.append(token)


def test_a_seed_gives_one_text_and_the_end_of_document_ends_it(model):
    texts = [sample(model, [5], 12, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert sample(model, [5], 12, seed=1, eod=texts[0][4]) == texts[0][: texts[0].index(texts[0][4])]
    with pytest.raises(ValueError, match="no token"):
        sample(model, [], 1)


def test_draws_follow_temperature_and_the_share_of_probability():
    logits, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]], torch.Generator().manual_seed(0)

    def shares(temperature: float, top_p: float) -> list[float]:
        draws = [draw(logits, temperature, top_p, generator) for _ in range(1000)]
        return [draws.count(token) / 1000 for token in range(4)]

    assert shares(1.0, 1.0) == pytest.approx([0.15, 0.5, 0.05, 0.3], abs=0.06)
    assert shares(1.0, 0.7) == pytest.approx([0, 0.625, 0, 0.375], abs=0.06)
    assert shares(1.0, 0.01) == [0, 1, 0, 0]
    squares = torch.tensor([0.15, 0.5, 0.05, 0.3]) ** 2
    assert shares(0.5, 1.0) == pytest.approx((squares / squares.sum()).tolist(), abs=0.06)


@pytest.mark.parametrize("length", [17, 40, 100])
def test_the_loss_of_a_text_counts_every_token_but_the_first_once(model, length):
    tokens = np.random.default_rng(0).integers(0, 64, length, dtype=np.uint16)
    ids, expected = torch.from_numpy(tokens.astype(np.int64)), 0.0
    for start in range(0, length - 1, 16):
        window = ids[start : start + 17]
        losses = -model(window[None, :-1])[:, 0].log_softmax(-1)
        expected += float(losses.gather(-1, window[1:, None]).sum())
    assert total_loss(model, tokens, batch_size=4) == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_of_bytes_has_eight_bits_per_byte():
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8)


def test_the_tool_prints_prompt_and_continuation(checkpoints, capsys):
    outputs = []
    for _ in range(2):
        assert generate(checkpoints, "--prompt", "3 1 4", "--max-tokens", "5", "--seed", "7") == 0
        outputs.append(capsys.readouterr().out)
    words = outputs[0].split()
    assert words[:3] == ["3", "1", "4"]
    assert 3 < len(words) <= 8
    assert outputs[1] == outputs[0]


def test_mistakes_are_one_message(checkpoints, tmp_path, capsys):
    assert generate(tmp_path / "nothing", "--prompt", "1") == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit, match="2"):
        generate(checkpoints, "--top-p", "0")
    assert "--top-p must be above 0" in capsys.readouterr().err
