"""The tools of hyperparameter transfer, from command line to files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

TOY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --disable-bias-linear "
    "--seq-length 16 --vocab-size 64 --make-vocab-size-divisible-by 8 --micro-batch-size 2 --global-batch-size 4 "
    "--mock-data --num-workers 0 --init-method-std 0.1 --lr 1e-2"
)


def call(tool: str, words: str) -> tuple[int, str]:
    """A tool's exit code and what it printed, in a worker of the pool."""
    import importlib

    sys.path.insert(0, str(ROOT / "tools"))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = importlib.import_module(tool).main(words.split())
    return code, out.getvalue()


def summary(folder: Path) -> dict[tuple[str, str, str], str]:
    with open(folder / "summary.csv") as file:
        return {(r["parametrization"], r["optimizer"], r["axis"]): r["verdict"] for r in csv.DictReader(file)}


def test_coord_check_writes_tables_pictures_and_a_verdict(pool, tmp_path):
    words = f"--widths 32,64 --depths 1,2 --steps 2 --parametrization standard,mup --output {tmp_path} {TOY}"
    code, out = pool.launch(1, call, "coord_check", words)[0]
    assert code == 1, out
    assert summary(tmp_path)["standard", "adam", "width"] == "FAILED"
    assert summary(tmp_path).keys() >= {("mup", "adam", "width"), ("mup", "adam", "depth")}
    for name in ("coordinates.csv", "verdicts.csv"):
        assert (tmp_path / "mup-adam" / name).stat().st_size > 1000
    for name in ("width.png", "depth.png"):
        assert (tmp_path / "mup-adam" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"])
def test_coord_check_finds_the_same_in_every_layout(pool, tmp_path, layout):
    found = []
    for ranks, flags in ((1, ""), (2, layout)):
        folder = tmp_path / str(ranks)
        words = f"--widths 32,64 --steps 1 --parametrization mup --optimizer muon --output {folder} {TOY} {flags}"
        codes = {code for code, _ in pool.launch(ranks, call, "coord_check", words)}
        assert len(codes) == 1
        with open(folder / "mup-muon" / "coordinates.csv") as file:
            rows = list(csv.DictReader(file))
        found.append({(r["hidden_size"], r["quantity"], r["name"], r["step"]): float(r["value"]) for r in rows})
    assert found[1] == pytest.approx(found[0], rel=2e-3, abs=1e-9)


def test_coord_check_refuses(pool, tmp_path):
    assert "at least two sizes" in pool.launch(1, call, "coord_check", f"--widths 32 {TOY}")[0][1]
    code, out = pool.launch(1, call, "coord_check", f"--widths 32,40 {TOY} --output {tmp_path}")[0]
    assert code == 2
    assert "not a whole number" in out


def test_sweep_runs_resumes_and_reports(pool, tmp_path):
    words = (
        f"--widths 32,64 --axis lr:-1:1:4 --output {tmp_path} {TOY} --parametrization mup --train-iters 12 "
        "--eval-interval 100 --eval-iters 2"
    )
    code, out = pool.launch(1, call, "transfer_sweep", f"{words} --minutes 0")[0]
    assert (code, "6 trials of the next round are left" in out) == (1, True), out
    code, out = pool.launch(1, call, "transfer_sweep", words)[0]
    assert code == 0, out
    assert out.count(" s)") == 6
    assert "over width at layers 2" in out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "curves").glob("*.jsonl"))) == 6
    code, out = pool.launch(1, call, "transfer_sweep", words)[0]
    assert (code, out.count(" s)")) == (0, 0), "nothing is run again"
    code, out = pool.launch(1, call, "transfer_sweep", f"{words} --seeds 2 --worker 1 --of 2")[0]
    assert code == 1, "the other worker's share is left"
    assert 0 < out.count(" s)") < 6
    assert sorted(path.name for path in (tmp_path / "trials").iterdir()) == ["worker-1-of-2.jsonl", "worker.jsonl"]


def test_a_divergence_is_a_result(pool, tmp_path):
    words = f"--axis lr:0:0 --output {tmp_path} {TOY} --train-iters 10 --lr 1e12 --clip-grad 0 --init-method-std 10"
    code, out = pool.launch(1, call, "transfer_sweep", words)[0]
    assert code == 0, out
    assert ": iteration " in out, "the iteration at which it diverged"
    (record,) = [json.loads(line) for line in (tmp_path / "trials" / "worker.jsonl").read_text().splitlines()]
    assert record["status"] == "diverged"


def test_make_proxy_writes_a_recipe_that_works(tmp_path):
    from make_proxy import main

    from megatron_mup.config import parse_config

    file = tmp_path / "proxy.yaml"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(f"--config {ROOT}/examples/llama-1b.yaml --width-ratio 4 --depth-ratio 4 --output {file}".split())
    assert code == 0
    assert "does not" in out.getvalue()
    assert yaml.safe_load(file.read_text())["parametrization"]["base_num_layers"] == 6
    proxy = parse_config(["--config", str(file)]).config
    assert (proxy.model.hidden_size, proxy.model.num_layers) == (512, 6)
    assert os.path.getsize(file) < 2000


def test_make_proxy_of_a_model_without_a_base(tmp_path):
    """u-muP has no base sizes: what is printed works."""
    from make_proxy import main

    from megatron_mup.config import parse_config, validate

    file = tmp_path / "proxy.yaml"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        umup = "--parametrization umup --disable-bias-linear --untie-embeddings-and-output-weights --lr 1"
        sizes = "--num-layers 4 --hidden-size 256 --num-attention-heads 8"
        code = main(f"{umup} {sizes} --width-ratio 4 --output {file}".split())
    assert code == 0
    assert "mup_base" not in out.getvalue() + file.read_text()
    assert "umup" in file.read_text()
    validate(parse_config(f"--config {file} --mock-data --vocab-size 64 --train-iters 1".split()).config, 1)
