"""Fused photometric operations for CPU and GPU; optional, used where they support every operation."""
