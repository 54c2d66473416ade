"""Transformers models on fused attention; modules are named here and in ``bridge`` only."""
