"""A changed byte or a lost file is found and named, and the last good checkpoint is taken instead."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_mup import checkpoint
from megatron_mup.config import ConfigError
from tests.checkpoint.cases import config_of, load_latest, save_known
from tests.checkpoint.convert.hf_cases import tool


def flip(file: Path, place: int) -> None:
    """Changes one bit."""
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 4
    file.write_bytes(content)


def inspect(capsys, *words: object) -> tuple[int, str]:
    code = tool("inspect_checkpoint").main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.fixture
def folder(pool, tmp_path) -> Path:
    pool.run(2, save_known, "fsdp2", str(tmp_path), [1, 2, 3])
    return tmp_path


def test_what_is_good_is_called_good(folder, capsys):
    facts = json.loads((folder / "iter_0000003" / "manifest.json").read_text())
    assert set(facts["checksums"]) == set(facts["files"]) == {".metadata", "__0_0.distcp", "__1_0.distcp", "rng.pt"}
    code, out = inspect(capsys, "verify", folder)
    assert code == 0
    assert out.count(": good, ") == 3
    assert out.endswith("last good checkpoint: " + str(folder / "iter_0000003") + "\n")


@pytest.mark.parametrize(("name", "place"), [("__0_0.distcp", 1000), ("__1_0.distcp", -1), ("rng.pt", 700)])
def test_a_flipped_bit(pool, folder, capsys, name, place):
    file = folder / "iter_0000003" / name
    flip(file, place)
    code, out = inspect(capsys, "verify", folder)
    assert code == 1
    assert "iter_0000003: DAMAGED, " in out
    assert f"{file}: damaged: its checksum is " in out
    assert f"last good checkpoint: {folder / 'iter_0000002'}" in out
    # A run takes the one before it, on whatever ranks; asked for this one it refuses.
    assert pool.run(2, load_latest, "tp2", str(folder)) == [("iter_0000002", [])] * 2
    with pytest.raises(
        ConfigError, match=r"its checksum is .*\n.*the last good checkpoint is .*iter_0000002"
    ) as caught:
        checkpoint.find(folder, 3)
    assert str(file) in str(caught.value)


def test_a_missing_shard(pool, folder, capsys):
    (folder / "iter_0000003" / "__1_0.distcp").unlink()
    flip(folder / "iter_0000002" / "__0_0.distcp", 5000)
    code, out = inspect(capsys, "verify", folder)
    assert code == 1
    assert "iter_0000003/__1_0.distcp: missing" in out
    assert f"last good checkpoint: {folder / 'iter_0000001'}" in out
    assert checkpoint.find(folder).name == "iter_0000001"
    flip(folder / "iter_0000001" / "__0_0.distcp", 5000)
    assert "last good checkpoint: none" in inspect(capsys, "verify", folder)[1]
    with pytest.raises(ConfigError, match="none of its checkpoints is complete"):
        checkpoint.find(folder)


def test_checkpoints_of_older_versions_load(folder, capsys):
    for path in folder.glob("iter_*"):
        facts = json.loads((path / "manifest.json").read_text())
        del facts["checksums"]
        (path / "manifest.json").write_text(json.dumps(facts))
    assert checkpoint.find(folder).name == "iter_0000003"
    assert "it has no checksums" in inspect(capsys, "verify", folder)[1]


def test_show_tensors_and_recipe(folder, capsys, tmp_path_factory):
    code, out = inspect(capsys, "show", folder)
    assert code == 0
    assert "iteration 3, 24 samples consumed" in out
    assert "dp_shard 2" in out
    assert "num_layers 3" in out
    assert "other checkpoints beside it: 1, 2" in out
    code, out = inspect(capsys, "tensors", folder, "--match", "layers.1.mlp.linear_fc1.weight")
    rows = [line for line in out.splitlines()[1:] if "model/" in line]
    assert len(rows) == 1
    rms, largest, dtype, shape, _ = rows[0].split()
    assert 0.9 < float(rms) < 1.1
    assert 2 < float(largest) < 6
    assert (dtype, shape) == ("float32", "64x24")
    code, out = inspect(capsys, "recipe", folder)
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(out)
    from megatron_mup.config import parse_config

    assert parse_config(["--config", str(file)]).config.model == config_of("one").model
    assert inspect(capsys, "show", os.devnull)[0] == 2
