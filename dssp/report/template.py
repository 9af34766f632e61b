"""The templates of the pages: autoescape is on, and what a template may include comes from the package."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from dssp.report.units import DASH
from dssp.runs.files import write_atomically


def environment() -> Environment:
    """Loads templates by package and name: "dssp.report/page.html.j2"."""
    made = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_text),
    )
    made.globals.update(dash=DASH, file=lambda name: Markup(_text(name)), sha256=_sha256)
    return made


def write_page(path: Path, html: str) -> Path:
    """Write a page, replacing it as a whole, and return its path."""
    write_atomically(path, lambda file: file.write(html.encode(errors="replace")))  # JSON can hold lone surrogates
    return path


def _sha256(name: str) -> str:
    """What a Content-Security-Policy calls the script in a file: nothing else on the page runs."""
    return f"sha256-{base64.b64encode(hashlib.sha256(_text(name).encode()).digest()).decode()}"


def _text(name: str) -> str:
    package, _, file = name.partition("/")
    return (files(package) / file).read_text(encoding="utf-8")
