"""Transformer Engine's layers around a stand-in for the library: what it is told, and that the rest is the native
layers' own."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from megatron_mup.checkpoint.whole import alone
from megatron_mup.config import Config
from megatron_mup.kernels import te_mlp
from megatron_mup.kernels.swiglu import plain_swiglu
from megatron_mup.layers.mlp import MLP
from megatron_mup.layers.te import TEMLP
from megatron_mup.models.build import build_model
from megatron_mup.parallel.mesh import Mesh
from tests.fake_te import installed
from tests.gpu.gpu_runs import COMPLETEP, FEATURES, UMUP, gpu_config, share, train
from tests.runs import step_of

TE = "--bf16 --transformer-impl transformer_engine"
SMALL = "--hidden-size 128 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2 --seq-length 64"
FP8 = "--fp8-format hybrid --fp8-recipe delayed"
PRODUCTS = 8
"""Of two layers."""
SCALES = [("scales", "forward"), ("scales", "backward")]


def te_train(config: Config) -> dict[str, Any]:
    """A few steps on this rank of a pool, with the stand-in if the configuration asks for the library."""
    with installed():
        return train(config, Mesh.build(config, torch.device("cpu")), 2)


LAYOUTS = {
    "alone": (1, ""),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "fsdp2": (2, "--data-parallel-sharding-strategy optim_grads_params"),
}
MODELS = {"completep": COMPLETEP, "umup": UMUP, "biases": f"{COMPLETEP} {FEATURES}"}


CORE = {("tp2-sp", "umup"), ("fsdp2", "biases")}
CASES = [
    pytest.param(layout, model, marks=[] if (layout, model) in CORE else pytest.mark.long)
    for layout in LAYOUTS
    for model in MODELS
]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_with_exact_products_it_is_the_native_backend(pool, layout, model):
    """Factors, collectives, biases and gathered weights included: to the bit, but for the place of a bias."""
    ranks, flags = LAYOUTS[layout]
    config = {flag: gpu_config(SMALL, flags, flag, scheme=MODELS[model]) for flag in ("--bf16", TE)}
    want, seen = (pool.run(ranks, te_train, each)[0] for each in config.values())
    for name, values in want["weights"].items():
        if model == "biases":
            torch.testing.assert_close(seen["weights"][name], values, rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(seen["weights"][name], values), name


def train_together(config: Config) -> dict[str, Any]:
    """The same where an MLP is taken together, by exact products."""

    def exact(x: torch.Tensor, _: Any, weights: tuple[torch.Tensor, torch.Tensor], run: int) -> torch.Tensor:
        return F.linear(plain_swiglu(F.linear(x, weights[0]), run), weights[1])

    with mock.patch.multiple(te_mlp, takes=lambda x: True, swiglu_mlp=exact):
        return te_train(config)


@pytest.mark.long
def test_an_mlp_taken_together_in_a_layout(pool):
    """Its collectives, and the weights' gradients, to the bit."""
    config = gpu_config(SMALL, LAYOUTS["tp2-sp"][1], TE, FP8)
    want, seen = (pool.run(2, call, config)[0] for call in (te_train, train_together))
    for name, values in want["weights"].items():
        assert torch.equal(seen["weights"][name], values), name


@pytest.mark.parametrize(
    ("flags", "scheme", "together"),
    [
        (FP8, COMPLETEP, True),
        ("", COMPLETEP, False),
        (f"{FP8} --no-fp8-wgrad", COMPLETEP, False),
        (f"{FP8} --fp8-recipe tensorwise", COMPLETEP, False),
        (f"{FP8} --fp8-critical-bf16", COMPLETEP, False),
        (f"{FP8} --no-disable-bias-linear", COMPLETEP, False),
        (f"{FP8} --no-swiglu", COMPLETEP, False),
        (FP8, UMUP, False),
    ],
)
def test_which_mlps_are_taken_together(lone_mesh, flags, scheme, together):
    model = build_model(gpu_config(SMALL, TE, flags, scheme=scheme), 128, lone_mesh)
    assert [isinstance(m, TEMLP) for m in model.modules() if isinstance(m, MLP)] == [together] * 2


def told(lone_mesh, *flags: str) -> list[Any]:
    """What the library is told in a step, an evaluation, and a second step."""
    config = gpu_config(SMALL, TE, *flags)
    with installed() as diary:
        step = step_of(config, lone_mesh)
        batch = share(config, lone_mesh, 0)
        step(batch, 1.0)
        diary.append("evaluation")
        step.evaluate(batch)
        diary.append("step")
        step(batch, 1.0)
        return list(diary)


def products(*first: bool | None, wgrad: bool = True) -> list[Any]:
    return [("product", each, False, wgrad) for each in first for _ in range(PRODUCTS)]


def test_a_step_casts_weights_once_and_scales_stand_still_inside(lone_mesh):
    """Four micro-batches; the first step's values are looked at before they are trained on."""
    passes = products(True, False, False, False)
    diary = told(lone_mesh, FP8)
    evaluation, step = diary.index("evaluation"), diary.index("step")
    assert diary[:evaluation] == [("reset",), *passes, *SCALES, *passes, *SCALES]
    assert diary[evaluation + 1 : step] == products(None, None, None, None)
    assert diary[step + 1 :] == [*passes, *SCALES]


def test_one_micro_batch_keeps_no_weights(lone_mesh):
    diary = told(lone_mesh, "--fp8-format hybrid --fp8-recipe tensorwise --micro-batch-size 8")
    assert diary[: diary.index("evaluation")] == [("reset",), *products(None), *SCALES]


def test_recomputation_casts_no_weight_again(lone_mesh):
    flags = "--fp8-format e4m3 --fp8-recipe tensorwise --micro-batch-size 8 --recompute-granularity full"
    diary = told(lone_mesh, flags)
    assert diary[: diary.index("evaluation")] == [("reset",), *products(True, False), *SCALES]


def test_gradients_of_weights_in_bf16(lone_mesh):
    """The library sees weights that want no gradient; they have one all the same, the native one."""
    flags = "--fp8-format hybrid --fp8-recipe tensorwise --no-fp8-wgrad --micro-batch-size 8"
    with installed() as diary:
        seen = train(gpu_config(SMALL, TE, flags), lone_mesh, 1)
        assert products(None, wgrad=False) == [entry for entry in diary if entry[0] == "product"]
        # The product is one of transposes, so this is no comparison to the bit.
        want = train(gpu_config(SMALL, "--bf16"), lone_mesh, 1)
    torch.testing.assert_close(seen["norms"], want["norms"], rtol=1e-2, atol=0)


def test_layers_that_fp8_leaves_out_are_native(lone_mesh):
    flags = "--fp8-format hybrid --fp8-recipe tensorwise --micro-batch-size 8"
    diary = told(lone_mesh, flags, "--num-layers 3 --first-last-layers-bf16 --fp8-critical-bf16")
    assert len([entry for entry in diary if entry[0] == "product"]) == 3 * 2


def test_inference_takes_pytorchs_products():
    assert alone(gpu_config(TE)).training.transformer_impl == "local"
