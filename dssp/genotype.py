"""The genotype: which operations a derived cell keeps; JSON and the text of the field, in and out, and its file."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dssp.arch_genotype import ArchGenotype
from dssp.chain_genotype import ChainGenotype
from dssp.runs.files import write_json

Edge = tuple[str, int]
Cell = tuple[tuple[Edge, ...], ...]

INPUTS = 2  # states 0 and 1 are the outputs of the two cells before
DARTS_EDGES = 2  # DARTS' text holds exactly two edges per node
CELL_FIELDS = ("normal", "reduce")
FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")


@dataclass(frozen=True)
class Genotype:
    """A derived pair of cells.

    normal, reduce                one entry per node: its incoming edges as (operation, source state); at least one.
    normal_concat, reduce_concat  the states concatenated to the cell's output.

    States are numbered as in DARTS: 0 and 1 are the cell's inputs, 2 is the first node. Raises ValueError naming the
    field if the cells do not fit that. The names of operations are checked by the network that builds them.
    """

    normal: Cell
    normal_concat: tuple[int, ...]
    reduce: Cell
    reduce_concat: tuple[int, ...]

    space: ClassVar[str] = "darts"
    inputs: ClassVar[int] = INPUTS
    shortcuts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in CELL_FIELDS:
            cell, concat = getattr(self, field), getattr(self, f"{field}_concat")
            _check_cell(field, cell)
            _check_concat(f"{field}_concat", concat, nodes=len(cell))

    @property
    def cells(self) -> dict[str, tuple[Cell, tuple[int, ...]]]:
        """Per cell type the edges, node by node, and the states that are concatenated to the cell's output."""
        return {field: (getattr(self, field), getattr(self, f"{field}_concat")) for field in CELL_FIELDS}

    @classmethod
    def from_cells(cls, cells: Mapping[str, Sequence[Sequence[Edge]]], concat: Sequence[int]) -> Genotype:
        """The genotype of a normal and a reduction cell with these edges, both with this output."""
        normal, reduce = (tuple(tuple(node) for node in cells[field]) for field in CELL_FIELDS)
        return cls(normal, tuple(concat), reduce, tuple(concat))

    def to_dict(self) -> dict[str, Any]:
        """The genotype as JSON types; `from_dict` reads it back."""
        fields: dict[str, Any] = {}
        for field in CELL_FIELDS:
            fields[field] = [[list(edge) for edge in node] for node in getattr(self, field)]
            fields[f"{field}_concat"] = list(getattr(self, f"{field}_concat"))
        return fields

    @classmethod
    def from_dict(cls, fields: object) -> Genotype:
        """The genotype that `to_dict` wrote. Raises ValueError naming the field that is missing or wrong."""
        if not isinstance(fields, dict) or set(fields) != set(FIELDS):
            got = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"genotype: expected an object with the fields {', '.join(FIELDS)}, got {got}")
        parts: dict[str, Any] = {}
        for field in CELL_FIELDS:
            nodes = _sequence(field, fields[field])
            parts[field] = tuple(tuple(_edge(field, edge) for edge in _sequence(field, node)) for node in nodes)
            parts[f"{field}_concat"] = tuple(_sequence(f"{field}_concat", fields[f"{field}_concat"]))
        return cls(**parts)

    def to_text(self) -> str:
        """DARTS' own text: `Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6), ...)`.

        That text holds exactly two edges per node, so a node with one edge gets ('none', 0) beside it: DARTS builds
        the same function from it. Raises ValueError if a node has more than two edges.
        """
        parts = []
        for field in CELL_FIELDS:
            edges: list[Edge] = []
            for state, node in enumerate(getattr(self, field), start=INPUTS):
                if len(node) > DARTS_EDGES:
                    raise ValueError(
                        f"{field}: node {state} has {len(node)} edges, DARTS' text holds {DARTS_EDGES} per node; "
                        "keep this genotype as JSON"
                    )
                edges += [*node, *[("none", 0)] * (DARTS_EDGES - len(node))]
            concat = getattr(self, f"{field}_concat")
            span = range(concat[0], concat[-1] + 1)
            parts.append(f"{field}={edges}, {field}_concat={span if concat == tuple(span) else list(concat)}")
        return f"Genotype({', '.join(parts)})"

    @classmethod
    def from_text(cls, text: str) -> Genotype:
        """The genotype in `text`, which may be a line of a log or a Python file; nothing in it is executed.

        Edges 'none' are dropped: they add nothing. Raises ValueError if the text holds no genotype, several different
        ones, or a wrong one.
        """
        found = {cls._from_call(call) for call in _calls(text)}
        if len(found) != 1:
            raise ValueError(f"genotype text: expected one Genotype(...), got {len(found)} different ones")
        return found.pop()

    @classmethod
    def _from_call(cls, source: str) -> Genotype:
        if not _PLAIN.fullmatch(source):
            raise ValueError("genotype text: expected names, numbers and lists only, closed by a bracket")
        try:
            call = ast.parse(source, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"genotype text: not a Python expression ({error})") from None
        if not isinstance(call, ast.Call) or call.args or sorted(str(k.arg) for k in call.keywords) != sorted(FIELDS):
            raise ValueError(f"genotype text: expected Genotype({'=..., '.join(FIELDS)}=...)")
        values = {str(keyword.arg): keyword.value for keyword in call.keywords}
        fields: dict[str, Any] = {}
        for field in CELL_FIELDS:
            edges = [_edge(field, edge) for edge in _sequence(field, _literal(field, values[field]))]
            if len(edges) % DARTS_EDGES:
                raise ValueError(f"{field}: expected {DARTS_EDGES} edges per node, got {len(edges)} edges in all")
            pairs = [edges[first : first + DARTS_EDGES] for first in range(0, len(edges), DARTS_EDGES)]
            fields[field] = tuple(tuple(edge for edge in pair if edge[0] != "none") for pair in pairs)
            fields[f"{field}_concat"] = _concat(f"{field}_concat", values[f"{field}_concat"], nodes=len(pairs))
        return cls(**fields)


