"""Triton's interpreter, for kernels on machines without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def interpreted(file: str, code: str) -> None:
    """Runs code beside a test module, in a process of its own: Triton reads the environment when it is imported."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(file).parent, env=env)
