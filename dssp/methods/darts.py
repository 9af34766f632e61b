"""DARTS: Differentiable Architecture Search (Liu, Simonyan, Yang 2019, arXiv:1806.09055)."""

from __future__ import annotations

from dssp.methods.base import Method


class Darts(Method):
    """softmax(alpha) over all candidates, `none` among them (eq. 2); alpha by the validation loss (eq. 6, xi = 0)."""
