"""Measures of every layer's hidden states, or every head's outputs, over texts.

Measured in one pass without keeping states, except by :func:`invariance`, whose measures compare
texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design
from headscope.errors import InputError, nearest
from headscope.geometry import measures as gm
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView
from headscope.origin import origin
from headscope.probes import Probe, from_tokens
from headscope.probes import text as text_probe
from headscope.table import HeadScores, HeadTable
from headscope.table.lens import LayerMeasure, LayerTable

NEIGHBOURS = 10
SCALE = 2  # scale of GRIDE: neighbour ranks 2 and 4
# Squared distances below this share of the points' squared norms are recomputed from differences.
_CLOSE = 1e-6
# States shorter than this share of the longest lose precision when the mean is added back.
_TINY = 1e-3
_STILL = 1e-12  # squared steps below this share of the squared norms count as zero


@dataclass(frozen=True, eq=False)
class Points:
    """Point clouds at several places, with cached intermediate results.

    Attributes:
        x: hidden states of the same points at every place.
        tokens: token ids of the points.
    """

    x: Float[Tensor, "place point d_model"]
    tokens: Int[Tensor, " point"]

    @property
    def few(self) -> bool:
        """Whether the matrix of inner products of points is smaller than the covariance."""
        return self.x.shape[-2] <= self.x.shape[-1]

    @cached_property
    def wide(self) -> Float[Tensor, "place point d_model"]:
        """States in fp64, on the CPU if the device does not support fp64."""
        return self.x.cpu().double() if self.x.device.type == "mps" else self.x.double()

    @cached_property
    def centred(self) -> Float[Tensor, "place point d_model"]:
        """States minus their mean."""
        return self.wide - self.wide.mean(-2, keepdim=True)

    @cached_property
    def products(self) -> Float[Tensor, "place point point"]:
        """Inner products of centred states."""
        return self.centred @ self.centred.mT

    @cached_property
    def squares(self) -> Float[Tensor, "place point"]:
        """Squared norms of centred states."""
        return self.products.diagonal(dim1=-2, dim2=-1)

    @cached_property
    def cosines(self) -> Float[Tensor, "place point point"]:
        """Cosines between states; 0 for zero states."""
        norms = self.wide.norm(dim=-1)
        if bool((norms < _TINY * norms.amax(-1, keepdim=True)).any()):
            unit = torch.nn.functional.normalize(self.wide, dim=-1)
            return unit @ unit.mT
        mean = self.wide.mean(-2, keepdim=True)
        along = (self.centred @ mean.mT).squeeze(-1) + mean.square().sum(-1) / 2
        inner = self.products + along[..., None] + along[..., None, :]
        inverse: Tensor = 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return inner * inverse[..., None] * inverse[..., None, :]

    def matrix_entropy(self) -> Tensor:
        """See :func:`headscope.geometry.matrix_entropy`."""
        if not self.few:
            return gm.matrix_entropy(self.x)
        norms = self.squares.sqrt()
        at_mean = norms <= 1e-6 * self.wide.norm(dim=-1)
        inverse = (1 / norms).masked_fill(at_mean, 0)
        total = (~at_mean).double().sum(-1)
        gram = self.products * inverse[..., None] * inverse[..., None, :]
        p = torch.linalg.eigvalsh(gram).clamp_min(0) / total[..., None]
        entropy: Tensor = torch.special.entr(p).sum(-1).masked_fill(total == 0, float("nan"))
        return entropy

    def anisotropy(self) -> Tensor:
        """See :func:`headscope.geometry.anisotropy`."""
        if not self.few:
            return gm.anisotropy(self.x)
        values = torch.linalg.eigvalsh(self.products).clamp_min(0)
        share: Tensor = values[..., -1] / values.sum(-1)
        return share

    def curvature(self) -> Tensor:
        """See :func:`headscope.geometry.curvature`."""
        if not self.few:
            return gm.curvature(self.x)
        g = self.products
        next_ = g.diagonal(1, -2, -1)
        length = self.squares[..., 1:] + self.squares[..., :-1] - 2 * next_
        still = length <= _STILL * (self.squares[..., 1:] + self.squares[..., :-1])
        length = length.masked_fill(still, float("nan"))
        turn = next_[..., 1:] - self.squares[..., 1:-1] - g.diagonal(2, -2, -1) + next_[..., :-1]
        return _angle(turn / (length[..., 1:] * length[..., :-1]).sqrt())

    def token_angle(self) -> Tensor:
        """See :func:`headscope.geometry.token_angle`."""
        if not self.few:
            return gm.token_angle(self.x)
        there = self.cosines.diagonal(dim1=-2, dim2=-1) > 0.5  # 1, or 0 for a zero state
        both = there[..., 1:] & there[..., :-1]
        return _angle(self.cosines.diagonal(1, -2, -1).masked_fill(~both, float("nan")))

    def mean_cosine(self) -> Tensor:
        """See :func:`headscope.geometry.mean_cosine`."""
        if not self.few:
            return gm.mean_cosine(self.x)
        n, own = self.x.shape[-2], self.cosines.diagonal(dim1=-2, dim2=-1)
        return (self.cosines.sum((-2, -1)) - own.sum(-1)) / (n * (n - 1))

    def self_similarity(self) -> Tensor:
        """See :func:`headscope.geometry.self_similarity`."""
        if not self.few:
            return gm.self_similarity(self.x, self.tokens)
        _, kind, count = self.tokens.to(self.wide.device).unique(
            return_inverse=True, return_counts=True
        )
        often = count > 1
        if not bool(often.any()):
            return torch.full(self.x.shape[:-2], float("nan"), dtype=torch.float64)
        same = torch.nn.functional.one_hot(kind).double()
        own = self.cosines.diagonal(dim1=-2, dim2=-1) @ same
        total = (same * (self.cosines @ same)).sum(-2)
        pairs = (count * (count - 1)).double()
        found: Tensor = ((total - own)[..., often] / pairs[often]).mean(-1) - self.mean_cosine()
        return found

    @cached_property
    def near(self) -> tuple[Float[Tensor, "place point k"], Int[Tensor, "place point k"]]:
        """Distances to the nearest other points, and their indices; on ties, the earlier first."""
        if self.few:
            both = self.squares[..., None] + self.squares[..., None, :]
            square = both - 2 * self.products
            square.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
            close = (square < _CLOSE * both).nonzero()
            for part in close.split(1 << 12):
                place, a, b = part.T
                difference = self.centred[place, a] - self.centred[place, b]
                square[place, a, b] = difference.square().sum(-1)
            far = square.clamp_min(0).sqrt()
        else:
            far = torch.cdist(self.wide, self.wide, compute_mode="donot_use_mm_for_euclid_dist")
        far.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
        k = min(max(NEIGHBOURS, 2 * SCALE), self.x.shape[-2] - 1)
        values, ids = far.topk(k + 1, largest=False)  # one more, to detect a tie at the last
        if bool((values.diff(dim=-1) == 0).any()):
            values, ids = far.sort(dim=-1, stable=True)
        return values[..., :k].cpu(), ids[..., :k]

    def intrinsic_dimension(self) -> Tensor:
        """See :func:`headscope.geometry.two_nn`."""
        return gm.two_nn_of(self.near[0])

    def gride(self) -> Tensor:
        """See :func:`headscope.geometry.gride`, for every place."""
        distances = self.near[0].numpy()
        return torch.from_numpy(np.array([gm.gride_of(one, SCALE) for one in distances]))

    def overlap(self) -> Tensor:
        """Overlap of neighbours with the previous place; NaN at the first."""
        k = min(NEIGHBOURS, self.x.shape[-2] - 2)
        ids = self.near[1][..., :k]
        later = (ids[:-1, :, :, None] == ids[1:, :, None, :]).any(-1).double().mean((-2, -1))
        return torch.cat([torch.full((1,), float("nan")).to(later), later])


def _angle(cosines: Float[Tensor, "place pair"]) -> Tensor:
    return torch.acos(cosines.clamp(-1, 1)).nanmean(-1)


_TOKENS_PER_PASS = 4096
# Tokens per dimension at which a linear fit has converged; later tokens are not added.
_LINEAR = 32


@dataclass(frozen=True)
class TextMeasure:
    """A measure with a value per text and place: its declaration and how to compute it.

    Attributes:
        spec: declaration of the measure.
        least: smallest number of points; texts with fewer have no value.
        take: maps the states of one text to a value per place.
        along: whether a place is compared with the previous one, so heads have no value.
    """

    spec: ScoreSpec
    least: int
    take: Callable[[Points], Tensor]
    along: bool = False


TEXT_MEASURES = {
    measure.spec.name: measure
    for measure in (
        TextMeasure(
            ScoreSpec(
                "matrix_entropy",
                "nats",
                (0.0, None),
                description="Tokens of a text spread over many directions.",
                source="Skean et al. 2025, definition 1; per text, tokens as points.",
            ),
            2,
            Points.matrix_entropy,
        ),
        TextMeasure(
            ScoreSpec(
                "curvature",
                "radians",
                (0.0, float(np.pi)),
                description="The trajectory through a text's tokens turns sharply at each step.",
                source="Hosseini and Fedorenko 2023: angle between successive differences.",
            ),
            3,
            Points.curvature,
        ),
        TextMeasure(
            ScoreSpec(
                "token_angle",
                "radians",
                (0.0, float(np.pi)),
                description="Neighbouring tokens of a text point in different directions.",
                source="Code of Skean et al. 2025, where it is called curvature.",
            ),
            2,
            Points.token_angle,
        ),
        TextMeasure(
            ScoreSpec(
                "anisotropy",
                "share of variance",
                (0.0, 1.0),
                description="One direction holds most of the variance of a text's tokens.",
                source="Razzhigaev et al. 2024.",
            ),
            2,
            Points.anisotropy,
        ),
        TextMeasure(
            ScoreSpec(
                "mean_cosine",
                "cosine",
                (-1.0, 1.0),
                description="Tokens of a text point in the same direction.",
                source="Ethayarajh 2019, intra-sentence similarity over pairs.",
            ),
            2,
            Points.mean_cosine,
        ),
        TextMeasure(
            ScoreSpec(
                "intrinsic_dimension",
                "dimensions",
                (0.0, None),
                description="Tokens of a text fill many dimensions; underestimated above five.",
                source="Facco et al. 2017 (TwoNN); per text as in Viswanathan et al. 2025.",
            ),
            20,
            Points.intrinsic_dimension,
        ),
        TextMeasure(
            ScoreSpec(
                "neighbourhood_overlap",
                "share of neighbours",
                (0.0, 1.0),
                description="Tokens of a text keep their neighbours through the layer.",
                source=f"Valeriani et al. 2023, {NEIGHBOURS} neighbours, with the place before.",
            ),
            NEIGHBOURS + 2,
            Points.overlap,
            along=True,
        ),
        TextMeasure(
            ScoreSpec(
                "intrinsic_dimension_gride",
                "dimensions",
                (0.0, None),
                description="Like intrinsic_dimension, from more distant, less noisy neighbours.",
                source=f"Denti et al. 2022 (GRIDE), neighbours {SCALE} and {2 * SCALE}.",
            ),
            20,
            Points.gride,
        ),
        TextMeasure(
            ScoreSpec(
                "self_similarity",
                "cosine",
                (-2.0, 2.0),
                description="A token keeps the same state throughout a text.",
                source="Ethayarajh 2019, self-similarity within a text, minus its mean cosine.",
            ),
            2,
            Points.self_similarity,
        ),
    )
}
POOLED = {
    "linearity": ScoreSpec(
        "linearity",
        "share of variance",
        (None, 1.0),
        description="A linear map predicts a layer's output from its input; adjusted for noise.",
        source="Razzhigaev et al. 2024, adjusted; all tokens of all texts together.",
    )
}


@checked
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
    """Measure the hidden states at every place of the residual stream over texts.

    The points are the tokens of a text. States are dropped as soon as a batch is measured, so
    memory does not grow with the number of texts. ``linearity`` is computed over all tokens
    together (up to ``32 * d_model`` tokens, where the fit has converged) and left out with fewer
    than ``10 * d_model`` tokens, unless requested.

    Args:
        model: the model.
        texts: texts or a path, as for :func:`headscope.probes.text`, or a probe; None: the bundled
            passages.
        measures: names from ``TEXT_MEASURES``, or ``linearity``; None: all.
        length: cut texts into pieces of this many tokens; None: whole texts. A probe is not cut.
        skip: leave out this many tokens at each text's start, since the first is often an attention
            sink whose state dwarfs all others.
        batch_size: texts per pass; default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        A table by place: ``embed``, then one place after each block.

    Raises:
        InputError: if a measure is unknown, or all texts are too short for a requested one.

    Example:
        >>> table = hs.geometry.layers(model, ["The cat sat on the mat.", "The dog ran."])
        >>> "curvature" in table
        True
    """
    options = RunOptions(batch_size, progress=progress)
    chosen = _chosen(measures, [*TEXT_MEASURES, *POOLED])
    probe = read_texts(model, texts, length, skip)
    points = (probe.real.sum(1) - skip).clamp_min(0)
    chosen = _fitting(chosen, points, model, asked=measures is not None)
    run = _RunningMeasures(model, probe, chosen, skip)
    size = options.per_pass(probe.length, _TOKENS_PER_PASS)
    with options.track(len(probe), "measuring layers") as advance:
        for start in range(0, len(probe), size):
            batch = slice(start, start + size)
            run.add(batch)
            advance(len(points[batch]))
    return run.table(measures)


@checked
@own_types()
def heads(
    model: HeadModel,
    texts: str | Path | Sequence[str] | Probe | None = None,
    *,
    measures: Sequence[str] | None = None,
    length: int | None = 128,
    skip: int = 1,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadTable:
    """Measure every head's outputs ``z`` over texts, with the same measures as :func:`layers`.

    The points are a head's attention-weighted values at the tokens of a text, before the output
    projection, ``[pos d_head]``. ``neighbourhood_overlap`` and ``linearity`` compare layers and are
    not available for heads. A head whose outputs are all zero has no value.

    Args:
        model: the model.
        texts: texts or a path, as for :func:`headscope.probes.text`, or a probe; None: the bundled
            passages.
        measures: names from ``TEXT_MEASURES``; None: all that apply to heads.
        length: cut texts into pieces of this many tokens; None: whole texts. A probe is not cut.
        skip: leave out this many tokens at each text's start.
        batch_size: texts per pass; default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        A table with one score per measure.

    Raises:
        InputError: if a measure is unknown, or all texts are too short for a requested one.

    Example:
        >>> table = hs.geometry.heads(model, ["The cat sat on the mat.", "The dog ran."])
        >>> table["curvature"].mean.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    options = RunOptions(batch_size, progress=progress)
    known = [name for name, measure in TEXT_MEASURES.items() if not measure.along]
    chosen = _chosen(measures, known)
    probe = read_texts(model, texts, length, skip)
    points = (probe.real.sum(1) - skip).clamp_min(0)
    chosen = _fitting(chosen, points, model, asked=measures is not None)
    shape = model.shape
    found = np.full((len(chosen), shape.n_layers, shape.n_heads, len(probe)), np.nan)
    size = options.per_pass(probe.length, _TOKENS_PER_PASS)
    with options.track(len(probe), "measuring heads") as advance:
        for start in range(0, len(probe), size):
            _measure_heads(model, probe, slice(start, start + size), chosen, skip, found)
            advance(len(points[start : start + size]))
    return HeadTable([
        HeadScores.from_examples(
            replace(of := TEXT_MEASURES[name].spec, source=f"{of.source} On z of each head."),
            column, kv_heads=shape.n_kv_heads, design=Design(clusters=probe.cluster_labels),
            provenance=origin(model, probe, skip=skip),
        )
        for name, column in zip(chosen, found, strict=True)
    ])  # fmt: skip


