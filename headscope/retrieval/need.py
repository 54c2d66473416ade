"""How well two moments tell which heads need more than their local tokens."""

import numpy as np

from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.scorers import long_need, long_need_predicted
from headscope.scorers.long_need import Moments
from headscope.scoring import score
from headscope.table import HeadScores, HeadTable


def need(
    model: HeadModel,
    probe: Probe,
    *,
    sink: int = 16,
    recent: int = 128,
    threshold: int | float = 0.6,
    moments: Moments = "bulk",
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadTable:
    """The exact need for far tokens, the predicted one, and the prediction's precision and recall.

    QAdA, Donhauser et al. 2025 (arXiv 2502.09647). Per head and example over the queries of the
    question and the answer: ``precision`` is the share of the queries called long that are,
    ``recall`` the share of the long ones that are called so; NaN where there are none.

    Args:
        model: whose queries and keys can be seen.
        probe: of kind ``needle``, with more than ``sink + recent`` tokens before the question.
        sink: first tokens that count as local.
        recent: last tokens that do.
        threshold: share of the attention that local tokens must have.
        moments: of the scores with far keys (``bulk``) or with the last ones (``local``).
        batch_size: examples at a time.
        progress: show a bar.

    Returns:
        The scores ``long_need``, ``long_need_predicted``, ``long_need_precision`` and
        ``long_need_recall``.

    Example:
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> list(need(model, probe, sink=2, recent=8))[:2]
        ['long_need', 'long_need_predicted']
    """
    exact = long_need(sink, recent, threshold, name="long_need")
    guess = long_need_predicted(sink, recent, threshold, moments, name="long_need_predicted")
    both = long_need_predicted(sink, recent, threshold, moments, both=True, name="both")
    table = score(model, probe, [exact, guess, both], batch_size=batch_size, progress=progress)

    def share(name: str, of: HeadScores, meaning: str) -> HeadScores:
        whole = of.per_example
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(whole > 0, table["both"].per_example / whole, np.nan)
        return HeadScores.from_examples(
            name,
            values,
            kv_heads=of.kv_heads,
            design=of.design,
            unit="share",
            bounds=(0.0, 1.0),
            description=meaning,
            source=guess.source,
            provenance=of.provenance,
        )

    return HeadTable(
        [
            table["long_need"],
            table["long_need_predicted"],
            share(
                "long_need_precision",
                table["long_need_predicted"],
                "Share of the queries said to need far tokens that do.",
            ),
            share(
                "long_need_recall",
                table["long_need"],
                "Share of the queries that need far tokens that are said to.",
            ),
        ]
    )
