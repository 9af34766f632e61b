"""The command `python -m dssp.report runs/X`: (re)writes the report of a run folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dssp.report import UnreadableRun, write_report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dssp.report",
        description="Write report.html of a run folder: one page, readable offline, also while the search is running.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder a search wrote, e.g. runs/X")
    run_dir = parser.parse_args(arguments).run_dir
    try:
        print(write_report(run_dir))
    except (UnreadableRun, OSError) as error:
        sys.exit(f"dssp.report: error: {error}")


if __name__ == "__main__":
    main()
