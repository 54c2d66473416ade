"""Spread of attention: distance, entropy, and mass on sinks and delimiters."""

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.errors import InputError
from headscope.probes.probe import Probe
from headscope.scorer import WORDS, Scorer, queries_past, queries_with, row_scorer
from headscope.scorers.patterns import mean_reach
from headscope.views import AttentionRows

_LOCAL = 8
# Mean from which a head has the role local.
_MOSTLY = 0.8


@checked
def window_mass(
    width: int, *, name: str | None = None, threshold: float | None = _MOSTLY
) -> Scorer:
    """Make a scorer of attention to the last ``width`` tokens; ``local_window`` uses 8.

    ``sum of A[i, j] over i - width < j <= i``, a probability in [0, 1], over the queries that have
    seen more than ``width`` tokens (the others see nothing else). In encoders, where queries also
    see later keys, ``|i - j| < width``: the same number of tokens on either side.

    Weakness: previous- and current-token heads score 1 too; the role excludes those. If the first
    token is a sink, read the ``_no_sink`` form.

    Args:
        width: number of tokens, including the query's own.
        name: name of the scorer. Default: with the width.
        threshold: smallest score of a head with this role; None: no role.

    Returns:
        The scorer.

    Raises:
        InputError: if the width is not at least 1.

    Example:
        >>> list(hs.score(model, probe, window_mass(4)))
        ['window_4']
    """
    if width < 1:
        raise InputError(f"width={width} holds no token: give 1 or more.")

    def function(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        batch, heads, _, keys = rows.held.shape
        ahead = 0 if rows.mask.causal else 1 - width
        back = torch.arange(ahead, width, device=rows.held.device)
        index = rows.query_pos[:, None] - back - rows.first_key
        inside = (index >= 0) & (index < keys)
        index = index.clamp(0, keys - 1)
        # Invisible keys hold 0, so only clamped indices have to be masked.
        picked = rows.held.gather(-1, index.expand(batch, heads, -1, -1)) * inside
        seen = (rows.held_visible.gather(-1, index.expand(batch, -1, -1)) & inside).any(-1)
        return picked.sum(-1).masked_fill(~seen[:, None], torch.nan)

    function.__doc__ = f"Attention to the last {width} tokens, the query's own included."
    return row_scorer(
        name=name or f"window_{width}",
        source="Xiao et al. 2023 (arXiv 2309.17453), recent window; local heads, arXiv 2409.03752",
        probe="text",
        queries=queries_past(width),
        threshold=threshold,
        needs=("one_sequence", "text"),
    )(function)


local_window = window_mass(_LOCAL, name="local_window")


@row_scorer(
    unit="tokens",
    bounds=(0.0, None),
    source="Vig & Belinkov 2019 (arXiv 1906.04284), mean attention distance",
    probe="text",
    control=None,
    needs=("one_sequence",),
)
def attention_distance(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Mean distance in tokens from a query to the keys it attends to.

    ``sum_j A[i, j] |i - j| / sum_j A[i, j]``, from 0 (the query's own token) to the position in the
    text, over every query but the first. Uniform attention over earlier tokens gives ``i/2``. It
    has no null and grows with the length of the texts: compare heads, not probes.

    Of images the distance is that between the middles of two patches, in patches, weighted by what
    a patch gives to patches alone (Dosovitskiy et al. 2020, arXiv 2010.11929, attention distance).

    Weakness: attention on the first token counts as looking far; read
    ``attention_distance_no_sink``.
    """
    if probe.grid is not None:
        return mean_reach(rows, probe)
    if not rows.mask.causal:
        apart = (rows.query_pos[:, None] - rows.key_pos).abs().to(rows.held.dtype)
        far: Tensor = torch.linalg.vecdot(rows.held, apart) / rows.total
        return far
    # Measured from the middle of the chunk, so that fp32 keeps short distances in long texts exact.
    middle = rows.query_pos[len(rows.query_pos) // 2]
    keys = rows.key_pos - middle
    weights = torch.stack([torch.ones_like(keys), keys], -1).to(rows.held.dtype)
    total, moment = torch.matmul(rows.held, weights).unbind(-1)
    return ((rows.query_pos - middle) - moment / total).clamp_min(0)


@row_scorer(
    unit="nats",
    bounds=(0.0, None),
    source="Clark et al. 2019 (arXiv 1906.04341), entropy of attention",
    probe="text",
    control=None,
)
def entropy(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Entropy of the attention: how many tokens a query attends to, on a log scale.

    ``-sum_j A[i, j] log A[i, j]`` in nats, from 0 (one key) to the log of the number of visible
    keys (uniform attention; ``log(i+1)`` with a causal mask), over every query but the first; of
    the row divided by its sum, where a learned sink takes part of it. Higher is broader. No
    smoothing, unlike the source, which matters only at 0.

    Weakness: later queries can spread wider; ``normalised_entropy`` divides that out.
    """
    return rows.entropy


@row_scorer(
    unit="share",
    source="Clark et al. 2019 (arXiv 1906.04341), entropy over its maximum",
    probe="text",
    control=None,
)
def normalised_entropy(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Entropy of the attention as a share of the largest possible.

    ``entropy / log(number of visible keys)``, from 0 (one key) to 1 (uniform attention), over every
    query but the first; NaN where only one key is visible.

    Weakness: near 0 for every head that has a sink; read ``normalised_entropy_no_sink``.
    """
    most = rows.held_visible.sum(-1).log()
    return (rows.entropy / most.where(most > 0, torch.nan)[:, None]).clamp_max(1)


@row_scorer(
    source="Voita et al. 2019 (arXiv 1905.09418), confidence",
    probe="text",
    control=None,
)
def max_attention(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Largest attention weight of a query: how focused a head is on one token.

    ``max_j A[i, j]``, from 1 over the number of visible keys to 1, over every query but the
    first. The source leaves out the end-of-sentence key; here ``max_attention_no_sink`` leaves
    out the first token.

    Weakness: high for every head that has a sink.
    """
    return rows.held.amax(-1)


@row_scorer(
    unit="share",
    source="Correia et al. 2019 (arXiv 1909.00015), attention density",
    probe="text",
    control=None,
)
def density(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Share of the visible keys that get any attention at all.

    ``(keys with A[i, j] > 0) / (visible keys)``, in [0, 1], over every query but the first. Below 1
    only where attention has exact zeros: entmax, sparsemax, top-k, or a softmax whose smallest
    weights fp32 cannot hold.

    Weakness: a key with a weight of 1e-30 counts like any other; read ``entropy`` beside it.
    """
    seen = rows.held_visible.sum(-1).to(rows.held.dtype)
    return (rows.held > 0).sum(-1) / seen.where(seen > 0, torch.nan)[:, None]


@row_scorer(
    unit="nats",
    bounds=(0.0, None),
    source="Correia et al. 2019 (arXiv 1909.00015), Jensen-Shannon divergence between heads",
    probe="text",
    control=None,
)
def head_diversity(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Divergence of a head's attention from the mean over its layer's heads.

    Kullback-Leibler divergence ``sum_j A[h, i, j] log(A[h, i, j] / M[i, j])`` from the layer's mean
    row M, in nats, from 0 (all heads attend alike) to the log of the number of heads (no other head
    looks where this one does), over every query but the first. Its mean over a layer's heads is
    their Jensen-Shannon divergence. Rows are divided by their sums, where a learned sink takes
    part of them; a head that attends to nothing is left out of the mean.

    Weakness: it depends on the other heads: a copy of a head halves what both have.
    """
    there = rows.total > 0
    shares = rows.held / rows.total.where(there, 1.0)[..., None]
    n = there.sum(1, keepdim=True).clamp_min(1)
    mean = shares.sum(1, keepdim=True) / n[..., None]
    crossed = (shares * mean.clamp_min(1e-38).log()).sum(-1)
    return (-rows.entropy - crossed).clamp_min(0).masked_fill(~there, torch.nan)


@row_scorer(
    source="Gu et al. 2024 (arXiv 2410.10781), attention sink; Xiao et al. 2023 (arXiv 2309.17453)",
    probe="text",
    threshold=0.5,
    needs=("one_sequence",),
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
    needs=("bidirectional", "one_sequence", "text"),
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
    needs=("one_sequence", "text"),
)
def delimiter(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to punctuation, line breaks and special separators.

    ``sum of A[i, j] over the keys marked "delimiter"``, a probability in [0, 1], over every
    query but the first that has seen one. The first token is never among them.

    Weakness: it counts delimiters, and texts with more of them give more to every head;
    compare with the flat null. The threshold is that of the source's head groups.
    """
    return rows.column_mass(probe.mark("delimiter"))
