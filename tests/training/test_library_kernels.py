"""Kernels of other libraries are asked for by flag, and refused where they can't run; so is a schedule."""

from __future__ import annotations

import sys

import pytest
import torch

from megatron_mup.config import ConfigError, parse_config, validate
from megatron_mup.kernels import libraries
from megatron_mup.training import precision
from megatron_mup.training.main import EXIT_CONFIG
from tests.runs import pretrain, words

FLAGS = ["--adam-impl apex", "--adam-impl transformer_engine", "--norm-impl apex", "--attention-backend flash4 --bf16"]


@pytest.mark.parametrize("flag", FLAGS)
def test_not_on_cpus(flag):
    outcome = pretrain(words(flag))
    assert outcome.code == EXIT_CONFIG
    assert f"{flag.removesuffix(' --bf16')}: the run is on CPUs" in outcome.err
    assert "fix: drop the flag" in outcome.err


@pytest.mark.parametrize(("library", "module"), [("apex", "amp_C"), ("transformer_engine", "transformer_engine")])
def test_not_without_the_library(monkeypatch, library, module):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "_on_gpu", lambda _: True)
    for name in ("apex", "apex.optimizers"):  # as if its Python part were there
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setitem(sys.modules, module, None)
    assert libraries.obstacle(library) is not None
    with pytest.raises(ConfigError, match=rf"(?s)--adam-impl {library}: .*{module}.* install the library"):
        precision.check_libraries(parse_config(words(f"--adam-impl {library}")).config)


def test_fused_adam_keeps_its_moments_in_fp32():
    with pytest.raises(ConfigError, match=r"--adam-impl apex.*--main-params-dtype bf16.*moments in fp32"):
        validate(parse_config(words("--adam-impl apex --bf16 --main-params-dtype bf16")).config, 1)
    with pytest.raises(ConfigError, match=r"--adam-impl apex, --exp-avg-dtype bf16: .*moments in fp32"):
        validate(parse_config(words("--adam-impl apex --exp-avg-dtype bf16")).config, 1)
    validate(parse_config(words("--adam-impl apex --bf16 --exp-avg-sq-dtype fp32")).config, 1)


def test_unused_where_nothing_is_trained_by_adamw():
    parsed = parse_config(words("--adam-impl apex --optimizer muon --scalar-optimizer lion"))
    assert any("--adam-impl" in warning for warning in validate(parsed.config, 1, parsed.explicit))


def test_flash_attention_4_is_told_apart_from_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    for capability, why in (((8, 0), "no kernel for some GPU"), ((9, 0), "flash_attn")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert why in libraries.obstacle("flash4")


@pytest.mark.parametrize(
    ("flags", "missing", "settled"),
    [
        ("", None, "flash4"),
        ("", "not installed", "auto"),
        ("--attention-backend fused", None, "fused"),
        ("--window-size 4", None, "auto"),
        ("--context-parallel-size 2", None, "auto"),
        ("--attention-dropout 0.1", None, "auto"),
        ("--kv-channels 96", None, "auto"),
        ("--deterministic-mode", None, "auto"),
    ],
)
def test_auto_takes_flash_attention_4_where_it_can(monkeypatch, flags, missing, settled):
    monkeypatch.setattr(precision, "_on_gpu", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(libraries, "obstacle", lambda _: missing)
    config = parse_config(words(f"--bf16 --kv-channels 64 {flags}")).config
    assert precision.settle_attention(config).training.attention_backend == settled
