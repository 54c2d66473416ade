"""``hs.edges.contextual``: contextual decomposition of what every head does (CD-T)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from headscope.base.options import RunOptions
from headscope.base.result import Glance, Rows, Section, Shown, Tabular, number
from headscope.base.saved import Saved
from headscope.base.specs import Provenance
from headscope.base.statistics import Design
from headscope.edges.split import NodeWrite, SplitRun, run_split
from headscope.edges.written import EdgeBatch, EdgeMeasurement
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import HeadScores

if TYPE_CHECKING:
    import pandas

Item = TypeVar("Item")
_SOURCE = "Hsu et al. 2024, arXiv 2407.00886"


@dataclass(frozen=True, eq=False, repr=False)
class Contextual(Saved, Shown, Tabular):
    """What comes of each head's relevant part: for the metric, and in every later head.

    Attributes:
        scores: change of the metric when the relevant part is left out, per head.
        passed: share of a later head's output that comes from each head, ``[layer head layer
            head]``: ``mean |relevant| / (mean |relevant| + mean |rest|)``, from 0 to 1; 0 where the
            second head is not above the first.
        by_position: scores of each head at each position; None where they were not asked for.
        provenance: where it came from.
    """

    scores: HeadScores
    passed: Float[np.ndarray, "layer head layer_b head_b"]
    by_position: Float[np.ndarray, "layer head pos"] | None = None
    provenance: Provenance = field(default_factory=Provenance)

    def top(self, k: int = 10) -> list[tuple[HeadIndex, float]]:
        """Heads with the largest magnitudes, largest first."""
        mean = self.scores.mean
        order = np.argsort(-np.abs(np.nan_to_num(mean)), axis=None, kind="stable")[: max(k, 0)]
        places = zip(*np.unravel_index(order, mean.shape), strict=True)
        return [(HeadIndex(int(a), int(b)), float(mean[a, b])) for a, b in places]

    def search(self, keep: int = 2, rounds: int = 3) -> tuple[tuple[HeadIndex, ...], ...]:
        """Heads found round by round, from the metric backwards.

        First the ``keep`` heads with the largest scores; then, of each head of the round before,
        the ``keep`` earlier heads whose parts make most of its output.

        Args:
            keep: heads per target.
            rounds: how often to go back; it ends earlier where nothing is below.

        Raises:
            InputError: if either is below 1.
        """
        if keep < 1 or rounds < 1:
            raise InputError(f"keep={keep!r}, rounds={rounds!r}: give 1 or more of each.")
        found = [tuple(head for head, _ in self.top(keep))]
        seen = set(found[0])
        while len(found) < rounds:
            new = [head for target in found[-1] for head in self._below(target, keep)]
            fresh = tuple(dict.fromkeys(head for head in new if head not in seen))
            if not fresh:
                break
            seen |= set(fresh)
            found.append(fresh)
        return tuple(found)

    def _below(self, target: HeadIndex, keep: int) -> list[HeadIndex]:
        shares = self.passed[:, :, target.layer, target.head]
        order = np.argsort(-shares, axis=None, kind="stable")[:keep]
        places = zip(*np.unravel_index(order, shares.shape), strict=True)
        return [HeadIndex(int(a), int(b)) for a, b in places if shares[a, b] > 0]

    def glance(self) -> Glance:
        """Heads with the largest scores, and what reaches them."""
        rows = [
            (str(head), number(score), " ".join(map(str, self._below(head, 3))))
            for head, score in self.top(6)
        ]
        return Glance(
            "contextual decomposition",
            [f"{self.scores.unit or 'metric'}", self.provenance.model],
            ("head", "change without it", "earlier heads in it"),
            rows,
            hint="result.search(), result.scores, result.passed",
        )

    def sections(self) -> list[Section]:
        """Scores by head."""
        rows = [(str(head), score) for head, score in self.top(20)]
        grid = Rows(("head", "change without what comes of it"), rows)
        return [Section("Contextual decomposition", [grid])]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head and later head: score of the first, share of the second."""
        import pandas

        heads = [HeadIndex(*place) for place in np.ndindex(*self.scores.mean.shape)]
        rows = [
            (str(a), str(b), self.scores.mean[a], float(self.passed[(*a, *b)]))
            for a in heads
            for b in heads
            if a.layer < b.layer
        ]
        return pandas.DataFrame(rows, columns=["head", "later", "score", "share"])


