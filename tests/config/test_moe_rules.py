"""Settings of experts that cannot work together are refused before anything starts."""

import pytest
from config_cases import warnings

from megatron_mup.config import Config, ConfigError, MoEConfig, parse_config, validate

BASE = "--mock-data --vocab-size 256 --train-iters 10 --num-experts 8 --disable-bias-linear"


def check(flags: str, world_size: int = 1) -> list[str]:
    parsed = parse_config(f"{BASE} {flags}".split())
    return validate(parsed.config, world_size, parsed.explicit)


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ("", 1),
        ("--moe-layer-freq 2 --moe-ffn-hidden-size 96 --moe-shared-expert-intermediate-size 64", 1),
        ("--expert-model-parallel-size 8 --tensor-model-parallel-size 2 --sequence-parallel", 8),
        ("--expert-model-parallel-size 2 --use-torch-fsdp2 --num-distributed-optimizer-instances 2", 8),
        ("--expert-tensor-parallel-size 2 --expert-model-parallel-size 2 --optimizer muon", 4),
        ("--expert-tensor-parallel-size 4 --tensor-model-parallel-size 2 --sequence-parallel", 4),
        ("--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.1", 1),
        ("--moe-router-topk 4 --moe-router-num-groups 4 --moe-router-group-topk 2", 1),
        ("--moe-router-topk 1 --moe-router-pre-softmax --moe-expert-capacity-factor 1.5", 1),
        ("--moe-aux-loss-coeff 0.01 --moe-router-load-balancing-type seq_aux_loss --moe-z-loss-coeff 1e-3", 1),
        ("--optimizer muon --muon-moe-router", 1),
        ("--parametrization mup --mup-base-hidden-size 64 --mup-base-moe-ffn-hidden-size 48", 1),
    ],
)
def test_what_works_passes_without_a_word(flags, world_size):
    assert check(flags, world_size) == []


@pytest.mark.parametrize(
    ("flags", "world_size", "parts"),
    [
        ("--no-disable-bias-linear", 1, ["--num-experts 8", "--disable-bias-linear"]),
        ("--moe-router-topk 9", 1, ["--moe-router-topk 9", "8 or less"]),
        ("--moe-router-topk 1", 1, ["--moe-router-topk 1", "--moe-router-pre-softmax"]),
        ("--moe-router-enable-expert-bias", 1, ["sigmoid"]),
        ("--moe-router-num-groups 2", 1, ["--moe-router-num-groups 2", "--moe-router-group-topk"]),
        ("--moe-router-num-groups 3 --moe-router-group-topk 1", 1, ["--moe-router-num-groups 1, 2, 4 or 8"]),
        ("--moe-router-num-groups 2 --moe-router-group-topk 4", 1, ["--moe-router-group-topk 2 or less"]),
        ("--moe-router-num-groups 8 --moe-router-group-topk 1", 1, ["--moe-router-group-topk 2"]),
        ("--moe-pad-expert-input-to-capacity", 1, ["--moe-expert-capacity-factor"]),
        ("--moe-layer-freq banana", 1, ["--moe-layer-freq banana", "pattern"]),
        ("--moe-layer-freq [0]*12", 1, ["no layer has experts"]),
        ("--moe-layer-freq [0]*3+[1]*8", 1, ["11 layers", "--num-layers 12"]),
        ("--moe-layer-freq __import__('os')", 1, ["pattern"]),
        ("--expert-model-parallel-size 3", 3, ["--num-experts 8", "1, 2, 4 or 8"]),
        ("--expert-model-parallel-size 4", 2, ["--expert-model-parallel-size 4", "2 ranks", "1 or 2"]),
        (
            "--expert-model-parallel-size 4 --use-torch-fsdp2 --num-distributed-optimizer-instances 2",
            4,
            ["--num-distributed-optimizer-instances 2", "--expert-model-parallel-size 1 or 2"],
        ),
        ("--tensor-model-parallel-size 2", 2, ["--sequence-parallel"]),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --swiglu --moe-shared-expert-intermediate-size 24",
            2,
            ["--moe-shared-expert-intermediate-size 16 or 32"],
        ),
        ("--bf16 --moe-ffn-hidden-size 100", 1, ["--moe-ffn-hidden-size 96 or 104"]),
        ("--parametrization everett", 1, ["--parametrization everett", "experts"]),
        (
            "--optimizer dion --dion-compressed-sync --clip-grad 0",
            2,
            ["--dion-compressed-sync", "experts"],
        ),
        (
            "--expert-tensor-parallel-size 2",
            1,
            ["1 rank", "--expert-tensor-parallel-size 1"],
        ),
        (
            "--expert-tensor-parallel-size 2 --expert-model-parallel-size 4",
            4,
            ["--expert-model-parallel-size 4", "--expert-tensor-parallel-size 2", "4 ranks", "1 or 2"],
        ),
        (
            "--expert-tensor-parallel-size 2 --use-torch-fsdp2 --num-distributed-optimizer-instances 2",
            2,
            ["--num-distributed-optimizer-instances 2", "--expert-tensor-parallel-size 2"],
        ),
        (
            "--expert-tensor-parallel-size 4 --moe-ffn-hidden-size 90",
            4,
            ["--moe-ffn-hidden-size 90", "--expert-tensor-parallel-size 4", "--moe-ffn-hidden-size 88 or 92"],
        ),
        (
            "--expert-tensor-parallel-size 2 --bf16 --moe-ffn-hidden-size 88",
            2,
            ["--expert-tensor-parallel-size 2", "a multiple of 16", "--moe-ffn-hidden-size 80 or 96"],
        ),
        (
            "--expert-tensor-parallel-size 2 --bf16 --transformer-impl transformer_engine --fp8-format e4m3 "
            "--fp8-recipe tensorwise",
            2,
            ["--expert-tensor-parallel-size 2", "--transformer-impl local"],
        ),
    ],
)
def test_what_cannot_work_is_refused(flags, world_size, parts):
    with pytest.raises(ConfigError) as caught:
        check(flags, world_size)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("flag", ["--expert-model-parallel-size", "--expert-tensor-parallel-size"])
def test_expert_ranks_need_experts(flag):
    with pytest.raises(ConfigError, match="there are no experts"):
        warnings(flag, "2", world_size=2)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--moe-router-bias-update-rate 0.1", "there is no expert bias"),
        ("--moe-router-load-balancing-type aux_loss", "--moe-aux-loss-coeff is 0"),
        ("--moe-router-load-balancing-type none --moe-aux-loss-coeff 1", "the balancing type is none"),
        ("--moe-token-drop-policy position", "no token is dropped"),
        ("--moe-router-score-function sigmoid --moe-router-pre-softmax", "the scores are sigmoids"),
    ],
)
def test_what_changes_nothing_is_told(flags, told):
    assert [told in warning for warning in check(flags)] == [True]


def test_without_experts_their_settings_change_nothing():
    assert all("there are no experts" in w for w in warnings("--moe-router-topk", "4", "--moe-aux-loss-coeff", "1"))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("1", "111111"),
        ("2", "101010"),
        ("[0]*2+[1]*4", "001111"),
        ("3*([0]+[1])", "010101"),
        ("[0, 1, 1, 0, 1, 1]", "011011"),
    ],
)
def test_layer_patterns(text, layers):
    moe = MoEConfig(num_experts=2, moe_layer_freq=text)
    assert "".join(str(int(has)) for has in moe.layers(6)) == layers


def test_the_default_width_is_the_mlps():
    assert Config().expert_ffn_size == Config().model.ffn_size
