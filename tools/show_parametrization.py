"""Shows what the parametrization makes of a configuration, without a run: one line per class of parameters.

    python tools/show_parametrization.py --config recipe.yaml --hidden-size 2048

takes every flag of pretrain.py and one of its own, --json, which prints the rows as JSON, in full precision.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_mup.config import Config, ConfigError
from megatron_mup.config.cli import parse_config
from megatron_mup.config.rules import check_model, check_parametrization
from megatron_mup.data.tokenizer import build_tokenizer
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parametrization.report import format_table, table_rows, to_json


def main(argv: Sequence[str]) -> int:
    """Prints the table; 2 after a mistake in the flags."""
    try:
        config = parse_config([arg for arg in argv if arg != "--json"]).config
        check_model(config)
        check_parametrization(config)
        rows = table_rows(parameter_metas(config, vocab_size(config)), config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(to_json(rows) if "--json" in argv else format_table(rows, config), end="")
    return 0


def vocab_size(config: Config) -> int:
    """Number of token ids: as given, else the tokenizer's."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if config.data.tokenizer_type is None:
        raise ConfigError("--vocab-size", "neither it nor a tokenizer is given", "add --vocab-size N")
    return build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model).vocab_size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
