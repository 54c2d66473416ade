"""Transformers models on fused attention; module names occur only here and in ``bridge``."""
