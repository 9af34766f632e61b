"""Whatever text arrives as command line, configuration or genotype: the documented error, or a value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dssp.command import GenotypeUnavailable
from dssp.config import RetrainConfig, SearchConfig, parse_search
from dssp.retrain import read_genotype

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
