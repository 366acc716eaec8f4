"""One GPU: the grouped product against its twin, a layer for which the host never waits, backward in halves."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels.grouped import grouped_linear, grouped_linear_reference
from megatron_mup.layers.factory import LayerFactory
from megatron_mup.parallel.mesh import ALONE
from tests.gpu.gpu_runs import COMPLETEP, EXPERTS, gpu_config, share
from tests.one_rank_pipeline import split_passes, stages_of, whole_passes
from tests.runs import model_of, relative_error

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
PADDED = "--moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity"


@pytest.mark.parametrize("counts", [[7, 0, 130, 59], [0, 0, 0, 196], [1, 64, 3, 128]], ids=str)
def test_grouped_product_equals_its_twin(counts):
    """Groups of any size, none too; forward and backward."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows = torch.randn(sum(counts), 64, generator=generator, device=DEVICE)
    weights = torch.randn(len(counts), 96, 64, generator=generator, device=DEVICE)
    grad = torch.randn(sum(counts), 96, generator=generator, device=DEVICE)
    found = []
    for function, dtype in ((grouped_linear, torch.bfloat16), (grouped_linear_reference, torch.float32)):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (rows, weights)]
        output = function(*leaves, torch.tensor(counts, device=DEVICE))
        output.backward(grad.bfloat16().to(dtype))
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for seen, want in zip(*found, strict=True):
        assert relative_error(seen.float(), want) < 1e-2


@pytest.mark.parametrize("flags", ["", "--torch-compile", PADDED], ids=["eager", "compiled", "padded"])
def test_the_host_never_waits(flags):
    torch._dynamo.reset()
    config = gpu_config("--bf16", flags, scheme=EXPERTS)
    with torch.device("meta"):
        layer = LayerFactory(config, 64, ALONE, torch.bfloat16).moe("decoder.layers.0.mlp", 0)
    layer.to_empty(device=DEVICE)
    layer.router.reset()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    x = torch.randn(128, 2, config.model.hidden_size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(weight.grad.norm() > 0 for weight in layer.parameters())


@pytest.mark.parametrize("precision", ["", "--bf16"], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("scheme", "more"),
    [(EXPERTS, ""), (COMPLETEP, "--cross-entropy-fusion-impl linear")],
    ids=["experts", "fused loss"],
)
def test_halves_of_backward_equal_the_whole(meshes, scheme, more, precision):
    mesh, config = meshes["cuda"], gpu_config("--num-layers 3", more, precision, scheme=scheme)
    whole, batch = model_of(config).to(DEVICE), share(config, mesh, 0)
    for router in whole.routers().values():
        router.reset()
    if precision:
        for weight in whole.parameters():
            weight.data = weight.data.bfloat16()
    stages = stages_of(whole, config, mesh)
    want, seen = whole_passes(whole, batch, 4), split_passes(stages, config, mesh, batch, 4)
    assert want.keys() == seen.keys()
    errors = {name: relative_error(seen[name].float(), value.float()) for name, value in want.items()}
    # The embedding's gradient adds up in any order.
    assert max(errors.values()) < (1e-2 if precision else 1e-5), errors
