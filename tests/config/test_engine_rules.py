"""What DeepSpeed's engine is refused for, before anything starts."""

from __future__ import annotations

import pytest

from megatron_mup.config import ConfigError, parse_config, validate
from tests.runs import words

LOCAL = "--non-persistent-ckpt-type local --non-persistent-local-ckpt-dir there"
DEEPSPEED = "--distributed-engine deepspeed"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--tensor-model-parallel-size 2", "data-parallel ranks"),
        ("--context-parallel-size 2", "data-parallel ranks"),
        ("--pipeline-model-parallel-size 2", "data-parallel ranks"),
        ("--num-experts 4 --disable-bias-linear", "experts"),
        ("--use-torch-fsdp2", "--zero-stage"),
        ("--data-parallel-sharding-strategy optim_grads", "--zero-stage"),
        ("--optimizer muon", "AdamW"),
        ("--bf16 --main-params-dtype bf16", "fp32 weights"),
        ("--torch-compile", "compiled"),
        ("--parametrization umup --disable-bias-linear --untie-embeddings-and-output-weights", "gradients"),
        ("--diagnostics-interval 2", "diagnostics"),
        ("--check-weight-hash-across-dp-replicas-interval 2", "replicas"),
        (f"{LOCAL} --non-persistent-save-interval 2 --save here", "one way to cut"),
    ],
)
def test_is_refused_with_the_reason(flags, why):
    config = parse_config(words(flags)).config
    validate(config, 2)
    config = parse_config(words(flags, DEEPSPEED)).config
    with pytest.raises(ConfigError, match=why) as refused:
        validate(config, 2)
    assert "--distributed-engine native" in str(refused.value)


@pytest.mark.parametrize("stage", [0, 4])
def test_stages(stage):
    with pytest.raises(ConfigError, match="--zero-stage"):
        validate(parse_config(words(DEEPSPEED, f"--zero-stage {stage}")).config, 2)


def test_zero_changes_nothing_in_a_native_run():
    parsed = parse_config(words("--zero-stage 2 --optimizer-cpu-offload"))
    told = validate(parsed.config, 2, parsed.explicit)
    assert len([line for line in told if "the engine is native" in line]) == 2
    parsed = parse_config(words(DEEPSPEED, "--zero-stage 2 --optimizer-cpu-offload"))
    assert validate(parsed.config, 2, parsed.explicit) == []
