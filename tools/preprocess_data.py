"""Tokenize a text corpus into PREFIX_KEY_document.bin and .idx, as Megatron-LM's tool of the same name does.

    python tools/preprocess_data.py --input 'corpus/*.jsonl.zst' --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --append-eod --workers 16
"""

from __future__ import annotations

import argparse
import signal
import sys
import time

from megatron_mup.config.errors import ConfigError
from megatron_mup.data.preprocess import PreprocessOptions, Progress, preprocess

NOT_NEEDED = {
    "--partitions": "memory is bounded without it, and --input takes several files and globs",
    "--keep-sequential-samples": "documents always keep their order",
    "--split-sentences": "a document is one sequence, as GPT training wants it",
    "--keep-newlines": "text is never changed",
    "--vocab-file": "use --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json",
    "--merge-file": "use --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json",
    "--find-optimal-num-workers": "give as many --workers as there are cores",
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Flags of the tool; Megatron-LM's that have no use here are refused with the reason."""
    for argument in argv:
        if argument.partition("=")[0] in NOT_NEEDED:
            name = argument.partition("=")[0]
            raise ConfigError(name, "this tool has no such flag", NOT_NEEDED[name])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, help="files or globs: JSON lines, also .gz and .zst, or .parquet"
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys or columns to tokenize (default: text)")
    parser.add_argument("--output-prefix", required=True, help="path of the result, without _KEY_document.bin")
    parser.add_argument(
        "--tokenizer-type",
        required=True,
        help="SentencePieceTokenizer, HuggingFaceTokenizer, TikTokenizer or NullTokenizer",
    )
    parser.add_argument("--tokenizer-model", help="file or folder of the tokenizer")
    parser.add_argument("--vocab-size", type=int, help="number of ids of NullTokenizer")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document id")
    parser.add_argument("--workers", type=int, required=True, help="tokenizing processes")
    parser.add_argument(
        "--log-interval", type=int, default=100_000, help="documents between lines, where stderr is no terminal"
    )
    return parser.parse_args(argv)


class Display:
    """Progress on stderr: a bar on a terminal, lines elsewhere."""

    def __init__(self, log_interval: int) -> None:
        """Starts the clock."""
        self._interval, self._next = max(1, log_interval), max(1, log_interval)
        self._start = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), DownloadColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("")

    def __call__(self, progress: Progress) -> None:
        """Shows where the run stands."""
        if self._bar is not None:
            self._bar.update(
                self._task, total=progress.total_bytes, completed=progress.bytes, description=self.line(progress)
            )
        elif progress.documents >= self._next:
            print(self.line(progress), file=sys.stderr, flush=True)
            self._next = progress.documents + self._interval

    def line(self, progress: Progress) -> str:
        """Documents, tokens and speed in words."""
        seconds = max(1e-9, time.monotonic() - self._start)
        return (
            f"{progress.documents:,} documents, {progress.tokens:,} tokens, {progress.tokens / seconds:,.0f} tokens/s"
        )

    def stop(self) -> None:
        """Gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code: 0, or 2 for a mistake that the message explains."""
    try:
        arguments = vars(parse_arguments(sys.argv[1:] if argv is None else argv))
        display = Display(arguments.pop("log_interval"))
        try:
            progress = preprocess(PreprocessOptions(**arguments), display)
        finally:
            display.stop()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror}; nothing was written", file=sys.stderr)
        return 2
    print(display.line(progress))
    return 0


if __name__ == "__main__":
    # An exception instead of sudden death, so that temporary files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
