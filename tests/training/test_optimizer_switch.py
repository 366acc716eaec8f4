"""A run that changes from AdamW to Muon: resumed around the change, and in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import pretrain, recorded, saved_tensors, words

FLAGS = (
    "--train-iters 6 --micro-batch-size 1 --global-batch-size 4 --optimizer muon --muon-lr 0.02 --swiglu "
    "--optimizer-switch-at 3 --optimizer-switch-carry-state --muon-scale-mode match_rms_adamw --print-optimizer-plan "
    "--log-interval 1"
)
LAYOUTS = {
    "one": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "fsdp2": (2, "--data-parallel-sharding-strategy optim_grads_params"),
}
LOSS = "train/lm loss"


def run(pool, layout: str, folder: Path, *flags: str) -> str:
    """Runs main on the layout's ranks, from the folder's checkpoint if there is one; what rank 0 printed."""
    ranks, parallel = LAYOUTS[layout]
    files = f"--save {folder}/run --load {folder}/run --metrics-file {folder}/metrics.jsonl"
    outcomes = pool.launch(ranks, pretrain, words(FLAGS, parallel, files, *flags))
    for outcome in outcomes:
        assert outcome.code == 0, outcome.err
    return outcomes[0].out


@pytest.fixture(scope="module")
def one_rank(pool, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    printed = run(pool, "one", folder)
    # Both tables, and the moment of the change.
    before, after = printed.split("from iteration 3 on:")
    assert "from iteration 0 on:" in before
    assert " muon" not in before.split("total")[0]
    assert " muon" in after.split("total")[0]
    _, changed = printed.split("from iteration 3 on the optimizer is muon")
    assert "matrices in 1 chunks" in changed
    return folder


@pytest.mark.parametrize(
    ("layout", "stops"),
    [
        ("one", (2, 3, 4)),
        ("fsdp2", (3,)),
        pytest.param("fsdp2", (2, 4), marks=pytest.mark.long),
        pytest.param("tp2", (3,), marks=pytest.mark.long),
        pytest.param("pp2", (3,), marks=pytest.mark.long),
    ],
)
def test_resumes_around_the_change(pool, one_rank, tmp_path, layout, stops):
    for stop in stops:
        run(pool, layout, tmp_path, f"--exit-interval {stop}")
    run(pool, layout, tmp_path)
    got, want = (recorded(folder / "metrics.jsonl", LOSS) for folder in (tmp_path, one_rank))
    assert got == (want if layout == "one" else pytest.approx(want, rel=1e-4))
    if layout == "one":
        tensors, wanted = (saved_tensors(folder / "run" / "iter_0000006") for folder in (tmp_path, one_rank))
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], value) for key, value in wanted.items())
