"""Reads and checks a run folder: config.json, metrics.jsonl, retrain.jsonl, genotype.json and summary.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dssp.genotype import AnyGenotype, genotype_from_dict

LARGEST = 1e39  # what a diverged search writes reaches beyond float32; charts need numbers that can be added


class UnreadableRun(ValueError):
    """A run folder that cannot be read. The message names the file, the line, what came and what was expected."""


@dataclass(frozen=True)
class Edge:
    """One edge of a cell; states count from 0, the cell's inputs before its nodes."""

    cell: str
    source: int
    target: int

    @property
    def name(self) -> str:
        return f"{self.cell}:{self.source}->{self.target}"


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl or retrain.jsonl; None is what it does not have, or a number that is not finite."""

    epoch: int
    warm_up: bool
    numbers: Mapping[str, float | None]
    gates: Mapping[Edge, float | None]
    normalised_gates: Mapping[Edge, float | None]
    weights: Mapping[Edge, tuple[float | None, ...] | None]  # softmax of alpha, per candidate
    tabulated: Mapping[str, float | None]  # what a benchmark says of the derived cell, in percent; empty without one
    pruned: tuple[Edge, ...]


@dataclass(frozen=True)
class Removal:
    epoch: int
    step: int | None
    edge: Edge


@dataclass(frozen=True)
class Summary:
    """summary.json of a finished search; `numbers` are its plain numbers, step_seconds as step_first and so on."""

    numbers: Mapping[str, float | None]
    pruned: tuple[Removal, ...]
    tabulated: Mapping[str, float | None]


@dataclass(frozen=True)
class Run:
    """What a run folder says. A search that is still running has no summary and may have no genotype."""

    path: Path
    config: Mapping[str, Any]
    command: str | None
    versions: Mapping[str, Any]
    commit: str | None
    machine: str | None
    operations: tuple[str, ...]  # names of the candidates, in the order of the softmax; may be empty
    edges: tuple[Edge, ...]
    epochs: tuple[Epoch, ...]
    retraining: tuple[Epoch, ...]
    genotype: AnyGenotype | None
    summary: Summary | None

    @property
    def inputs(self) -> int:
        """How many inputs a cell has: its first node is the first state that an edge enters."""
        return min((edge.target for edge in self.edges), default=2)


def read_run_folder(path: Path) -> Run:
    """Read a run folder. Raises UnreadableRun for a folder that is none, and for a file that is malformed."""
    if not path.is_dir():
        raise UnreadableRun(f"{path} is not a folder; expected a run folder, e.g. runs/X")
    if not (path / "config.json").is_file():
        raise UnreadableRun(f"{path} is not a run folder: it has no config.json")
    config = _read_json(path / "config.json")
    edges = _edges(config)
    summary = _read_json(path / "summary.json") if (path / "summary.json").is_file() else None
    return Run(
        path=path,
        config=config.mapping("config"),
        command=config.text("command"),
        versions=config.mapping("versions"),
        commit=config.text("commit"),
        machine=config.text("machine"),
        operations=tuple(_Fields(v, config.where).as_text("operations") for v in config.items("operations")),
        edges=edges,
        epochs=_read_epochs(path / "metrics.jsonl", edges),
        retraining=_read_epochs(path / "retrain.jsonl", ()),
        genotype=_genotype(path, summary),
        summary=_summary(summary) if summary else None,
    )


class _Fields:
    """A JSON value with its place: every access checks the type and, failing, says where and what was expected."""

    def __init__(self, value: Any, where: str) -> None:
        self.value, self.where = value, where

    def fail(self, key: str, expected: str, got: Any) -> UnreadableRun:
        return UnreadableRun(f"{self.where}: {key[:60]!r} must be {expected[:90]}, got {_shortened(repr(got), 60)}")

    def get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = self.value.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise self.fail(key, expected, value)
        return value

    def text(self, key: str) -> str | None:
        return self.get(key, str, "a string")

    def items(self, key: str) -> list[Any]:
        return self.get(key, list, "a list") or []

    def mapping(self, key: str) -> dict[str, Any]:
        return self.get(key, dict, "an object") or {}

    def number(self, key: str) -> float | None:
        return self.as_number(key, self.get(key, (int, float), "a number"))

    def whole(self, key: str) -> int:
        value = self.get(key, int, "a whole number")
        if value is None or not 0 <= value < 2**53:
            raise self.fail(key, "a whole number", value)
        return value

    def as_number(self, key: str, value: Any) -> float | None:
        """A float; None for null and for what a diverged search writes: NaN, infinity, numbers beyond float32."""
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "a number or null", value)
        return float(value) if abs(value) < LARGEST else None

    def as_text(self, key: str) -> str:
        if not isinstance(self.value, str):
            raise self.fail(key, "a list of strings", self.value)
        return self.value

    def edge(self, key: str, name: Any, cell: str | None = None) -> Edge:
        """An edge from "normal:0->2", or from "0->2" when the cell type is known."""
        full = f"{cell}:{name}" if cell is not None else name
        match = re.fullmatch(r"(.+):(\d{1,6})->(\d{1,6})", full, re.DOTALL) if isinstance(full, str) else None
        if match is None:
            raise self.fail(key, "an edge such as " + ('"normal:0->2"' if cell is None else '"0->2"'), name)
        return Edge(match[1], int(match[2]), int(match[3]))


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _parse(text: bytes, where: str) -> _Fields:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableRun(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UnreadableRun(f"{where}: expected a JSON object, got {type(value).__name__}")
    return _Fields(value, where)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_json(path: Path) -> _Fields:
    return _parse(path.read_bytes(), str(path))


def _edges(config: _Fields) -> tuple[Edge, ...]:
    cells = _Fields(config.mapping("edges"), config.where)
    return tuple(config.edge("edges", name, cell) for cell in cells.value for name in cells.items(cell))


def _read_epochs(path: Path, edges: tuple[Edge, ...]) -> tuple[Epoch, ...]:
    """The epochs in order; of an epoch that a resumed run wrote twice, the later line counts."""
    if not path.is_file():
        return ()
    *lines, last = path.read_bytes().split(b"\n")
    epochs = [_epoch(_parse(line, f"{path}, line {i}"), edges) for i, line in enumerate(lines, 1) if line.strip()]
    if _is_json(last):  # otherwise the run is writing this line at this moment, or was killed while it did
        epochs.append(_epoch(_parse(last, f"{path}, line {len(lines) + 1}"), edges))
    by_number = {epoch.epoch: epoch for epoch in epochs}
    return tuple(by_number[number] for number in sorted(by_number))


_NUMBERS = (
    *("train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "prune_loss"),
    *("active_edges", "total_edges", "step_seconds", "seconds", "learning_rate"),
)


def _epoch(line: _Fields, edges: tuple[Edge, ...]) -> Epoch:
    def number_of(key: str, value: Any) -> float | None:
        return line.as_number(key, value)

    def weights_of(key: str, value: Any) -> tuple[float | None, ...] | None:
        if value is not None and not isinstance(value, list):
            raise line.fail(key, "per edge a list of numbers, or null", value)
        return None if value is None else tuple(line.as_number(key, entry) for entry in value)

    return Epoch(
        epoch=line.whole("epoch"),
        warm_up=line.text("phase") == "warm-up",
        numbers={name: line.number(name) for name in _NUMBERS},
        gates={edge: number_of("gates", v) for edge, v in _per_edge(line, "gates", edges)},
        normalised_gates={e: number_of("normalised_gates", v) for e, v in _per_edge(line, "normalised_gates", edges)},
        weights={edge: weights_of("alpha", v) for edge, v in _per_edge(line, "alpha", edges)},
        tabulated=_tabulated(line),
        pruned=tuple(line.edge("pruned", name) for name in line.items("pruned")),
    )


def _tabulated(fields: _Fields) -> dict[str, float | None]:
    return {column: fields.as_number("tabulated", value) for column, value in fields.mapping("tabulated").items()}


def _per_edge(line: _Fields, key: str, edges: tuple[Edge, ...]) -> list[tuple[Edge, Any]]:
    """Pairs each edge of config.json with its entry in {"normal": [...], "reduce": [...]}; nothing where null."""
    cells = _Fields(line.mapping(key), line.where)
    pairs: list[tuple[Edge, Any]] = []
    for cell in cells.value:
        of_cell, values = [edge for edge in edges if edge.cell == cell], cells.items(cell)
        if edges and len(values) != len(of_cell):
            raise line.fail(key, f"{len(of_cell)} entries for the edges of cell {cell!r}", values)
        pairs += zip(of_cell, values, strict=False)
    return pairs


def _genotype(path: Path, summary: _Fields | None) -> AnyGenotype | None:
    """The derived genotype, from genotype.json or, failing that, from summary.json."""
    source = _read_json(path / "genotype.json") if (path / "genotype.json").is_file() else summary
    if source is None or not (fields := source.mapping("genotype")):
        return None
    try:
        return genotype_from_dict(fields)
    except ValueError as error:
        raise UnreadableRun(f"{source.where}: {_shortened(str(error), 300)}") from error


def _summary(summary: _Fields) -> Summary:
    steps = _Fields(summary.mapping("step_seconds"), summary.where)
    names = ("search_seconds", "search_flops", "retrain_seconds", "test_accuracy", "parameters", "flops")
    removals = []
    for entry in summary.items("pruned"):
        if not isinstance(entry, dict):
            raise summary.fail("pruned", 'a list of {"epoch", "step", "edge"}', entry)
        fields = _Fields(entry, f"{summary.where}, 'pruned'")
        step = None if entry.get("step") is None else fields.whole("step")
        removals.append(Removal(fields.whole("epoch"), step, fields.edge("edge", entry.get("edge"))))
    return Summary(
        numbers={
            **{name: summary.number(name) for name in names},
            "step_first": steps.number("first"),
            "step_last": steps.number("last"),
            "step_paths": steps.number("paths"),
        },
        pruned=tuple(removals),
        tabulated=_tabulated(summary),
    )
