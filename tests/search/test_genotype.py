"""A genotype survives JSON and DARTS' text, and bad input is a ValueError that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssp.genotype import Genotype, load_genotype, save_genotype

# DARTS' genotypes.py, as printed there.
DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)
NAMES = ["max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3"]


@st.composite
def cells(draw: st.DrawFn, max_edges: int) -> tuple[Any, Any]:
    nodes = draw(st.integers(1, 5))
    cell = tuple(
        tuple(
            draw(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, node + 1)), min_size=1, max_size=max_edges))
        )
        for node in range(nodes)
    )
    states = draw(st.lists(st.integers(2, nodes + 1), min_size=1, unique=True))
    return cell, tuple(states)


def genotypes(max_edges: int) -> st.SearchStrategy[Genotype]:
    return st.builds(lambda n, r: Genotype(*n, *r), cells(max_edges), cells(max_edges))


def small(**fields: object) -> dict[str, object]:
    valid: dict[str, object] = {
        "normal": [[["sep_conv_3x3", 0]], [["skip_connect", 2], ["max_pool_3x3", 1]]],
        "normal_concat": [2, 3],
        "reduce": [[["max_pool_3x3", 0]]],
        "reduce_concat": [2],
    }
    return {**valid, **fields}


@given(genotypes(max_edges=4))
def test_json_round_trip_keeps_every_genotype(genotype: Genotype) -> None:
    assert Genotype.from_dict(json.loads(json.dumps(genotype.to_dict()))) == genotype


@given(genotypes(max_edges=2), st.sampled_from(["{}", "genotype = {}\n", "# 3 edges (of 8)\n\nBEST = {}  # (best)\n"]))
def test_text_round_trip_keeps_every_genotype_of_up_to_two_edges(genotype: Genotype, around: str) -> None:
    assert Genotype.from_text(around.format(genotype.to_text())) == genotype


def test_published_darts_genotype_is_read() -> None:
    genotype = Genotype.from_text(f"DARTS_V2 = {DARTS_V2}\n\nDARTS = DARTS_V2\n")
    assert genotype.normal[3] == (("skip_connect", 0), ("dil_conv_3x3", 2))
    assert genotype.reduce[1] == (("skip_connect", 2), ("max_pool_3x3", 1))
    assert genotype.normal_concat == (2, 3, 4, 5)


def test_text_is_the_text_darts_prints() -> None:
    printed = DARTS_V2.replace("[2, 3, 4, 5]", "range(2, 6)")
    assert Genotype.from_text(DARTS_V2).to_text() == printed


def test_single_edge_is_padded_with_none_in_text_and_dropped_on_reading() -> None:
    genotype = Genotype.from_dict(small())
    assert "normal=[('sep_conv_3x3', 0), ('none', 0), " in genotype.to_text()
    assert Genotype.from_text(genotype.to_text()) == genotype


def test_more_than_two_edges_have_no_text_but_have_json(tmp_path: Path) -> None:
    genotype = Genotype.from_dict(small(reduce=[[["skip_connect", 0], ["max_pool_3x3", 0], ["max_pool_3x3", 1]]]))
    with pytest.raises(ValueError, match="reduce: node 2 has 3 edges"):
        genotype.to_text()
    save_genotype(tmp_path / "genotype.json", genotype, space="darts", method="dssp", seed=3)
    assert json.loads((tmp_path / "genotype.json").read_text())["text"] is None
    assert load_genotype(tmp_path / "genotype.json") == genotype


def test_genotype_file_holds_the_contracted_fields_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    genotype = Genotype.from_text(DARTS_V2)
    save_genotype(tmp_path / "genotype.json", genotype, space="darts", method="darts", seed=7)
    content = json.loads((tmp_path / "genotype.json").read_text())
    assert (content["space"], content["method"], content["seed"]) == ("darts", "darts", 7)
    assert Genotype.from_dict(content["genotype"]) == Genotype.from_text(content["text"]) == genotype
    assert [path.name for path in tmp_path.iterdir()] == ["genotype.json"]


def test_file_with_darts_text_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(f"11:08:02 PM genotype = {DARTS_V2}\n11:08:02 PM (done)\n")
    assert load_genotype(tmp_path / "log.txt") == Genotype.from_text(DARTS_V2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"normal": []}, "normal: expected", id="no node"),
        pytest.param({"normal": [[["sep_conv_3x3", 0]], []]}, "normal: node 3 has no incoming edge", id="no edge"),
        pytest.param({"normal": "sep_conv_3x3"}, "normal: expected a list, got str", id="text for list"),
        pytest.param({"reduce": [[["max_pool_3x3", 2]]]}, "reduce: node 2 has source 2", id="source is itself"),
        pytest.param({"reduce": [[["max_pool_3x3", -1]]]}, "reduce: node 2 has source -1", id="negative source"),
        pytest.param({"reduce": [[["max_pool_3x3", True]]]}, "reduce: expected an edge", id="bool source"),
        pytest.param({"reduce": [[["max_pool_3x3"]]]}, "reduce: expected an edge", id="half an edge"),
        pytest.param({"reduce": [[["max pool", 0]]]}, "reduce: expected an edge", id="no identifier"),
        pytest.param({"reduce": [[["none", 0]]]}, "reduce: node 2 has an edge 'none'", id="none"),
        pytest.param({"normal_concat": [2, 4]}, "normal_concat: expected distinct nodes from 2 to 3", id="no node 4"),
        pytest.param({"normal_concat": [2, 2]}, "normal_concat: expected distinct", id="twice"),
        pytest.param({"normal_concat": []}, "normal_concat: expected distinct", id="nothing"),
        pytest.param({"normal_concat": [2.0]}, "normal_concat: expected distinct", id="float state"),
        pytest.param({"cells": 3}, "genotype: expected an object with the fields", id="unknown field"),
    ],
)
def test_wrong_field_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Genotype.from_dict(small(**fields))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Genotype",
        "Genotype(",
        "Genotype()",
        "Genotype(normal=1)",
        DARTS_V2.replace("[2, 3, 4, 5]", "range(0, 10000000000000000000000)"),
        DARTS_V2.replace("[2, 3, 4, 5]", "open('x')"),
        DARTS_V2.replace("[2, 3, 4, 5]", "range(2, 6, 1)"),
        DARTS_V2.replace("'skip_connect', 0", "'none', 0").replace("'sep_conv_3x3', 1", "'none', 1"),
        DARTS_V2.replace("('sep_conv_3x3', 0), ", "", 1),
        DARTS_V2.replace("'sep_conv_3x3'", "sep_conv_3x3"),
        DARTS_V2.replace("normal=", "normal=not " + "not " * 5000),
        DARTS_V2.replace("normal=", "normal=" + "(" * 5000 + ")" * 5000),
        DARTS_V2 + DARTS_V2.replace("dil_conv_3x3", "dil_conv_5x5"),
        DARTS_V2.replace("[2, 3, 4, 5]", "range" + "()" * 900),
        DARTS_V2.replace("normal=", "normal=" + "x" + "[0]" * 900 + " and "),
        "Genotype(" * 100_000,
    ],
    ids=range(17),
)
def test_hostile_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        Genotype.from_text(text)


@given(st.text() | st.text(alphabet="Genotype()[]=,'none 012range").map(lambda inner: f"Genotype({inner})"))
def test_any_text_is_read_or_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        Genotype.from_text(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.fixed_dictionaries({field: json_values for field in small()}) | json_values)
def test_any_json_is_a_value_error(content: object) -> None:
    with pytest.raises(ValueError):
        Genotype.from_dict(content)


@pytest.mark.parametrize(
    "content", [b"{", b"{}", b"[" * 100_000, b"{" + b'"a":[' * 100_000, b"\xff\xfe", b""], ids=range(6)
)
def test_broken_file_is_a_value_error_naming_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json"):
        load_genotype(tmp_path / "broken.json")
