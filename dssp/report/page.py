"""The report page: turns what a run folder says into texts, charts and tables, and those into one HTML file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dssp.genotype import AnyGenotype, with_shortcuts
from dssp.report.axis import ticks
from dssp.report.candidates import heat_maps
from dssp.report.cells import FAMILIES, draw_cell, family
from dssp.report.charts import Frame, Line, line_chart
from dssp.report.course import course
from dssp.report.run_folder import LARGEST, Edge, Epoch, Removal, Run, read_run_folder
from dssp.report.svg import state_name
from dssp.report.template import environment, write_page
from dssp.report.units import DASH, count, duration, percent

_NAMES = {
    **{"dssp": "DSSP", "darts": "DARTS", "snas": "SNAS", "gdas": "GDAS", "random": "Random search"},
    **{"digits": "digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagefolder": "an image folder"},
    **{"normal": "Normal cell", "reduce": "Reduction cell"},
}


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html, replacing it as a whole, and return its path.

    The page needs no other file and no network; JavaScript replays the epochs of the searched cells, without it the
    last one shows. It shows what the folder has: also a search that is still running, and a baseline without masks.
    Raises UnreadableRun if `run_dir` is not a run folder or a file in it is malformed.
    """
    run_dir = Path(run_dir)
    return write_page(run_dir / "report.html", render(read_run_folder(run_dir)))


def render(run: Run) -> str:
    """The page as HTML. Every text of the run folder passes through autoescape or the SVG element tree."""
    made = environment()
    made.globals.update(cell_name=display_name, state=partial(_state, inputs=run.inputs))
    template = made.get_template("dssp.report/page.html.j2")
    method, dataset = run.config.get("method", "search"), run.config.get("dataset", "unknown data")
    removals = _removals(run)
    return template.render(
        title=f"{display_name(method)} on {display_name(dataset)}",
        subtitle=_subtitle(run),
        running=_running(run),
        tiles=_tiles(run, removals),
        cells=drawn_cells(run.genotype),
        one_output=run.genotype is not None and all(len(concat) == 1 for _, concat in run.genotype.cells.values()),
        families=families([run.genotype]),
        genotype_text=genotype_text(run.genotype),
        course=course(run, {removal.edge: removal.epoch for removal in removals}),
        gates=_gate_groups(run, removals, "gates", "absolute"),
        normalised_gates=_gate_groups(run, removals, "normalised_gates", "relative"),
        learning=_learning(run),
        candidates=heat_maps(run, {removal.edge for removal in removals}),
        removals=[(removal, _last_gate(run, removal.edge)) for removal in removals],
        retraining=_retraining(run.retraining),
        config={key: setting(value) for key, value in run.config.items()},
        versions={key: setting(value) for key, value in run.versions.items()},
        run=run,
    )


def display_name(key: Any) -> str:
    """A setting as a heading says it: cifar10 is CIFAR-10."""
    return _NAMES.get(key, key) if isinstance(key, str) else setting(key)


def setting(value: Any) -> str:
    """A value of a configuration as text."""
    return DASH if value is None else value if isinstance(value, str) else json.dumps(value)


def _state(state: int, inputs: int) -> Markup:
    """A state's name in HTML: for the inputs, c with a subscript."""
    name, _, index = state_name(state, inputs).partition("_")
    index = index.strip("{}").replace("-", "\N{MINUS SIGN}")
    return Markup("<i>{}</i><sub>{}</sub>").format(name, index) if index else Markup("{}").format(name)


# The headline


def _subtitle(run: Run) -> str:
    parts = [f"{key} {setting(run.config[key])}" for key in ("space", "seed") if key in run.config]
    if run.epochs:
        parts.append(f"{len(run.epochs)} epochs")
    return " \N{MIDDLE DOT} ".join([*parts, run.path.resolve().name])


def _running(run: Run) -> str | None:
    """What to say of a search without summary.json."""
    if run.summary is not None:
        return None
    planned = run.config.get("epochs")
    done = f"{len(run.epochs)} of {planned} epochs" if isinstance(planned, int) else f"{len(run.epochs)} epochs"
    return f"This search is not finished: {done} so far."


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str


