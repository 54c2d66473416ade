"""Scorers: pure functions from attention rows, head outputs, QK scores, gradients or weights."""

from headscope.scorer import (
    Control,
    DefaultProbe,
    Scorer,
    every_query,
    gradient_scorer,
    output_scorer,
    qk_scorer,
    row_scorer,
    value_weighted,
    weight_scorer,
    without_sink,
)
from headscope.scorers.catalogue import CATALOGUE, DEFAULT, resolve
from headscope.scorers.long_need import long_need, long_need_predicted, streaming_gap
from headscope.scorers.patterns import hop_mass, relative_offset
from headscope.scorers.relation import Relation, between, relation
from headscope.scorers.spread import window_mass
from headscope.views import AttentionRows, HeadGradients, HeadOutputs, QueryKeys

__all__ = [
    "CATALOGUE",
    "DEFAULT",
    "AttentionRows",
    "Control",
    "DefaultProbe",
    "HeadGradients",
    "HeadOutputs",
    "QueryKeys",
    "Relation",
    "Scorer",
    "between",
    "every_query",
    "gradient_scorer",
    "hop_mass",
    "long_need",
    "long_need_predicted",
    "output_scorer",
    "qk_scorer",
    "relation",
    "relative_offset",
    "resolve",
    "row_scorer",
    "streaming_gap",
    "value_weighted",
    "weight_scorer",
    "window_mass",
    "without_sink",
]
