"""Scorers: pure functions from attention rows or head outputs to a number per head and query."""

from headscope.outputs import HeadOutputs
from headscope.rows import AttentionRows
from headscope.scorers.base import (
    Scorer,
    every_query,
    output_scorer,
    row_scorer,
    value_weighted,
    without_sink,
)
from headscope.scorers.between import between
from headscope.scorers.catalogue import CATALOGUE, DEFAULT, resolve
from headscope.scorers.offsets import relative_offset
from headscope.scorers.spread import window_mass

__all__ = [
    "CATALOGUE",
    "DEFAULT",
    "AttentionRows",
    "HeadOutputs",
    "Scorer",
    "between",
    "every_query",
    "output_scorer",
    "relative_offset",
    "resolve",
    "row_scorer",
    "value_weighted",
    "window_mass",
    "without_sink",
]
