"""Arch strings go in and out unchanged, and anything else is a ValueError that says what came."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssp.arch_genotype import OPERATIONS, ArchGenotype
from dssp.genotype import genotype_from_dict, load_genotype, load_with_space, save_genotype

ARCH = "|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|nor_conv_3x3~2|"
GENOTYPE = ArchGenotype(
    (
        (("nor_conv_3x3", 0),),
        (("none", 0), ("avg_pool_3x3", 1)),
        (("skip_connect", 0), ("nor_conv_1x1", 1), ("nor_conv_3x3", 2)),
    )
)


def test_arch_string_is_read_edge_by_edge() -> None:
    assert ArchGenotype.from_text(ARCH) == ArchGenotype.from_text(f" {ARCH}\n") == GENOTYPE
    assert GENOTYPE.to_text() == ARCH


def test_all_cells_of_the_benchmark_survive_text_and_json() -> None:
    seen = set()
    for names in product(OPERATIONS, repeat=6):
        arch = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|".format(*names)
        genotype = ArchGenotype.from_text(arch)
        assert genotype.to_text() == arch and genotype_from_dict(genotype.to_dict()) == genotype
        seen.add(genotype)
    assert len(seen) == 15625


def test_cells_leave_out_the_edges_that_are_not_there_and_come_back() -> None:
    nodes, concat = GENOTYPE.cells["normal"]
    assert nodes[1] == (("avg_pool_3x3", 1),) and concat == (3,)
    assert ArchGenotype.from_cells({"normal": nodes}, concat) == GENOTYPE


def test_genotype_file_names_space_and_arch_string(tmp_path: Path) -> None:
    save_genotype(tmp_path / "genotype.json", GENOTYPE, space="nasbench201", method="dssp", seed=1)
    content = json.loads((tmp_path / "genotype.json").read_text())
    assert (content["space"], content["method"], content["seed"], content["text"]) == ("nasbench201", "dssp", 1, ARCH)
    assert load_with_space(tmp_path / "genotype.json") == ("nasbench201", GENOTYPE)


def test_file_with_an_arch_string_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "arch.txt").write_text(f"{ARCH}\n")
    assert load_with_space(tmp_path / "arch.txt") == ("nasbench201", GENOTYPE)


def test_broken_arch_string_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "arch.txt").write_text("|nor_conv_3x3~0|")
    with pytest.raises(ValueError, match=r"arch\.txt: arch string: expected 3 nodes joined by '\+', got 1"):
        load_genotype(tmp_path / "arch.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 3 nodes joined by '+', got 1"),
        (ARCH + "+|none~0|", "expected 3 nodes joined by '+', got 4"),
        (ARCH[1:], "node 1: expected |operation~source|...|, got 'nor_conv_3x3~0|'"),
        (ARCH.replace("|+|", "+"), "node 1: expected |operation~source|...|"),
        (ARCH.replace("3x3~2|", "3x3~2"), "node 3: expected |operation~source|...|"),
        (ARCH.replace("none~0", "none"), "node 2: expected operation~source, got 'none'"),
        (ARCH.replace("none~0", ""), "node 2: expected operation~source, got ''"),
        (ARCH.replace("none~0", "none~x"), "node 2: expected operation~source, got 'none~x'"),
        (ARCH.replace("none~0|", ""), "node 2: expected edges from [0, 1], got [1]"),
        (ARCH.replace("none~0|avg_pool_3x3~1", "avg_pool_3x3~1|none~0"), "node 2: expected edges from [0, 1]"),
        (ARCH.replace("none", "max_pool_3x3"), "node 2: got operation 'max_pool_3x3', expected one of none, skip"),
        (ARCH.replace("none~0", "none ~0"), "node 2: expected operation~source, got 'none ~0'"),
        ("|" * 100_000, "expected 3 nodes"),
    ],
    ids=range(13),
)
def test_wrong_arch_string_says_what_came(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        ArchGenotype.from_text(text)
    assert message in str(error.value) and len(str(error.value)) < 250


@given(st.text() | st.text(alphabet="|+~none012").map(lambda inner: f"|{inner}|+|none~0|none~1|+|{inner}|"))
def test_any_text_is_read_or_a_value_error(text: str) -> None:
    try:
        assert ArchGenotype.from_text(text).to_text() == text.strip()
    except ValueError as error:
        assert "node" in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(OPERATIONS),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(st.fixed_dictionaries({"normal": json_values}) | json_values)
def test_any_json_is_a_value_error(content: object) -> None:
    with pytest.raises(ValueError):
        ArchGenotype.from_dict(content)
