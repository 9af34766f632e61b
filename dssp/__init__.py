"""Differentiable Search Space Pruning: architecture search that removes edges while it runs."""

__version__ = "0.1.0"
