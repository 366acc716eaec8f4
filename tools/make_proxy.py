"""The proxy of a big model: its recipe, a fraction as wide and deep, and what carries over from it.

    python tools/make_proxy.py --config big.yaml --width-ratio 8 --depth-ratio 4 --output proxy.yaml [flags]

The proxy keeps the head width and everything that is not a size; its own sizes become the base sizes. What the big
recipe needs to follow them is printed. Exit code 2: something does not divide, and what to do about it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_mup.config import Config, ConfigError, changed, parse_config, to_yaml
from megatron_mup.transfer.proxy import base_sizes, claims, format_claims, make_proxy, parameters


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags of the tool, and the rest, which are those of `pretrain.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--width-ratio", type=int, default=1, help="divides the hidden size, heads and MLP width")
    parser.add_argument("--depth-ratio", type=int, default=1, help="divides the number of layers")
    parser.add_argument("--proxy-query-groups", type=int, help="the proxy's key/value heads, where they don't divide")
    parser.add_argument("--output", help="file of the proxy's recipe (default: print it)")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.width_ratio < 1 or arguments.depth_ratio < 1:
        parser.error("ratios are at least 1")
    return arguments, rest


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns its exit code."""
    arguments, rest = parse_arguments(argv)
    try:
        big = parse_config(rest).config
        proxy = make_proxy(big, arguments.width_ratio, arguments.depth_ratio, arguments.proxy_query_groups)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    recipe = to_yaml(changed(proxy))
    if arguments.output is None:
        print(recipe)
    else:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(recipe)
        print(f"wrote {arguments.output}")
    print(_sizes(proxy, big))
    print("\nput into the big recipe (base sizes), with the values that the proxy's sweep finds:")
    parametrization = {"parametrization": proxy.parametrization.parametrization, **base_sizes(proxy)}
    print(to_yaml({"parametrization": parametrization}))
    print(format_claims(claims(proxy, big)))
    return 0


def _sizes(proxy: Config, big: Config) -> str:
    def told(config: Config) -> str:
        model = config.model
        vocabulary = f" + vocabulary of {model.vocab_size}" if model.vocab_size else " without vocabulary"
        size = parameters(model, model.vocab_size or 0)
        return (
            f"{model.num_layers} layers, hidden {model.hidden_size}, MLP {model.ffn_size}, heads "
            f"{model.num_attention_heads}/{model.query_groups} x {model.head_dim}: {size / 1e6:.1f} M{vocabulary}"
        )

    return f"proxy: {told(proxy)}\nbig:   {told(big)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
