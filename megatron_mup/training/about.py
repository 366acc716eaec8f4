"""What a record says about its run, each time the run starts."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from megatron_mup import __version__
from megatron_mup.config import Config, to_dict
from megatron_mup.parallel.mesh import Mesh


def about_run(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Time of the start (UTC), number of ranks, device, versions and configuration, of JSON's types only."""
    device = mesh.device
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": mesh.world.size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "megatron_mup": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "configuration": to_dict(config),
    }
