"""A page about a run, finished, running or broken off: curves, parametrization, configuration, versions.

python tools/report.py --load runs/llama-1b
python tools/report.py --metrics-file runs/metrics.jsonl --output report.html

The page is one HTML file that loads nothing from elsewhere. Made again, it shows what has come since.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mup.config import ConfigError
from megatron_mup.training.record import find_record, read_json_lines, read_tensorboard
from megatron_mup.training.report import write_report


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code: 0, or 2 for a mistake that the message explains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    places = parser.add_mutually_exclusive_group(required=True)
    places.add_argument("--load", type=Path, help="folder of a run: its checkpoints, metrics file or event files")
    places.add_argument("--metrics-file", type=Path, help="what --metrics-file of the run wrote")
    places.add_argument("--tensorboard-dir", type=Path, help="what --tensorboard-dir of the run wrote")
    parser.add_argument("--output", type=Path, help="file to write (default: report.html beside the record)")
    parser.add_argument("--title", help="of the page (default: the name of the folder or file)")
    arguments = parser.parse_args(argv)
    place: Path = arguments.load or arguments.metrics_file or arguments.tensorboard_dir
    beside = place.parent if place == arguments.metrics_file else place
    output: Path = arguments.output or beside / "report.html"
    try:
        if arguments.load is not None:
            record = find_record(place)
        elif arguments.metrics_file is not None:
            record = read_json_lines(place)
        else:
            record = read_tensorboard(place)
        write_report(record, output, arguments.title or place.resolve().stem)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or output}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{output}: {len(record.curves)} curves up to iteration {record.iteration:,}, of {record.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