@own_types()
def contextual(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    *,
    ablation: str | None = None,
    positions: bool = False,
    sign_rule: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Contextual:
    """Follow what comes of each head to the output, with all else held, and leave it out.

    What a head writes is split into a relevant part, by which it differs from what it writes once
    taken out, and the rest. Both go on through the model and sum to the whole at every point:
    attention patterns and the scales of norms are those of the whole run; a bias is shared by the
    magnitudes of the two parts; of a nonlinear function the relevant part is
    ``f(whole) - f(rest)``. The score is the metric of the rest less that of the whole, so that in a
    linear net with flat patterns it is the effect of taking the head out, exactly. Unlike
    patching, it does not see what a head does through the queries and keys of others.

    Heads of a layer run together: ``layers (heads + 1)`` passes, with positions that many times
    the length.

    Args:
        model: as in :func:`attribute`; of experts, the routing is part of the function.
        probe: texts with answers.
        metric: as in :func:`attribute`.
        ablation: what the rest has in place of the head's output, as in :func:`attribute`; the
            paper has ``mean``.
        positions: also take each head at each position apart; all texts then have one length.
        sign_rule: in MLPs, where the parts have opposite signs, give the whole to the larger, as
            the reference implementation does. It breaks exactness in linear nets.
        batch_size: examples per pass; changes no number.
        progress: show a bar.

    Raises:
        InputError: if probe and metric do not fit.
        UnsupportedModelError: as :func:`attribute`, and of experts with biases.

    Source:
        Hsu et al. 2024, "Efficient automated circuit discovery in transformers using contextual
        decomposition", arXiv 2407.00886.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> found = hs.edges.contextual(model, names, hs.metrics.logit_difference)
        >>> found.scores.mean.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    options = RunOptions(batch_size, progress=progress)
    study = EdgeMeasurement.of(model, probe, metric, ablation, options)
    layers, heads = study.wiring.n_layers, study.wiring.n_heads
    values = np.full((layers, heads, len(probe)), np.nan)
    passed = np.zeros((layers, heads, layers, heads))
    placed = np.zeros((layers, heads, probe.length)) if positions else None
    work = layers * len(probe) * (1 + (probe.length if positions else 0))
    with options.track(float(work), "contextual decomposition") as advance:
        for start in range(0, len(probe), study.size):
            batch = study.batch(start)
            count = len(batch.texts.tokens)
            for layer in range(layers):
                found, shares = _layer(batch, layer, sign_rule)
                values[layer, :, start : start + count] = found
                passed[layer] += shares * count / len(probe)
                advance(float(count))
                if placed is not None:
                    placed[layer] += _by_position(batch, layer, sign_rule, advance) / len(probe)
    about = origin(
        model, probe, attention="patterns held", metric=study.metric.name, method="CD-T",
        ablation=study.ablation, sign_rule=sign_rule,
    )  # fmt: skip
    scores = HeadScores.from_effects(
        "contextual", values, kv_heads=model.shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels), unit=study.metric.unit,
        description="Metric without what comes of the head, less the whole.",
        source=_SOURCE, provenance=about,
    )  # fmt: skip
    return Contextual(scores, passed, placed, about)


def _layer(
    batch: EdgeBatch, layer: int, sign_rule: bool
) -> tuple[Float[np.ndarray, "head batch"], Float[np.ndarray, "head layer head_b"]]:
    """Scores of a layer's heads, and their shares in the outputs of later heads."""
    wiring = batch.study.wiring
    taps = [Tap("z", later) for later in range(layer + 1, wiring.n_layers)]
    numbers = range(*wiring.heads_of(layer).indices(len(wiring.sources)))
    values, shares = [], []
    for some in _chunks(numbers, batch.room):
        sources = [NodeWrite.of(batch, number) for number in some]
        run = run_split(batch, sources, taps, sign_rule=sign_rule)
        values.append(_change(batch, run))
        shares.append(_shares(batch, run, layer, len(sources)))
    return np.concatenate(values), np.concatenate(shares)


def _change(batch: EdgeBatch, run: SplitRun) -> Float[np.ndarray, "source batch"]:
    """The metric of each rest less that of the whole; NaN where it reads nothing."""
    assert run.logits is not None  # noqa: S101  # they were asked for
    values = batch.measured(run.logits)
    unread = ~batch.measured.counted.to(values.device)
    change = (values[1:] - values[:1]).masked_fill(unread, float("nan"))
    found: np.ndarray = change.cpu().double().numpy()
    return found


def _shares(
    batch: EdgeBatch, run: SplitRun, layer: int, sources: int
) -> Float[np.ndarray, "source layer head"]:
    """Share of the relevant part in what every later head gives, over real positions."""
    wiring = batch.study.wiring
    found = np.zeros((sources, wiring.n_layers, wiring.n_heads))
    real = batch.texts.real
    for later in range(layer + 1, wiring.n_layers):
        tap = Tap("z", later)
        mask = real.to(run.taps[tap].device)
        relevant = run.relevant(tap)[:, mask].abs().float().mean((1, 3))
        rest = run.taps[tap][1:][:, mask].abs().float().mean((1, 3))
        found[:, later] = (relevant / (relevant + rest).clamp_min(1e-12)).cpu().double().numpy()
    return found


def _by_position(
    batch: EdgeBatch, layer: int, sign_rule: bool, advance: Callable[[float], None]
) -> Float[np.ndarray, "head pos"]:
    """Sum over examples of the scores of a layer's heads at every position."""
    wiring, length = batch.study.wiring, batch.texts.tokens.shape[1]
    numbers = range(*wiring.heads_of(layer).indices(len(wiring.sources)))
    places = [(number, pos) for number in numbers for pos in range(length)]
    found = []
    for some in _chunks(places, batch.room):
        sources = [NodeWrite.of(batch, number, pos) for number, pos in some]
        run = run_split(batch, sources, [], sign_rule=sign_rule)
        found.append(np.nansum(_change(batch, run), 1))
        advance(len(batch.texts.tokens) * len(some) / len(numbers))
    return np.concatenate(found).reshape(len(numbers), length)


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
