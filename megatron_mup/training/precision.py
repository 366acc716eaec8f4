"""Whether this machine multiplies in FP8, and what a run does where it doesn't."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_mup.config import Config, ConfigError
from megatron_mup.kernels.fp8 import device_has_fp8


def settle_fp8(config: Config) -> tuple[Config, list[str]]:
    """The configuration that this machine can run, and warnings if that isn't what was asked for.

    Raises:
        ConfigError: FP8 was asked for, the device hasn't got it, and ``--fp8-fallback`` says to stop.
    """
    fp8 = config.fp8
    on_gpu = torch.cuda.is_available() and config.parallel.distributed_backend != "gloo"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if fp8.fp8_format is None or device_has_fp8(device):
        return config, []
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    if fp8.fp8_fallback == "stop":
        raise ConfigError(
            f"--fp8-format {fp8.fp8_format}",
            f"{what} has no FP8 matrix products (NVIDIA GPUs have them from compute capability 8.9 on)",
            "drop it, go on without (--fp8-fallback bf16), or emulate it slowly (--fp8-fallback emulate)",
        )
    if fp8.fp8_fallback == "emulate":
        return config, [f"{what} has no FP8: its rounding is emulated, which is slower than no FP8"]
    return replace(config, fp8=replace(fp8, fp8_format=None)), [f"{what} has no FP8: the run goes on without it"]
