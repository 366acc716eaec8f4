"""Convert between checkpoints and Hugging Face's or Megatron-LM's, on the CPU; prove that both agree.

python tools/convert_checkpoint.py to-hf --load runs/my-model --save my-model-hf
python tools/convert_checkpoint.py from-hf --load Qwen3-0.6B --save runs/qwen3
python tools/convert_checkpoint.py from-megatron --load megatron-run --save runs/theirs
python tools/convert_checkpoint.py to-megatron --load runs/my-model --save megatron-run
python tools/convert_checkpoint.py grow --load runs/my-model --save runs/deeper --num-layers 48
python tools/convert_checkpoint.py upcycle --load runs/my-model --save runs/experts --num-experts 8
"""

from __future__ import annotations

import argparse
import sys

import torch

from megatron_mup.checkpoint.convert.architectures import ARCHITECTURES
from megatron_mup.checkpoint.convert.grow import grow
from megatron_mup.checkpoint.convert.hf import Check, from_hf, to_hf
from megatron_mup.checkpoint.convert.megatron import from_megatron, to_megatron
from megatron_mup.checkpoint.convert.output import ConversionError
from megatron_mup.checkpoint.convert.upcycle import upcycle
from megatron_mup.checkpoint.whole import open_model
from megatron_mup.config import ConfigError
from megatron_mup.data.tokenizer import build_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAILED, MISTAKE = 1, 2


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Flags of the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    out = ways.add_parser("to-hf", help="a checkpoint becomes a model folder")
    into = ways.add_parser("from-hf", help="a model folder becomes a checkpoint of iteration 0")
    for way, there in ((out, "folder of checkpoints, as --save named it"), (into, "model folder")):
        way.add_argument("--load", required=True, help=there)
        way.add_argument("--save", required=True, help="folder to make")
        way.add_argument("--tokens", type=int, nargs="+", help="ids on which logits are compared (default: 64 random)")
        way.add_argument("--tolerance", type=float, help="difference allowed, relative to the largest logit")
    megatron = ways.add_parser("from-megatron", help="one of Megatron-LM (torch, torch_dist) becomes ours")
    megatron.add_argument("--load", required=True, help="folder of Megatron-LM's --save")
    megatron.add_argument("--save", required=True, help="folder to make")
    megatron.add_argument("--true-vocab-size", type=int, help="token ids without padding (default: with)")
    legacy = ways.add_parser("to-megatron", help="a checkpoint becomes one of Megatron-LM's legacy format torch")
    larger = ways.add_parser("grow", help="a model becomes deeper or wider and computes the same")
    sparse = ways.add_parser("upcycle", help="a dense model becomes one with experts and computes the same")
    for way in (legacy, larger, sparse):
        way.add_argument("--load", required=True, help="folder of checkpoints, as --save named it")
        way.add_argument("--save", required=True, help="folder to make")
        way.add_argument("--ckpt-step", type=int, help="iteration (default: the latest)")
    larger.add_argument("--num-layers", type=int, help="layers to have (default: as before)")
    larger.add_argument("--ffn-hidden-size", type=int, help="width of the MLPs to have (default: as before)")
    larger.add_argument("--hidden-size", type=int, help="width of the residual stream to have (default: as before)")
    sparse.add_argument("--num-experts", type=int, required=True, help="experts of each layer")
    sparse.add_argument("--moe-router-topk", type=int, default=2, help="experts of each token (default: 2)")
    sparse.add_argument(
        "--moe-upcycling-granularity", type=int, default=1, help="experts that a copy of the MLP is cut into"
    )
    sparse.add_argument("--moe-layer-freq", default="1", help="layers with experts, as in pretrain.py (default: all)")
    out.add_argument("--ckpt-step", type=int, help="iteration (default: the latest)")
    out.add_argument("--architecture", choices=ARCHITECTURES, help="default: the plainest that can hold the model")
    out.add_argument(
        "--multipliers",
        choices=("fold", "granite"),
        help="fold muP's factors into the weights, or map them to Granite's fields (default: fold)",
    )
    out.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: as saved)")
    out.add_argument("--max-shard-size", type=float, default=2.0, help="gigabytes per file, and in memory (default: 2)")
    return parser.parse_args(argv)


def end_of_document(folder: str, step: int | None) -> int | None:
    """The id that the run ended documents with, if it can be told."""
    data = open_model(folder, step).config.data
    if data.eod_token_id is not None or data.tokenizer_type in (None, "NullTokenizer"):
        return data.eod_token_id
    try:
        return build_tokenizer(data.tokenizer_type, data.tokenizer_model).eod
    except ConfigError:
        # The export says what became of the tokenizer.
        return None


def check_of(arguments: argparse.Namespace) -> Check:
    """How the result is compared."""
    return Check(tokens=arguments.tokens, tolerance=arguments.tolerance)


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code: 0, 1 where the models differ, 2 for a mistake that the message explains."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        if arguments.way == "from-megatron":
            from_megatron(arguments.load, arguments.save, vocab_size=arguments.true_vocab_size)
        elif arguments.way == "to-megatron":
            to_megatron(arguments.load, arguments.save, step=arguments.ckpt_step)
        elif arguments.way == "grow":
            grow(
                arguments.load,
                arguments.save,
                step=arguments.ckpt_step,
                num_layers=arguments.num_layers,
                ffn_hidden_size=arguments.ffn_hidden_size,
                hidden_size=arguments.hidden_size,
            )
        elif arguments.way == "upcycle":
            upcycle(
                arguments.load,
                arguments.save,
                num_experts=arguments.num_experts,
                topk=arguments.moe_router_topk,
                granularity=arguments.moe_upcycling_granularity,
                layer_freq=arguments.moe_layer_freq,
                step=arguments.ckpt_step,
            )
        elif arguments.way == "from-hf":
            from_hf(arguments.load, arguments.save, check=check_of(arguments))
        else:
            to_hf(
                arguments.load,
                arguments.save,
                step=arguments.ckpt_step,
                architecture=arguments.architecture,
                multipliers=arguments.multipliers,
                dtype=DTYPES.get(arguments.dtype),
                eos=end_of_document(arguments.load, arguments.ckpt_step),
                shard_bytes=int(arguments.max_shard_size * 1e9),
                check=check_of(arguments),
            )
    except ConversionError as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
