"""Masking heads while a model reads or writes: a scope, or a value for one generation."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

from headscope import edits
from headscope.ablation.run import present
from headscope.edits import HeadEdit, Heads, Scope
from headscope.errors import InputError, nearest
from headscope.interventions.donors import head_means
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, text

Masking = Literal["uniform", "zero", "mean"]
_SCOPES = get_args(Scope)


@dataclass(frozen=True, eq=False)
class Mask:
    """Heads that are masked, how, and while what is done. Make it with :meth:`of`.

    Attributes:
        edit: what becomes of their values, in its scope.
        scope: ``decode``: from the last token of the prompt on, whose query predicts the first
            new token (so in the source): headscope reads that token by itself, as the first step
            of decoding; ``prefill``: before it; ``all``: everywhere.

    Example:
        >>> mask = Mask.of(model, ["L2H0"])
        >>> sorted(mask.edit.layers), mask.scope
        ([2], 'decode')
    """

    edit: HeadEdit
    scope: Scope

    @classmethod
    def of(
        cls,
        model: HeadModel,
        heads: Heads,
        method: Masking = "uniform",
        scope: Scope = "decode",
        *,
        reference: Probe | None = None,
    ) -> "Mask":
        """A mask for generation step by step; arguments are those of :func:`mask_heads`."""
        if scope not in _SCOPES:
            raise InputError(nearest(str(scope), _SCOPES, kind="scope"))
        return cls(_edit(model, heads, method, scope, reference), scope)


def mask_heads(
    model: HeadModel,
    heads: Heads,
    method: Masking = "uniform",
    scope: Scope = "decode",
    *,
    reference: Probe | None = None,
) -> AbstractContextManager[None]:
    """Scope in which some heads are masked, in every pass of the model; restored after.

    ``uniform`` is what Wu et al. 2024 (arXiv 2404.15574) call masking: the query becomes 0, so
    that the head attends to all visible keys alike. ``zero`` makes the head's output 0, ``mean``
    its mean over a reference. Until the scope ends the model's own ``generate`` runs masked, with
    keys and values kept.

    transformers' ``generate`` reads the whole prompt at once, so its first new token is said
    before ``scope="decode"`` begins; in the source the mask begins with the last token of the
    prompt, as it does in :func:`headscope.retrieval.generate`. In your own loop, a pass that
    extends a cache counts as decoding.

    Args:
        model: from :func:`headscope.load`.
        heads: which.
        method: ``uniform``, ``zero`` or ``mean``.
        scope: ``decode`` while tokens are generated, ``prefill`` while a prompt is read, ``all``
            in both.
        reference: of ``mean``; default: the bundled passages.

    Raises:
        InputError: if the model has no such head, or an argument is unknown.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> with mask_heads(model, ["L2H0", "L2H1"]):
        ...     said = hs.retrieval.generate(model, "The code of the red door is", new_tokens=2)
        >>> len(said.tokens[0])
        2
    """
    if scope not in _SCOPES:
        raise InputError(nearest(str(scope), _SCOPES, kind="scope"))
    return model.edited([_edit(model, heads, method, scope, reference)])


def _edit(
    model: HeadModel, heads: Heads, method: Masking, scope: Scope, reference: Probe | None
) -> HeadEdit:
    chosen = present(model, heads)
    if method not in get_args(Masking):
        raise InputError(nearest(str(method), get_args(Masking), kind="way to mask heads"))
    if reference is not None and method != "mean":
        raise InputError(f"reference is for method='mean'; {method} needs none.")
    if method == "mean":
        means = head_means(model, text(model) if reference is None else reference)
        return edits.mean(chosen, means, scope=scope)
    return (edits.uniform if method == "uniform" else edits.zero)(chosen, scope=scope)
