"""Transformer Engine's products against PyTorch's, in bf16 and in each FP8 recipe, on one GPU and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_mup.config import Config
from megatron_mup.kernels import te_mlp
from megatron_mup.kernels.te import obstacle
from megatron_mup.parallel.mesh import Mesh
from tests.gpu.gpu_runs import (
    COMPLETEP,
    EXPERTS,
    FEATURES,
    UMUP,
    gpu_config,
    gpu_words,
    share,
    train,
    train_many_on_rank,
    train_on_rank,
)
from tests.pool import Pool
from tests.runs import pretrain, recorded, relative_error, saved_tensors, step_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
TE = "--bf16 --transformer-impl transformer_engine"
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@pytest.fixture(autouse=True)
def clean_process():
    """Each model compiles anew, or the limit of recompilations would silently make later ones eager."""
    torch._dynamo.reset()


def fp8(recipe: str, kind: str = "hybrid") -> str:
    """Flags of a recipe; skips the test where it can't run."""
    if (why := obstacle(recipe)) is not None:
        pytest.skip(why)
    return f"{TE} --fp8-format {kind} --fp8-recipe {recipe}"


def bf16() -> str:
    """Flags of the backend without FP8; skips the test where it can't run."""
    if (why := obstacle(None)) is not None:
        pytest.skip(why)
    return TE


def first_step(config: Config) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a step."""
    mesh, grads = Mesh.build(config, DEVICE), {}
    step, batch = step_of(config, mesh), share(config, mesh, 0)
    # Those of static scales lack a factor until the update.
    lacking = 1 / (batch["labels"] != -100).sum() if step.sums_tokens and not step.unit_scaled else 1

    def look(_loss: torch.Tensor, _norm: torch.Tensor) -> bool:
        grads.update({main.meta.name: main.grad * lacking for main in step.main.params})
        return True

    return step(batch, 1.0, gate=look).loss, grads


def trained(*flags: str, scheme: str = COMPLETEP, steps: int = 5) -> torch.Tensor:
    """Losses of some steps."""
    torch._dynamo.reset()
    config = gpu_config(*flags, scheme=scheme)
    return train(config, Mesh.build(config, DEVICE), steps)["losses"]


MODELS = {"completep": COMPLETEP, "umup": UMUP, "biases": f"{COMPLETEP} {FEATURES}", "experts": EXPERTS}


@pytest.mark.parametrize("model", MODELS)
def test_in_bf16_it_is_the_native_backend(process_group, model):
    (loss, grads), (want, wanted) = (first_step(gpu_config(f, scheme=MODELS[model])) for f in (bf16(), "--bf16"))
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=0)
    for name, grad in wanted.items():
        # A key's bias has no gradient in truth.
        if "linear_qkv.bias" not in name:
            assert relative_error(grads[name], grad) < 2e-2, name


@pytest.mark.parametrize("kind", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train_as_bf16(process_group, recipe, kind):
    want, seen = trained("--bf16", steps=8), trained(fp8(recipe, kind), steps=8)
    assert not torch.equal(seen, want), "nothing was cast"
    torch.testing.assert_close(seen, want, rtol=3e-2, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_in_fp8(process_group, recipe):
    """Of matrices; with those of weights in bf16 they are nearer."""
    _, want = first_step(gpu_config("--bf16"))
    mean = {}
    for flag in ("", "--no-fp8-wgrad"):
        _, grads = first_step(gpu_config(fp8(recipe), flag))
        errors = [relative_error(grads[n], g) for n, g in want.items() if "decoder" in n and g.dim() == 2]
        mean[flag] = sum(errors) / len(errors)
        assert max(errors) < 0.25, errors
    assert mean["--no-fp8-wgrad"] < mean[""]


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_compiled(process_group, recipe):
    """Around the products, which stay eager."""
    flags = bf16() if recipe is None else fp8(recipe)
    torch.testing.assert_close(trained(flags, "--torch-compile"), trained(flags), rtol=2e-2, atol=0)


def test_an_mlp_that_writes_fp8_at_once(process_group, monkeypatch):
    """Is what the library's layers make of it, but for values that were rounded to bf16 on the way."""
    flags = f"{fp8('delayed')} --attention-backend unfused"
    loss, grads = first_step(gpu_config(flags))
    monkeypatch.setattr(te_mlp, "takes", lambda x: False)
    want, wanted = first_step(gpu_config(flags))
    assert loss != want, "it was not called"
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=0)
    for name, grad in wanted.items():
        assert relative_error(grads[name], grad) < 8e-2, name  # E5M2 alone rounds by up to an eighth


