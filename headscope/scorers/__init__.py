"""Scorers: pure functions from attention rows or head outputs to a number per head and query."""

from headscope.matches import Matches
from headscope.outputs import HeadOutputs
from headscope.rows import AttentionRows
from headscope.scorers.base import (
    Scorer,
    every_query,
    match_scorer,
    output_scorer,
    row_scorer,
    value_weighted,
    without_sink,
)
from headscope.scorers.between import between
from headscope.scorers.catalogue import CATALOGUE, DEFAULT, resolve
from headscope.scorers.long_need import long_need, long_need_predicted
from headscope.scorers.offsets import relative_offset
from headscope.scorers.relation import Relation, relation
from headscope.scorers.spread import window_mass
from headscope.scorers.streaming import streaming_gap

__all__ = [
    "CATALOGUE",
    "DEFAULT",
    "AttentionRows",
    "HeadOutputs",
    "Matches",
    "Relation",
    "Scorer",
    "between",
    "every_query",
    "long_need",
    "long_need_predicted",
    "match_scorer",
    "output_scorer",
    "relation",
    "relative_offset",
    "resolve",
    "row_scorer",
    "streaming_gap",
    "value_weighted",
    "window_mass",
    "without_sink",
]
