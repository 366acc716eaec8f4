"""Which checkpoint is found, what is kept, and that a crash at any moment leaves the one before."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch

from megatron_mup import checkpoint
from megatron_mup.checkpoint import files
from megatron_mup.config import ConfigError

POINTER = "latest_checkpointed_iteration.txt"


class CrashError(BaseException):
    """Ends a save as a kill would: nothing cleans up."""


def pieces(value: float = 0.0) -> list[checkpoint.Piece]:
    return [checkpoint.Piece("model/a", torch.full((3,), value), (3,), (0,))]


def save(folder, iteration, **options):
    manifest = checkpoint.Manifest(
        iteration=iteration, consumed_samples=2 * iteration, config={}, parametrization=[], layout={"pp": 1}
    )
    return checkpoint.save(folder, pieces(float(iteration)), manifest, **options)


def value_at(path) -> float:
    loaded = pieces(-1.0)
    checkpoint.load(path, loaded)
    return loaded[0].tensor[0].item()


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_files_and_manifest(tmp_path):
    path = save(tmp_path / "new" / "folder", 123)
    assert path.name == "iter_0000123"
    assert names(tmp_path / "new" / "folder") == ["iter_0000123", POINTER]
    assert (path.parent / POINTER).read_text() == "123\n"
    values = json.loads((path / "manifest.json").read_text())
    assert values["iteration"] == 123
    assert values["versions"]["torch"] == torch.__version__
    assert values["files"] == {n: (path / n).stat().st_size for n in names(path) if n != "manifest.json"}
    assert set(values["files"]) == {".metadata", "__0_0.distcp", "rng.pt"}
    assert checkpoint.read_manifest(path).consumed_samples == 246


def test_nothing_to_find(tmp_path):
    assert checkpoint.find(tmp_path / "missing") is None
    assert checkpoint.find(tmp_path) is None
    (tmp_path / ".iter_0000001.tmp-00000000").mkdir()
    assert checkpoint.find(tmp_path) is None


def test_find_by_step(tmp_path):
    for iteration in (1, 2, 12):
        save(tmp_path, iteration)
    assert checkpoint.find(tmp_path).name == "iter_0000012"
    assert value_at(checkpoint.find(tmp_path, 2)) == 2
    with pytest.raises(ConfigError, match=r"--ckpt-step 3: .* has no such checkpoint\n.*1, 2, 12"):
        checkpoint.find(tmp_path, 3)
    (tmp_path / "iter_0000012" / "rng.pt").unlink()
    with pytest.raises(ConfigError, match=r"rng.pt: missing\n.*last good checkpoint is .*iter_0000002: --ckpt-step 2"):
        checkpoint.find(tmp_path, 12)


@pytest.mark.parametrize("pointer", [None, "", "ten\n", "77\n"])
def test_falls_back_without_a_good_pointer(tmp_path, pointer, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2)
    if pointer is None:
        (tmp_path / POINTER).unlink()
    else:
        (tmp_path / POINTER).write_text(pointer)
    assert checkpoint.find(tmp_path).name == "iter_0000002"
    assert "falling back" in caplog.text


@pytest.mark.parametrize("damage", ["shard", "truncated", "manifest", "json", "version", "whole"])
def test_falls_back_from_damage(tmp_path, damage, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    manifest = newest / "manifest.json"
    if damage == "shard":
        (newest / "__0_0.distcp").unlink()
    elif damage == "truncated":
        os.truncate(newest / "__0_0.distcp", 100)
    elif damage == "manifest":
        manifest.unlink()
    elif damage == "json":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "version":
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    else:
        shutil.rmtree(newest)
    assert value_at(checkpoint.find(tmp_path)) == 1
    assert "falling back" in caplog.text
    if damage == "whole":
        return
    with pytest.raises(ConfigError, match=r"the last good checkpoint is .*iter_0000001|wrote it") as error:
        checkpoint.load(newest, pieces())
    file = "__0_0.distcp" if damage in ("shard", "truncated") else "manifest.json"
    assert file in error.value.what


def test_refuses_when_none_is_complete(tmp_path):
    for iteration in (1, 2):
        (save(tmp_path, iteration) / "rng.pt").unlink()
    with pytest.raises(ConfigError, match="none of its checkpoints is complete"):
        checkpoint.find(tmp_path)


def test_manifest_errors_are_clear(tmp_path):
    path = save(tmp_path, 1)
    file = path / "manifest.json"
    good = json.loads(file.read_text())
    for text, message in [
        ("{", "not readable as JSON"),
        ("[]", "format version None"),
        (json.dumps({**good, "format_version": 2}), "format version 2; this megatron_mup"),
        (json.dumps({k: v for k, v in good.items() if k != "config"}), "lacks config"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            checkpoint.read_manifest(path)


def test_damage_inside_a_file_of_the_right_size(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    for name in ("__0_0.distcp", ".metadata"):
        before = (path / name).read_bytes()
        (path / name).write_bytes(bytes(len(before)))
        with pytest.raises(ConfigError, match=r"--ckpt-step 1"):
            checkpoint.load(path, pieces())
        (path / name).write_bytes(before)
    assert value_at(path) == 2


def test_keeps_the_last(tmp_path):
    for iteration in range(1, 6):
        save(tmp_path, iteration, keep_last=2)
    assert names(tmp_path) == ["iter_0000004", "iter_0000005", POINTER]


def test_keeping_counts_only_complete_ones_and_spares_later_ones(tmp_path):
    for iteration in (1, 2, 3, 9):
        save(tmp_path, iteration)
    (tmp_path / "iter_0000003" / "rng.pt").unlink()
    save(tmp_path, 4, keep_last=2)
    assert names(tmp_path) == ["iter_0000002", "iter_0000003", "iter_0000004", "iter_0000009", POINTER]
    save(tmp_path, 5, keep_last=1)
    assert names(tmp_path) == ["iter_0000005", "iter_0000009", POINTER]
    assert value_at(checkpoint.find(tmp_path)) == 5


@pytest.mark.parametrize("moment", ["write", "publish", "point_to"])
def test_a_crash_leaves_the_one_before(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)

    def crash(*_):
        raise CrashError

    with monkeypatch.context() as patched:
        # By name: `checkpoint.save` is the function.
        module = sys.modules["megatron_mup.checkpoint.save"] if moment == "write" else files
        patched.setattr(module, moment, crash)
        with pytest.raises(CrashError):
            save(tmp_path, 2)
    left = names(tmp_path)
    if moment == "point_to":
        assert left == ["iter_0000001", "iter_0000002", POINTER]
    else:
        assert left[0].startswith(".iter_0000002.tmp-")
    assert value_at(checkpoint.find(tmp_path)) == 1
    checkpoint.clean(tmp_path)
    assert [name for name in names(tmp_path) if name.startswith(".")] == []
    assert value_at(save(tmp_path, 2)) == 2
    assert names(tmp_path) == ["iter_0000001", "iter_0000002", POINTER]


def test_saving_an_iteration_again_replaces_it(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    (path / "rng.pt").unlink()
    assert value_at(save(tmp_path, 1)) == 1
    assert names(tmp_path) == ["iter_0000001", POINTER]

    rename = os.rename

    def crash_between(source, target):
        if target == path:
            raise CrashError
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", crash_between)
        with pytest.raises(CrashError):
            save(tmp_path, 1)
    assert [name for name in names(tmp_path) if name.startswith("iter")] == []
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["iter_0000001", POINTER]
    assert value_at(checkpoint.find(tmp_path)) == 1


def test_iterations_beyond_seven_digits(tmp_path):
    save(tmp_path, 9_999_999)
    save(tmp_path, 10_000_000, keep_last=2)
    (tmp_path / POINTER).unlink()
    assert checkpoint.find(tmp_path).name == "iter_10000000"
    assert list(files.checkpoints(tmp_path)) == [9_999_999, 10_000_000]
