"""Metrics: one number per example from the logits, as frozen values.

A metric says which positions it reads, so that logits are computed nowhere else. By default these
are the positions that have a target; ``metric.at("end")`` reads a mark of the probe instead. Where
an example has several, its number is their mean; where it has none, NaN. A metric is also a plain
function of whole logits: ``hs.metrics.loss(model.forward(probe.tokens), probe)``.
A user's function ``f(logits [batch pos d_vocab], probe) -> [batch]`` is a metric too.
"""

from headscope.metrics.base import Answered as Answered
from headscope.metrics.base import AnyMetric as AnyMetric
from headscope.metrics.base import LogitRows as LogitRows
from headscope.metrics.base import Metric as Metric
from headscope.metrics.base import WholeMetric as WholeMetric
from headscope.metrics.base import as_metric as as_metric
from headscope.metrics.base import cost_sign as cost_sign
from headscope.metrics.base import rows_of as rows_of
from headscope.metrics.catalogue import POOLINGS as POOLINGS
from headscope.metrics.catalogue import EmbeddingMetric as EmbeddingMetric
from headscope.metrics.catalogue import accuracy as accuracy
from headscope.metrics.catalogue import answer_log_prob as answer_log_prob
from headscope.metrics.catalogue import answer_probability as answer_probability
from headscope.metrics.catalogue import answer_rank as answer_rank
from headscope.metrics.catalogue import embedding_cosine as embedding_cosine
from headscope.metrics.catalogue import embedding_distance as embedding_distance
from headscope.metrics.catalogue import js_divergence as js_divergence
from headscope.metrics.catalogue import kl_divergence as kl_divergence
from headscope.metrics.catalogue import logit_difference as logit_difference
from headscope.metrics.catalogue import loss as loss
from headscope.metrics.catalogue import normalised_effect as normalised_effect
from headscope.metrics.catalogue import similarity as similarity
