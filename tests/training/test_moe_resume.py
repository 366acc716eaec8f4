"""A model with experts, stopped and resumed: bitwise in its layout, to rounding in another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import pretrain, recorded, saved_tensors, words

FEATURES = (
    "--train-iters 4 --micro-batch-size 1 --global-batch-size 4 --muon-lr 0.02 --swiglu --disable-bias-linear "
    "--num-experts 4 --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 16 --moe-aux-loss-coeff 0.01 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.01 "
    "--adam-eps 1e-3 --log-interval 1"
)
EP2 = "--expert-model-parallel-size 2"
FSDP = "--data-parallel-sharding-strategy optim_grads_params"
LAYOUTS = {
    "one": (1, ""),
    "ep2": (2, EP2),
    "ep2-tp2": (2, f"{EP2} --tensor-model-parallel-size 2 --sequence-parallel"),
    "ep2-fsdp2": (4, f"{EP2} {FSDP}"),
    "ep2-dp2": (4, EP2),
    "etp2-fsdp2": (4, f"--expert-tensor-parallel-size 2 {FSDP}"),
    "etp2-tp2": (2, "--expert-tensor-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    "dp3-of-three-experts": (3, f"{FSDP} --global-batch-size 6 --num-experts 3"),
}
TRAIN = "train/lm loss"
# One number per row at home, one vector per matrix, all momentum and a basis per matrix, nothing but momentum.
OPTIMIZERS = {
    "muon": "--optimizer muon",
    "normuon": "--optimizer normuon",
    "spectral_sphere": "--optimizer spectral_sphere",
    "dion": "--optimizer dion --dion-rank-fraction 0.5",
    "adam": "",
}


def run(pool, layout: str, folder: Path, *flags: str) -> dict[int, float]:
    ranks, parallel = LAYOUTS[layout]
    files = f"--save {folder}/run --load {folder}/run --metrics-file {folder}/metrics.jsonl"
    for outcome in pool.launch(ranks, pretrain, words(FEATURES, parallel, files, *flags)):
        assert outcome.code == 0, outcome.err
    return recorded(folder / "metrics.jsonl", TRAIN)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return saved_tensors(folder / "run" / "iter_0000004")


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ("ep2-fsdp2", "normuon"),
        pytest.param("one", "muon", marks=pytest.mark.long),
        pytest.param("ep2-tp2", "adam", marks=pytest.mark.long),
        pytest.param("ep2-dp2", "spectral_sphere", marks=pytest.mark.long),
        pytest.param("dp3-of-three-experts", "muon", marks=pytest.mark.long),
        pytest.param("etp2-fsdp2", "normuon", marks=pytest.mark.long),
        pytest.param("ep2-fsdp2", "dion", marks=pytest.mark.long),
    ],
)
def test_resumes_bitwise_in_the_same_layout(pool, tmp_path, layout, optimizer):
    whole = run(pool, layout, tmp_path / "whole", OPTIMIZERS[optimizer])
    run(pool, layout, tmp_path / "broken", OPTIMIZERS[optimizer], "--exit-interval 2")
    assert run(pool, layout, tmp_path / "broken", OPTIMIZERS[optimizer]) == whole
    want, got = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert want.keys() == got.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key
    routers = [key for key in want if key.startswith("optimizer/load/")]
    assert [key.replace("optimizer/load/", "model/") + ".expert_bias" in want for key in routers] == [True] * 2
    assert all(want[key.replace("optimizer/load/", "model/") + ".expert_bias"].any() for key in routers)


@pytest.mark.parametrize(
    ("before", "after", "optimizer"),
    [
        ("ep2", "one", "muon"),
        pytest.param("one", "ep2-fsdp2", "spectral_sphere", marks=pytest.mark.long),
        pytest.param("ep2-fsdp2", "ep2-tp2", "normuon", marks=pytest.mark.long),
        pytest.param("ep2-dp2", "ep2-fsdp2", "spectral_sphere", marks=pytest.mark.long),
        pytest.param("ep2-tp2", "ep2-dp2", "adam", marks=pytest.mark.long),
        pytest.param("ep2-dp2", "one", "normuon", marks=pytest.mark.long),
        pytest.param("etp2-fsdp2", "one", "normuon", marks=pytest.mark.long),
        pytest.param("etp2-fsdp2", "ep2-tp2", "dion", marks=pytest.mark.long),
        pytest.param("one", "etp2-tp2", "muon", marks=pytest.mark.long),
        pytest.param("etp2-tp2", "ep2-fsdp2", "normuon", marks=pytest.mark.long),
    ],
)
def test_resumes_in_another_layout(pool, tmp_path, before, after, optimizer):
    whole = run(pool, before, tmp_path / "whole", OPTIMIZERS[optimizer])
    run(pool, before, tmp_path / "broken", OPTIMIZERS[optimizer], "--exit-interval 2")
    resumed = run(pool, after, tmp_path / "broken", OPTIMIZERS[optimizer])
    assert resumed == pytest.approx(whole, rel=1e-5)
    want, got = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert {key: value.shape for key, value in want.items()} == {key: value.shape for key, value in got.items()}
    for key, value in want.items():
        if key.startswith("optimizer/load/"):
            assert torch.equal(got[key], value), key
        elif "momentum" in key or key.startswith("model/"):
            assert (got[key] - value).norm() <= 1e-3 * value.norm() + 1e-6, key
