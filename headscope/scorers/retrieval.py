"""Retrieval, teacher-forced: is the most attended token the needle's, and the one to be said?

Queries are the positions that predict the answer; their rows are exact, no other is computed.
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
    """The position that predicts the first token of each answer."""
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

    1 where ``j = argmax A[i]`` lies in ``needle_answer`` and token j is the one that query i
    should predict, else 0; in [0, 1], over the positions that predict the answer. Ties go to the
    lowest key. The source decodes and takes the token that the model says: for runs that answer
    right both are the same (``headscope.retrieval`` has that form, and measures how well they
    agree). NaN where the layer's window hides all of it. The threshold is the source's.

    Weakness: an argmax sees neither how much is attended nor what is written, and a head that
    parks attention on the first token scores 0 however much of the rest it spends on the needle.
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

    ``retrieval`` where only the question tells which needle is meant: at the position that
    predicts the answer's first token; 1 or 0 an example, the mean in [0, 1]. Behind that token an
    answer of several ones goes on as it does in the text, so that a head which continues what it
    finds (induction) scores there under any question: with numbers as needles ``retrieval`` is then
    as high in the control ``other_question`` as in the probe, and this score is not (SmolLM2-135M,
    15 numbers: L23H2 is .44 against .16 there and 1.00 against .07 here). NaN where the layer's
    window hides the answer.

    Weakness: one bit an example; to name one head among a thousand takes 15 of them.
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
    """Share of the answer's tokens at which the head looks at the needle, whatever token it is at.

    1 where ``argmax A[i]`` lies in ``needle``, all of it, else 0; in [0, 1], over the positions
    that predict the answer. With ``retrieval_copy_only`` the two halves of ``retrieval``. NaN
    where the layer's window hides the needle.

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
    """Share of the answer's tokens at which the head looks at that token, wherever it stands.

    1 where token ``argmax A[i]`` is the one to be predicted, else 0; in [0, 1], over the
    positions that predict the answer.

    Weakness: frequent words in the answer are found by chance; the control says how often.
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

    Weakness: a long needle catches more of any attention; the control has one as long.
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

    ``sum of A[i, j] over the keys marked needle``, a probability in [0, 1], over the tokens of
    the question. The source subtracts the same of an empty query ("N/A"), token by token, and
    drops the tokens that are then two deviations below the mean. Here nothing is dropped, and
    ``mean - null`` takes off the attention under another question
    (``control="other_question"``).

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
    """Attention on those of the needle's tokens that are among the head's most attended ones.

    ``sum of A[i, j] over j in needle and in the k largest of row i``, k the needle's length; a
    probability in [0, 1], over the positions that predict the answer. The source decodes,
    keeps runs with an F1 above .5, and divides the sum over steps by the needle's length; this
    mean over steps equals it where the answer is as long as the needle, and is larger where it is
    shorter. Softer than ``retrieval``: hardly any head is at 0. NaN where the layer's window hides
    the needle.

    Weakness: no token has to be the right one.
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
    """NaN for queries that see no key of a mark."""
    seen = (rows.visible & mark[:, None, : rows.visible.shape[-1]]).any(-1)
    return values.masked_fill(~seen[:, None], torch.nan)


def _is_target(
    keys: Int[Tensor, "batch head query"], rows: AttentionRows, probe: Probe
) -> Bool[Tensor, "batch head query"]:
    """Whether the token at each key is the one that the query should predict."""
    tokens = probe.tokens[:, None].expand(-1, keys.shape[1], -1).gather(2, keys)
    return tokens == probe.targets[:, None, rows.query_pos]