def _measure_heads(
    model: HeadModel,
    probe: Probe,
    batch: slice,
    names: Sequence[str],
    skip: int,
    found: Float[np.ndarray, "measure layer head text"],
) -> None:
    """Measure the head outputs of some texts, layer by layer, into ``found``."""
    part = probe.examples(batch)

    def measure(view: TapView) -> None:
        z = view.z.float().transpose(1, 2)
        for number in range(len(part)):
            real = part.real[number].nonzero().squeeze(1)[skip:]
            points = Points(z[number, :, real.to(z.device)], part.tokens[number, real])
            silent = ~(points.x != 0).flatten(1).any(1)
            for at, name in enumerate(names):
                if len(real) >= TEXT_MEASURES[name].least:
                    values = TEXT_MEASURES[name].take(points)
                    values = values.masked_fill(silent.to(values.device), float("nan"))
                    found[at, view.layer, :, batch.start + number] = values.cpu().double().numpy()

    layers = model.shape.attention_layers
    model.run(
        part, reads={Tap("z", layer): measure for layer in layers}, until=Tap("z", layers[-1])
    )


_INVARIANCE = (
    ScoreSpec(
        "info_nce", "nats", (0.0, None),
        description="Two noisy views of a text are hard to match with each other.",
        source="van den Oord et al. 2018; Skean et al. 2025.",
    ),
    ScoreSpec(
        "lidar", "dimensions", (1.0, None),
        description="Many directions separate texts beyond the noise between views.",
        source="Thilak et al. 2023.",
    ),
    ScoreSpec(
        "dime", "nats",
        description="Two noisy views of a text share much information.",
        source="Skean et al. 2023.",
    ),
)  # fmt: skip


