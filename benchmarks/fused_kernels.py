"""One kernel of several makers on one GPU: AdamW's step, and norms forward and backward.

    python benchmarks/fused_kernels.py [--preset dense-1b] [--shape ROWS WIDTH] [--repeats N] [--out FILE]

AdamW steps all parameters of a preset, on a rank alone, through the optimizer that a run takes (``--adam-impl``); with
fp32 main parameters beside bf16 weights and without. Apex and Transformer Engine write fp32 weights alone, so copying
these into the module's bf16 ones is in every time. Norms are timed eager, as an operation of their own, and compiled.
What isn't installed is left out and said so. Times are medians, in ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

if __package__:
    from benchmarks.train_step import VOCAB_SIZE, preset
else:
    from train_step import VOCAB_SIZE, preset

from megatron_mup.config import parse_config
from megatron_mup.kernels.libraries import obstacle
from megatron_mup.layers.norm import LayerNorm, RMSNorm
from megatron_mup.models.build import build_model
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.launch import Launch, init_process_group
from megatron_mup.training.step import TrainStep

ADAMS = ("native", "apex", "transformer_engine")
NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


def milliseconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median time on the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 3)


def adam_step(name: str, impl: str, precision: str, device: torch.device) -> Callable[[], None]:
    """AdamW's step over all parameters of a preset, with bf16 gradients, published to the module."""
    config = parse_config([*preset(name), "--main-params-dtype", precision, "--adam-impl", impl]).config
    mesh = Mesh.build(config, device)
    step = TrainStep(build_model(config, config.model.vocab_size or VOCAB_SIZE, mesh), config, mesh)
    step.initialise()
    grads = {main.meta.name: torch.randn_like(main.value, dtype=torch.bfloat16) for main in step.main.params}

    def take() -> None:
        for main in step.main.params:
            main.grad = grads[main.meta.name]
        step.optimizer.step(1.0)
        step.main.publish()

    return take


def torch_step(name: str, device: torch.device) -> Callable[[], None]:
    """PyTorch's fused AdamW over the same parameters in fp32, gradients cast and weights copied out."""
    config = parse_config(preset(name)).config
    mesh = Mesh.build(config, device)
    module = build_model(config, config.model.vocab_size or VOCAB_SIZE, mesh)
    copies = [param.detach() for param in module.parameters()]
    weights = [torch.nn.Parameter(torch.zeros_like(copy, dtype=torch.float32)) for copy in copies]
    grads = [torch.randn_like(copy) for copy in copies]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def take() -> None:
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.float()
        optimizer.step()
        torch._foreach_copy_(copies, [weight.detach() for weight in weights])

    return take


def norm_pass(kind: str, impl: str, rows: int, width: int, device: torch.device) -> Callable[[], None]:
    """A norm's forward and backward in bf16; ``compiled`` is PyTorch's by its compiler."""
    gains = [torch.nn.Parameter(torch.ones(width, dtype=torch.bfloat16, device=device)) for _ in range(2)]
    given = gains[:1] if kind == "RMSNorm" else gains
    module = NORMS[kind](width, *given, 1e-5, impl="apex" if impl == "apex" else "native")
    if impl == "compiled":
        module.compile()
    x = torch.randn(rows, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    upstream = torch.randn_like(x)

    def take() -> None:
        torch.autograd.grad(module(x), [x, *given], upstream)

    return take


def measure(name: str, rows: int, width: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """All times by what was timed; for what can't be, why."""
    found: dict[str, Any] = {"preset": name, "rows": rows, "width": width}
    missing = {library: obstacle(library) for library in ("apex", "transformer_engine")}
    calls: dict[str, Callable[[], Callable[[], None]]] = {}
    calls["AdamW, torch fused, fp32"] = lambda: torch_step(name, device)
    for impl in ADAMS:
        calls[f"AdamW, {impl}, fp32"] = lambda impl=impl: adam_step(name, impl, "fp32", device)
    calls["AdamW, native, bf16"] = lambda: adam_step(name, "native", "bf16", device)
    for kind in NORMS:
        for impl in ("native", "compiled", "apex"):
            calls[f"{kind}, {impl}"] = lambda kind=kind, impl=impl: norm_pass(kind, impl, rows, width, device)
    for label, make in calls.items():
        reason = next((why for library, why in missing.items() if library in label and why), None)
        found[label] = reason or milliseconds(make(), repeats, device)
        torch.cuda.empty_cache()
        print(f"{label:34} {found[label]}", flush=True)
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dense-1b")
    parser.add_argument("--shape", type=int, nargs=2, default=(8192, 2048), metavar=("ROWS", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the same as JSON")
    args = parser.parse_args()
    device = init_process_group(parse_config(preset(args.preset)).config, Launch(0, 0, 1))
    found = measure(args.preset, *args.shape, args.repeats, device)
    found |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    dist.destroy_process_group()
    if args.out:
        args.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
