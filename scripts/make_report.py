"""Write a run's report page again, or a page that compares two runs, from their folders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from finetune import cli
from finetune.files import shown


def parse() -> argparse.Namespace:
    parser = cli.plain_parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, as in adapters/RUN")
    parser.add_argument("other", metavar="RUN", type=Path, nargs="?", help="a second run to compare it with")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from finetune.results.report import page  # imports matplotlib, which --help does not need

    path = page.write(options.run) if options.other is None else page.write_comparison(options.run, options.other)
    if options.json:
        cli.print_json({"report": str(path.resolve())})
    else:
        print(shown(path.resolve()))


if __name__ == "__main__":
    cli.run(main)
