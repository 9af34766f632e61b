"""Whatever arrives as command line, configuration, genotype or benchmark table: the documented error, or a value."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dssp.arch_genotype import ArchGenotype
from dssp.benchmark import COLUMNS, Benchmark
from dssp.command import GenotypeUnavailable
from dssp.config import ConfigError, RetrainConfig, SearchConfig, parse_search
from dssp.retrain import read_genotype
from dssp.spaces import NASBENCH201

FIELDS = sorted(SearchConfig().to_dict())
FLAGS = [f"--{name.replace('_', '-')}" for name in FIELDS]
QUIET = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
words = st.sampled_from([*FLAGS, "0", "-1", "1e309", "nan", "3", "dssp", "darts", "cuda:1"]) | st.text(max_size=9)


@QUIET
@given(arguments=st.lists(words, max_size=6))
def test_command_line_is_understood_or_refused_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        parse_search(arguments).resolve()
    except SystemExit as exit_:
        said = capsys.readouterr()
        helped = exit_.code == 0 and said.out.startswith("usage")
        assert helped or (exit_.code == 2 and said.err.startswith("python -m dssp.search: error: "))


@QUIET
@given(fields=st.dictionaries(st.sampled_from([*FIELDS, "unknown"]), json_values, max_size=4) | json_values)
@pytest.mark.parametrize("config", [SearchConfig, RetrainConfig])
def test_configuration_is_read_or_refused_by_value_error(
    config: type[SearchConfig] | type[RetrainConfig], fields: Any
) -> None:
    try:
        read = config.from_dict(fields).resolve()
    except ValueError:
        return
    assert type(read).from_dict(json.loads(json.dumps(read.to_dict()))) == read


genotype_like = st.fixed_dictionaries(
    {
        "space": st.sampled_from(["darts", "nasbench201", "other"]) | json_values,
        "genotype": st.fixed_dictionaries(
            {}, optional={key: json_values for key in ("normal", "reduce", "normal_concat", "reduce_concat", "arch")}
        )
        | json_values,
    }
)
arch_pieces = st.sampled_from(
    ["|", "+", "~", "nor_conv_3x3", "none~0", "skip_connect~1", "0", "Genotype(", ")", "[", "'"]
)


@QUIET
@given(
    content=(json_values | genotype_like).map(json.dumps).map(str.encode)
    | st.lists(arch_pieces, max_size=12).map("".join).map(str.encode)
    | st.binary(max_size=40)
)
def test_genotype_file_is_read_or_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "genotype"
    path.write_bytes(content)
    try:
        read_genotype(str(path))
    except GenotypeUnavailable as error:
        assert str(error).startswith("--genotype: ")


SKIPS = "|skip_connect~0|+|skip_connect~0|skip_connect~1|+|skip_connect~0|skip_connect~1|skip_connect~2|"
cells = st.sampled_from(["91.5", "0", "nan", "inf", "-1e999", "", SKIPS, "=1+1", "x" * 140_000, "a\nb", '"', "\0", "é"])
headings = st.permutations(["arch", *COLUMNS, "index"]) | st.lists(
    st.sampled_from(["arch", *COLUMNS, "index", "", "\n", "y" * 140_000]), max_size=6
)


@st.composite
def tables(draw: Any) -> bytes:
    """Well-formed or nearly, any text in any column, in the encoding that is expected or another."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=draw(st.sampled_from(["\n", "\r\n"])))
    names = draw(headings)
    writer.writerow(names)
    for i in range(draw(st.integers(0, 3))):
        row = [SKIPS.replace("~0", "~0" * i) if name == "arch" else f"{i}.5" for name in names]
        if row and draw(st.booleans()):
            row[draw(st.integers(0, len(row) - 1))] = draw(cells)
        writer.writerow(row[: draw(st.integers(0, len(row)))] if draw(st.booleans()) else row)
    return text.getvalue().encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "latin-1"])))


def cut_or_flipped(draw: Any, content: bytes) -> bytes:
    place = draw(st.integers(0, len(content)))
    if draw(st.booleans()):
        return content[:place]
    return content[:place] + draw(st.binary(max_size=3)) + content[place + 1 :]


@settings(QUIET, max_examples=200)
@given(data=st.data(), name=st.sampled_from(["table.csv", "table.csv.gz"]))
def test_benchmark_table_is_read_or_refused_in_one_line(data: st.DataObject, name: str, tmp_path: Path) -> None:
    content = data.draw(tables() | st.binary(max_size=60))
    if name.endswith(".gz") and data.draw(st.sampled_from([True, True, True, False])):
        content = gzip.compress(content, mtime=0)
    if data.draw(st.booleans()):
        content = cut_or_flipped(data.draw, content)
    (tmp_path / name).write_bytes(content)
    try:
        benchmark = Benchmark(str(tmp_path / name), NASBENCH201)
        accuracies = benchmark.tabulated(ArchGenotype.from_text(SKIPS))
    except ConfigError as error:
        assert error.field == "benchmark" and error.reason.isprintable()
        assert error.reason.startswith(str(tmp_path / name)) and len(error.reason) < len(str(tmp_path)) + 700
    else:
        assert tuple(accuracies) == COLUMNS and all(map(math.isfinite, accuracies.values()))