AnyGenotype = Genotype | ArchGenotype | ChainGenotype


def with_shortcuts(genotype: AnyGenotype) -> dict[str, tuple[Cell, tuple[int, ...]]]:
    """genotype.cells, a shortcut written as the edge `skip_connect` that it is: all that the cells compute."""
    if not genotype.shortcuts:
        return genotype.cells
    first = genotype.inputs
    return {
        cell_type: ((nodes[0], *((*node, ("skip_connect", n)) for n, node in enumerate(nodes[1:], first))), concat)
        for cell_type, (nodes, concat) in genotype.cells.items()
    }


def save_genotype(path: str | Path, genotype: AnyGenotype, *, space: str, method: str, seed: int) -> None:
    """Write genotype.json: {"space", "genotype", "method", "seed", "text"}.

    `text` is DARTS' text, NAS-Bench-201's arch string or the layers of a chain, or null where that cannot say it.
    """
    text = text_or_none(genotype)
    content = {"space": space, "genotype": genotype.to_dict(), "method": method, "seed": seed, "text": text}
    write_json(Path(path), content)


def text_or_none(genotype: AnyGenotype) -> str | None:
    """genotype.to_text(); None where that cannot say it."""
    try:
        return genotype.to_text()
    except ValueError:
        return None


def load_genotype(path: str | Path) -> AnyGenotype:
    """Read a genotype.json, or any file with DARTS' text in it, or one that holds an arch string.

    Raises ValueError naming the file if it holds no valid genotype, OSError if it cannot be read.
    """
    return load_with_space(path)[1]


def load_with_space(path: str | Path) -> tuple[str, AnyGenotype]:
    """load_genotype(), after the name of its search space: as the file says, else the one such genotypes come from."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if not text.lstrip().startswith("{"):
            found = ArchGenotype.from_text(text) if text.lstrip().startswith("|") else Genotype.from_text(text)
            return found.space, found
        content = json.loads(text)
        if "genotype" not in content:
            raise ValueError(f"expected the field genotype, got {sorted(content)}")
        genotype = genotype_from_dict(content["genotype"])
        space = content.get("space", genotype.space)
        if not isinstance(space, str):
            raise ValueError(f"space: expected a name, got {space!r}")
        return space, genotype
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def genotype_from_dict(fields: object) -> AnyGenotype:
    """The genotype that its to_dict() wrote, of the kind that has these fields. Raises ValueError if it is none."""
    names = set(fields) if isinstance(fields, dict) else set()
    if names == {"stages"}:
        return ChainGenotype.from_dict(fields)
    return ArchGenotype.from_dict(fields) if names == {"normal"} else Genotype.from_dict(fields)


_CALL = re.compile(r"\bGenotype\(")
_PLAIN = re.compile(r"[\w\s()\[\],='\"]*\)")  # what DARTS' text is made of; anything else is not even parsed


def _calls(text: str) -> Iterator[str]:
    """Every `Genotype(...)` in `text` up to its closing bracket, or up to the end if there is none."""
    end = 0
    while match := _CALL.search(text, end):
        end, depth = match.end(), 1
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        yield text[match.start() : end]


def _literal(field: str, node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{field}: expected a list, got {type(node).__name__} ({error})") from None


def _concat(field: str, node: ast.expr, nodes: int) -> tuple[int, ...]:
    """The states in `range(a, b)` or a list of them."""
    if not isinstance(node, ast.Call):
        return tuple(_sequence(field, _literal(field, node)))
    match node:
        case ast.Call(ast.Name("range"), [ast.Constant(int(first)), ast.Constant(int(end))], []):
            pass
        case _:
            raise ValueError(f"{field}: expected a list or range(first, end) with whole numbers")
    if end - first > nodes:
        raise ValueError(f"{field}: expected at most {nodes} states, got range({first}, {end})")
    return tuple(range(first, end))


def _sequence(field: str, value: object) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{field}: expected a list, got {type(value).__name__}")
    return value


def _edge(field: str, value: object) -> Edge:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{field}: expected an edge (operation, source state), got {value!r}")
    operation, source = value
    if not isinstance(operation, str) or not operation.isidentifier() or type(source) is not int:
        raise ValueError(f"{field}: expected an edge (name of an operation, source state), got {value!r}")
    return operation, source


def _check_cell(field: str, cell: Cell) -> None:
    edges = [edge for node in cell for edge in node] if isinstance(cell, tuple) else []
    if not cell or not all(isinstance(part, tuple) for part in (cell, *cell, *edges)):
        raise ValueError(f"{field}: expected a tuple of at least one node, each a tuple of edges, got {cell!r}")
    for state, node in enumerate(cell, start=INPUTS):
        if not node:
            raise ValueError(f"{field}: node {state} has no incoming edge, expected at least one")
        for operation, source in (_edge(field, edge) for edge in node):
            if operation == "none":
                raise ValueError(f"{field}: node {state} has an edge 'none'; leave the edge out")
            if not 0 <= source < state:
                raise ValueError(f"{field}: node {state} has source {source}, expected a state from 0 to {state - 1}")


def _check_concat(field: str, concat: tuple[int, ...], nodes: int) -> None:
    last = INPUTS + nodes - 1
    valid = isinstance(concat, tuple) and concat and all(type(s) is int and INPUTS <= s <= last for s in concat)
    if not valid or len(set(concat)) != len(concat):
        raise ValueError(f"{field}: expected distinct nodes from {INPUTS} to {last}, at least one, got {concat!r}")
