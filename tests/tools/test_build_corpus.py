from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "build_corpus.py"


def build(source: Path | None, output: Path) -> subprocess.CompletedProcess[str]:
    flags = [] if source is None else ["--source", str(source)]
    command = [sys.executable, str(TOOL), "--output-dir", str(output), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def paths(file: Path) -> list[str]:
    return [json.loads(line)["path"] for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "library"
    for i in range(100):
        (folder / f"package{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"package{i % 3}" / f"module{i}.py").write_text(f"# The number is {i}, é.\n\n", encoding="utf-8")
    return folder


def test_two_corpora_of_the_standard_library_are_equal(tmp_path):
    outputs = [tmp_path / "one", tmp_path / "two"]
    assert [build(None, output).returncode for output in outputs] == [0, 0]
    for name in ("train.jsonl", "validation.jsonl"):
        first, second = ((output / name).read_bytes() for output in outputs)
        assert first == second
        assert len(first) > 100_000
    train, validation = (set(paths(outputs[0] / f"{part}.jsonl")) for part in ("train", "validation"))
    assert not train & validation
    assert not any("site-packages" in path or "/test" in path for path in train | validation)


def test_the_validation_part_does_not_depend_on_the_other_files(library, tmp_path):
    build(library, tmp_path / "all")
    whole = paths(tmp_path / "all" / "validation.jsonl")
    assert 0 < len(whole) < 20
    for i in range(100):
        if f"package{i % 3}/module{i}.py" not in whole and i != 99:
            (library / f"package{i % 3}" / f"module{i}.py").unlink()
    build(library, tmp_path / "few")
    assert paths(tmp_path / "few" / "validation.jsonl") == whole


def test_texts_are_kept_as_they_are_and_what_is_no_text_is_left_out(library, tmp_path):
    texts = {"a.py": "\tx = 1  \r\n\n\nprint('…')", "b.py": "pass\n", "empty.py": " \n", "twice.py": "pass\n"}
    for name, text in texts.items():
        (library / name).write_bytes(text.encode())
    (library / "latin.py").write_bytes(b"x = '\xe9'\n")
    for folder in ("test", "site-packages", "__pycache__"):
        (library / folder).mkdir()
        (library / folder / "z.py").write_text("unwanted = True\n")
    build(library, tmp_path / "out")
    parts = [(tmp_path / "out" / f"{part}.jsonl").read_text(encoding="utf-8") for part in ("train", "validation")]
    found = {record["path"]: record["text"] for part in parts for record in map(json.loads, part.splitlines())}
    assert found.keys() & {"a.py", "b.py", "empty.py", "twice.py", "latin.py"} == {"a.py", "b.py"}
    assert found["a.py"] == texts["a.py"]
    assert len(found) == 102


def test_a_folder_without_sources_is_an_error(tmp_path):
    outcome = build(tmp_path, tmp_path / "out")
    assert outcome.returncode == 2
    assert "too few Python sources" in outcome.stderr


def test_several_folders_make_one_corpus(tmp_path, library):
    other = tmp_path / "other"
    other.mkdir()
    (other / "own.py").write_text("# Only here.\n", encoding="utf-8")
    (other / "copy.py").write_text("# The number is 7, é.\n\n", encoding="utf-8")
    command = [
        sys.executable,
        str(TOOL),
        "--output-dir",
        str(tmp_path / "corpus"),
        "--source",
        str(library),
        str(other),
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0
    found = [path for part in ("train", "validation") for path in paths(tmp_path / "corpus" / f"{part}.jsonl")]
    assert "other/own.py" in found
    assert "library/package1/module7.py" in found
    assert "other/copy.py" not in found, "the same text as another file"
    assert len(found) == 101
