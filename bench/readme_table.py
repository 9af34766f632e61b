"""The README's table of speed-ups, made from JSON of bench/edge_throughput.py.

python bench/readme_table.py bench/results/edge-throughput-2-cores.json         # print it
python bench/readme_table.py bench/results/edge-throughput-2-cores.json --write README.md   # between its marker lines
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `bench`, where it runs as a script
from bench.baselines import PASSES
from bench.comparison import read_results
from bench.table import BASELINES

BEGIN, END = "<!-- speed: bench/readme_table.py -->", "<!-- end of speed -->"
LAYOUTS = ("contiguous", "channels_last")


def table(found: dict[str, Any], file: str) -> str:
    """Markdown: a line per kind of mix and baseline, a column per layout and pass, memory and origin below."""
    speedup = found["summary"]["speedup"]
    columns = [(layout, name) for layout in LAYOUTS for name in PASSES]
    titles = [f"{layout}, {name.replace('+', ' + ')}" for layout, name in columns]
    lines = [f"| mix | times faster than | {' | '.join(titles)} |", "|---" * (2 + len(columns)) + "|"]
    for mixed, layouts in speedup.items():
        for baseline in BASELINES:
            ratios = [layouts.get(layout, {}).get(name, {}).get(baseline) for layout, name in columns]
            if any(ratios):
                shown = ["-" if ratio is None else f"{ratio:.1f}x" for ratio in ratios]
                lines.append(f"| {mixed} | {baseline} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", memory(found["summary"]["memory"]), "", origin(found, file)])


def memory(shares: dict[str, Any]) -> str:
    """Bytes kept for the backward pass as a share of eager's, of every kind in its last layout."""
    parts = []
    for mixed, layouts in shares.items():
        layout, passes = list(layouts.items())[-1]
        saved = passes.get("forward+backward", {}).get("saved")
        if saved is not None:
            parts.append(f"{mixed} {saved:.2f} ({layout})")
    return f"Bytes kept for the backward pass, as a share of eager's: {', '.join(parts)}."


def origin(found: dict[str, Any], file: str) -> str:
    machine = found["machine"]
    where = machine.get("gpu") or f"{machine['cpu']} with {machine['instruction_set']}, {machine['cores']} cores"
    command = shlex.join(["python", "bench/edge_throughput.py", *found["command"]])
    commit = str(found["commit"])[:7]
    return (
        "K = 7, float32, geometric mean over DARTS' three shapes, medians of ratios in one process: "
        f"{where}, torch {found['versions']['torch']}, commit {commit}, `{command}`, stored in `{file}`."
    )


def replaced(text: str, table: str) -> str:
    """`text` with the table between its two marker lines. Raises ValueError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r} around the table, found no such pair")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="README", help="put the table into this file")
    args = parser.parse_args(argv)
    try:
        made = table(read_results(args.file), args.file.as_posix())
        if args.write:
            args.write.write_text(replaced(args.write.read_text(), made))
        else:
            print(made)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
