"""Search methods, by name."""

from __future__ import annotations

from dssp.methods.base import Method
from dssp.methods.darts import Darts
from dssp.methods.dssp import Dssp
from dssp.methods.dssp_paper import DsspPaper
from dssp.methods.fair_darts import FairDarts
from dssp.methods.gdas import Gdas
from dssp.methods.pc_darts import PcDarts
from dssp.methods.random_search import RandomSearch
from dssp.methods.snas import Snas

METHODS: dict[str, type[Method]] = {
    "dssp": Dssp,
    "dssp-paper": DsspPaper,
    "darts": Darts,
    "pc-darts": PcDarts,
    "fair-darts": FairDarts,
    "snas": Snas,
    "gdas": Gdas,
    "random": RandomSearch,
}
"""By the names of SearchConfig.method."""

__all__ = ["METHODS", "Method"]
