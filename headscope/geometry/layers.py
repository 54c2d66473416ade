"""Measures of every layer's hidden states over texts, in one pass and without keeping states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.progress import track
from headscope.base.statistics import Bounds
from headscope.errors import InputError, nearest
from headscope.geometry import measures as gm
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView
from headscope.origin import origin
from headscope.probes import Probe
from headscope.probes import text as text_probe
from headscope.table.layers import LayerMeasure, LayerTable

_NEIGHBOURS = 10
_TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class TextMeasure:
    """A measure that every text has at every place: what it is, and how to take it.

    Attributes:
        least: points that a text must have; texts with fewer have no value.
        take: from the states of one text, ``[place point d_model]``, to a value per place.
    """

    name: str
    unit: str
    bounds: Bounds
    description: str
    source: str
    least: int
    take: Callable[[Float[Tensor, "place point d_model"]], Tensor]


def _overlap(x: Float[Tensor, "place point d_model"]) -> Tensor:
    """Overlap of each place's neighbours with those one place earlier; none at the embedding."""
    later = gm.neighbourhood_overlap(x[:-1], x[1:], min(_NEIGHBOURS, x.shape[1] - 2))
    return torch.cat([torch.full((1,), float("nan")).to(later), later])


TEXT_MEASURES = {
    measure.name: measure
    for measure in (
        TextMeasure(
            "matrix_entropy",
            "nats",
            (0.0, None),
            "Tokens of a text spread over many directions.",
            "Skean et al. 2025, definition 1; per text, tokens as points.",
            2,
            gm.matrix_entropy,
        ),
        TextMeasure(
            "curvature",
            "radians",
            (0.0, float(np.pi)),
            "The path through a text's tokens turns sharply from step to step.",
            "Hosseini and Fedorenko 2023: angle between successive differences.",
            3,
            gm.curvature,
        ),
        TextMeasure(
            "token_angle",
            "radians",
            (0.0, float(np.pi)),
            "Neighbouring tokens of a text point in different directions.",
            "Code of Skean et al. 2025, where it is called curvature.",
            2,
            gm.token_angle,
        ),
        TextMeasure(
            "anisotropy",
            "share of variance",
            (0.0, 1.0),
            "One direction holds most of the variance of a text's tokens.",
            "Razzhigaev et al. 2024.",
            2,
            gm.anisotropy,
        ),
        TextMeasure(
            "mean_cosine",
            "cosine",
            (-1.0, 1.0),
            "Tokens of a text point in the same direction.",
            "Ethayarajh 2019, intra-sentence similarity over pairs.",
            2,
            gm.mean_cosine,
        ),
        TextMeasure(
            "intrinsic_dimension",
            "dimensions",
            (0.0, None),
            "Tokens of a text fill a space of many dimensions; biased low above five.",
            "Facco et al. 2017 (TwoNN); per text as in Viswanathan et al. 2025.",
            20,
            gm.two_nn,
        ),
        TextMeasure(
            "neighbourhood_overlap",
            "share of neighbours",
            (0.0, 1.0),
            "A layer leaves the tokens of a text in the neighbourhoods that they had before it.",
            f"Valeriani et al. 2023, {_NEIGHBOURS} neighbours, with the place before.",
            _NEIGHBOURS + 2,
            _overlap,
        ),
    )
}
POOLED = {
    "linearity": (
        "share of variance",
        (None, 1.0),
        "A linear map explains what a layer makes of its input, less what fits noise.",
        "Razzhigaev et al. 2024, adjusted; all tokens of all texts together.",
    )
}


