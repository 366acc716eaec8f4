"""The training step of another trainer on the same preset, one GPU, timed as ``train_step.py`` times ours.

    python benchmarks/peers.py torchtitan|megatron-core [--preset NAME] [--micro-batch-size N] [--fp32-master]
        [--fp8 RECIPE] [--steps N] [--json]

It drives the package that is installed, with the settings that its authors recommend for one GPU, on random tokens:

- ``torchtitan`` (0.2): its own ``Trainer`` and Llama 3, each block and the loss compiled, no recomputation, fused
  AdamW, its own clipping. Pure bf16: ``training.dtype`` bfloat16. fp32 master weights: its default, autocast over fp32
  weights.
- ``megatron-core`` with Transformer Engine: ``GPTModel`` from the TE layer spec, fused RoPE, SwiGLU and cross entropy.
  Pure bf16: PyTorch's fused AdamW, since its own optimizers keep fp32 weights. fp32 master weights: its
  ``DistributedDataParallel`` and mixed-precision optimizer, gradients accumulated in fp32 by TE's products. ``--fp8``:
  a recipe of its ``fp8_recipe`` (``delayed``, ``tensorwise``, ``blockwise``), format hybrid.

Exit code 4: the package isn't installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import socket
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

# The folder of this program is on the path when it is started, the repository's when it is imported.
if __package__:
    from benchmarks.train_step import PRESETS, VOCAB_SIZE
else:
    from train_step import PRESETS, VOCAB_SIZE

SEQUENCE = 4096
NOT_INSTALLED = 4
Step = Callable[[], object]


def one_process() -> None:
    """Environment and process group of a run alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.cuda.set_device(0)


def random_tokens(micro_batch: int) -> torch.Tensor:
    """Ids ``[micro-batch, sequence]`` on the GPU, input and label alike."""
    return torch.randint(0, VOCAB_SIZE, (micro_batch, SEQUENCE), device="cuda")


def torchtitan(args: argparse.Namespace, sizes: tuple[int, ...], micro_batch: int) -> Step:
    """A step of torchtitan's trainer."""
    from dataclasses import replace
    from importlib import import_module

    from torchtitan.config import JobConfig
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.train import Trainer

    hidden, layers, heads, groups, ffn, _ = sizes
    llama = import_module("torchtitan.models.llama3")
    shape = llama.TransformerModelArgs(
        dim=hidden,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=groups,
        vocab_size=VOCAB_SIZE,
        multiple_of=64,
        ffn_dim_multiplier=ffn / int(8 * hidden / 3),
        rope_theta=10000,
    )
    tokens = random_tokens(micro_batch).cpu()  # its trainer moves them

    class Loader:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, _state: dict[str, Any]) -> None:
            """Nothing to load."""

    plain = llama.get_train_spec()
    spec = replace(
        plain,
        model_args={"preset": shape},
        build_tokenizer_fn=None,
        build_dataloader_fn=lambda **_: Loader(),
        state_dict_adapter=None,
    )
    register_train_spec("preset", spec)
    job = JobConfig()
    job.model.name, job.model.flavor = "preset", "preset"
    job.training.local_batch_size, job.training.seq_len = micro_batch, SEQUENCE
    job.training.dtype = "float32" if args.fp32_master else "bfloat16"
    job.training.steps = 1000
    job.metrics.log_freq = 1000
    job.activation_checkpoint.mode = "none"
    job.compile.enable = True
    trainer = Trainer(job)

    def batches():
        while True:
            yield {"input": tokens}, tokens

    data = batches()

    def step() -> None:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(data)

    trainer.step = 1  # it logs the first one
    return step


def megatron_core(args: argparse.Namespace, sizes: tuple[int, ...], micro_batch: int) -> Step:
    """A step of megatron-core's model with Transformer Engine."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    hidden, layers, heads, groups, ffn, _ = sizes
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=True,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="native",
        gradient_accumulation_fusion=args.fp32_master,
        fp8="hybrid" if args.fp8 else None,
        fp8_recipe=args.fp8 or "delayed",
    )
    model: Any = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQUENCE,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    ).cuda()
    tokens, places = random_tokens(micro_batch), torch.arange(SEQUENCE, device="cuda").expand(micro_batch, -1)
    if not args.fp32_master:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            model(tokens, places, None, labels=tokens).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    flags = OptimizerConfig(optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16, clip_grad=0.0)
    mixed = get_megatron_optimizer(flags, [model])

    def mixed_step() -> None:
        model.zero_grad_buffer()
        mixed.zero_grad()
        model(tokens, places, None, labels=tokens).mean().backward()
        model.finish_grad_sync()
        mixed.step()

    return mixed_step


PEERS = {"torchtitan": torchtitan, "megatron-core": megatron_core}
PACKAGES = {
    "torchtitan": ("torchtitan", "torch"),
    "megatron-core": ("megatron-core", "transformer_engine", "torch"),
}


def timed(step: Step, steps: int) -> float:
    """Median milliseconds of a step in the device's time, each one waited for; four steps run before."""
    for _ in range(4):
        step()
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--preset", default="dense-1b", choices=PRESETS)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--fp32-master", action="store_true")
    parser.add_argument("--fp8", metavar="RECIPE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        versions = {name: importlib.metadata.version(name) for name in PACKAGES[args.peer]}
    except importlib.metadata.PackageNotFoundError as missing:
        print(f"{missing.name} is not installed", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    sizes = PRESETS[args.preset]
    micro_batch = args.micro_batch_size or sizes[-1]
    one_process()
    ms = timed(PEERS[args.peer](args, sizes, micro_batch), args.steps)
    result = {
        "preset": args.preset,
        "peer": args.peer,
        "versions": versions,
        "micro_batch_size": micro_batch,
        "fp32_master": args.fp32_master,
        "ms_per_step": round(ms, 2),
        "tokens_per_s": round(micro_batch * SEQUENCE / ms * 1e3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "device": torch.cuda.get_device_name(),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{k:20} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
