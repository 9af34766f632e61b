"""Fused kernels for the mixed edges of differentiable architecture search."""

from dssp_kernels.backend import get_backend, set_backend
from dssp_kernels.batch_norm_mixed_sum.op import batch_norm_mixed_sum
from dssp_kernels.convert import fuse_mixed_ops
from dssp_kernels.depthwise_conv.module import DepthwiseConv2d
from dssp_kernels.depthwise_conv.op import depthwise_conv2d
from dssp_kernels.mixed_sum.op import mixed_sum
from dssp_kernels.modules import FusedMixedEdge, FusedMixedNode, PruningMask, prune_matrix
from dssp_kernels.parameter_free_sums.cell import CellSums
from dssp_kernels.pointwise_batch_norm.op import pointwise_batch_norm, pointwise_batch_norm_group
from dssp_kernels.pointwise_batch_norm.step import relu_pointwise_norms
from dssp_kernels.pool_batch_norm.op import pool_batch_norm
from dssp_kernels.separable_conv.op import (
    SeparableConvolution,
    SeparablePair,
    separable_conv2d,
    separable_conv2d_group,
)
from dssp_kernels.separable_conv.step import SeparableStep
from dssp_kernels.sharing import SharedOutputs, parameter_free

__all__ = [
    "CellSums",
    "DepthwiseConv2d",
    "FusedMixedEdge",
    "FusedMixedNode",
    "PruningMask",
    "SeparableConvolution",
    "SeparablePair",
    "SeparableStep",
    "SharedOutputs",
    "batch_norm_mixed_sum",
    "depthwise_conv2d",
    "fuse_mixed_ops",
    "get_backend",
    "mixed_sum",
    "parameter_free",
    "pointwise_batch_norm",
    "pointwise_batch_norm_group",
    "pool_batch_norm",
    "prune_matrix",
    "relu_pointwise_norms",
    "separable_conv2d",
    "separable_conv2d_group",
    "set_backend",
]
