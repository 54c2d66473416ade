"""Which heads appear when: scores and losses at every checkpoint of a training run."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from headscope.base.options import RunOptions
from headscope.capture import check_fits, losses_by_position
from headscope.errors import HeadscopeError, InputError
from headscope.models import bundled
from headscope.models.loading.load import load
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes import Probe, repeated_tokens, text
from headscope.probes.encoding import next_tokens
from headscope.scorers import Scorer
from headscope.scoring import score
from headscope.table import Emergence, HeadTable
from headscope.table.comparing import joined_curves

UNITS = {
    "loss": "nats",
    "in-context score": "nats",
    "first copy": "nats",
    "second copy": "nats",
}
# Parts of a text whose mean losses the in-context score compares.
_EARLY, _LATE = (0.05, 0.15), (0.9, 1.0)


@own_types()
def token_losses(model: HeadModel, probe: Probe) -> Float[np.ndarray, "example token"]:
    """Cross-entropy of each token given those before it, nats.

    NaN for the first token of an example, at padding, and at the first token after padding.
    """
    check_fits(model, probe, answers=True)
    found = np.full(tuple(probe.tokens.shape), np.nan)
    for row in range(len(probe)):
        part = probe.examples(slice(row, row + 1))
        asked = replace(part, targets=next_tokens(part.tokens, part.real), control=None)
        found[row, 1:] = losses_by_position(model, asked)[0, :-1].double().numpy()
    return found


@own_types()
def text_curves(
    losses: Float[np.ndarray, "example token"],
) -> dict[str, Float[np.ndarray, " example"]]:
    """Mean loss, and the in-context score: late loss less early loss.

    Early is the mean from 5% to 15% of each text's tokens, late that of its last tenth. Negative
    where the context helps. The source takes the 500th token less the 50th, which is this for
    texts of 500 tokens but for the averaging, which it does over many more texts.

    Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    scores = []
    for row in losses:
        known = row[np.isfinite(row)]
        parts = [
            known[int(start * len(known)) : max(int(end * len(known)), 1)]
            for start, end in (_EARLY, _LATE)
        ]
        enough = len(known) >= 20
        scores.append(parts[1].mean() - parts[0].mean() if enough else np.nan)
    count = np.isfinite(losses).sum(1)
    mean = np.nansum(losses, 1) / np.where(count, count, np.nan)
    return {"loss": mean, "in-context score": np.array(scores)}


@own_types()
def copy_curves(
    losses: Float[np.ndarray, "example token"], half: int
) -> dict[str, Float[np.ndarray, " example"]]:
    """Mean loss on the first and on the second copy of a text repeated.

    The second copy's first token is left out: nothing predicts it.

    Args:
        losses: of every token.
        half: length of a copy; the copies end where the rows end.
    """
    first, second = losses[:, -2 * half : -half], losses[:, -half + 1 :]
    known = np.isfinite(first)
    return {
        "first copy": np.where(known, first, 0.0).sum(1) / known.sum(1),
        "second copy": second.mean(1),
    }


_SCORES = ("previous_token", "induction", "duplicate_token", "first_token")


@own_types()
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
    the losses on the ``first copy`` and the ``second copy`` of random tokens repeated.

    Args:
        source: of :func:`headscope.load`; default: the bundled model.
        checkpoints: revisions, earliest first; default: all those of a bundled model.
        scorers: names or scorers; default: previous token, induction, duplicate token
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
    options = RunOptions(seed=seed, progress=progress)
    name = source or bundled.DEFAULT
    wanted = _revisions(name, checkpoints)
    chosen = _SCORES if scorers is None else tuple(scorers)
    if not chosen:
        raise InputError("give at least one scorer.")
    if texts is None and name in bundled.READERS:
        texts = bundled.stories(seed=seed)
    tables, parts, labels = [], [], []
    with options.track(float(len(wanted)), "scoring checkpoints") as advance:
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
    known = bundled.checkpoints(name) if name in bundled.names() else ()
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