@own_types()
def layers(
    model: HeadModel,
    texts: str | Path | Sequence[str] | Probe | None = None,
    *,
    measures: Sequence[str] | None = None,
    length: int | None = 128,
    skip: int = 1,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> LayerTable:
    """Measure the hidden states of every place of the residual stream over texts.

    Each text's tokens are the points. The states are dropped as soon as a batch is measured;
    memory does not grow with the number of texts. ``linearity`` is of all tokens together and is
    left out where there are fewer than ten times as many as ``d_model``, unless asked for.

    Args:
        model: the model.
        texts: as :func:`headscope.probes.text` takes them, or a probe; None: the bundled passages.
        measures: names, of ``TEXT_MEASURES`` or ``linearity``; None: all.
        length: cut texts into pieces of this many tokens; None: whole texts. Of a probe nothing
            is cut.
        skip: leave out this many tokens at each text's start: the first is often a sink whose
            state dwarfs all others.
        batch_size: texts per pass; default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        A table by place, ``embed`` and then one place after each block.

    Raises:
        InputError: if a measure is unknown, or all texts are too short for one that was asked for.

    Example:
        >>> table = hs.geometry.layers(model, ["The cat sat on the mat. The dog ran."] * 2)
        >>> "curvature" in table
        True
    """
    chosen = _chosen(measures)
    probe = texts if isinstance(texts, Probe) else text_probe(model, texts, length)
    if skip < 0:
        raise InputError(f"skip={skip}: the number of tokens left out must be 0 or more.")
    points = (probe.real.sum(1) - skip).clamp_min(0)
    chosen = _fitting(chosen, points, model, asked=measures is not None)
    run = _Run(model, probe, chosen, skip)
    size = batch_size or max(1, _TOKENS_PER_PASS // probe.length)
    with track(len(probe), "measuring layers", show=progress) as advance:
        for start in range(0, len(probe), size):
            batch = slice(start, start + size)
            run.add(batch)
            advance(len(points[batch]))
    return run.table(measures)


def _chosen(measures: Sequence[str] | None) -> list[str]:
    known = [*TEXT_MEASURES, *POOLED]
    if measures is None:
        return known
    for name in measures:
        if name not in known:
            raise InputError(nearest(name, known, kind="measure"))
    if not measures:
        raise InputError(f"no measure given: choose some of {', '.join(known)}.")
    return list(dict.fromkeys(measures))


def _fitting(
    names: list[str], points: Int[Tensor, " text"], model: HeadModel, *, asked: bool
) -> list[str]:
    """Measures that the texts are long enough for; one that was asked for must be among them."""
    kept = []
    for name in names:
        if name in TEXT_MEASURES:
            have, need, what = int(points.max()), TEXT_MEASURES[name].least, "tokens in a text"
        else:
            have, need, what = int(points.sum()), 10 * model.shape.d_model, "tokens in all"
        if have >= need:
            kept.append(name)
        elif asked:
            raise InputError(f"{name} needs {need} {what}, and the longest give {have}.")
    if not kept:
        raise InputError("the texts are too short for every measure: give longer ones.")
    return kept


class _Run:
    """Adds up one model's measures, batch by batch."""

    def __init__(self, model: HeadModel, probe: Probe, names: list[str], skip: int) -> None:
        self.model, self.probe, self.names, self.skip = model, probe, names, skip
        self.places = 1 + model.shape.n_layers
        self.values: dict[str, list[Float[np.ndarray, " place"]]] = {n: [] for n in names}
        d_model = model.shape.d_model
        self.moments = [
            gm.LinearMoments(d_model) for _ in range(self.places - 1) if "linearity" in names
        ]

    def add(self, batch: slice) -> None:
        """Run one batch and measure each of its texts."""
        part = self.probe.examples(batch)
        states = self._states(part)
        for number in range(len(part)):
            real = part.real[number].nonzero().squeeze(1)[self.skip :]
            self._measure(states[:, number, real.to(states.device)])

    def _states(self, part: Probe) -> Float[Tensor, "place batch pos d_model"]:
        kept: list[Tensor] = []

        def keep(view: TapView) -> None:
            kept.append(view.value.float())

        last = self.model.shape.n_layers - 1
        taps = [Tap("embed"), *(Tap("resid_post", layer) for layer in range(last + 1))]
        self.model.run(part, reads=dict.fromkeys(taps, keep), until=taps[-1])
        return torch.stack([state.to(kept[0].device) for state in kept])

    def _measure(self, states: Float[Tensor, "place point d_model"]) -> None:
        for name in self.names:
            if name in TEXT_MEASURES:
                measure = TEXT_MEASURES[name]
                enough = states.shape[1] >= measure.least
                found = measure.take(states).cpu().double().numpy() if enough else np.nan
                self.values[name].append(np.broadcast_to(found, self.places))
        for moments, before, after in zip(self.moments, states, states[1:], strict=False):
            moments.add(before, after)

    def table(self, measures: Sequence[str] | None) -> LayerTable:
        """Put the measures side by side."""
        made = [self._made(name) for name in self.names]
        asked = None if measures is None else " ".join(measures)
        provenance = origin(self.model, self.probe, measures=asked, skip=self.skip)
        places = ("embed", *(f"L{layer}" for layer in range(self.places - 1)))
        return LayerTable(places, tuple(made), provenance)

    def _made(self, name: str) -> LayerMeasure:
        if name in TEXT_MEASURES:
            of = TEXT_MEASURES[name]
            values = np.stack(self.values[name], 1)
            return LayerMeasure(name, values, of.unit, of.bounds, of.description, of.source)
        unit, bounds, description, source = POOLED[name]
        found = [float("nan"), *(moments.linearity() for moments in self.moments)]
        return LayerMeasure(name, np.array(found)[:, None], unit, bounds, description, source)
