"""Fused operations, one folder each: reference, Triton kernel, dispatch. There are none yet."""
