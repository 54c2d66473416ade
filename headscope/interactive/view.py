"""The attention viewer, from a model."""

from collections.abc import Iterable

from headscope.errors import InputError
from headscope.models.protocol import HeadModel
from headscope.patterns import attention_example
from headscope.report import AttentionView

_MOST_BYTES = 30_000_000


def attention_view(
    model: HeadModel,
    text: str | None = None,
    heads: "Iterable[str | tuple[int, int]] | None" = None,
    *,
    length: int | None = None,
) -> AttentionView:
    """Show where heads look: tokens in a line, a thumbnail per head, whole in one frame.

    In a notebook the last value of a cell shows itself; ``.save("view.html")`` writes a file that
    opens offline. Probabilities are kept in steps of 1/255.

    Args:
        model: from :func:`headscope.load`.
        text: what the model reads; default: two sentences said twice, or random tokens said twice
            where the model has no tokenizer.
        heads: which, in this order; default: all.
        length: tokens that are kept of the text, from its start; default: the context, at most
            1024.

    Raises:
        InputError: if the text is empty, the model has no such head, or there is more to show
            than a notebook bears.

    Example:
        >>> hs.attention_view(model, "the cat sat on the cat", heads=["L2H1", "L1H2"])
        AttentionView(L2H1, L1H2 on ... tokens)
    """
    found = attention_example(model, text, heads, length=length)
    if found.pattern.size > 2 * _MOST_BYTES:
        raise InputError(
            f"{len(found.heads)} heads on {len(found.tokens)} tokens would be "
            f"{found.pattern.size / 2e6:.0f} MB in the notebook: name fewer heads, or give a "
            "shorter length."
        )
    return AttentionView(found)
