"""Search methods, by name."""

from __future__ import annotations

from dssp.methods.base import Method
from dssp.methods.darts import Darts
from dssp.methods.dssp import Dssp
from dssp.methods.dssp_paper import DsspPaper

METHODS: dict[str, type[Method]] = {"dssp": Dssp, "dssp-paper": DsspPaper, "darts": Darts}

__all__ = ["METHODS", "Method"]
