"""Attention that is parked: on the first token, on delimiters."""

from jaxtyping import Float
from torch import Tensor

from headscope.probes.probe import Probe
from headscope.rows import AttentionRows
from headscope.scorer import WORDS, row_scorer
from headscope.scorers.queries import queries_with


@row_scorer(
    source="Gu et al. 2024 (arXiv 2410.10781), attention sink; Xiao et al. 2023 (arXiv 2309.17453)",
    probe="text",
    threshold=0.5,
)
def first_token(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to the first real token, the usual sink.

    ``A[i, 0]``, a probability in [0, 1], over every query but the first. It is ``alpha`` of
    the source without the first query, whose 1 says nothing. In a layer with a window NaN
    where the first token is out of sight.

    Weakness: a sink is where attention goes when a head has nothing to do; the value there is
    often near zero, which ``first_token_value_weighted`` shows. The source calls .3 a sink;
    the threshold asks for half, so that the name means what the head mostly does.
    """
    return rows.at(probe.first[:, None].expand(-1, len(rows.query_pos)))


@row_scorer(
    source="Clark et al. 2019 (arXiv 1906.04341), attention to [SEP]",
    probe=WORDS,
    queries=queries_with("separator"),
    threshold=0.5,
    needs=("bidirectional",),
)
def separator(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to the separators of an encoder, ``[SEP]`` or ``</s>``, its usual sink.

    ``sum of A[i, j] over the keys marked "separator"``, a probability in [0, 1], over every
    query but the first; the separator's own query counts.

    Weakness: as ``first_token``: attention is parked there when a head has nothing to do.
    """
    return rows.column_mass(probe.mark("separator"))


@row_scorer(
    source="Clark et al. 2019 (arXiv 1906.04341), attention to [SEP] and punctuation",
    probe=WORDS,
    queries=queries_with("delimiter"),
    threshold=0.6,
)
def delimiter(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to punctuation, line breaks and special separators.

    ``sum of A[i, j] over the keys marked "delimiter"``, a probability in [0, 1], over every
    query but the first that has seen one. The first token is never among them.

    Weakness: it counts delimiters, and texts with more of them give more to every head;
    compare with the flat null. The threshold is that of the source's head groups.
    """
    return rows.column_mass(probe.mark("delimiter"))
