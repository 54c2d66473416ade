"""In-context learning: how much lower the loss is late in a text, and which heads cause it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.ablation.heads import ablated
from headscope.ablation.run import InterventionLike, Measurement, Placer, by_head, facts_of, present
from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design
from headscope.capture import check_fits, losses_by_position
from headscope.edits import Heads
from headscope.errors import InputError
from headscope.metrics import LogitRows, Metric, loss
from headscope.models.protocol import Edit, HeadModel
from headscope.models.running import own_types
from headscope.probes.encoding import next_tokens
from headscope.probes.probe import Probe
from headscope.retrieval.generation import Mask, Masking
from headscope.table import HeadScores, TokenLosses

Places = int | tuple[int, int]
_TOKENS_PER_PASS = 8192
_SOURCE = "Olsson et al. 2022 (arXiv 2209.11895), in-context learning score"


@checked
@own_types()
def in_context_score(
    model: HeadModel,
    probe: Probe,
    *,
    early: Places = 50,
    late: Places = 500,
    method: InterventionLike = "mean",
    heads: Heads | None = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Effect of ablating each head on the in-context-learning score, in nats.

    The score is ``loss of a late token - loss of an early one`` (500th and 50th in the source,
    counted from the text's first token as 0): the more negative, the more the model uses its
    context. The effect is the ablated model's score minus the whole model's, per text: positive if
    the model uses the head for in-context learning. The whole model's own score, mean over texts,
    is in ``provenance.checks["score"]``.

    Args:
        model: from :func:`headscope.load`.
        probe: texts; every one must reach the late token. Next tokens are predicted, whatever the
            probe's targets are.
        early: token, or first and last token of a range, over which the loss is averaged.
        late: the same, after it.
        method: as in :func:`headscope.ablate_heads`; zero ablation overstates heads whose mean
            output others rely on.
        heads: heads to use. Default: all.
        reference: where means come from; default: the probe.
        seed: seed of the method's draws.
        batch_size: texts per pass.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if a text is too short, or an argument is invalid.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.probes.repeated_tokens(model, length=20, batch=2)
        >>> in_context_score(model, probe, early=(5, 15), late=(25, 35)).mean.shape
        (3, 4)
    """
    options = RunOptions(batch_size, seed=seed, progress=progress)
    asked, metric = _differences(probe, _range(early), _range(late))
    measurement = Measurement.of(model, asked, metric, options)
    chosen = present(model, heads)
    placer = Placer(measurement, method, reference=reference)
    effects = ablated(measurement, placer, chosen)
    clean = np.concatenate([batch.clean.numpy() for _, batch in measurement.batches()])
    checks = {**placer.checks, "score": float(clean.mean()), "scores": clean.tolist()}
    facts = {**facts_of(method, reference, None), "early": str(early), "late": str(late)}
    values = by_head(model, chosen, effects)
    return HeadScores.from_effects(
        "in_context_learning",
        values,
        kv_heads=model.shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels),
        unit="nats",
        description="In-context-learning score with the head ablated minus that without.",
        source=_SOURCE,
        provenance=measurement.provenance(seed, checks=checks, **facts),
    )


@checked
@own_types()
def token_losses(
    model: HeadModel,
    probe: Probe,
    masked: Mapping[str, Heads] | None = None,
    *,
    method: Masking = "uniform",
    reference: Probe | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> TokenLosses:
    """Loss of every token by position in the text, with and without some heads.

    Args:
        model: from :func:`headscope.load`.
        probe: texts.
        masked: heads to mask at every position, by name of the line.
        method: how heads are masked; see :func:`headscope.mask_heads`.
        reference: reference of ``mean``.
        batch_size: texts per pass; default: about 8192 tokens.
        progress: show a progress bar.

    Returns:
        ``hs.plots.token_losses`` draws it; ``.score(50, 500)`` is the in-context-learning score.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.probes.repeated_tokens(model, length=20, batch=2)
        >>> token_losses(model, probe, {"without L2H1": ["L2H1"]}).arms
        ('whole model', 'without L2H1')
    """
    options = RunOptions(batch_size, progress=progress)
    check_fits(model, probe)
    arms: dict[str, tuple[Edit, ...]] = {"whole model": ()}
    for name, heads in (masked or {}).items():
        mask = Mask.of(model, heads, method, "all", reference=reference)
        arms[name] = (mask.edit,)
    targets = next_tokens(probe.tokens, probe.real)
    size = options.per_pass(probe.length, _TOKENS_PER_PASS)
    losses = np.full((len(arms), len(probe), int(probe.real.sum(1).max())), np.nan)
    with options.track(len(arms) * len(probe), "losses by token") as advance:
        for at, edits in enumerate(arms.values()):
            for start in range(0, len(probe), size):
                rows = slice(start, start + size)
                part = replace(probe.examples(rows), targets=targets[rows], control=None)
                losses[at, rows] = _losses(model, part, edits, losses.shape[2])
                advance(len(part))
    return TokenLosses(tuple(arms), losses, model.name)


@torch.no_grad()
def _losses(
    model: HeadModel, part: Probe, edits: Sequence[Edit], width: int
) -> Float[np.ndarray, "example token"]:
    """Loss of each token of a text, counted from its first; NaN there and at padding."""
    found = losses_by_position(model, replace(part, marks={}), edits).double().numpy()
    by_token = np.full((len(part), width), np.nan)
    for row, first in enumerate(part.first.tolist()):
        values = found[row, first : first + width - 1]
        by_token[row, 1 : 1 + len(values)] = values
    return by_token


def _range(places: Places) -> tuple[int, int]:
    return (places, places) if isinstance(places, int) else places


def _differences(
    probe: Probe, early: tuple[int, int], late: tuple[int, int]
) -> tuple[Probe, Metric]:
    """Build a probe with both ranges as targets, and a metric: late loss minus early.

    A metric sees rows one by one, not their positions, so the row's range is passed in the field of
    the foil, which a loss does not use.
    """
    if not 1 <= early[0] <= early[1] < late[0] <= late[1]:
        raise InputError(
            f"early={early} and late={late}: give tokens from 1 on, early before late."
        )
    short = int(probe.real.sum(1).min())
    if late[1] >= short:
        raise InputError(
            f"token {late[1]} is asked for and the shortest text has {short}: give longer texts, "
            "or smaller early= and late=."
        )
    token = probe.position_in_text + 1  # index of the token that a position predicts
    sides = torch.full_like(probe.tokens, -1)
    sides[(token >= early[0]) & (token <= early[1])] = 0
    sides[(token >= late[0]) & (token <= late[1])] = 1
    targets = next_tokens(probe.tokens, probe.real).where(sides >= 0, -1)
    sizes = torch.tensor([early[1] - early[0] + 1, late[1] - late[0] + 1])
    weights = sizes.sum() / sizes * torch.tensor([-1.0, 1.0])

    def signed(rows: LogitRows) -> Float[Tensor, " row"]:
        assert rows.foils is not None  # noqa: S101  # needs says so
        return loss.value(rows) * weights.to(rows.logits.device)[rows.foils]

    asked = replace(probe, targets=targets, foils=sides, control=None, corrupt=None)
    spec = ScoreSpec(
        "in_context_learning",
        unit="nats",
        direction="lower",
        description="Loss of late tokens minus that of early ones.",
    )
    return asked, Metric(spec, signed, needs=frozenset({"target", "foil"}))
