"""Failures of one rank are the same clear error on all, and cost nothing that was saved before."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_mup import checkpoint
from megatron_mup.checkpoint import dcp
from megatron_mup.config import Config, ConfigError, ModelConfig, OptimizerConfig, ScheduleConfig, to_dict
from tests.checkpoint.cases import Run, config_of, fill, load_error, load_latest, save_known

POINTER = "latest_checkpointed_iteration.txt"


def save_failing(layout: str, folder: str, how: str, rank: int) -> str:
    """Saves iteration 2 while something fails on one rank."""
    run = Run(config_of(layout))
    fill(run.pieces(), 2)
    mine = run.mesh.world.get_rank() == rank
    undo = _break(how) if mine else lambda: None
    try:
        run.save(folder, 2, keep_last=1)
    except ConfigError as error:
        return str(error)
    finally:
        undo()
    return ""


def _break(how: str) -> Any:
    if how == "no space":
        whole = dcp.FileSystemWriter.write_data

        def fail(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "__1_0.distcp")

        dcp.FileSystemWriter.write_data = fail
        return lambda: setattr(dcp.FileSystemWriter, "write_data", whole)
    if how == "file too large":
        # The kernel refuses bytes beyond the limit, in the middle of a shard.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    whole_text = checkpoint.files.write_text

    def full(file: Path, _text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    checkpoint.files.write_text = full
    return lambda: setattr(checkpoint.files, "write_text", whole_text)


@pytest.mark.parametrize(
    ("how", "rank", "message"),
    [
        ("no space", 1, "on rank 1, No space left on device"),
        ("no space", 0, "on rank 0, No space left on device"),
        ("file too large", 1, "on rank 1, File too large"),
        ("manifest", 0, "No space left on device"),
    ],
)
def test_a_failed_save_costs_nothing(pool, tmp_path, how, rank, message):
    pool.run(2, save_known, "fsdp2", str(tmp_path), [1])
    errors = pool.run(2, save_failing, "fsdp2", str(tmp_path), how, rank)
    assert errors[0] == errors[1]
    assert f"--save {tmp_path}: the checkpoint can't be written: {message}" in errors[0]
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", POINTER]
    assert pool.run(2, load_latest, "tp2", str(tmp_path)) == [("iter_0000001", [])] * 2
    assert pool.run(2, save_failing, "fsdp2", str(tmp_path), "nothing fails", 99) == ["", ""]
    assert pool.run(2, load_latest, "tp2", str(tmp_path)) == [("iter_0000002", [])] * 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which needs root")
def test_a_disk_that_is_really_full(pool, tmp_path):
    path = Path(pool.run(2, save_known, "fsdp2", str(tmp_path / "trial"), [1])[0])
    kilobytes = sum(file.stat().st_size for file in path.iterdir()) * 3 // 2 // 1024
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("can't mount here")
    try:
        pool.run(2, save_known, "fsdp2", str(disk), [1])
        errors = pool.run(2, save_failing, "fsdp2", str(disk), "nothing fails", 99)
        assert errors[0] == errors[1]
        assert "No space left on device" in errors[0]
        assert sorted(os.listdir(disk)) == ["iter_0000001", POINTER]
        assert pool.run(2, load_latest, "dp2", str(disk)) == [("iter_0000001", [])] * 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written(pool, tmp_path):
    (tmp_path / "file").write_text("")
    errors = pool.run(2, save_failing, "dp2", str(tmp_path / "file" / "folder"), "nothing fails", 99)
    assert errors[0] == errors[1]
    assert "Not a directory" in errors[0]


def save_unshared(layout: str, folder: str) -> str:
    """Rank 1 sees another disk."""
    run = Run(config_of(layout))
    real = Path.is_dir
    if run.mesh.world.get_rank() == 1:
        Path.is_dir = lambda self: False
    try:
        run.save(folder, 1)
    except ConfigError as error:
        return str(error)
    finally:
        Path.is_dir = real
    return ""


def test_a_folder_that_not_all_ranks_see(pool, tmp_path):
    errors = pool.run(2, save_unshared, "dp2", str(tmp_path))
    assert errors[0] == errors[1]
    assert "rank 1 on" in errors[0]
    assert "file system that all nodes share" in errors[0]
    assert os.listdir(tmp_path) == []


def test_a_shard_that_is_deleted_or_cut_short(pool, tmp_path):
    path = Path(pool.run(2, save_known, "fsdp2", str(tmp_path), [1, 2])[0])
    os.truncate(path / "__1_0.distcp", 1000)
    assert pool.run(2, load_latest, "dp2", str(tmp_path)) == [("iter_0000001", [])] * 2
    (tmp_path / "iter_0000001" / "__0_0.distcp").unlink()
    errors = pool.run(2, load_error, "dp2", str(tmp_path), {})
    assert errors[0] == errors[1]
    assert "__1_0.distcp: damaged: it has 1,000 bytes of" in errors[0]
    assert "none of its checkpoints is complete" in errors[0]


@pytest.fixture(scope="module")
def three_layers(pool, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("architecture"))
    pool.run(2, save_known, "fsdp2", folder, [1])
    return folder


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_layers": 4}, "--num-layers was 3 and is 4; it lacks model/decoder.layers.3"),
        ({"num_layers": 2}, "--num-layers was 3 and is 2; model/decoder.layers.2"),
        ({"hidden_size": 32}, "--hidden-size was 24 and is 32; model/"),
        ({"vocab_size": 103}, "--vocab-size was 101 and is 103; model/embedding.word_embeddings.weight is [101, 24]"),
        ({"untie_embeddings_and_output_weights": True}, "--untie-embeddings-and-output-weights was False and is True"),
        ({"qk_layernorm": False}, "--qk-layernorm was True and is False"),
    ],
)
def test_a_checkpoint_of_another_architecture(pool, three_layers, model, message):
    errors = pool.run(2, load_error, "tp2", three_layers, model)
    assert errors[0] == errors[1]
    assert "a checkpoint of another architecture: " + message in errors[0]


def load_with(folder: str, optimizer: str) -> str:
    config = config_of("one")
    run = Run(Config(model=config.model, optimizer=OptimizerConfig(optimizer=optimizer)))
    try:
        checkpoint.load(checkpoint.find(folder), run.pieces(), run.config)
    except ConfigError as error:
        return str(error)
    return ""


def save_weights(folder: str) -> None:
    Run(config_of("one")).save(folder, 1, optimizer=False)


def test_optimizer_state_of_another_kind_or_none(pool, tmp_path):
    pool.run(1, save_known, "one", str(tmp_path / "muon"), [1])
    (error,) = pool.run(1, load_with, str(tmp_path / "muon"), "adam")
    assert "a checkpoint of another optimizer: --optimizer was muon and is adam" in error
    assert "--no-load-optim" in error
    pool.run(1, save_weights, str(tmp_path / "bare"))
    (error,) = pool.run(1, load_with, str(tmp_path / "bare"), "muon")
    assert "without optimizer state (--no-save-optim)" in error


def test_compare_configs():
    base = Config(model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=101))
    spelt_out = Config(
        model=ModelConfig(
            num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=256, num_query_groups=4, kv_channels=16
        )
    )
    assert checkpoint.compare_configs(to_dict(base), spelt_out) == []
    other = Config(model=ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4, hidden_dropout=0.1))
    assert checkpoint.compare_configs(to_dict(base), other) == [("--num-layers", 2, 3)]
    saved = to_dict(base)
    saved["model"]["setting_of_the_future"] = 1
    saved["section_of_the_future"] = {"a": 1}
    assert checkpoint.compare_configs(saved, base) == []
    assert checkpoint.compare_configs({}, Config()) == []
    faster = Config(model=base.model, optimizer=OptimizerConfig(lr=1e-2), schedule=ScheduleConfig(lr_warmup_iters=5))
    assert checkpoint.compare_configs(to_dict(base), faster) == []
    flags = [flag for flag, _, _ in checkpoint.compare_configs(to_dict(base), faster, "schedule")]
    assert {"--lr", "--lr-warmup-iters"} <= set(flags)
    assert "--lr was" in checkpoint.told_differences(
        checkpoint.compare_configs(to_dict(base), faster, "schedule"), most=9
    )