@pytest.mark.parametrize("compiled", ["", "--torch-compile"])
@pytest.mark.parametrize("recipe", [None, "delayed", "tensorwise", "blockwise"])
def test_cuda_graph(process_group, recipe, compiled):
    """Scales that follow the values are computed on the device, so they move in a graph as well."""
    flags = f"{bf16() if recipe is None else fp8(recipe)} --attention-backend unfused {compiled}"
    seen, want = trained(flags, "--cuda-graph-impl local", steps=7), trained(flags, steps=7)
    torch.testing.assert_close(seen, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("micro_batch", [2, 8])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_recomputation_changes_nothing(process_group, recipe, micro_batch):
    """Scales stand still inside a step, so a layer is computed again as it was."""
    flags = [fp8(recipe), f"--micro-batch-size {micro_batch} --attention-backend unfused"]
    seen = trained(*flags, "--recompute-granularity full", steps=3)
    torch.testing.assert_close(seen, trained(*flags, steps=3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts(process_group, recipe):
    """A token between two experts may go to the other one."""
    wide = "--moe-shared-expert-intermediate-size 128"
    seen = trained(fp8(recipe), wide, scheme=EXPERTS)
    torch.testing.assert_close(seen, trained("--bf16", wide, scheme=EXPERTS), rtol=4e-2, atol=0)


def test_layers_left_in_bf16(process_group):
    flags = "--num-layers 4 --first-last-layers-bf16 --fp8-critical-bf16"
    seen, want = trained(fp8("tensorwise"), flags), trained("--bf16 --num-layers 4")
    torch.testing.assert_close(seen, want, rtol=3e-2, atol=0)


def test_evaluation_leaves_scales_alone(process_group):
    losses = []
    for evaluates in (False, True):
        config = gpu_config(fp8("delayed"), "--attention-backend unfused")
        mesh = Mesh.build(config, DEVICE)
        step = step_of(config, mesh)
        for number in range(4):
            losses.append(step(share(config, mesh, number), 1.0).loss.item())
            if evaluates:
                step.evaluate(share(config, mesh, 9))
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-4)


def run(folder: Any, name: str, *flags: str) -> dict[int, float]:
    """A whole run that saves into ``folder``, and goes on with what lies there."""
    files = f"--save {folder}/run --load {folder}/run --metrics-file {folder}/{name}.jsonl --log-interval 1"
    outcome = pretrain(gpu_words("--train-iters 6", files, *flags))
    assert outcome.code == 0, outcome.err
    return recorded(folder / f"{name}.jsonl", "train/lm loss")


@pytest.mark.parametrize("first", ["native", "delayed"])
def test_a_checkpoint_knows_no_backend(tmp_path, first):
    """One backend goes on where the other saved, from the very bits."""
    flags = {"native": "--bf16", "delayed": fp8("delayed")}
    second = "delayed" if first == "native" else "native"
    unbroken = run(tmp_path / "whole", "run", flags["native"])
    run(tmp_path / "broken", "first", flags[first], "--exit-interval 3")
    went_on = run(tmp_path / "broken", "second", flags[second])
    assert list(went_on) == [4, 5, 6]
    assert [went_on[n] for n in (4, 5, 6)] == pytest.approx([unbroken[n] for n in (4, 5, 6)], rel=3e-2)
    whole, broken = (saved_tensors(tmp_path / name / "run" / "iter_0000006") for name in ("whole", "broken"))
    assert {n: (v.shape, v.dtype) for n, v in whole.items()} == {n: (v.shape, v.dtype) for n, v in broken.items()}


def scales() -> dict[str, Any]:
    """Of recipe delayed, by direction, on a rank of a pool."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    held = FP8GlobalStateManager.quantization_state.global_scale_buffer
    return {"scales": {key.split("_")[0]: torch.cat(values).cpu() for key, values in held.items()}}


LAYOUTS = {
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "fsdp2": "--data-parallel-sharding-strategy optim_grads_params",
    "fsdp2-grads": "--data-parallel-sharding-strategy optim_grads",
    "dp2": "",
    "pp2": "--pipeline-model-parallel-size 2",
    "cp2": "--context-parallel-size 2",
}
COMPILED = "--torch-compile --recompute-granularity full"


@pytest.mark.multi_gpu
@pytest.mark.parametrize("recipe", [None, "delayed", "tensorwise", "blockwise"])
def test_two_gpus(process_group, gpus, recipe):
    compare_layouts(gpus, recipe, LAYOUTS)


@pytest.mark.multi_gpu
def test_compiled_on_two_gpus(process_group, gpus):
    compare_layouts(gpus, "delayed", {n: f"{LAYOUTS[n]} {COMPILED}" for n in ("tp2-sp", "fsdp2")})


def compare_layouts(gpus: Pool, recipe: str | None, layouts: dict[str, str]) -> None:
    """With one GPU; all in one pair of processes, which take longer to start than to train."""
    flags = bf16() if recipe is None else fp8(recipe)
    want = train(gpu_config(flags), Mesh.build(gpu_config(flags), DEVICE))
    configs = {layout: gpu_config(flags, more) for layout, more in layouts.items()}
    ranks = gpus.run(2, train_many_on_rank, configs, "cuda", scales)
    for layout in configs:
        for seen in (rank[layout] for rank in ranks):
            assert isinstance(seen, dict), seen
            torch.testing.assert_close(seen["losses"], want["losses"], rtol=2e-2, atol=0, msg=layout)
            torch.testing.assert_close(seen["norms"][0], want["norms"][0], rtol=5e-2, atol=0, msg=layout)
        if recipe == "delayed" and layout != "pp2":
            one, other = (rank[layout]["scales"] for rank in ranks)
            for direction, values in one.items():
                assert torch.equal(values, other[direction]), f"{layout}: ranks disagree"
                assert not torch.equal(values, torch.ones_like(values)), f"{layout}: nothing was measured"


@pytest.mark.multi_gpu
def test_experts_on_two_gpus(process_group, gpus):
    flags = fp8("tensorwise")
    want = train(gpu_config(flags, scheme=EXPERTS), Mesh.build(gpu_config(flags, scheme=EXPERTS), DEVICE))
    config = gpu_config(flags, "--expert-model-parallel-size 2", scheme=EXPERTS)
    for seen in gpus.run(2, train_on_rank, config):
        torch.testing.assert_close(seen["losses"], want["losses"], rtol=4e-2, atol=0)
