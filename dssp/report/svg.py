"""SVG built as an element tree: texts and attributes from a run folder are escaped by construction."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from markupsafe import Markup


def drawing(width: float, height: float, title: str) -> ET.Element:
    """An empty picture of this size in CSS pixels; `title` is what a screen reader says."""
    box = f"0 0 {round(width, 1):g} {round(height, 1):g}"
    svg = ET.Element("svg", {"viewBox": box, "width": f"{width:.0f}", "height": f"{height:.0f}", "role": "img"})
    element(svg, "title", title)
    return svg


def element(parent: ET.Element, tag: str, text: str | None = None, **attributes: str | float) -> ET.Element:
    """Append an element. `class_` stands for class, an underscore for a hyphen; lengths are rounded to 0.1 pixel."""
    written = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{round(value, 1):g}"
        for name, value in attributes.items()
    }
    child = ET.SubElement(parent, tag, written)
    child.text = text
    return child


def state_name(state: int | str, inputs: int) -> str:
    """A state of a cell with so many inputs, as the field draws it; a text is itself.

    With two inputs, as DARTS does: c_{k-2} and c_{k-1}, then nodes 0, 1, ...; with one, as NAS-Bench-201 does: c_{k-1},
    which is node 0, then nodes 1, 2, ...
    """
    if isinstance(state, str):
        return state
    return f"c_{{k-{inputs - state}}}" if state < inputs else str(state if inputs == 1 else state - inputs)


def state_text(parent: ET.Element, name: str, **attributes: str | float) -> ET.Element:
    """A text element; what stands in _{} is set as a subscript."""
    name, _, index = name.partition("_{")
    text = element(parent, "text", name, **attributes)
    if index:
        element(text, "tspan", index.rstrip("}").replace("-", "\N{MINUS SIGN}"), dy=3, class_="sub")
    return text


def markup(svg: ET.Element) -> Markup:
    return Markup(ET.tostring(svg, encoding="unicode"))
