"""What Transformer Engine's products are refused with, and what a machine without it says."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.config import Config, ConfigError, parse_config, validate
from megatron_mup.kernels import te
from megatron_mup.training.precision import settle_fp8

TE = "--transformer-impl transformer_engine --bf16"
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --vocab-size 64 --seq-length 32 "
    "--mock-data --train-iters 1"
)
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def parsed(flags: str, world_size: int = 1) -> tuple[Config, list[str]]:
    parsed = parse_config(f"{MODEL} {flags}".split())
    return parsed.config, validate(parsed.config, world_size, parsed.explicit)


def test_what_is_fine():
    assert parsed(TE)[1] == []
    assert parsed(f"{TE} --recompute-granularity full --torch-compile")[1] == []
    assert parsed(f"{TE} --cuda-graph-impl local")[1] == []
    for recipe in ("delayed", "tensorwise"):
        assert parsed(f"{TE} --fp8-format hybrid --fp8-recipe {recipe} --cuda-graph-impl local")[1] == []
    for recipe in ("delayed", "tensorwise", "mxfp8"):
        assert parsed(f"{TE} --fp8-format hybrid --fp8-recipe {recipe} --no-fp8-wgrad")[1] == []
    wide = "--hidden-size 128 --micro-batch-size 4 --fp8-recipe blockwise --tensor-model-parallel-size 1"
    assert parsed(f"{TE} --fp8-format e4m3 {wide}")[1] == []
    assert parsed(f"{TE} --fp8-format e4m3 --fp8-recipe delayed --fp8-amax-history-len 16 --fp8-margin 1")[1] == []


REFUSED = {
    "fp32": ("--transformer-impl transformer_engine", "add --bf16"),
    "selective": (f"{TE} --recompute-granularity selective", "--recompute-granularity selective"),
    "deepspeed": (f"{TE} --distributed-engine deepspeed", "--distributed-engine deepspeed"),
    "graphs": (f"{TE} --fp8-format hybrid --fp8-recipe mxfp8 --cuda-graph-impl local", "--cuda-graph-impl local"),
    "static": (f"{TE} --fp8-format hybrid", "--fp8-recipe static"),
    "local": ("--bf16 --fp8-format hybrid --fp8-recipe delayed", "add --transformer-impl transformer_engine"),
    "emulated": (
        f"{TE} --fp8-format hybrid --fp8-recipe delayed --fp8-fallback emulate",
        "only static FP8 is emulated",
    ),
    "gather": (f"{TE} --fp8-format hybrid --fp8-recipe delayed --fp8-param-gather", "FSDP2 gathers bf16"),
    "blocks": (f"{TE} --fp8-format hybrid --fp8-recipe blockwise", "the hidden size, 64, is no multiple of 128"),
    "mxfp8": (
        f"{TE} --fp8-format e4m3 --fp8-recipe mxfp8 --seq-length 48",
        "in a micro-batch, 48, is no multiple of 32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    flags, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        parsed(flags)


def test_a_schedule_with_two_backward_halves():
    flags = "--pipeline-model-parallel-size 2 --pipeline-schedule ZBVZeroBubble --global-batch-size 8"
    with pytest.raises(ConfigError, match="can't be taken in two halves"):
        parsed(f"{TE} {flags}", 2)


def test_idle_settings_are_told():
    told = " ".join(parsed("--fp8-margin 1 --fp8-fallback bf16")[1])
    assert "--fp8-margin 1 changes nothing" in told
    assert "--fp8-fallback bf16 changes nothing" in told
    told = parsed(f"{TE} --fp8-format hybrid --fp8-recipe tensorwise --fp8-amax-history-len 4")[1]
    assert ["--fp8-amax-history-len" in sentence for sentence in told] == [True]
    assert parsed(f"{TE} --fp8-fallback bf16")[1] == []


def test_the_reason_comes_before_the_cure(monkeypatch):
    """Installing it is advised where that would help."""
    config = parsed(f"{TE} --distributed-backend auto")[0]
    for there, obstacle, reason, cure in (
        (False, None, "this machine has no CUDA device", "run it where there is an NVIDIA GPU"),
        (True, "importing it failed: boom", "importing it failed", "install it"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(te, "obstacle", lambda recipe, obstacle=obstacle: obstacle)
        with pytest.raises(ConfigError, match=reason) as caught:
            settle_fp8(config)
        assert cure in str(caught.value)
        assert ("install" in str(caught.value)) == there


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_without_the_library(recipe):
    """On CPUs it can't run: one sentence, or a run in bf16 that says so."""
    fp8 = "" if recipe is None else f"--fp8-format hybrid --fp8-recipe {recipe}"
    flags = f"{TE} {fp8} --distributed-backend gloo --hidden-size 128 --micro-batch-size 4"
    with pytest.raises(ConfigError, match=r"--transformer-impl transformer_engine.*can't be used: (this|--dist)"):
        settle_fp8(parsed(flags)[0])
    config, told = settle_fp8(parsed(f"{flags} --fp8-fallback bf16")[0])
    assert config.training.transformer_impl == "local"
    assert config.fp8.fp8_format is None
    assert ["WITHOUT FP8" in sentence for sentence in told] == [recipe is not None]
