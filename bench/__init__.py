"""Benchmarks: what the fused operators save, measured beside what people write today."""
