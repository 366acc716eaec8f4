from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tools import plan

ROOT = Path(__file__).parents[2]
LLAMA_405B = (
    "--num-layers 126 --hidden-size 16384 --ffn-hidden-size 53248 --num-attention-heads 128 --num-query-groups 8 "
    "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 128256 --bf16 --torch-compile "
    "--seq-length 8192 --global-batch-size 512 --tensor-model-parallel-size 8 --sequence-parallel "
    "--pipeline-model-parallel-size 16 --data-parallel-sharding-strategy optim_grads"
)
SMALL = "--num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 1024 --vocab-size 32000 --bf16"


def planned(capsys, *flags: str) -> tuple[int, dict]:
    code = plan.main(" ".join([*flags, "--json"]).split())
    return code, json.loads(capsys.readouterr().out)


def test_405_billion_parameters_on_1024_gpus_in_seconds(capsys):
    started = time.process_time()
    code, found = planned(capsys, LLAMA_405B, "--world-size 1024 --optimizer muon --suggest 3")
    assert time.process_time() - started < 30
    assert found["parameters"] == 405_853_388_800
    assert found["flops_per_token"] == pytest.approx(6 * 404e9, rel=0.1)
    assert found["bubble"] == pytest.approx(15 / (64 + 15))
    assert len(found["memory"]) == 16
    assert code == 1, "nothing is recomputed, and the front holds 16 micro-batches"
    assert len(found["suggestions"]) == 3
    steps = [other["seconds_per_step"] for other in found["suggestions"]]
    assert steps == sorted(steps)
    assert all(other["fits"] for other in found["suggestions"])


def test_suggestions_are_flags_that_give_what_they_promise(capsys):
    run = f"{SMALL} --world-size 8 --global-batch-size 64"
    _, found = planned(capsys, run, "--suggest 4")
    for other in found["suggestions"]:
        code, again = planned(capsys, run, other["flags"], "--suggest 0")
        assert code == 0
        assert again["seconds_per_step"] == other["seconds_per_step"]
        assert again["reserved"] == other["reserved"]


def test_the_page_has_all_parts(capsys):
    flags = f"{SMALL} --world-size 16 --optimizer muon --pipeline-model-parallel-size 2 --global-batch-size 32"
    assert plan.main(flags.split()) == 0
    page = capsys.readouterr().out
    for part in ("parameters", "FLOP per token", "optimizer state", "fits", "MFU", "bubble", "data, replicas"):
        assert part in page
    for part in ("times the mean", "assumed:", "layouts that fit"):
        assert part in page


def test_a_gpu_that_is_too_small(capsys):
    code, found = planned(capsys, SMALL, "--world-size 1 --gpu-memory 1 --suggest 2")
    assert code == 1
    assert not found["fits"]
    assert found["suggestions"] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--world-size 3 --tensor-model-parallel-size 2", "--tensor-model-parallel-size 2"),
        ("--world-size 1 --node-rate 0", "--node-rate 0"),
        ("--world-size 1 --hiden-size 8", "--hidden-size"),
    ],
)
def test_mistakes(capsys, flags, said):
    assert plan.main(f"{SMALL} {flags}".split()) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_recipes_need_no_run_length_and_no_data(capsys):
    recipe = ROOT / "examples" / "llama-1b.yaml"
    code, found = planned(capsys, f"--config {recipe} --vocab-size 32000 --world-size 8 --suggest 1")
    assert code == 0
    assert found["suggestions"]
