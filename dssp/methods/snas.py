"""SNAS: Stochastic Neural Architecture Search (Xie, Zheng, Liu, Lin 2019, arXiv:1812.09926)."""

from __future__ import annotations

from typing import ClassVar

from dssp.methods.gumbel import GumbelMethod


class Snas(GumbelMethod):
    """Z_e = softmax((alpha_e + g_e) / tau), drawn anew for every step: the concrete relaxation (section 2.2).

    alpha and the weights learn from the same batch of the training half and the same loss (single level, section 2.1).
    The log of the paper's probabilities is alpha up to a constant per edge, which the softmax does not see. The paper
    gives no numbers for the fall of tau: ours is linear, from 1 to 0.1. Left out is its penalty on resources (section
    2.4). The derivation is DARTS'.
    """

    joint: ClassVar[bool] = True
