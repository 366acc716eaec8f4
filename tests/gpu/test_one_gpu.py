"""One GPU: the CPU's numbers in fp32, eager's numbers when compiled, a whole run, and its resumption."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.checkpoint.background import BackgroundSaver
from megatron_mup.checkpoint.manifest import Manifest
from megatron_mup.checkpoint.state import Piece, checkpoint_pieces
from megatron_mup.kernels.libraries import obstacle
from megatron_mup.parallel.mesh import Mesh
from tests.gpu.gpu_runs import (
    BF16,
    COMPLETEP,
    EXPERTS,
    FEATURES,
    MUNIT,
    UMUP,
    first_step,
    gpu_config,
    gpu_words,
    share,
    train,
)
from tests.runs import pretrain, recorded, relative_error, saved_tensors, step_of

pytestmark = pytest.mark.gpu

OPTIMIZERS = {"adam": "", "muon": "--optimizer muon --muon-lr 0.02 --muon-ns-dtype fp32"}


@pytest.fixture(autouse=True)
def clean_process():
    """Each model compiles anew, or the limit of recompilations would silently make later ones eager."""
    torch._dynamo.reset()
    yield
    # main turns it on for a whole process.
    torch.use_deterministic_algorithms(False)


def close(seen, want, tolerance):
    torch.testing.assert_close(seen["losses"], want["losses"], rtol=tolerance, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("features", ["", FEATURES], ids=["llama", "features"])
def test_fp32_equals_the_cpu(meshes, optimizer, features):
    """Dropout included, whose masks don't know the device."""
    config = gpu_config(features, OPTIMIZERS[optimizer])
    seen = {kind: train(config, mesh) for kind, mesh in meshes.items()}
    for name, value in seen["cpu"]["initial"].items():
        assert torch.equal(seen["cuda"]["initial"][name], value), f"initial {name}"
    # Newton-Schulz magnifies the rounding of directions that hardly have a gradient.
    close(seen["cuda"], seen["cpu"], 1e-5 if optimizer == "adam" else 1e-4)
    torch.testing.assert_close(seen["cuda"]["losses"][0], seen["cpu"]["losses"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(seen["cuda"]["norms"][0], seen["cpu"]["norms"][0], rtol=1e-5, atol=0)
    for name, value in seen["cpu"]["weights"].items():
        # A key's bias has no gradient in truth; it moves by rounding.
        if value.dim() > 1:
            assert relative_error(seen["cuda"]["weights"][name], value) < 1e-4, name


OTHER_MODELS = {"experts": EXPERTS, "umup": UMUP, "munit": MUNIT}


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_other_models_equal_the_cpu(process_group, model):
    config = gpu_config(scheme=OTHER_MODELS[model])
    seen = {kind: train(config, Mesh.build(config, torch.device(kind))) for kind in ("cpu", "cuda")}
    close(seen["cuda"], seen["cpu"], 1e-4)
    torch.testing.assert_close(seen["cuda"]["norms"][0], seen["cpu"]["norms"][0], rtol=1e-5, atol=0)


def test_experts_by_dion(process_group):
    """The CPU's losses, and launched the same as replayed from a graph."""
    flags = "--optimizer dion --muon-lr 0.02 --muon-ns-dtype fp32"
    config, launched = (gpu_config(flags, more, scheme=EXPERTS) for more in ("", "--no-optimizer-cuda-graph"))
    meshes = {kind: Mesh.build(config, torch.device(kind)) for kind in ("cpu", "cuda")}
    replayed = train(config, meshes["cuda"], 6)
    close(replayed, train(config, meshes["cpu"], 6), 1e-3)
    close(replayed, train(launched, meshes["cuda"], 6), 1e-4)


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_other_models_compiled_in_bf16(process_group, model):
    """Grouped products and unit scales, against fp32."""
    mesh = Mesh.build(gpu_config(scheme=OTHER_MODELS[model]), torch.device("cuda"))
    plain, compiled = (train(gpu_config(flag, scheme=OTHER_MODELS[model]), mesh, 5) for flag in ("", BF16))
    close(compiled, plain, 3e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_compiled_fp32_equals_eager(meshes, optimizer):
    eager, compiled = (
        train(gpu_config(OPTIMIZERS[optimizer], flag), meshes["cuda"]) for flag in ("", "--torch-compile")
    )
    close(compiled, eager, 1e-5 if optimizer == "adam" else 1e-4)
    torch.testing.assert_close(compiled["norms"][0], eager["norms"][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("rotated", ["", "--rotary-percent 0.5"])
@pytest.mark.parametrize(("precision", "tolerance"), [("", 1e-4), ("--bf16", 3e-2)])
def test_gradients_of_rotated_projections_compiled(meshes, precision, tolerance, rotated):
    """Without norms in between queries, keys and values have a kernel of their own for their gradient."""
    flags = ("--no-qk-layernorm", precision, rotated)
    want, got = (first_step(gpu_config(*flags, flag), meshes["cuda"])["grads"] for flag in ("", "--torch-compile"))
    for name, grad in want.items():
        assert relative_error(got[name], grad) < tolerance, name


@pytest.mark.parametrize("features", ["", FEATURES], ids=["llama", "features"])
def test_compiled_bf16_equals_eager(meshes, features):
    eager, compiled = (train(gpu_config(features, flag), meshes["cuda"], 5) for flag in ("--bf16", BF16))
    close(compiled, eager, 2e-2)
    close(eager, train(gpu_config(features), meshes["cuda"], 5), 2e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheme", [COMPLETEP, UMUP], ids=["completep", "umup"])
@pytest.mark.parametrize("compiled", ["", "--torch-compile"])
def test_a_graph_changes_nothing(meshes, optimizer, scheme, compiled):
    """Three steps before the capture, four from it."""
    flags = (OPTIMIZERS[optimizer], compiled)
    eager, graphed = (
        train(gpu_config(*flags, impl, scheme=scheme), meshes["cuda"], 7) for impl in ("", "--cuda-graph-impl local")
    )
    close(graphed, eager, 1e-5)
    torch.testing.assert_close(graphed["norms"], eager["norms"], rtol=1e-4, atol=0)


def test_a_graph_is_captured_anew_for_other_batches(meshes):
    """As a growing batch size has them."""
    config, mesh = gpu_config("--cuda-graph-impl local --bf16"), meshes["cuda"]
    step, plain = step_of(config, mesh), step_of(gpu_config("--bf16"), mesh)
    for number in range(10):
        batch = share(config, mesh, number)
        if number < 5:
            batch = {name: value[:4] for name, value in batch.items()}
        seen, want = step(batch, 1.0, request=number), plain(batch, 1.0)
        torch.testing.assert_close(seen.loss, want.loss, rtol=1e-3, atol=0)
        assert seen.request.item() == number


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_changes_nothing(meshes, granularity):
    flags = f"--recompute-granularity {granularity}"
    plain, recomputed = (train(gpu_config(flag), meshes["cuda"], 2) for flag in ("", flags))
    close(recomputed, plain, 1e-6)


def test_recomputation_compiled(meshes):
    """Sums in bf16 may be fused otherwise."""
    flags = "--recompute-granularity selective"
    plain, recomputed = (train(gpu_config(BF16, flag), meshes["cuda"], 2) for flag in ("", flags))
    close(recomputed, plain, 2e-2)


@pytest.mark.parametrize("backend", ["flash", "flash4", "fused", "unfused"])
def test_attention_kernels(meshes, backend):
    if backend == "flash4" and (why := obstacle(backend)) is not None:
        pytest.skip(why)
    seen, plain = (
        train(gpu_config("--bf16", f"--attention-backend {name}"), meshes["cuda"]) for name in (backend, "auto")
    )
    close(seen, plain, 2e-2)


def test_no_memory_left_behind(meshes):
    """Steps after the first few allocate nothing that stays."""
    config = gpu_config("--bf16")
    step, held = step_of(config, meshes["cuda"]), []
    for number in range(4):
        step(share(config, meshes["cuda"], number), 1.0)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2] == held[3]


def files(folder):
    return f"--save {folder}/run --load {folder}/run --metrics-file {folder}/metrics.jsonl --log-interval 1"


def test_run_from_start_to_end(tmp_path):
    flags = "--train-iters 20 --eval-interval 10 --eval-iters 2 --optimizer muon --muon-lr 0.02 --lr 3e-3"
    outcome = pretrain(gpu_words(flags, BF16, files(tmp_path)))
    assert outcome.code == 0, outcome.err
    losses = recorded(tmp_path / "metrics.jsonl", "train/lm loss")
    assert losses[20] < losses[1] - 0.5
    assert list(recorded(tmp_path / "metrics.jsonl", "validation/lm loss")) == [10, 20]


def test_resumes_bitwise(tmp_path):
    flags = f"--train-iters 6 --optimizer muon --muon-lr 0.02 {BF16} --deterministic-mode"
    for folder, parts in (("whole", [""]), ("broken", ["--exit-interval 3", ""])):
        for part in parts:
            outcome = pretrain(gpu_words(flags, files(tmp_path / folder), part))
            assert outcome.code == 0, outcome.err
    curves = [recorded(tmp_path / name / "metrics.jsonl", "train/lm loss") for name in ("whole", "broken")]
    assert curves[0] == curves[1]
    whole, broken = (saved_tensors(tmp_path / name / "run" / "iter_0000006") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    for key, value in whole.items():
        assert torch.equal(broken[key], value), key


def test_saving_in_the_background_while_training_goes_on(meshes, tmp_path, monkeypatch):
    """The device copies late, and the optimizer waits for it."""
    step = step_of(gpu_config("--bf16 --main-params-dtype fp32"), meshes["cuda"])
    step(share(step.config, step.mesh, 0), 1.0)
    pieces = checkpoint_pieces(step.main.params, step.optimizer.state_tensors())
    want = {piece.key: piece.tensor.cpu() for piece in pieces}

    def late(piece: Piece) -> torch.Tensor:
        torch.cuda._sleep(5_000_000)  # milliseconds, on the stream that copies
        return piece.tensor

    monkeypatch.setattr(Piece, "value", late)
    saver = BackgroundSaver()
    manifest = Manifest(iteration=1, consumed_samples=0, config={}, parametrization=[], layout={})
    step.before_update = saver.before_update
    saver.prepare(pieces)
    saver.start(tmp_path, pieces, manifest, None, None, lambda _: None)
    for number in (1, 2):
        step(share(step.config, step.mesh, number), 1.0)
    assert not torch.equal(pieces[0].tensor.cpu(), want[pieces[0].key])
    saver.finish()
    assert all(copy.is_pinned() for copy in saver._copies._tensors.values())
    saved = saved_tensors(tmp_path / "iter_0000001")
    assert saved.keys() == want.keys()
    assert all(torch.equal(saved[key], value) for key, value in want.items())