def _tiles(run: Run, removals: Sequence[Removal]) -> list[Tile]:
    """The headline's numbers; what the run folder does not say is left out."""
    numbers = run.summary.numbers if run.summary else {}
    last = run.epochs[-1] if run.epochs else None
    so_far = last.numbers["seconds"] if last else None
    tiles = []
    if (accuracy := numbers.get("test_accuracy")) is not None:
        note = f"after {len(run.retraining)} epochs of retraining" if run.retraining else "derived network"
        tiles.append(Tile("Test accuracy", percent(accuracy), note))
    elif last and (accuracy := last.numbers["valid_accuracy"]) is not None:
        tiles.append(Tile("Validation accuracy", percent(accuracy), f"supernet, epoch {last.epoch}"))
    tabulated = run.summary.tabulated if run.summary else last.tabulated if last else {}
    for column, accuracy in tabulated.items():
        value = DASH if accuracy is None else percent(accuracy / 100)
        tiles.append(Tile("Tabulated accuracy", value, column))
    if (parameters := numbers.get("parameters")) is not None:
        tiles.append(Tile("Parameters", count(parameters), "derived network"))
    if (flops := numbers.get("flops")) is not None:
        tiles.append(Tile("FLOPs", count(flops), "per image, a multiply-add is two"))
    if (seconds := numbers.get("search_seconds", so_far)) is not None:
        retraining = numbers.get("retrain_seconds")
        tiles.append(
            Tile("Search time", duration(seconds), f"and {duration(retraining)} retraining" if retraining else "")
        )
    if (flops := numbers.get("search_flops")) is not None:
        tiles.append(Tile("Search FLOPs", count(flops), "convolutions and matrix products"))
    if removals or any(epoch.gates for epoch in run.epochs):
        total = f" of {len(run.edges)}" if run.edges else ""
        left = f"{len(run.edges) - len(removals)} left" if run.edges else ""
        tiles.append(Tile("Edges removed", f"{len(removals)}{total}", left))
    first_step, last_step = _step_times(run)
    if first_step and last_step:
        (first, unit), last_text = duration(first_step).rsplit("\N{NO-BREAK SPACE}", 1), duration(last_step)
        first += "" if last_text.endswith("\N{NO-BREAK SPACE}" + unit) else "\N{NO-BREAK SPACE}" + unit
        ratio = first_step / last_step
        note = f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"
        if (paths := numbers.get("step_paths")) is not None:
            note += f"; on hard paths {duration(paths)}"
        tiles.append(Tile("Step time", f"{first} \N{RIGHTWARDS ARROW} {last_text}", f"{note}, first to last"))
    return tiles


def _step_times(run: Run) -> tuple[float | None, float | None]:
    """First and last mean step time: of the summary, else of the search epochs so far (warm-up steps do less)."""
    if run.summary:
        return run.summary.numbers["step_first"], run.summary.numbers["step_last"]
    steps = [step for epoch in run.epochs if not epoch.warm_up and (step := epoch.numbers["step_seconds"])]
    return (steps[0], steps[-1]) if steps else (None, None)


def _removals(run: Run) -> list[Removal]:
    """The removed edges in order, with their step if the search is finished."""
    if run.summary is not None:
        return list(run.summary.pruned)
    return [Removal(epoch.epoch, None, edge) for epoch in run.epochs for edge in epoch.pruned]


def _last_gate(run: Run, edge: Edge) -> float | None:
    return next((gate for e in reversed(run.epochs) if (gate := e.gates.get(edge)) is not None), None)


# The derived cells


def drawn_cells(genotype: AnyGenotype | None) -> list[tuple[str, Markup]]:
    """The cells of a genotype, by name; none without one."""
    if genotype is None:
        return []
    return [
        (display_name(key), draw_cell(cell, concat, f"Derived {display_name(key).lower()}", genotype.inputs))
        for key, (cell, concat) in with_shortcuts(genotype).items()
    ]


def families(genotypes: Sequence[AnyGenotype | None]) -> dict[str, str]:
    """The legend: the families of operations that the genotypes have."""
    cells = [nodes for genotype in genotypes if genotype for nodes, _ in with_shortcuts(genotype).values()]
    present = {family(operation) for nodes in cells for node in nodes for operation, _ in node}
    return {key: name for key, name in FAMILIES.items() if key in present}


def genotype_text(genotype: AnyGenotype | None) -> str | None:
    """DARTS' text, one node per line, or an arch string; JSON where a node has more edges than a text can say."""
    if genotype is None:
        return None
    try:
        text = re.sub(r"(\('\w+', \d+\), \('\w+', \d+\)), ", r"\1,\n" + 17 * " ", genotype.to_text())
        return text.replace(", reduce=", ",\n" + 9 * " " + "reduce=")
    except ValueError:
        return "\n".join(f"{key}: {json.dumps(value)}" for key, value in genotype.to_dict().items())


# Charts over the epochs


@dataclass(frozen=True)
class Figure:
    caption: str
    svg: Markup
    note: str = ""


def _gate_groups(run: Run, removals: Sequence[Removal], which: str, strategy: str) -> list[tuple[str, list[Figure]]]:
    """Per cell type a small chart per node, a line per incoming edge, axes all the same. `which`: a field of Epoch."""
    values = [gate for epoch in run.epochs for gate in getattr(epoch, which).values() if gate is not None]
    if not values:
        return []
    threshold = (
        _plain_number(run.config.get("prune_threshold")) if run.config.get("prune_strategy") == strategy else None
    )
    level = ("threshold", threshold) if threshold is not None else None
    shown = [*values, level[1]] if level else values
    frame = _frame(run.epochs, 270, 190, ticks(min(shown), max(shown)), level=level, right=46)
    ends = {removal.edge: removal.epoch for removal in removals}
    groups = []
    for cell in dict.fromkeys(edge.cell for edge in run.edges):
        nodes = dict.fromkeys(edge.target for edge in run.edges if edge.cell == cell)
        figures = [_node_figure(run, cell, node, which, frame, ends) for node in nodes]
        groups.append((display_name(cell), figures))
    return groups