@checked
@own_types()
def invariance(
    model: HeadModel,
    texts: str | Path | Sequence[str] | Probe | None = None,
    *,
    views: int = 2,
    drop: float = 0.1,
    length: int | None = 128,
    skip: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> LayerTable:
    """Measure how stable each place of the residual stream is under noise in the texts.

    A view of a text is the text with some of its tokens dropped at random; its vector is the mean
    state of the remaining tokens. ``info_nce`` and ``dime`` compare the first two views, ``lidar``
    all of them. Memory holds one mean state per text, view and place.

    Args:
        model: the model.
        texts: texts or a path, as for :func:`headscope.probes.text`, or a probe; at least three,
            and many more for reliable ``lidar`` and ``dime``. None: the bundled passages.
        views: views per text, at least two.
        drop: share of the tokens to drop, below 1; the first ``skip`` are kept.
        length: cut texts into pieces of this many tokens; None: whole texts. A probe is not cut.
        skip: leave out this many tokens at each text's start.
        seed: seed for the dropped tokens.
        batch_size: texts per pass; default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        A table by place; ``info_nce`` has a value per text, the others one for all texts.

    Raises:
        InputError: if there are too few texts, views or tokens.

    Example:
        >>> texts = ["The cat sat on the mat.", "Dogs run far.", "It rained all day long."]
        >>> "lidar" in hs.geometry.invariance(model, texts)
        True
    """
    options = RunOptions(batch_size, seed=seed, progress=progress)
    probe = read_texts(model, texts, length, skip)
    if len(probe) < 3 or views < 2 or not 0 <= drop < 1:
        raise InputError(
            f"invariance of {len(probe)} texts in {views} views with drop={drop}: give at least 3 "
            "texts and 2 views, and a share of tokens below 1."
        )
    if int(probe.real.sum(1).min()) <= skip:
        raise InputError(f"a text has no token after the first {skip}: give longer texts.")
    size = options.per_pass(probe.length, _TOKENS_PER_PASS)
    noisy = [_dropped(probe, drop, skip, seed + view) for view in range(views)]
    with options.track(views * len(probe), "measuring invariance") as advance:
        means = [_mean_states(model, view, skip, size, advance) for view in noisy]
    places = torch.stack(means, 2)
    found = {
        "info_nce": [gm.info_nce_by_text(x[:, 0], x[:, 1]).cpu().numpy() for x in places],
        "lidar": [[gm.lidar(x)] for x in places],
        "dime": [[gm.dime(x[:, 0], x[:, 1], seed=seed)] for x in places],
    }
    made = (LayerMeasure(spec, np.array(found[spec.name])) for spec in _INVARIANCE)
    names = ("embed", *(f"L{layer}" for layer in range(model.shape.n_layers)))
    came = origin(model, probe, views=views, drop=drop, skip=skip, noise_seed=seed)
    return LayerTable(names, tuple(made), came)


def _dropped(probe: Probe, share: float, skip: int, seed: int) -> Probe:
    """Drop random tokens of the texts, keeping at least one."""
    draw = torch.Generator().manual_seed(seed)
    kept = []
    for tokens, real in zip(probe.tokens, probe.real, strict=True):
        words = tokens[real]
        order = torch.randperm(len(words) - skip, generator=draw)
        stays = len(order) - min(int(share * len(order)), len(order) - 1)
        kept.append(torch.cat([words[:skip], words[skip:][order[:stays].sort().values]]))
    sequences = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
    lengths = torch.tensor([len(words) for words in kept])
    return from_tokens(sequences, real=torch.arange(sequences.shape[1]) < lengths[:, None])


def _mean_states(
    model: HeadModel, probe: Probe, skip: int, size: int, advance: Callable[[float], None]
) -> Float[Tensor, "place text d_model"]:
    """Mean state of each text at every place."""
    last = model.shape.n_layers - 1
    taps = [Tap("embed"), *(Tap("resid_post", layer) for layer in range(last + 1))]
    found: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    for start in range(0, len(probe), size):
        part = probe.examples(slice(start, start + size))
        inside = part.real & (part.position_in_text >= skip)

        def keep(view: TapView, inside: Tensor = inside) -> None:
            weights = inside.to(view.value.device, torch.float32)[..., None]
            total = (view.value.float() * weights).sum(1)
            found[view.tap].append((total / weights.sum(1)).cpu())

        model.run(part, reads=dict.fromkeys(taps, keep), until=taps[-1])
        advance(float(len(part)))
    return torch.stack([torch.cat(found[tap]) for tap in taps])


def read_texts(
    model: HeadModel,
    texts: str | Path | Sequence[str] | Probe | None,
    length: int | None,
    skip: int,
) -> Probe:
    """Convert texts to a probe.

    Raises:
        InputError: if ``skip`` is negative, or there are several texts that are all the same.
    """
    if skip < 0:
        raise InputError(f"skip={skip}: give 0 or more tokens to leave out.")
    probe = texts if isinstance(texts, Probe) else text_probe(model, texts, length)
    need_different(probe)
    return probe


def need_different(probe: Probe) -> None:
    """Raise InputError for identical texts, for which every standard error would be 0.

    Raises:
        InputError: if there are several texts and all are the same.
    """
    same = probe.tokens == probe.tokens[:1]
    if len(probe) > 1 and bool((same & probe.real | ~probe.real & ~probe.real[:1]).all()):
        raise InputError(
            f"the {len(probe)} texts are all the same, so errors and intervals over them are "
            "meaningless: give different texts, or a single one."
        )


def _chosen(measures: Sequence[str] | None, known: list[str]) -> list[str]:
    if measures is None:
        return known
    for name in measures:
        if name not in known:
            raise InputError(nearest(name, known, kind="measure"))
    if not measures:
        raise InputError(f"no measure given: choose from {', '.join(known)}.")
    return list(dict.fromkeys(measures))


def _fitting(
    names: list[str], points: Int[Tensor, " text"], model: HeadModel, *, asked: bool
) -> list[str]:
    """Measures for which the texts are long enough; raises if a requested one is not."""
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


class _RunningMeasures:
    """Accumulator of one model's measures, batch by batch."""

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
            at = real.to(states[0].device)
            states_of = torch.stack([place[number, at] for place in states])
            self._measure(Points(states_of, part.tokens[number, real]))
        inside = part.real & (part.position_in_text >= self.skip)
        for moments, before, after in zip(self.moments, states, states[1:], strict=False):
            if moments.n < _LINEAR * self.model.shape.d_model:
                moments.add(before[inside], after[inside])

    def _states(self, part: Probe) -> list[Float[Tensor, "batch pos d_model"]]:
        kept: list[Tensor] = []

        def keep(view: TapView) -> None:
            kept.append(view.value.float())

        last = self.model.shape.n_layers - 1
        taps = [Tap("embed"), *(Tap("resid_post", layer) for layer in range(last + 1))]
        self.model.run(part, reads=dict.fromkeys(taps, keep), until=taps[-1])
        return [state.to(kept[0].device) for state in kept]

    def _measure(self, points: Points) -> None:
        for name in self.names:
            if name in TEXT_MEASURES:
                measure = TEXT_MEASURES[name]
                enough = points.x.shape[1] >= measure.least
                found = measure.take(points).cpu().double().numpy() if enough else np.nan
                self.values[name].append(np.broadcast_to(found, self.places))

    def table(self, measures: Sequence[str] | None) -> LayerTable:
        """Collect the measures in a table."""
        made = [self._made(name) for name in self.names]
        asked = None if measures is None else " ".join(measures)
        provenance = origin(self.model, self.probe, measures=asked, skip=self.skip)
        places = ("embed", *(f"L{layer}" for layer in range(self.places - 1)))
        return LayerTable(places, tuple(made), provenance)

    def _made(self, name: str) -> LayerMeasure:
        if name in TEXT_MEASURES:
            return LayerMeasure(TEXT_MEASURES[name].spec, np.stack(self.values[name], 1))
        found = [float("nan"), *(moments.linearity() for moments in self.moments)]
        return LayerMeasure(POOLED[name], np.array(found)[:, None])
