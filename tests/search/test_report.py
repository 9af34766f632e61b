"""Claims about dssp.report: what its one page shows of a run folder, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dssp.arch_genotype import ArchGenotype
from dssp.genotype import Genotype
from dssp.report import UnreadableRun, write_report
from dssp.report.axis import spread, tick_labels, ticks
from dssp.report.cells import draw_cell, lay_out
from dssp.report.run_folder import read_run_folder
from dssp.report.units import count, duration, percent

OPERATIONS = [
    *("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
]
EDGES = [(source, node) for node in range(2, 6) for source in range(node)]
GENOTYPE: dict[str, Any] = {
    "normal": [
        [["sep_conv_3x3", 0], ["sep_conv_5x5", 1]],
        [["skip_connect", 0], ["dil_conv_3x3", 2]],
        [["max_pool_3x3", 1]],
        [["dil_conv_5x5", 2], ["sep_conv_3x3", 4]],
    ],
    "normal_concat": [2, 3, 4, 5],
    "reduce": [
        [["max_pool_3x3", 0], ["max_pool_3x3", 1]],
        [["avg_pool_3x3", 1], ["skip_connect", 2]],
        [["skip_connect", 2], ["sep_conv_3x3", 3]],
        [["skip_connect", 2], ["max_pool_3x3", 0]],
    ],
    "reduce_concat": [2, 3, 4, 5],
}
ARCH = "|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|nor_conv_3x3~2|"
REMOVED = {(3, "normal", EDGES.index((0, 4))), (4, "reduce", EDGES.index((1, 5)))}  # epoch, cell type, edge


def epoch_line(epoch: int, *, masks: bool = True) -> dict[str, Any]:
    """One epoch as the engine writes it: warm-up for two epochs, then gates and weights drift apart."""

    def live(cell: str, edge: int) -> bool:
        return not any(epoch > end and (cell, edge) == (of_cell, removed) for end, of_cell, removed in REMOVED)

    def weights(edge: int) -> list[float]:
        exponentials = [math.exp(max(0, epoch - 1) * 0.1 * ((edge * 3 + k * 5) % 7)) for k in range(len(OPERATIONS))]
        return [value / sum(exponentials) for value in exponentials]

    gates = {
        cell: [
            1 / (1 + math.exp(-1 + 0.05 * max(0, epoch - 1) * (edge % 5))) if live(cell, edge) else None
            for edge in range(14)
        ]
        for cell in ("normal", "reduce")
    }
    removed = [f"{cell}:{EDGES[edge][0]}->{EDGES[edge][1]}" for end, cell, edge in sorted(REMOVED) if end == epoch]
    return {
        "epoch": epoch,
        "phase": "warm-up" if epoch < 2 else "search",
        "train_loss": 2.3 / (epoch + 1),
        "train_accuracy": 1 - 0.9 / (epoch + 1),
        "valid_loss": 2.5 / (epoch + 1),
        "valid_accuracy": 1 - 0.95 / (epoch + 1),
        "prune_loss": 0.1,
        "active_edges": 28 - sum(end < epoch for end, _, _ in REMOVED),
        "total_edges": 28,
        "step_seconds": 0.1 if epoch < 2 else 0.3 - 0.02 * epoch,
        "seconds": 7.0 * (epoch + 1),
        "learning_rate": 0.025,
        "gates": gates if masks else None,
        "normalised_gates": {cell: [g and g / 0.6 for g in row] for cell, row in gates.items()} if masks else None,
        "alpha": {cell: [weights(edge) for edge in range(14)] for cell in gates},
        "pruned": removed if masks else [],
    }


def write_run(folder: Path, *, epochs: int = 6, finished: bool = True, masks: bool = True) -> Path:
    """A run folder as a search leaves it; unfinished, as one finds it while the search runs."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{source}->{node}" for source, node in EDGES]
    method = "dssp" if masks else "darts"
    config = {"dataset": "digits", "space": "darts", "method": method, "epochs": epochs, "seed": 3, "data_path": None}
    write_json(
        folder / "config.json",
        config={**config, "prune_strategy": "relative", "prune_threshold": 0.5},
        command="python -m dssp.search --seed 3",
        versions={"python": "3.11.7", "torch": "2.10.0", "triton": None, "dssp": "0.1.0"},
        commit="3f2c1b9",
        machine="2 cores",
        edges={"normal": names, "reduce": names},
        operations=OPERATIONS,
    )
    lines = [json.dumps(epoch_line(epoch, masks=masks)) for epoch in range(epochs)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if finished:
        retraining = [{"epoch": e, "train_loss": 2 / (e + 1), "train_accuracy": 0.9, "seconds": 3.0} for e in range(20)]
        (folder / "retrain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in retraining))
        write_json(folder / "genotype.json", space="darts", genotype=GENOTYPE, method=method, seed=3, text=None)
        write_json(
            folder / "summary.json",
            genotype=GENOTYPE,
            search_seconds=142.0,
            search_flops=3 * 10**12,
            retrain_seconds=61.2,
            test_accuracy=0.9778,
            parameters=213456,
            flops=12345678,
            pruned=[
                {"epoch": epoch, "step": 11 * epoch, "edge": f"{cell}:{EDGES[edge][0]}->{EDGES[edge][1]}"}
                for epoch, cell, edge in sorted(REMOVED)
                if masks
            ],
            step_seconds={"first": 0.31, "last": 0.155, "paths": 0.04},
            tabulated=None,
        )
    return folder


def write_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def change_json(path: Path, **content: Any) -> None:
    write_json(path, **{**json.loads(path.read_text()), **content})


def report(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


class Page(HTMLParser):
    """The page as a browser sees it: its tags with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data

    @property
    def active(self) -> list[Any]:
        """What could run or load something, the scripts apart."""
        tags = {"link", "img", "image", "iframe", "object", "embed", "base", "form", "use", "foreignobject"}
        return [
            (tag, attributes)
            for tag, attributes in self.tags
            if tag in tags or any(name.startswith("on") or name.endswith(("href", "src")) for name in attributes)
        ]


def pictures(html: str, title: str) -> list[ET.Element]:
    """The SVG pictures whose title starts like this."""
    found = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    return [svg for svg in found if (svg.findtext("title") or "").startswith(title)]


# The page


def test_report_is_self_contained(tmp_path: Path) -> None:
    html = report(write_run(tmp_path / "run"))
    assert not Page(html).active
    assert not re.search(r"https?:|url\(|@import", html)


def test_only_the_slider_may_run(tmp_path: Path) -> None:
    page = Page(report(write_run(tmp_path / "run")))
    (script,) = page.scripts
    assert script == (files("dssp.report") / "course.js").read_text()
    (policy,) = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def searched(html: str, cell: str) -> dict[str, ET.Element]:
    """The edges of a searched cell, by the states they connect."""
    (svg,) = pictures(html, f"Searched {cell} cell")
    return {group.get("data-ends", ""): group for group in svg.iter("g") if group.get("data-ends")}


def test_searched_cells_show_the_last_epoch_and_hold_the_others(tmp_path: Path) -> None:
    html = report(write_run(tmp_path / "run"))
    edges = searched(html, "normal")
    assert len(edges) == 14
    course = json.loads(edges["c_{k-2} \N{RIGHTWARDS ARROW} 2"].get("data-course", ""))
    assert [state for *_, state in course] == ["live", "live", "live", "leaving", "gone", "gone"]
    assert [gate is None for _, gate, _, _ in course] == [False] * 4 + [True] * 2
    assert edges["c_{k-2} \N{RIGHTWARDS ARROW} 2"].get("class", "").endswith(" gone")
    weights = epoch_line(5)["alpha"]["normal"][0]
    first = edges["c_{k-2} \N{RIGHTWARDS ARROW} 0"]
    assert first.findtext("text") == OPERATIONS[weights.index(max(weights))] and "live" in first.get("class", "")
    assert "Epoch 5: 26 of 28 edges, 182 candidates" in Page(html).text


def test_dropped_candidates_are_not_counted_and_slider_is_labelled(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", masks=False, epochs=1)
    line = epoch_line(0, masks=False)
    line["alpha"]["reduce"][3] = [0, 0, 0.4, 0.6, 0, 0, 0]
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(report(folder))
    assert "Epoch 0: 28 of 28 edges, 191 candidates" in page.text
    (slider,) = [attributes for tag, attributes in page.tags if tag == "input"]
    assert slider["type"] == "range" and ("label", {"for": slider["id"]}) in page.tags


def test_edges_that_form_no_cell_are_not_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    names = [f"{source}->{node}" for source, node in EDGES[:-1]]
    change_json(folder / "config.json", edges={"normal": [*names, "9->5"], "reduce": [*names, "0->999999"]})
    change_json(folder / "summary.json", pruned=[])
    assert "Searched cells" not in report(folder)


def test_headline_tells_what_came_out(tmp_path: Path) -> None:
    text = Page(report(write_run(tmp_path / "run"))).text.replace("\N{NO-BREAK SPACE}", " ")
    for part in (
        "DSSP on digits",
        "97.78 %",
        "213 k",
        "12.3 M",
        "2 min 22 s",
        "2 of 28",
        "310 → 155 ms",
        "2.00 times faster",
    ):
        assert part in text


def test_every_edge_of_the_genotype_is_drawn(tmp_path: Path) -> None:
    html = report(write_run(tmp_path / "run"))
    names = {0: "c_{k-2}", 1: "c_{k-1}", **{state: str(state - 2) for state in range(2, 6)}}
    for half, title in (("normal", "Derived normal cell"), ("reduce", "Derived reduction cell")):
        (svg,) = pictures(html, title)
        edges = [g for g in svg.iter("g") if "edge" in g.get("class", "").split()]
        drawn = sorted((g.findtext("title"), g.findtext("text")) for g in edges)
        wanted = [
            (f"{names[source]} \N{RIGHTWARDS ARROW} {names[node]}: {operation}", operation)
            for node, incoming in enumerate(GENOTYPE[half], 2)
            for operation, source in incoming
        ]
        assert drawn == sorted(wanted)


def test_genotype_text_on_the_page_reads_back(tmp_path: Path) -> None:
    assert Genotype.from_text(Page(report(write_run(tmp_path / "run"))).text) == Genotype.from_dict(GENOTYPE)


def test_genotype_with_three_edges_into_a_node_is_shown_as_json(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    three = [["sep_conv_3x3", 0], ["sep_conv_3x3", 1], ["skip_connect", 2]]
    change_json(folder / "genotype.json", genotype={**GENOTYPE, "normal": [*GENOTYPE["normal"][:3], three]})
    assert json.dumps(three) in Page(report(folder)).text


def write_nasbench201_run(folder: Path, *, finished: bool) -> Path:
    """The same for a search of NAS-Bench-201: one cell type, one input, judged by a benchmark."""
    edges = ["0->1", "0->2", "1->2", "0->3", "1->3", "2->3"]
    folder.mkdir(parents=True)
    config = {"dataset": "cifar10", "space": "nasbench201", "method": "dssp", "epochs": 3}
    operations = ["skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
    write_json(folder / "config.json", config=config, edges={"normal": edges}, operations=operations)
    lines = []
    for epoch in range(3):
        tabulated = {"cifar10_valid_12ep": 60.0 + epoch, "cifar10_test_12ep": 70.0, "cifar10_test_200ep": 91.25}
        line = {"epoch": epoch, "phase": "search", "gates": {"normal": [0.7] * 6}, "tabulated": tabulated}
        lines.append(
            json.dumps({**line, "alpha": {"normal": [[0.25] * 4] * 6}, "pruned": ["normal:0->2"][epoch - 2 :]})
        )
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if finished:
        arch = ArchGenotype.from_text(ARCH)
        write_json(folder / "genotype.json", space="nasbench201", genotype=arch.to_dict(), method="dssp", seed=0)
        pruned = [{"epoch": 2, "step": 9, "edge": "normal:0->2"}]
        write_json(folder / "summary.json", pruned=pruned, tabulated={"cifar10_test_200ep": 91.25})
    return folder


def test_cell_with_one_input_is_drawn_without_the_edges_it_lacks(tmp_path: Path) -> None:
    html = report(write_nasbench201_run(tmp_path / "run", finished=True))
    (svg,) = pictures(html, "Derived normal cell")
    titles = {g.findtext("title") for g in svg.iter("g") if "edge" in g.get("class", "").split()}
    assert titles == {
        "c_{k-1} \N{RIGHTWARDS ARROW} 1: nor_conv_3x3",
        "1 \N{RIGHTWARDS ARROW} 2: avg_pool_3x3",
        "c_{k-1} \N{RIGHTWARDS ARROW} 3: skip_connect",
        "1 \N{RIGHTWARDS ARROW} 3: nor_conv_1x1",
        "2 \N{RIGHTWARDS ARROW} 3: nor_conv_3x3",
    }
    (chart,) = pictures(html, "Gates of the edges into node 3, normal cell")
    lines = [(g.findtext("title") or "").split(":")[0] for g in chart.iter("g") if "line" in g.get("class", "")]
    assert lines == ["c_{k-1}", "1", "2"]
    text = " ".join(Page(html).text.split())
    assert ARCH in text and "from its input to its output, its last node" in text and "Reduction cell" not in text


@pytest.mark.parametrize("finished", [True, False])
def test_tabulated_accuracy_is_in_the_headline_and_over_the_epochs(tmp_path: Path, finished: bool) -> None:
    html = report(write_nasbench201_run(tmp_path / "run", finished=finished))
    assert "91.25\N{NO-BREAK SPACE}%" in Page(html).text
    (chart,) = pictures(html, "Tabulated accuracy of the derived cell (%) by epoch")
    lines = [(g.findtext("title") or "").split(":")[0] for g in chart.iter("g") if "line" in g.get("class", "")]
    assert lines == ["valid 12ep 62", "test 12ep 70", "test 200ep 91.25"]


def test_input_without_edges_is_drawn_beside_the_other_one() -> None:
    layout = lay_out([[("max_pool_3x3", 1)], [("skip_connect", 2)]], [2, 3], 2)
    assert layout.height < 150


@pytest.mark.parametrize("arch", ["|none~0|+|none~0|none~1|+|none~0|none~1|none~2|", ARCH])
def test_cell_without_edges_can_be_drawn(arch: str) -> None:
    ((cell, concat),) = ArchGenotype.from_text(arch).cells.values()
    assert draw_cell(cell, concat, "cell", inputs=1).count('class="edge') == arch.count("~") - arch.count("none")


def test_tabulated_that_is_no_number_names_file_and_line(tmp_path: Path) -> None:
    folder = write_nasbench201_run(tmp_path / "run", finished=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "tabulated": {"cifar10_test_200ep": "good"}}\n')
    with pytest.raises(UnreadableRun, match=r"metrics\.jsonl, line 4: 'tabulated' must be a number"):
        write_report(folder)


def test_removed_edge_ends_its_line(tmp_path: Path) -> None:
    html = report(write_run(tmp_path / "run"))
    (chart,) = pictures(html, "Gates of the edges into node 2, normal cell")
    lines = {(g.findtext("title") or "").split(":")[0]: g for g in chart.iter("g") if "line" in g.get("class", "")}
    assert set(lines) == {"c_{k-2}", "c_{k-1}", "0", "1"}
    ended = [name for name, g in lines.items() if any(path.get("class") == "removed" for path in g.iter("path"))]
    assert ended == ["c_{k-2}"]
    assert "removed after epoch 3" in (lines["c_{k-2}"].findtext("title") or "")

    def last_x(group: ET.Element) -> float:
        path = group.find("path")
        assert path is not None
        return float(re.findall(r"[ML]([\d.]+)", path.get("d", ""))[-1])

    assert last_x(lines["c_{k-2}"]) < last_x(lines["1"])


def test_removed_edges_are_listed_with_epoch_and_step(tmp_path: Path) -> None:
    html = report(write_run(tmp_path / "run"))
    rows = [re.sub(r"<[^>]*>|\s", " ", row).split() for row in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)]
    listed = [(row[0], row[1], row[-2]) for row in rows if len(row) > 3 and "-&gt;" in row[-2]]
    assert listed == [("3", "33", "normal:0-&gt;4"), ("4", "44", "reduce:1-&gt;5")]


def test_script_tags_are_escaped(tmp_path: Path) -> None:
    evil = "</title></svg><script>alert(1)</script><img src=x onerror=alert(1)>\"' &amp;"
    folder = write_run(tmp_path / "<script>alert(2)<", finished=True)
    config = json.loads((folder / "config.json").read_text())
    config["edges"][evil] = config["edges"].pop("reduce")
    config["config"].update(dataset=evil, method=evil, space=evil, **{evil: evil})
    change_json(
        folder / "config.json",
        **{
            **config,
            "command": evil,
            "commit": evil,
            "machine": evil,
            "versions": {evil: evil},
            "operations": [evil] * 7,
        },
    )
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        for key in ("gates", "normalised_gates", "alpha"):
            line[key][evil] = line[key].pop("reduce")
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(report(folder))
    assert not page.active and len(page.scripts) == 1
    assert page.text.count(evil) > 10


def test_text_that_utf8_cannot_say_is_replaced(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    change_json(folder / "config.json", command="run \ud800 x")
    assert "run ? x" in report(folder)


def test_running_search_without_summary_renders(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    change_json(folder / "config.json", config={"method": "dssp", "dataset": "digits", "epochs": 50})
    text = Page(report(folder)).text
    assert "not finished: 6 of 50 epochs" in text
    assert "Validation accuracy" in text and "2 of 28" in text
    assert "Derived cells" not in text and "Retraining" not in text


def test_search_that_has_just_begun_renders(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", epochs=1, finished=False)
    assert pictures(report(folder), "Loss")
    (folder / "metrics.jsonl").unlink()
    assert "How this was run" in report(folder)


def test_baseline_without_masks_has_no_gates(tmp_path: Path) -> None:
    html = report(write_run(tmp_path / "run", masks=False))
    assert "DARTS on digits" in html
    for absent in ("<h2>Gates", "<h2>Normalised", "<h2>Removed", "Edges removed"):
        assert absent not in html
    assert "<h2>Candidate operations" in html and "<h2>Derived cells" in html


def test_loss_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    diverged = {**epoch_line(3), "train_loss": math.nan, "valid_loss": math.inf, "train_accuracy": 10**400}
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:3], json.dumps(diverged), *lines[4:]]) + "\n")
    (svg,) = pictures(report(folder), "Loss")
    paths = [path.get("d", "") for path in svg.iter("path") if path.get("class") == "wire"]
    assert [path.count("M") for path in paths] == [2, 2]
    assert not any("nan" in path or "inf" in path for path in paths)


def test_writing_again_gives_the_same_page_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    before = {path.name for path in folder.iterdir()}
    assert report(folder) == report(folder)
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}


# What is refused


def test_half_written_last_line_is_ignored(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    whole = (folder / "metrics.jsonl").read_bytes()
    line = json.dumps(epoch_line(6)).encode()
    for cut in (1, len(line) // 2, line.index(b"}") + 1, len(line) - 1):
        (folder / "metrics.jsonl").write_bytes(whole + line[:cut])
        assert len(read_run_folder(folder).epochs) == 6
    (folder / "metrics.jsonl").write_bytes(whole + line)
    assert len(read_run_folder(folder).epochs) == 7


def test_epoch_written_twice_by_a_resumed_run_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({**epoch_line(5), "train_loss": 0.25}) + "\n")
    epochs = read_run_folder(folder).epochs
    assert [epoch.epoch for epoch in epochs] == list(range(6))
    assert epochs[-1].numbers["train_loss"] == 0.25


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"epoch": 1, "train_', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"train_loss": 1}', "'epoch' must be a whole number, got None"),
        ('{"epoch": -1}', "'epoch' must be a whole number, got -1"),
        ('{"epoch": true}', "'epoch' must be a whole number, got True"),
        ('{"epoch": 1, "train_loss": "low"}', "'train_loss' must be a number, got 'low'"),
        ('{"epoch": 1, "gates": [0.5]}', "'gates' must be an object"),
        ('{"epoch": 1, "gates": {"normal": [0.5]}}', "'gates' must be 14 entries for the edges of cell 'normal'"),
        ('{"epoch": 1, "pruned": ["normal:0-2"]}', "'pruned' must be an edge"),
    ],
    ids=["half", "deep", "list", "no-epoch", "negative", "bool", "text", "gates", "edges", "edge"],
)
def test_malformed_metrics_names_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    folder = write_run(tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    first, _, rest = metrics.read_text().partition("\n")
    metrics.write_text(f"{first}\n{line}\n{rest}")
    with pytest.raises(UnreadableRun) as error:
        write_report(folder)
    assert str(error.value).startswith(f"{metrics}, line 2: ")
    assert complaint in str(error.value)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("config.json", {"edges": {"normal": ["0-2"]}}, "'edges' must be an edge such as \"0->2\""),
        ("config.json", {"operations": [1]}, "'operations' must be a list of strings"),
        ("summary.json", {"test_accuracy": "good"}, "'test_accuracy' must be a number"),
        ("summary.json", {"pruned": [{"epoch": 1, "step": 2}]}, "'edge' must be an edge"),
        ("genotype.json", {"genotype": {"reduce": []}}, "genotype: expected an object with the fields"),
    ],
    ids=["edges", "operations", "accuracy", "pruned", "genotype"],
)
def test_malformed_file_is_named(tmp_path: Path, name: str, content: dict[str, Any], complaint: str) -> None:
    folder = write_run(tmp_path / "run")
    change_json(folder / name, **content)
    with pytest.raises(UnreadableRun) as error:
        write_report(folder)
    assert str(error.value).startswith(str(folder / name))
    assert complaint in str(error.value)


def test_command_writes_the_report_and_refuses_other_folders_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dssp.report"]
    folder = write_run(tmp_path / "run")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(folder / "report.html"), "")
    for other, reason in ((tmp_path, "it has no config.json"), (tmp_path / "absent", "is not a folder")):
        refused = subprocess.run([*command, str(other)], capture_output=True, text=True)
        assert refused.returncode == 1 and reason in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


# Drawing


@st.composite
def cells(draw: st.DrawFn) -> list[list[tuple[str, int]]]:
    """A DARTS-size cell: up to five nodes with one to three incoming edges each."""
    cell = []
    for node in range(2, 2 + draw(st.integers(1, 5))):
        sources = draw(st.sets(st.integers(0, node - 1), min_size=1, max_size=min(3, node)))
        cell.append([(draw(st.sampled_from(OPERATIONS)), source) for source in sorted(sources)])
    return cell


@given(cells())
@settings(max_examples=60, deadline=None)
def test_labels_nodes_and_passing_edges_do_not_overlap(cell: list[list[tuple[str, int]]]) -> None:
    layout = lay_out(cell, range(2, 2 + len(cell)))
    for column in layout.columns:
        assert all(slot.width <= slot.gap for slot in column)
        for above, below in pairwise(column):
            assert below.y - above.y >= (above.height + below.height) / 2 - 1e-6
    for left, right in pairwise(layout.columns):
        assert right[0].x - left[0].x > (left[0].gap + right[0].gap) / 2
    labels = [slot for column in layout.columns for slot in column if slot.text]
    assert len(labels) == sum(map(len, cell))
    for slot in labels:
        assert slot.width / 2 <= slot.x <= layout.width - slot.width / 2
        assert slot.height / 2 <= slot.y <= layout.height - slot.height / 2


def test_long_operation_name_is_cut_in_the_label_and_whole_in_the_title() -> None:
    name = "an_operation_with_a_very_long_name"
    svg = ET.fromstring(draw_cell([[(name, 0)]], [2], "cell"))
    (edge,) = [g for g in svg.iter("g") if "edge" in g.get("class", "").split()]
    assert (edge.findtext("title") or "").endswith(name)
    assert edge.findtext("text") == name[:23] + "\N{HORIZONTAL ELLIPSIS}"


NUMBERS = st.floats(-1e39, 1e39)


@given(NUMBERS, NUMBERS, st.integers(1, 12), st.booleans())
@settings(max_examples=300, deadline=None)
def test_ticks_are_few_round_and_enclose_the_range(a: float, b: float, wanted: int, whole: bool) -> None:
    low, high = min(a, b), max(a, b)
    values = ticks(low, high, wanted, whole=whole)
    step = values[1] - values[0]
    assert 2 <= len(values) <= wanted + 2
    slack = 1e-6 * step
    assert values[0] <= low + slack and high <= values[-1] + slack
    assert all(math.isclose(after - before, step, rel_tol=1e-6) for before, after in pairwise(values))
    assert float(f"{step:.3e}"[0]) in (1, 2, 5)
    assert not whole or all(value == int(value) for value in values)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.21, 0.33, ["0.20", "0.22", "0.24", "0.26", "0.28", "0.30", "0.32", "0.34"]),
        (0, 2800, ["0", "500", "1,000", "1,500", "2,000", "2,500", "3,000"]),
        (-1, 1, ["\N{MINUS SIGN}1.0", "\N{MINUS SIGN}0.5", "0.0", "0.5", "1.0"]),
        (3, 3, ["2.7", "2.8", "2.9", "3.0", "3.1", "3.2", "3.3"]),
        (0, 3e9, ["0", "5e+08", "1e+09", "1.5e+09", "2e+09", "2.5e+09", "3e+09"]),
    ],
    ids=["unit", "small", "thousands", "negative", "empty", "large"],
)
def test_tick_labels_are_short_and_have_the_same_decimals(low: float, high: float, labels: list[str]) -> None:
    assert tick_labels(ticks(low, high)) == labels


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(1, 50)), min_size=1, max_size=20))
def test_spread_keeps_the_order_and_moves_only_what_overlaps(items: list[tuple[float, float]]) -> None:
    wanted, sizes = sorted(y for y, _ in items), [size for _, size in items]
    placed = spread(wanted, sizes)
    assert all(b - a >= (s + t) / 2 - 1e-6 for (a, s), (b, t) in pairwise(zip(placed, sizes, strict=True)))
    assert spread(placed, sizes) == pytest.approx(placed, abs=1e-6)
    assert sum(placed) == pytest.approx(sum(wanted), abs=1e-6 * len(items) + 1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(0.97781), "97.78 %"),
        (count(213456), "213 k"),
        (count(999_960), "1.00 M"),
        (count(3_349_000, "FLOPs"), "3.35 MFLOPs"),
        (count(12), "12"),
        (duration(0.0312), "31.2 ms"),
        (duration(5.312), "5.31 s"),
        (duration(99.96), "1 min 40 s"),
        (duration(4020), "1 h 7 min"),
        (duration(90_000), "1 d 1 h 0 min"),
        (duration(None), "\N{EN DASH}"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(text: str, expected: str) -> None:
    assert text.replace("\N{NO-BREAK SPACE}", " ") == expected
