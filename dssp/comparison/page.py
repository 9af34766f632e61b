"""The page of a comparison: one HTML file with its table, charts and the best cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from dssp.comparison.results import Comparison, Result
from dssp.comparison.table import headings, rows
from dssp.report.axis import ticks
from dssp.report.charts import Frame, Line, line_chart
from dssp.report.page import Figure, display_name, drawn_cells, families, genotype_text, setting
from dssp.report.run_folder import Epoch
from dssp.report.scatter import Point, scatter_chart
from dssp.report.template import environment
from dssp.report.template import write_page as write_html
from dssp.report.units import count, duration, percent

COLOURS = 8  # classes s0, s1, ... of the style sheet


def write_page(comparison: Comparison) -> Path:
    """Write comparison.html to the comparison's folder, replacing it as a whole, and return its path."""
    return write_html(comparison.folder / "comparison.html", render(comparison))


def render(comparison: Comparison) -> str:
    """The page as HTML. Every text of a run folder passes through autoescape or the SVG element tree."""
    colours = {method: f"s{i % COLOURS}" for i, method in enumerate(comparison.methods)}
    best = [result for method in comparison.methods if (result := comparison.best(method))]
    made = environment()
    made.globals.update(display_name=display_name)
    return made.get_template("dssp.comparison/page.html.j2").render(
        title=f"Methods compared on {display_name(_dataset(comparison))}",
        subtitle=_subtitle(comparison),
        running=_running(comparison),
        headings=headings(comparison, wide=True),
        rows=rows(comparison, wide=True),
        shared=any(result.shared for result in comparison.results),
        colours=colours,
        courses=_courses(comparison, colours),
        trades=_trades(comparison, colours),
        best=[(result, _accuracy(comparison, result), *_cells(result)) for result in best],
        judge=comparison.judge.replace("_", " "),
        families=families([result.run.genotype for result in best if result.run]),
        runs=[(result, _run_numbers(result)) for result in comparison.results],
        command=comparison.command,
        config={key: setting(value) for key, value in _config(comparison).items()},
    )


def _config(comparison: Comparison) -> Mapping[str, object]:
    """What was compared; settings that all runs had are those of the first one."""
    flags = comparison.config.get("flags", {})
    own = {key: comparison.config[key] for key in ("methods", "seeds", "jobs")}
    own |= {"search_seconds": seconds} if (seconds := comparison.search_seconds) else {}
    return {**own, **flags, **next((result.run.versions for result in comparison.results if result.run), {})}


def _dataset(comparison: Comparison) -> object:
    return next((r.run.config.get("dataset") for r in comparison.results if r.run), "unknown data")


def _subtitle(comparison: Comparison) -> str:
    config = next((result.run.config for result in comparison.results if result.run), {})
    budget = [] if comparison.search_seconds else ["epochs"]  # of all runs alike, or of each method its own
    parts = [f"{key} {setting(config[key])}" for key in ("space", *budget, "retrain_epochs") if key in config]
    parts += [f"searches of {comparison.search_seconds:g} s"] if comparison.search_seconds else []
    methods, seeds = len(comparison.methods), comparison.config["seeds"]
    parts = [f"{methods} methods, {seeds} seeds each", *(part.replace("_", " ") for part in parts)]
    return " \N{MIDDLE DOT} ".join([*parts, comparison.folder.resolve().name])


def _running(comparison: Comparison) -> str | None:
    """What to say while runs are missing."""
    counts = {s: sum(r.status == s for r in comparison.results) for s in ("failed", "unfinished")}
    said = [f"{number} of {len(comparison.results)} runs {s}" for s, number in counts.items() if number]
    return f"{', '.join(said)}: what follows is what the others say." if said else None


def _accuracy(comparison: Comparison, result: Result) -> str:
    value = result.numbers.get(comparison.judge)
    return percent(value / 100 if value is not None and comparison.judge != "test_accuracy" else value)


def _cells(result: Result) -> tuple[list[tuple[str, str]], str | None]:
    genotype = result.run.genotype if result.run else None
    return [(name, svg) for name, svg in drawn_cells(genotype)], genotype_text(genotype)


