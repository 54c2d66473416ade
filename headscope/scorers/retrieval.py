"""Retrieval heads, teacher-forced: is the most attended token the needle's next answer token?

Queries are the positions that predict the answer; only their rows are computed, exactly.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.probes.probe import Probe
from headscope.scorer import queries_at, row_scorer
from headscope.views import AttentionRows

_WU = "Wu et al. 2024 (arXiv 2404.15574), {}"
answering = queries_at("answering")


def first_answering(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Mask of the position that predicts each answer's first token."""
    asked = answering(probe)
    return asked & (asked.int().cumsum(1) == 1)


@row_scorer(
    unit="share",
    source=_WU.format("retrieval score, section 2; teacher-forced"),
    probe="needle",
    queries=answering,
    control="needle",
    needs=("causal",),
    threshold=0.1,
)
def retrieval(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Share of the answer's tokens that the head copies from the needle.

    1 where ``j = argmax A[i]`` lies in ``needle_answer`` and token j is the one that query i should
    predict, else 0; in [0, 1], over the positions that predict the answer. On ties the lowest key
    wins. The source decodes and compares with the generated token: both agree for runs that answer
    correctly (``headscope.retrieval`` implements that form, and measures the agreement). NaN where
    the layer's window hides all of it. The threshold is the source's.

    Weakness: an argmax ignores how much is attended and what is written, and a head that parks
    attention on the first token scores 0 however much of the rest it spends on the needle.
    """
    best = rows.pattern.argmax(-1)
    mark = probe.mark("needle_answer")
    hit = chosen_by(best, mark) & _is_target(best, rows, probe)
    return unless_hidden(hit.float(), rows, mark)


@row_scorer(
    unit="share",
    source=_WU.format("retrieval score, at the answer's first token alone"),
    probe="needle",
    queries=first_answering,
    control="needle",
    needs=("causal",),
    threshold=0.1,
)
def retrieval_first_token(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Share of the answers whose first token the head copies from the needle.

    Like ``retrieval``, only at the position that predicts the answer's first token, where the
    question alone tells which needle is meant; 1 or 0 per example, the mean in [0, 1]. The later
    tokens of an answer follow as they do in the text, so a head that continues what it finds
    (induction) scores there under any question: with numbers as needles ``retrieval`` is as high in
    the control ``other_question`` as in the probe, and this score is not (SmolLM2-135M, 15 numbers:
    L23H2 is .44 against .16 there and 1.00 against .07 here). NaN where the layer's window hides
    the answer.

    Weakness: one bit per example; naming one head among a thousand takes 15 examples.
    """
    return retrieval(rows, probe)


@row_scorer(
    unit="share",
    source=_WU.format("the first half of the retrieval condition alone"),
    probe="needle",
    queries=answering,
    control="needle",
    needs=("causal",),
)
def retrieval_needle_only(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Share of the answer's tokens at which the head's top key is anywhere in the needle.

    1 where ``argmax A[i]`` lies in the whole span ``needle``, else 0; in [0, 1], over the positions
    that predict the answer. With ``retrieval_copy_only`` it makes up the two halves of
    ``retrieval``. NaN where the layer's window hides the needle.

    Weakness: looking at the right sentence is not reading the right word.
    """
    mark = probe.mark("needle")
    return unless_hidden(chosen_by(rows.pattern.argmax(-1), mark).float(), rows, mark)


@row_scorer(
    unit="share",
    source=_WU.format("the second half of the retrieval condition alone"),
    probe="needle",
    queries=answering,
    control="needle",
    needs=("causal",),
)
def retrieval_copy_only(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Share of the answer's tokens at which the head's top key holds that token, anywhere.

    1 where token ``argmax A[i]`` is the one to be predicted, else 0; in [0, 1], over the
    positions that predict the answer.

    Weakness: frequent words in the answer match by chance; the control says how often.
    """
    return _is_target(rows.pattern.argmax(-1), rows, probe).float()


@row_scorer(
    source="mean attention on the needle: Wu et al. 2024, without the argmax",
    probe="needle",
    queries=answering,
    control="needle",
    needs=("causal",),
)
def needle_mass(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention on the needle while the answer is predicted.

    ``sum of A[i, j] over the keys marked needle``, a probability in [0, 1], over the positions
    that predict the answer. NaN where the layer's window hides the needle.

    Weakness: a long needle catches more of any attention; the control has one of the same length.
    """
    return rows.column_mass(probe.mark("needle"))


@row_scorer(
    source="QRHead, EMNLP 2025: mean attention of the query's tokens, null subtracted apart",
    probe="needle",
    queries=queries_at("question"),
    control="needle",
    needs=("causal",),
)
def query_focused_retrieval(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention on the needle while the question is read.

    ``sum of A[i, j] over the keys marked needle``, a probability in [0, 1], over the tokens of the
    question. The source subtracts the same for an empty query ("N/A"), token by token, and drops
    the tokens that are then two deviations below the mean. Here nothing is dropped, and ``mean -
    null`` subtracts the attention under another question (``control="other_question"``).

    Weakness: tokens that question and needle share attract duplicate-token heads.
    """
    return rows.column_mass(probe.mark("needle"))


@row_scorer(
    source="HeadKV, Fu et al. 2024 (arXiv 2410.19258), retrieval-reasoning score",
    probe="needle",
    queries=answering,
    control="needle",
    needs=("causal",),
)
def importance_weighted_retrieval(
    rows: AttentionRows, probe: Probe
) -> Float[Tensor, "batch head query"]:
    """Attention on those of the needle's tokens that are among the head's top keys.

    ``sum of A[i, j] over j in needle and in the k largest of row i``, with k the needle's length; a
    probability in [0, 1], over the positions that predict the answer. The source decodes, keeps
    runs with an F1 above .5, and divides the sum over steps by the needle's length; this mean over
    steps equals it if the answer is as long as the needle, and is larger if it is shorter. Less
    strict than ``retrieval``: few heads score 0. NaN where the layer's window hides the needle.

    Weakness: the attended token need not be the right one.
    """
    mark = probe.mark("needle")
    size = mark.sum(1)
    most = min(int(probe.host.mark("needle").sum(1).max()), rows.pattern.shape[-1])
    largest = rows.pattern.topk(most, dim=-1)
    rank = torch.arange(most, device=size.device)
    counted = (rank < size[:, None])[:, None, None]
    batch, heads, queries, _ = largest.indices.shape
    inside = chosen_by(largest.indices.flatten(2), mark).view(batch, heads, queries, most)
    return unless_hidden((largest.values * (inside & counted)).sum(-1), rows, mark)


def chosen_by(
    keys: Int[Tensor, "batch head some"], mark: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch head some"]:
    """Whether each of these keys has a mark."""
    return mark[:, None].expand(-1, keys.shape[1], -1).gather(2, keys)


def unless_hidden(
    values: Float[Tensor, "batch head query"], rows: AttentionRows, mark: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch head query"]:
    """NaN for queries that see no key with a mark."""
    seen = (rows.visible & mark[:, None, : rows.visible.shape[-1]]).any(-1)
    return values.masked_fill(~seen[:, None], torch.nan)


def _is_target(
    keys: Int[Tensor, "batch head query"], rows: AttentionRows, probe: Probe
) -> Bool[Tensor, "batch head query"]:
    """Whether the token at each key is the query's target."""
    tokens = probe.tokens[:, None].expand(-1, keys.shape[1], -1).gather(2, keys)
    return tokens == probe.targets[:, None, rows.query_pos]
