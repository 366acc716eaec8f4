from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_mup.data.indexed_dataset import IndexedDatasetWriter
from megatron_mup.planning import machine, packages, smoke
from megatron_mup.planning.findings import Finding, Verdict, healthy, show
from megatron_mup.planning.machine import check_data, check_limits, check_python, check_save
from megatron_mup.planning.packages import PACKAGES, check_packages
from megatron_mup.planning.smoke import check_backend
from tools import doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def without(monkeypatch):
    """Hides packages."""

    def hide(*modules: str) -> dict[str, Finding]:
        find = importlib.util.find_spec
        monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None if name in modules else find(name))
        return {finding.what: finding for finding in check_packages()}

    return hide


def test_what_a_missing_package_costs(without):
    findings = without("sentencepiece", "wandb")
    assert findings["sentencepiece"].verdict is Verdict.NOTE
    assert "SentencePieceTokenizer" in findings["sentencepiece"].text
    assert "sentencepiece" not in findings["packages"].text
    assert healthy(findings.values())


def test_a_package_that_runs_need_is_bad(without):
    assert not healthy(without("yaml").values())


def test_the_registrys_apex_is_another(monkeypatch):
    spec = importlib.util.find_spec("json")

    def find(name: str):
        if name == "apex.optimizers":
            raise ModuleNotFoundError("No module named 'apex.optimizers'")
        return spec

    monkeypatch.setattr(packages.importlib.util, "find_spec", find)
    finding = next(finding for finding in check_packages() if finding.what == "apex")
    assert "not NVIDIA's" in finding.text


def test_every_dependency_of_the_project_is_looked_for():
    text = (ROOT / "pyproject.toml").read_text()
    named = {package.name for package in PACKAGES} - {"apex", "triton"}
    assert {name for name in named if f'"{name}' not in text} == set()


def test_a_pytorch_that_is_too_old(monkeypatch):
    assert healthy(check_python())
    monkeypatch.setattr(machine.torch, "__version__", "2.9.1+cu128")
    assert not healthy(check_python())
    monkeypatch.setattr(machine.torch, "__version__", "2.11.0a0+nv26.04")
    assert healthy(check_python())


def test_data_whose_files_disagree(tmp_path):
    prefix = str(tmp_path / "corpus")
    assert check_data(prefix).verdict is Verdict.BAD
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(10, dtype=np.uint16))
    assert check_data(prefix).verdict is Verdict.GOOD
    assert "10 tokens" in check_data(prefix).text
    file = Path(f"{prefix}.bin")
    file.write_bytes(file.read_bytes()[:-4])
    assert check_data(prefix).verdict is Verdict.BAD


def test_where_checkpoints_go(tmp_path, monkeypatch):
    assert check_save(tmp_path / "runs" / "new").verdict is not Verdict.BAD
    file = tmp_path / "file"
    file.touch()
    assert check_save(file / "runs").verdict is Verdict.BAD
    monkeypatch.setattr(machine, "ENOUGH_DISK", 1 << 60)
    assert check_save(tmp_path).verdict is Verdict.NOTE


def test_little_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ENOUGH_SHARED", 1 << 60)
    shared = next(finding for finding in check_limits(tmp_path) if finding.what == str(tmp_path))
    assert shared.verdict is Verdict.BAD
    assert "--ipc=host" in shared.text
    assert check_limits(tmp_path / "none")[0].verdict is Verdict.BAD


def test_processes_that_do_not_meet_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(smoke, "PROGRAM", "import time; time.sleep(60)")
    assert "no answer within 0.5 s" in check_backend("gloo", 2, str(tmp_path), 0.5).text
    monkeypatch.setattr(smoke, "PROGRAM", "raise SystemExit('no such interface')")
    assert "no such interface" in check_backend("gloo", 1, str(tmp_path), 30).text


def test_it_says_which_line_is_bad(capsys):
    show([Finding("data", Verdict.BAD, "no [file]")], Console(width=60))
    assert capsys.readouterr().out.split() == ["bad", "data", "no", "[file]"]


def test_the_page_and_its_exit_code(tmp_path, capsys):
    assert doctor.main(["--save", str(tmp_path)]) == 0
    assert "2 processes summed a tensor" in capsys.readouterr().out
    assert doctor.main(["--quick", "--data-path", "none"]) == 1
    page = capsys.readouterr().out
    assert "none.idx" in page
    assert "summed" not in page