def _run_numbers(result: Result) -> list[str]:
    numbers = result.numbers
    return [
        percent(numbers["test_accuracy"]),
        count(numbers["parameters"]),
        count(numbers["flops"]),
        duration(numbers["search_seconds"]),
        count(numbers["search_flops"]),
        duration(numbers["retrain_seconds"]),
        count(numbers["peak_memory_bytes"], "B"),
    ]


# Accuracy over time


def _courses(comparison: Comparison, colours: Mapping[str, str]) -> list[Figure]:
    columns = dict.fromkeys(
        column for result in comparison.results if result.run for e in result.run.epochs for column in e.tabulated
    )
    wanted = [("valid_accuracy", "Validation accuracy of the supernet (%)", 100.0)]
    wanted += [(column, f"Tabulated accuracy, {column} (%)", 1.0) for column in columns]
    return [figure for key, caption, scale in wanted for figure in _course(comparison, colours, key, caption, scale)]


def _course(comparison: Comparison, colours: Mapping[str, str], key: str, caption: str, scale: float) -> list[Figure]:
    """One chart, none if no run has the number."""
    lines = []
    for method in comparison.methods:
        runs = [result.run.epochs for result in comparison.results if result.method == method and result.run]
        courses = [points for epochs in runs if (points := _points(epochs, key, scale))]
        if not courses:
            continue
        lines += [Line(display_name(method), colours[method], list(c.values()), thin=True) for c in courses]
        lines.append(Line(display_name(method), colours[method], _mean_course(courses)))
    drawn = [place for line in lines for place in line.drawn]
    if not drawn:
        return []
    seconds, values = zip(*drawn, strict=True)
    right = max(76, 7 * max(len(line.name) for line in lines))
    y_ticks = ticks(min(values), max(values))
    frame = Frame(540, 260, (0, max(seconds) or 1), y_ticks, left=42, right=right, x_name="s")
    return [Figure(caption, line_chart(lines, frame, f"{caption} by seconds of search"))]


def _points(epochs: tuple[Epoch, ...], key: str, scale: float) -> dict[int, tuple[float, float]]:
    """Epoch -> seconds since the start of the search, the number."""
    points = {}
    for epoch in epochs:
        value, seconds = {**epoch.tabulated, **epoch.numbers}.get(key), epoch.numbers["seconds"]
        if value is not None and seconds is not None:
            points[epoch.epoch] = (seconds, value * scale)
    return points


def _mean_course(courses: list[dict[int, tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean seconds and mean number after every epoch that all the courses have."""
    common = sorted(set.intersection(*(set(course) for course in courses)))
    return [tuple(fmean(c[epoch][i] for c in courses) for i in (0, 1)) for epoch in common]  # type: ignore[misc]


# Accuracy and size


def _trades(comparison: Comparison, colours: Mapping[str, str]) -> list[Figure]:
    wanted = (("parameters", "parameters"), ("flops", "FLOPs per image"))
    return [figure for key, name in wanted for figure in _trade(comparison, colours, key, name)]


def _trade(comparison: Comparison, colours: Mapping[str, str], key: str, name: str) -> list[Figure]:
    """Accuracy against one measure of size; none if no run has both."""
    judge = comparison.judge
    percents = 100.0 if judge == "test_accuracy" else 1.0
    found = [
        (result, size, accuracy * percents)
        for result in comparison.results
        if (size := result.numbers[key]) is not None and (accuracy := result.numbers.get(judge)) is not None
    ]
    if not found:
        return []
    largest = max(size for _, size, _ in found)
    prefix, unit = next(((p, u) for p, u in (("G ", 1e9), ("M ", 1e6), ("k ", 1e3)) if largest >= u), ("", 1.0))
    points = [
        Point(f"{display_name(result.method)}, seed {result.seed}", colours[result.method], size / unit, accuracy)
        for result, size, accuracy in found
    ]
    x_ticks = ticks(min(p.x for p in points), max(p.x for p in points))
    y_ticks = ticks(min(p.y for p in points), max(p.y for p in points))
    axis = f"{prefix}{name}"
    frame = Frame(540, 260, (x_ticks[0], x_ticks[-1]), y_ticks, left=42, right=6.2 * len(axis) + 12, x_name=axis)
    caption = f"{judge.replace('_', ' ').capitalize()} (%) and {name}"
    return [Figure(caption, scatter_chart(points, frame, caption))]
