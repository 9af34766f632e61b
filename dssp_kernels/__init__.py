"""Fused kernels for the mixed edges of differentiable architecture search."""

from dssp_kernels.backend import get_backend, set_backend
from dssp_kernels.batch_norm_mixed_sum.op import batch_norm_mixed_sum
from dssp_kernels.mixed_sum.op import mixed_sum
from dssp_kernels.modules import FusedMixedEdge, FusedMixedNode, PruningMask, prune_matrix

__all__ = [
    "FusedMixedEdge",
    "FusedMixedNode",
    "PruningMask",
    "batch_norm_mixed_sum",
    "get_backend",
    "mixed_sum",
    "prune_matrix",
    "set_backend",
]
