"""Two GPUs under NCCL compute what one computes."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.gpu.gpu_runs import BF16, gpu_config, gpu_words, train_on_rank
from tests.runs import pretrain, recorded

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

TP = "--tensor-model-parallel-size 2"
FSDP = "--data-parallel-sharding-strategy optim_grads_params"
LAYOUTS = {
    "dp2": "",
    "tp2": TP,
    "tp2-sp": f"{TP} --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "fsdp2": FSDP,
    "fsdp2-grads": "--data-parallel-sharding-strategy optim_grads",
}
TIES = "--no-untie-embeddings-and-output-weights"
MUON = "--optimizer muon --muon-lr 0.02 --muon-ns-dtype fp32"


@pytest.fixture(scope="module")
def one_gpu(gpus):
    """What one GPU computes, by flags."""
    return functools.cache(lambda *flags: gpus.run(1, train_on_rank, gpu_config(*flags))[0])


def compare(gpus, one_gpu, layout, *flags, more="", first=1e-5, later=1e-4):
    want = one_gpu(*flags)
    for seen in gpus.run(2, train_on_rank, gpu_config(LAYOUTS[layout], more, *flags)):
        torch.testing.assert_close(seen["losses"][0], want["losses"][0], rtol=first, atol=0)
        torch.testing.assert_close(seen["norms"][0], want["norms"][0], rtol=first, atol=0)
        torch.testing.assert_close(seen["losses"], want["losses"], rtol=later, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(gpus, one_gpu, layout):
    compare(gpus, one_gpu, layout)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "fsdp2"])
def test_muon_and_tied_embeddings(gpus, one_gpu, layout):
    compare(gpus, one_gpu, layout, MUON, TIES)


@pytest.mark.parametrize("layout", ["tp2", "fsdp2"])
def test_compiled_fp32(gpus, one_gpu, layout):
    """Against eager on one GPU."""
    compare(gpus, one_gpu, layout, more="--torch-compile")


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
def test_compiled_bf16(gpus, one_gpu, layout):
    compare(gpus, one_gpu, layout, BF16, first=2e-2, later=2e-2)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "fsdp2"])
def test_runs_and_resumes_on_one_gpu(gpus, tmp_path, layout):
    """The whole program in a layout of two, and the step after it on one."""
    files = f"--save {tmp_path}/run --load {tmp_path}/run"

    def run(ranks, name, *flags):
        file = tmp_path / name
        argv = gpu_words(MUON, "--train-iters 8 --log-interval 1", f"--metrics-file {file}", *flags)
        for outcome in gpus.launch(ranks, pretrain, argv):
            assert outcome.code == 0, outcome.err
        return recorded(file, "train/lm loss")

    unbroken = run(2, "unbroken.jsonl", LAYOUTS[layout], "--exit-interval 5")
    assert list(run(2, "broken.jsonl", files, LAYOUTS[layout], "--exit-interval 4")) == [1, 2, 3, 4]
    assert run(1, "broken.jsonl", files, "--exit-interval 5") == pytest.approx(unbroken, rel=1e-5)
