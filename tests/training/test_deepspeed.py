"""DeepSpeed's engine trains what the native one does, starts from the same bits, and shares its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_mup.models.build import build_model
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training import deepspeed_engine
from megatron_mup.training.deepspeed_engine import DeepSpeedStep
from megatron_mup.training.main import EXIT_CONFIG
from megatron_mup.training.step import TrainStep
from tests.pool import Pool
from tests.runs import VOCAB_SIZE, batch_of, config_of, pretrain, recorded, step_of, values, words

DEEPSPEED = "--distributed-engine deepspeed --zero-stage"
STAGES = ("1", "2", "3")
OFFLOAD = "--optimizer-cpu-offload"
LOSS, NORM, VALID = "train/lm loss", "train/grad norm", "validation/lm loss"
LEARNING = (
    "--train-iters 10 --micro-batch-size 1 --global-batch-size 8 --eod-token-id 5 --eod-mask-loss --adam-eps 1e-8 "
    "--lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1 --clip-grad 0.5 --hidden-dropout 0.1 "
    "--eval-interval 5 --eval-iters 1 --log-interval 1"
)
"""Two ranks take four micro-batches each a step, whose documents' ends, without loss, lie anywhere."""
PAIRS = [*(("native", s) for s in STAGES), ("3", "native"), ("2", "native"), ("1", "3"), *((s, s) for s in STAGES)]
MODELS = {
    "standard": "--position-embedding-type learned_absolute --num-query-groups 2 --qk-layernorm",
    "completep": "--parametrization completep --mup-base-hidden-size 16 --base-num-layers 1 --swiglu "
    "--untie-embeddings-and-output-weights",
}

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def pool():
    """Workers of their own: DeepSpeed replaces functions of PyTorch in a process for good, and numbers its modules on
    from run to run, so that ranks must have the same runs behind them."""
    workers = Pool()
    yield workers
    workers.close()


def run(pool, folder: Path, *flags: str, ranks: int = 2, name: str = "run") -> None:
    files = f"--metrics-file {folder}/{name}.jsonl"
    for outcome in pool.launch(ranks, pretrain, words(LEARNING, files, *flags)):
        assert outcome.code == 0, outcome.err


def curves(folder: Path, name: str = "run") -> dict[str, dict[int, float]]:
    return {curve: recorded(folder / f"{name}.jsonl", curve) for curve in (LOSS, NORM, VALID)}


@pytest.fixture(scope="module")
def native(pool, tmp_path_factory):
    """Curves of native runs, by model."""
    found = {}

    def curves_of(model: str) -> dict[str, dict[int, float]]:
        if model not in found:
            folder = tmp_path_factory.mktemp(model)
            run(pool, folder, MODELS[model])
            found[model] = curves(folder)
        return found[model]

    return curves_of


def assert_near(got: dict[str, dict[int, float]], want: dict[str, dict[int, float]], tolerance: float) -> None:
    for name, curve in want.items():
        assert got[name].keys() == curve.keys()
        for iteration, value in curve.items():
            assert got[name][iteration] == pytest.approx(value, abs=tolerance), (name, iteration)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("completep", "1"),
        ("completep", f"2 {OFFLOAD}"),
        ("completep", "3"),
        pytest.param("completep", "2", marks=pytest.mark.long),
        *(pytest.param("completep", f"{stage} {OFFLOAD}", marks=pytest.mark.long) for stage in "13"),
        *(pytest.param("standard", stage, marks=pytest.mark.long) for stage in STAGES),
        pytest.param("completep", "3 --recompute-granularity full", marks=pytest.mark.long),
        pytest.param("completep", "3 --cross-entropy-fusion-impl linear", marks=pytest.mark.long),
    ],
)
def test_losses_are_those_of_the_native_engine(pool, native, tmp_path, model, flags):
    run(pool, tmp_path, MODELS[model], DEEPSPEED, flags)
    assert_near(curves(tmp_path), native(model), 2e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(3, "--global-batch-size 12 --rampup-batch-size 6 6 18"), (4, "--global-batch-size 8")],
)
def test_more_ranks_and_a_growing_batch(tmp_path, ranks, flags):
    """Three divides no vector as two does, nor the sum of gradients without rounding."""
    workers = Pool()
    run(workers, tmp_path, flags, ranks=ranks, name="native")
    for stage in STAGES:
        run(workers, tmp_path, flags, DEEPSPEED, stage, ranks=ranks, name=stage)
        assert_near(curves(tmp_path, stage), curves(tmp_path, "native"), 2e-6)
    workers.close()


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_selective_recomputation(native, tmp_path, stage):
    workers = Pool()
    run(workers, tmp_path, MODELS["completep"], DEEPSPEED, stage, "--recompute-granularity selective")
    workers.close()
    assert_near(curves(tmp_path), native("completep"), 2e-6)


