"""What FP8 is refused with, and the layers that it covers."""

from __future__ import annotations

import pytest

from megatron_mup.config import ConfigError, parse_config, validate
from megatron_mup.config.fp8 import Fp8Config

UMUP = "--parametrization umup --untie-embeddings-and-output-weights --disable-bias-linear"
FP8 = "--fp8-format hybrid"
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --vocab-size 64 --seq-length 32 "
    "--mock-data --train-iters 1"
)


def check(flags: str, world_size: int = 1) -> list[str]:
    parsed = parse_config(f"{MODEL} {flags}".split())
    return validate(parsed.config, world_size, parsed.explicit)


def test_what_is_fine():
    assert check(f"{FP8} {UMUP} --first-last-layers-bf16") == []
    assert check(f"{FP8} {UMUP} --tensor-model-parallel-size 4", 4) == []


REFUSED = {
    "no unit scale": ("", "--parametrization umup or munit"),
    "mup": ("--parametrization mup", "--parametrization umup or munit"),
    "hidden": (f"{UMUP} --hidden-size 72 --kv-channels 16", "the hidden size, 72, is no multiple of 16"),
    "mlp": (f"{UMUP} --ffn-hidden-size 120", "a rank's MLP width, 120, is no multiple of 16"),
    "qkv": (f"{UMUP} --num-attention-heads 2 --kv-channels 4", "heads x head width, 8, is no multiple of 16"),
    "groups": (f"{UMUP} --num-query-groups 1 --kv-channels 4", "queries, keys and values, 24, is no multiple of 16"),
    "tokens": (f"{UMUP} --seq-length 40", "tokens in a micro-batch, 40, is no multiple of 16"),
    "nothing left": (f"{UMUP} --first-last-layers-bf16 --num-layers-at-end-in-bf16 3", "no layer is left in FP8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    flags, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        check(f"{flags} {FP8}")


def test_idle_settings_are_told():
    told = check("--fp8-recipe static --num-layers-at-start-in-bf16 2")
    assert any("--fp8-recipe" in t and "--fp8-format" in t for t in told)
    assert any("--num-layers-at-start-in-bf16" in t for t in told)


def test_layers():
    assert list(Fp8Config().layers(4)) == []
    assert list(Fp8Config(fp8_format="e4m3").layers(4)) == [0, 1, 2, 3]
    ends = Fp8Config(fp8_format="e4m3", first_last_layers_bf16=True, num_layers_at_start_in_bf16=2)
    assert list(ends.layers(4)) == [2]
