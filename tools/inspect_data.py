"""Show what an indexed dataset holds: documents, lengths, decoded samples; with --verify, read every token.

python tools/inspect_data.py PREFIX --verify --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json
"""

from __future__ import annotations

import argparse
import sys

from megatron_mup.config.errors import ConfigError
from megatron_mup.data.indexed_dataset import IndexedDataset
from megatron_mup.data.inspection import document_tokens, summarize, verify
from megatron_mup.data.tokenizer import Tokenizer, build_tokenizer


def show_summary(dataset: IndexedDataset) -> None:
    """Prints counts, percentiles and a histogram."""
    summary = summarize(dataset)
    print(dataset.prefix)
    print(f"  documents  {summary.documents:,} ({summary.empty_documents:,} empty) in {summary.sequences:,} sequences")
    print(f"  tokens     {summary.tokens:,} of {summary.dtype}, {summary.bin_bytes:,} bytes")
    print(f"  length     {summary.shortest:,} to {summary.longest:,}, mean {summary.mean:,.1f} tokens")
    print("  percentile " + "  ".join(f"{p}%: {value:,}" for p, value in summary.percentiles.items()))
    widest = max((count for *_, count in summary.histogram), default=1)
    for low, high, count in summary.histogram:
        print(f"  {low:>12,} to {high - 1:>12,}  {count:>12,}  {'#' * max(1, round(40 * count / widest))}")


def show_samples(dataset: IndexedDataset, tokenizer: Tokenizer | None, samples: int, max_tokens: int) -> None:
    """Prints the first tokens of documents spread evenly over the dataset, as text where there is a tokenizer."""
    count = min(samples, dataset.num_documents)
    for document in (i * dataset.num_documents // count for i in range(count)):
        ids = document_tokens(dataset, document)
        shown = ids[:max_tokens].tolist()
        text = " ".join(map(str, shown)) if tokenizer is None else repr(tokenizer.detokenize(shown))
        print(f"  document {document}, {len(ids)} tokens: {text}{' ...' if len(ids) > max_tokens else ''}")


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code: 0, or 2 where the data or the flags are at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", help="datasets, without .bin and .idx")
    parser.add_argument("--verify", action="store_true", help="read every token and check it against the vocabulary")
    parser.add_argument("--samples", type=int, default=0, help="documents to show")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to show of each (default: 64)")
    parser.add_argument("--tokenizer-type", help="as in preprocess_data.py; decodes samples and knows the vocabulary")
    parser.add_argument("--tokenizer-model", help="file or folder of the tokenizer")
    parser.add_argument("--vocab-size", type=int, help="number of ids; default: the tokenizer's")
    arguments = parser.parse_args(argv)
    try:
        tokenizer = None
        if arguments.tokenizer_type is not None:
            tokenizer = build_tokenizer(arguments.tokenizer_type, arguments.tokenizer_model, arguments.vocab_size)
        vocab_size = arguments.vocab_size or (tokenizer.vocab_size if tokenizer else None)
        for prefix in arguments.prefix:
            dataset = IndexedDataset(prefix)
            show_summary(dataset)
            show_samples(dataset, tokenizer, arguments.samples, arguments.max_tokens)
            if arguments.verify:
                result = verify(dataset, vocab_size, tokenizer.eod if tokenizer else None)
                eods = "" if result.eod_count is None else f", {result.eod_count:,} end-of-document ids"
                below = "" if vocab_size is None else f", all below {vocab_size:,}"
                unused = f"; {result.unused_bytes:,} bytes of the .bin are not used" if result.unused_bytes else ""
                print(f"  verified   ids {result.lowest:,} to {result.highest:,}{below}{eods}{unused}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
