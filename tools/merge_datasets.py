"""Merge all indexed datasets of a folder, in the order of their names, into one.

python tools/merge_datasets.py --input FOLDER --output-prefix PREFIX
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mup.config.errors import ConfigError
from megatron_mup.data.merge import merge_datasets


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code: 0, or 2 for a mistake that the message explains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder of .bin and .idx pairs")
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the result, without .bin")
    arguments = parser.parse_args(argv)
    try:
        merged = merge_datasets(arguments.input, arguments.output_prefix)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or arguments.output_prefix}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{merged.num_documents:,} documents, {len(merged):,} sequences, {merged.num_tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