def _plain_number(value: Any) -> float | None:
    """A setting that a chart can show; None for one that is no number, or not within float32."""
    return float(value) if type(value) in (int, float) and abs(value) < LARGEST else None


def _node_figure(run: Run, cell: str, node: int, which: str, frame: Frame, ends: Mapping[Edge, int]) -> Figure:
    edges = [edge for edge in run.edges if (edge.cell, edge.target) == (cell, node)]
    lines = []
    for edge in edges:
        points = [(epoch.epoch, getattr(epoch, which).get(edge)) for epoch in run.epochs]
        ended = f"removed after epoch {ends[edge]}" if edge in ends else None
        lines.append(Line(state_name(edge.source, run.inputs), f"s{edge.source % 6}", points, ended))
    name = f"Node {state_name(node, run.inputs)}"
    left = sum(edge not in ends for edge in edges)
    of_cell = f"{name.lower()}, {display_name(cell).lower()}"
    title = f"{which.replace('_', ' ').capitalize()} of the edges into {of_cell}, by epoch"
    return Figure(name, line_chart(lines, frame, title), f"{left} of {len(edges)} edges left")


def _frame(epochs: Sequence[Epoch], width: float, height: float, y_ticks: Sequence[float], **options: Any) -> Frame:
    warm = [epoch.epoch for epoch in epochs if epoch.warm_up]
    first, last = epochs[0].epoch, epochs[-1].epoch
    warm_up = min(warm[-1] + 0.5, last) if warm and last > first else None
    return Frame(width, height, (first, last), y_ticks, warm_up=warm_up, **options)


def _figure(
    epochs: Sequence[Epoch],
    caption: str,
    keys: Mapping[str, str],
    scale: float = 1,
    *,
    from_zero: bool = False,
    whole: bool = False,
) -> list[Figure]:
    """A chart of these numbers (key -> name) of the epochs, names showing the last value; none without numbers."""
    lines = []
    for colour, (key, name) in enumerate(keys.items(), max(0, 2 - len(keys))):
        numbers = [{**epoch.tabulated, **epoch.numbers}.get(key) for epoch in epochs]
        points = [(e.epoch, None if n is None else n * scale) for e, n in zip(epochs, numbers, strict=True)]
        last = next((f"{y:.4g}" for _, y in reversed(points) if y is not None), "")
        lines.append(Line(f"{name} {last}".strip(), f"p{colour}", points))
    values = [y for line in lines for _, y in line.drawn]
    if not values:
        return []
    low, longest = min(values + [0.0] * from_zero), max(len(line.name) for line in lines)
    frame = _frame(epochs, 540, 230, ticks(low, max(values), whole=whole), right=max(76, 7 * longest))
    return [Figure(caption, line_chart(lines, frame, f"{caption} by epoch"))]


def _learning(run: Run) -> list[Figure]:
    epochs = run.epochs
    steps = [step for epoch in epochs if (step := epoch.numbers["step_seconds"]) is not None]
    unit, scale = ("ms", 1000.0) if max(steps, default=0) < 1 else ("s", 1.0)
    both = {"train_{}": "train", "valid_{}": "valid"}
    return [
        *_figure(epochs, "Loss (cross-entropy)", {k.format("loss"): name for k, name in both.items()}),
        *_figure(epochs, "Accuracy (%)", {k.format("accuracy"): name for k, name in both.items()}, 100),
        *_figure(epochs, "Active edges", {"active_edges": ""}, from_zero=True, whole=True),
        *_figure(epochs, "Tabulated accuracy of the derived cell (%)", _short_columns(epochs)),
        *_figure(epochs, f"Mean time of a search step ({unit})", {"step_seconds": ""}, scale, from_zero=True),
    ]


def _short_columns(epochs: Sequence[Epoch]) -> dict[str, str]:
    """The columns of the benchmark, each named by its last words: cifar10_test_200ep -> test 200ep."""
    columns = dict.fromkeys(column for epoch in epochs for column in epoch.tabulated)
    return {column: " ".join(column.split("_")[-2:]) for column in columns}


def _retraining(epochs: Sequence[Epoch]) -> list[Figure]:
    return [
        *_figure(epochs, "Training loss (cross-entropy)", {"train_loss": ""}),
        *_figure(epochs, "Training accuracy (%)", {"train_accuracy": ""}, 100),
    ]
