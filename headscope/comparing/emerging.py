"""Which heads appear when: scores at every checkpoint of a training run."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from headscope.comparing.curves import UNITS, copy_curves, text_curves, token_losses
from headscope.errors import HeadscopeError, InputError
from headscope.models.loading import shipped
from headscope.models.loading.load import load
from headscope.models.protocol import HeadModel
from headscope.probes import repeated_tokens, text
from headscope.progress import track
from headscope.scorers import Scorer
from headscope.scoring import score
from headscope.table import Emergence, HeadTable
from headscope.table.comparing import joined_curves

_SCORES = ("previous_token", "induction", "duplicate_token", "first_token")


def emergence(
    source: str | None = None,
    checkpoints: Sequence[str] | None = None,
    scorers: "Iterable[str | Scorer] | None" = None,
    *,
    texts: "Sequence[str] | None" = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Emergence:
    """Score every head at every checkpoint, beside the losses that the model has by then.

    One checkpoint is in memory at a time; all see the same probes. Curves: ``loss`` and
    ``in-context score`` (late loss less early loss; negative where context helps) on text, and
    the losses on the ``first copy`` and the ``second copy`` of random tokens said twice.

    Args:
        source: of :func:`headscope.load`; default: the bundled model.
        checkpoints: revisions, earliest first; default: all those of a bundled model.
        scorers: names or scorers of your own; default: previous token, induction, duplicate token
            and first token.
        texts: for the loss; default: of a bundled model stories like those of its training, else
            bundled passages of prose.
        device: where models are put.
        dtype: of the weights.
        seed: of the probes.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the model does not come with checkpoints and none are named.

    Source: Olsson et al. 2022, "In-context Learning and Induction Heads" (the phase change).

    Example:
        >>> story = hs.emergence(checkpoints=["step-000000", "step-005000"], scorers=["induction"])
        >>> story.scores
        ('induction',)
    """
    name = source or shipped.DEFAULT
    wanted = _revisions(name, checkpoints)
    chosen = _SCORES if scorers is None else tuple(scorers)
    if not chosen:
        raise InputError("give at least one scorer.")
    if texts is None and name in shipped.names():
        texts = shipped.stories(seed=seed)
    tables, parts, labels = [], [], []
    with track(float(len(wanted)), "scoring checkpoints", show=progress) as advance:
        for revision in wanted:
            model = load(source, revision=revision, device=device, dtype=dtype)
            tables.append(_labelled(score(model, scorers=chosen, seed=seed, progress=False)))
            parts.append(_curves(model, texts, seed))
            labels.append(revision)
            del model
            advance(1.0)
    origin = next(iter(tables[-1].values())).provenance
    return Emergence(
        origin.model or name, tuple(labels), tuple(tables), joined_curves(parts), UNITS
    )


def _revisions(name: str, checkpoints: Sequence[str] | None) -> list[str]:
    if checkpoints is not None:
        if len(set(checkpoints)) < max(2, len(checkpoints)):
            raise InputError("give two different checkpoints or more, earliest first.")
        return list(checkpoints)
    known = shipped.checkpoints(name) if name in shipped.names() else ()
    if not known:
        raise InputError(
            f"{name!r} does not come with checkpoints: name its revisions, earliest first."
        )
    return list(known)


def _labelled(table: HeadTable) -> HeadTable:
    """Without values per example: a story keeps means, errors and p-values."""
    slim = [replace(one, examples=None, control_examples=None) for one in table.values()]
    return HeadTable(slim)


def _curves(
    model: HeadModel, texts: "Sequence[str] | None", seed: int
) -> dict[str, Float[np.ndarray, " example"]]:
    """Losses of one checkpoint; without a tokenizer, of random tokens alone."""
    room = model.shape.n_ctx or 512
    half = min(50, (room - 1) // 2)
    twice = repeated_tokens(model, length=half, batch=8, seed=seed)
    found = copy_curves(token_losses(model, twice), half)
    try:
        passages = text(
            model, None if texts is None else list(texts), length=model.shape.n_ctx, seed=seed
        )
    except HeadscopeError:
        if texts is not None:
            raise
        return found
    return {**text_curves(token_losses(model, passages)), **found}
