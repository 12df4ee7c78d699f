"""Fused operations for CPU and GPU, used where they support every operation."""