@pytest.mark.long
@pytest.mark.parametrize(("stage", "tolerance"), [("1", 1e-3), ("2", 5e-3), ("3", 5e-3)])
def test_bf16(tmp_path, stage, tolerance):
    """ZeRO-2 and 3 round the sum of each micro-batch's gradients over the ranks to bf16; ZeRO-1 doesn't, and is off
    when a weight's last fp32 bit tips it to another bf16 number."""
    workers = Pool()
    run(workers, tmp_path, "--bf16", name="native")
    run(workers, tmp_path, "--bf16", DEEPSPEED, stage)
    workers.close()
    assert_near(curves(tmp_path), curves(tmp_path, "native"), tolerance)


Weights = list[tuple[str, tuple[int, ...], torch.Tensor]]


def weights(step: TrainStep) -> Weights:
    """Name, place and copy of each of this rank's shards."""
    return [(main.meta.name, main.layout.offsets, main.value.clone()) for main in step.main.params]


def assembled(ranks: list[Weights], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole parameters from the shards of all ranks, NaN where nobody has any."""
    whole = {name: torch.full_like(value, math.nan) for name, value in like.items()}
    for name, offsets, value in (shard for shards in ranks for shard in shards):
        whole[name][tuple(slice(o, o + n) for o, n in zip(offsets, value.shape, strict=True))] = value
    return whole


def some_steps(flags: str) -> tuple[Weights, Weights, list[tuple[bool, float]]]:
    """A step, two that are refused, the second with a broken gradient on one rank, and a step.

    Returns:
        Initial and last weights; of each refused step whether it left everything as it was, and its gradient norm.
    """
    config = config_of(MODELS["completep"], flags)
    mesh = Mesh.build(config, torch.device("cpu"))
    step = DeepSpeedStep(build_model(config, VOCAB_SIZE, mesh), config, mesh)
    step.initialise()
    initial, refused = weights(step), []

    def batch(number: int) -> dict[str, torch.Tensor]:
        return {name: part.chunk(mesh.dp_size)[mesh.dp_rank] for name, part in batch_of(config, number).items()}

    def state() -> list[torch.Tensor]:
        moments = [tensor for _, tensor in step.optimizer.state_tensors().values()]
        return [tensor.clone() for tensor in [*moments, *(main.value for main in step.main.params), *step.main.steps]]

    def refuse(_loss: torch.Tensor, _norm: torch.Tensor) -> bool:
        return False

    step(batch(0), 1.0)
    before = state()
    for broken in (False, True):
        hook = step.model.decoder.register_forward_hook(lambda _module, _inputs, out: out * math.nan)
        if not broken or mesh.dp_rank == 0:
            hook.remove()
        norm = step(batch(1), 1.0, gate=refuse).grad_norm.item()
        hook.remove()
        refused.append((all(map(torch.equal, before, state())), norm))
    step(batch(2), 1.0)
    assert step.optimizer.state_scalars() == {"step": 2}
    return initial, weights(step), refused


@pytest.mark.parametrize("flags", [*STAGES, f"2 {OFFLOAD}", pytest.param(f"3 {OFFLOAD}", marks=pytest.mark.long)])
def test_initial_weights_and_refused_steps(pool, lone_mesh, flags):
    """Bitwise the native run's initial weights; a refused step leaves weights and state to the bit, and no trace."""
    config = config_of(MODELS["completep"])
    native = step_of(config, lone_mesh)
    first, last, refused = zip(*pool.run(2, some_steps, f"{DEEPSPEED} {flags}"), strict=True)
    initial = values(native)
    for name, value in assembled(first, initial).items():
        assert torch.equal(value, initial[name]), name
    for (finite, norm), (broken, broken_norm) in refused:
        assert finite
        assert math.isfinite(norm)
        assert broken
        assert not math.isfinite(broken_norm)
    for number in (0, 2):
        native(batch_of(config, number), 1.0)
    final = values(native)
    for name, value in assembled(last, initial).items():
        torch.testing.assert_close(value, final[name], atol=1e-6, rtol=1e-5, msg=name)


ENGINES = {"native": "", **{stage: f"{DEEPSPEED} {stage}" for stage in STAGES}}


@pytest.mark.parametrize(
    ("saves", "loads"),
    [
        ("1", "native"),
        ("2", "3"),
        *(pytest.param(saves, loads, marks=pytest.mark.long) for saves, loads in PAIRS),
    ],
)
def test_runs_go_on_in_another_engine(pool, native, tmp_path, saves, loads):
    folder = f"--save {tmp_path}/run --load {tmp_path}/run"
    run(pool, tmp_path, MODELS["completep"], folder, ENGINES[saves], "--exit-interval 4")
    run(pool, tmp_path, MODELS["completep"], folder, ENGINES[loads])
    assert_near(curves(tmp_path), native("completep"), 2e-6)


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(deepspeed_engine.importlib.util, "find_spec", lambda _name: None)
    outcome = pretrain(words(DEEPSPEED, "1"))
    assert outcome.code == EXIT_CONFIG
    assert "megatron-mup[deepspeed]" in outcome.err
