"""AttentionInfluence: how much retrieval heads help to read each document of a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from headscope.ablation.arguments import present
from headscope.ablation.groups import joint
from headscope.ablation.run import Placer, Study
from headscope.edits import Heads
from headscope.errors import InputError
from headscope.metrics import loss
from headscope.models.protocol import HeadModel
from headscope.probes.encoding import encode, next_tokens, pad_right
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import bos_prefix, need_tokenizer
from headscope.retrieval.masks import Masking

Denominator = Literal["base", "masked"]
_TOKENS_PER_PASS = 8192
_LONGEST = 4096


@dataclass(frozen=True, eq=False)
class Influence:
    """What masking heads does to the loss of each document, in the order given.

    Attributes:
        base: mean cross-entropy per token of the whole model, nats; NaN for documents of fewer
            than two tokens.
        masked: the same with the heads masked.
        tokens: read of each document, a BOS included.
        denominator: what the score is a share of.
    """

    base: Float[np.ndarray, " document"]
    masked: Float[np.ndarray, " document"]
    tokens: Int[np.ndarray, " document"]
    denominator: Denominator = "base"

    @property
    def score(self) -> Float[np.ndarray, " document"]:
        """``(masked - base) / base`` (Hua et al. 2025, equation 5), or over ``masked``."""
        below = self.base if self.denominator == "base" else self.masked
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(below > 0, (self.masked - self.base) / below, np.nan)


def influence(
    model: HeadModel,
    documents: Sequence[str],
    heads: Heads,
    *,
    method: Masking = "uniform",
    denominator: Denominator = "base",
    max_tokens: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Influence:
    """Loss of each document with and without some heads (Hua et al. 2025, arXiv 2505.07293).

    A document whose loss rises much when retrieval heads attend to everything alike is one that
    needs looking back: the source ranks pretraining data by it, within a domain, and keeps the
    best fifth. It masks the 5% of heads with the highest retrieval scores.

    Documents of similar length share a pass; the result is that of one at a time. Only layers
    from the first masked one on are run twice.

    Args:
        model: from :func:`headscope.load`.
        documents: texts.
        heads: to be masked, at every position.
        method: how; ``uniform`` in the source.
        denominator: ``base``, equation 5 of the source; ``masked``, as in its figure 3.
        max_tokens: read of a document, from its start; default: what the model reads, up to 4096.
        batch_size: documents per pass; default: about 8192 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if there is no document, or an argument makes no sense.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> found = influence(model, ["The cat slept. The dog slept.", "One day"], ["L2H1"])
        >>> found.score.shape
        (2,)
    """
    chosen = present(model, heads)
    if not documents or denominator not in ("base", "masked"):
        raise InputError("give at least one document, and denominator='base' or 'masked'.")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size} leaves nothing to run: give 1 or more.")
    ids = [document_ids(model, text, max_tokens) for text in documents]
    base, masked = np.full((2, len(ids)), np.nan)
    order = sorted((i for i in range(len(ids)) if len(ids[i]) > 1), key=lambda i: -len(ids[i]))
    while order:
        count = batch_size or max(1, _TOKENS_PER_PASS // len(ids[order[0]]))
        rows, order = order[:count], order[count:]
        study = Study.of(model, _probe([ids[i] for i in rows]), loss, progress=progress)
        effects, clean = joint(study, Placer(study, method), [chosen])
        base[rows], masked[rows] = clean, clean + effects[0]
    return Influence(base, masked, np.array([len(one) for one in ids]), denominator)


def document_ids(model: HeadModel, text: str, max_tokens: int | None) -> list[int]:
    """Tokens of a document, a BOS in front if the model uses one, cut at its end."""
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens={max_tokens} leaves nothing to predict: give 2 or more.")
    room = min(model.shape.n_ctx or _LONGEST, max_tokens or _LONGEST)
    tokenizer = need_tokenizer(model, "a document")
    return encode(tokenizer, text, bos_prefix(model, None)).ids[:room]


def _probe(rows: Sequence[Sequence[int]]) -> Probe:
    tokens, real = pad_right(rows)
    targets = next_tokens(tokens, real)
    return Probe(tokens, real, tokens.where(real, -1), targets, name="documents")
