"""Whatever a run folder holds: a page on which nothing runs but the slider, or the documented error; no other file."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dssp.report import UnreadableRun, write_report
from tests.search.test_report import Page, write_run

FILES = ("config.json", "metrics.jsonl", "retrain.jsonl", "genotype.json", "summary.json")
FUZZED = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

words = st.text(max_size=8) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        "</script></style></title></svg><img src=x onerror=alert(1)>",
        "\"'><svg onload=alert(1)>",
        "<!--<script>",
        "]]><iframe src=javascript:alert(1)>",
        "edge gone f-conv",
        "{{ 7 * 7 }}{% include 'dssp.report/style.css' %}",
        "../../../outside",
        "/outside/report.html",
        "\0\x1b[2J\ud800\u2028",
        "normal:0->2",
        "reduce:9->3",
        "0->2",
        "1->999999",
        "skip_connect",
        "warm-up",
        "|nor_conv_3x3~0|+|none~0|none~1|+|none~0|none~1|none~2|",
    ]
)
numbers = st.integers(-3, 9) | st.sampled_from([10**400, -(10**18), 2**53, 0.5, 1e308, -1e308, 5e-324]) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def change(draw: Any, document: Any) -> None:
    """Replace, remove or rename something inside."""
    container, key = draw(st.sampled_from(list(places(document)) or [([None], 0)]))
    act = draw(st.sampled_from(["replace", "remove", "rename"]))
    if act == "replace" or isinstance(container, list):
        container[key] = draw(values)
    else:
        content = container.pop(key)
        if act == "rename":
            container[draw(words)] = content


@st.composite
def damaged(draw: Any, original: Path) -> dict[str, bytes | None]:
    """The files of a run, one to three of them changed in places, replaced by anything, or missing."""
    files: dict[str, bytes | None] = {name: (original / name).read_bytes() for name in FILES}
    for name in draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=3)):
        content = files[name] or b"{}"
        how = draw(st.sampled_from(["changed", "changed", "changed", "value", "bytes", "cut", "gone"]))
        if how == "changed":
            try:
                documents = [json.loads(line) for line in content.splitlines()]
            except ValueError:
                continue  # was given bytes before
            for _ in range(draw(st.integers(1, 3))):
                change(draw, documents)
            files[name] = "\n".join(map(json.dumps, documents)).encode()
        elif how == "gone":
            files[name] = None
        else:
            other = {"value": values.map(json.dumps).map(str.encode), "bytes": st.binary(max_size=30)}
            files[name] = draw(other[how]) if how in other else content[: draw(st.integers(0, len(content)))]
    return files


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), epochs=3)


def assert_harmless(folder: Path) -> None:
    """The page is well-behaved, or the error the documented one; beside the page, no file came or changed."""
    root = folder.parent
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    try:
        written = write_report(folder)
    except UnreadableRun as error:
        assert (
            str(error).startswith(str(folder)) and "\n" not in str(error) and len(str(error)) < len(str(folder)) + 400
        )
        assert not (folder / "report.html").exists()
    else:
        assert written == folder / "report.html"
        page = Page(written.read_text(encoding="utf-8"))
        assert not page.active and len(page.scripts) <= 1
        policies = [tag for tag in page.tags if tag[0] == "meta" and "http-equiv" in tag[1]]
        assert len(policies) == 1 and "default-src 'none'" in str(policies[0])
        before[written] = written.read_bytes()
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def check(files: dict[str, bytes | None], root: Path) -> None:
    shutil.rmtree(root / "run", ignore_errors=True)
    (root / "run").mkdir()
    for name, content in files.items():
        if content is not None:
            (root / "run" / name).write_bytes(content)
    assert_harmless(root / "run")


@pytest.mark.parametrize("threshold", [10**400, -(10**400), math.inf, -math.inf, math.nan, True, "0.5", [0.5]], ids=str)
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
def test_threshold_that_no_chart_can_show_is_left_out(tmp_path: Path, strategy: str, threshold: Any) -> None:
    folder = write_run(tmp_path / "run", epochs=3)
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= {"prune_strategy": strategy, "prune_threshold": threshold}
    (folder / "config.json").write_text(json.dumps(config))
    assert_harmless(folder)
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("value", [1e38, -1e38, 5e-324, 10**38, 2.0**53], ids=str)
def test_numbers_at_the_ends_of_their_range_are_drawn(tmp_path: Path, value: float) -> None:
    folder = write_run(tmp_path / "run", epochs=3)
    names = ("train_loss", "valid_accuracy", "step_seconds", "active_edges", "seconds")
    lines = [json.loads(line) | dict.fromkeys(names, value) for line in (folder / "metrics.jsonl").open()]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= dict.fromkeys(("search_seconds", "test_accuracy", "parameters", "flops", "retrain_seconds"), value)
    (folder / "summary.json").write_text(json.dumps({**summary, "step_seconds": {"first": value, "last": 5e-324}}))
    assert_harmless(folder)
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("depth", [100, 700, 960, 970, 975, 980, 985, 990, 5000])
def test_setting_nested_deeply_is_shown_or_refused(tmp_path: Path, depth: int) -> None:
    folder = write_run(tmp_path / "run", epochs=3)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"seed": 3', f'"seed": {"[" * depth}{"]" * depth}'))
    assert_harmless(folder)


def test_link_in_place_of_the_unfinished_page_is_not_followed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", epochs=3)
    (tmp_path / "outside").write_text("mine")
    (folder / "report.html").symlink_to(tmp_path / "outside")
    write_report(folder)
    assert (tmp_path / "outside").read_text() == "mine" and not (folder / "report.html").is_symlink()
    (folder / f".report.html.{os.getpid()}").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError):
        write_report(folder)
    assert (tmp_path / "outside").read_text() == "mine"


def test_page_that_cannot_take_its_place_leaves_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", epochs=3)
    (folder / "report.html").mkdir()
    before = sorted(folder.iterdir())
    with pytest.raises(IsADirectoryError):
        write_report(folder)
    assert sorted(folder.iterdir()) == before


@FUZZED
@given(data=st.data())
def test_report_of_a_damaged_folder_is_harmless_or_refused(data: st.DataObject, original: Path, tmp_path: Path) -> None:
    check(data.draw(damaged(original)), tmp_path)


@pytest.mark.slow
@settings(FUZZED, max_examples=400)
@given(data=st.data())
def test_report_of_a_damaged_folder_is_harmless_or_refused_at_length(
    data: st.DataObject, original: Path, tmp_path: Path
) -> None:
    check(data.draw(damaged(original)), tmp_path)
