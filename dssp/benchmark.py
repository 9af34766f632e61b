"""The benchmark judge: tabulated accuracies of trained NAS-Bench-201 cells, to look at and never to choose by."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from pathlib import Path

from dssp.arch_genotype import ArchGenotype
from dssp.genotype import AnyGenotype
from dssp.options import ConfigError
from dssp.spaces import CellSpace

COLUMNS = ("cifar10_valid_12ep", "cifar10_test_12ep", "cifar10_test_200ep")  # accuracies in percent
SHOWN = 200  # characters of a wrong table that a message repeats


class Benchmark:
    """A table with columns `arch` and COLUMNS; others are ignored.

    Args:
        path: comma-separated values, with one line of headings; compressed if it ends in .gz.
        space: what is searched; its genotypes must have arch strings.

    Raises ConfigError of the field `benchmark` for a table that cannot be read, lacks a column, holds something else
    than finite numbers, a line without a cell or a cell twice, and for a space without arch strings.
    """

    def __init__(self, path: str, space: CellSpace) -> None:
        if not issubclass(space.genotype, ArchGenotype):
            raise _error(f"a table is looked up by arch strings, the cells of space {space.name} have none")
        self.path = path
        try:
            with (gzip.open if path.endswith(".gz") else open)(Path(path), "rt", encoding="utf-8", newline="") as file:
                self._accuracies = self._read(csv.DictReader(file))
        except OSError as error:  # gzip's own has no strerror
            raise _error(f"{path}: {error.strerror or error}") from None
        except (EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise _error(f"{path}: unreadable ({str(error)[:200]})") from None

    def __len__(self) -> int:
        return len(self._accuracies)

    def tabulated(self, genotype: AnyGenotype) -> dict[str, float]:
        """The accuracies (percent) of a cell, by column. Raises ConfigError if the table does not have it."""
        arch = genotype.to_text()
        if arch not in self._accuracies:
            raise _error(f"{self.path}: none of its {len(self)} cells is {arch}")
        return dict(zip(COLUMNS, self._accuracies[arch], strict=True))

    def _read(self, rows: csv.DictReader[str]) -> dict[str, tuple[float, ...]]:
        headings = rows.fieldnames or []
        if missing := [name for name in ("arch", *COLUMNS) if name not in headings]:
            got = ", ".join(_shown(heading) for heading in headings)
            raise _error(f"{self.path}: no column {', '.join(missing)}, got {got[:SHOWN] or 'an empty file'}")
        accuracies: dict[str, tuple[float, ...]] = {}
        for row in rows:
            where, arch = f"{self.path}, line {rows.line_num}", row["arch"]
            try:
                numbers = tuple(float(row[name] or "") for name in COLUMNS)
            except ValueError:
                numbers = ()
            if not numbers or not all(map(math.isfinite, numbers)):
                raise _error(f"{where}: expected numbers, got {str([row[name] for name in COLUMNS])[:SHOWN]}")
            if not arch:
                raise _error(f"{where}: expected an arch string, got none")
            if arch in accuracies:
                raise _error(f"{where}: {_shown(arch)} came before")
            accuracies[arch] = numbers
        return accuracies


def open_benchmark(path: str | None, space: CellSpace) -> Benchmark | None:
    """The table at a path, None where there is none."""
    return None if path is None else Benchmark(path, space)


def _shown(text: str) -> str:
    """A text of the table as a message repeats it: in one line, and not all of a long one."""
    return (text if text.isprintable() else repr(text))[:SHOWN]


def _error(reason: str) -> ConfigError:
    return ConfigError("benchmark", reason)
