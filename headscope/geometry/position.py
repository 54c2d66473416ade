"""Position and content: their shares in hidden states, head outputs and attention scores.

Over texts of equal length, a hidden state is exactly the sum of a grand mean, a position part, a
text part and a rest. The position part of a text is estimated from the mean of *other* texts (every
second one), so chance gives 0 and texts are independent.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.result import Listed
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design
from headscope.errors import InputError, UnsupportedModelError
from headscope.geometry.layers import need_different
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import ATTENTION_SITES, Tap, TapView
from headscope.origin import origin
from headscope.probes import Probe
from headscope.probes import text as text_probe
from headscope.table import HeadScores, HeadTable
from headscope.table.lens import LayerMeasure, LayerTable

_PAPER = "Song and Zhong 2023, arXiv 2310.04861; {}"
_LEAST_TEXTS, _LEAST_POSITIONS = 4, 3
_LENGTH = 64
_TOKENS_PER_PASS = 4096
# Share of the within-row variance of log rows that query times key must explain, and the smallest
# probability whose logarithm is used.
_EXPLAINED, _VISIBLE_FROM = 0.999, 1e-20


@dataclass(frozen=True, eq=False, repr=False)
class Anova(Listed):
    """Decomposition of states of equally long texts: ``mean + position + context + rest``.

    Attributes:
        mean: mean of all states.
        position: mean of each position over texts, minus ``mean``; sums to 0 over positions.
        context: mean of each text over positions, minus ``mean``; sums to 0 over texts.
        rest: remainder; sums to 0 over texts and over positions.
    """

    mean: Float[Tensor, " d_model"]
    position: Float[Tensor, "pos d_model"]
    context: Float[Tensor, "text d_model"]
    rest: Float[Tensor, "text pos d_model"]

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the variance around the mean: ``position``, ``context`` and ``rest`` sum to 1.

        Estimated means contain noise: with T positions, C texts and no structure, position gets
        about ``1 / C`` and context about ``1 / T``.
        """
        texts, positions = self.rest.shape[:2]
        sums = {
            "position": texts * float(self.position.double().square().sum()),
            "context": positions * float(self.context.double().square().sum()),
            "rest": float(self.rest.double().square().sum()),
        }
        total = sum(sums.values()) or float("nan")
        return {name: value / total for name, value in sums.items()}

    @property
    def position_rank(self) -> float:
        """Stable rank of the position part: squared norm over the largest squared singular value.

        From 1 to the smaller dimension of the matrix: 1 is a line, about 2 a circle.
        """
        return _stable_rank(self.position)

    @property
    def smoothness(self) -> float:
        """Lag-1 autocorrelation of the position part, in [-1, 1]; 0 for noise."""
        return _smoothness(self.position)

    @property
    def incoherence(self) -> float:
        """Largest absolute cosine between a position's and a text's part, in [0, 1]."""
        p, c = (torch.nn.functional.normalize(x, dim=-1) for x in (self.position, self.context))
        return float((p @ c.mT).abs().max())


@checked
def anova(states: Float[Tensor, "text pos d_model"]) -> Anova:
    """Decompose states of equally long texts exactly (two-way ANOVA).

    Leave out the first position: it is often an attention sink whose state is a hundred times
    larger and would dominate ``position``.

    Args:
        states: hidden states of at least two texts and two positions.

    Raises:
        InputError: if there are fewer than two texts or two positions.

    Source:
        Song and Zhong 2023, "Uncovering hidden geometry in transformers via disentangling
        position and context", arXiv 2310.04861.

    Example:
        >>> parts = anova(torch.randn(4, 6, 3))
        >>> bool(parts.position.sum(0).abs().max() < 1e-5)
        True
        >>> round(sum(parts.shares.values()), 6)
        1.0
    """
    if states.ndim != 3 or min(states.shape[:2]) < 2:
        raise InputError(
            f"states of shape {list(states.shape)}: give [text pos d_model] with at least two "
            "texts and two positions."
        )
    x = states.double()
    mean = x.mean((0, 1))
    position, context = x.mean(0) - mean, x.mean(1) - mean
    rest = x - mean - position - context[:, None]
    return Anova(*(part.to(states.dtype) for part in (mean, position, context, rest)))


@checked
@own_types()
def position_layers(
    model: HeadModel,
    texts: Probe | Sequence[str] | str | Path | None = None,
    *,
    length: int | None = None,
    skip: int = 1,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> LayerTable:
    """Shares of position and text in the hidden states, layer by layer.

    Every second text serves as a reference; the others are measured. ``position_share`` of a text
    is the share of its states' variance explained by the reference: ``sum_t <h_t - g, P_t - g> /
    sum_t |h_t - g|^2``, with ``P_t`` the mean of the reference at position t and ``g`` the mean of
    those. ``context_share`` is the share explained by the mean of the text's *other* positions,
    after subtracting the position part. Both are 0 by chance and at most 1. ``position_rank`` and
    ``position_smoothness`` are those of :class:`Anova`, over the reference.

    Args:
        model: model to run.
        texts: texts or a path, as for :func:`headscope.probes.text`, or a probe; None: the bundled
            passages. Pieces shorter than the longest are left out.
        length: cut texts into pieces of this many tokens. Default: 64. A probe is not cut.
        skip: leave out this many positions at the start, since the first is often an attention
            sink.
        batch_size: texts per pass. Default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if fewer than four texts or three positions are left.

    Source:
        Song and Zhong 2023, arXiv 2310.04861; held-out shares are headscope's.

    Example:
        >>> table = hs.geometry.position_layers(model, length=16)
        >>> table.places[0], "position_share" in table
        ('embed', True)
    """
    options = RunOptions(batch_size, progress=progress)
    study = _PairedTexts.of(model, texts, length, skip, options)
    last = model.shape.n_layers
    taps = [Tap("embed"), *(Tap("resid_post", layer) for layer in range(last))]
    found: dict[Tap, list[tuple[Tensor, Tensor]]] = {tap: [] for tap in taps}
    with options.track(float(len(study.probe)), "position in layers") as advance:
        means = study.means(taps, advance)

        def keep(view: TapView) -> None:
            x = _wide(view)[:, study.skip :]
            found[view.tap].append(held_out_shares(x, means[view.tap]))

        study.run(study.measured, dict.fromkeys(taps, keep), advance)
    made = []
    for at, name in enumerate(("position_share", "context_share")):
        rows = [torch.cat([pair[at] for pair in found[tap]]) for tap in taps]
        made.append(LayerMeasure(_LAYER_SPECS[name], torch.stack(rows).cpu().numpy()))
    profiles = [means[tap] - means[tap].mean(0) for tap in taps]
    for name, measure in (("position_rank", _stable_rank), ("position_smoothness", _smoothness)):
        made.append(LayerMeasure(_LAYER_SPECS[name], np.array([[measure(p)] for p in profiles])))
    places = ("embed", *(f"L{layer}" for layer in range(last)))
    return LayerTable(places, tuple(made), origin(model, study.probe, skip=skip))


@checked
@own_types()
def position_heads(
    model: HeadModel,
    texts: Probe | Sequence[str] | str | Path | None = None,
    *,
    length: int | None = None,
    skip: int = 1,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadTable:
    """Positional shares of every head: in its output, and in its attention scores.

    ``output_position`` is the held-out position share of what the head writes (z), as
    ``position_share`` of :func:`position_layers`.

    The scores ``q . k`` are split exactly. Every query and key, as attention uses it (norm and
    rotation included), is the mean of the reference at its position plus the text's own content, so
    a score is a sum of four parts: ``qk_position`` (mean query, mean key: position alone),
    ``qk_key_content``, ``qk_query_content``, and ``qk_content`` (content with content). Each number
    is the covariance of its part with the score, divided by the variance of the score, over the
    visible keys within each row, since a softmax only depends on differences within a row. The four
    sum to 1; each may be negative. A previous-token head with learned positions has ``qk_position``
    near 1; a duplicate-token or induction head has a large ``qk_content``, and a head that always
    attends to commas a large ``qk_key_content``.

    Args:
        model: model to run; a position bias (ALiBi) or a soft cap is refused, because scores are
            then not ``q . k`` alone.
        texts: see :func:`position_layers`.
        length: cut texts into pieces of this many tokens. Default: 64.
        skip: leave out this many positions at the start, as queries and as keys.
        batch_size: texts per pass. Default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        Five scores. ``output_position`` and ``qk_position`` are tested against 0, their value by
        chance.

    Raises:
        InputError: if fewer than four texts or three positions are left.
        UnsupportedModelError: if rows are not the softmax of ``q . k``.

    Source:
        Song and Zhong 2023, arXiv 2310.04861, section on QK; their panels are normalised separately
        and do not sum to the score; these do.

    Example:
        >>> table = hs.geometry.position_heads(model, length=16)
        >>> table["qk_position"].mean.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    options = RunOptions(batch_size, progress=progress)
    study = _PairedTexts.of(model, texts, length, skip, options)
    layers = model.shape.attention_layers
    read = [Tap(site, layer) for layer in layers for site in ("z", "query", "key", "pattern")]
    outputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    panels: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    held: dict[Tap, Tensor] = {}
    with options.track(float(len(study.probe)), "position in heads") as advance:
        means = study.means([tap for tap in read if tap.site != "pattern"], advance)

        def keep(view: TapView) -> None:
            if view.tap.site == "pattern":
                Q, K = (Tap(site, view.tap.layer) for site in ("query", "key"))
                query, key, visible = held.pop(Q), held.pop(K), _visible(view, study.skip)
                _check_scores(model, view, query, key, visible, study.skip)
                found = _panels(query, key, means[Q], means[K], visible)
                panels[view.tap.layer or 0].append(found)
                return
            x = _by_position(view)[..., study.skip :, :]
            if view.tap.site == "z":
                shares, _ = held_out_shares(x, means[view.tap])
                outputs[view.tap.layer or 0].append(shares)
            else:
                held[view.tap] = x

        study.run(study.measured, dict.fromkeys(read, keep), advance)
    return _head_table(study, outputs, panels)


class PositionContext(NamedTuple):
    """Shares of position and content in a model: by layer, and by head.

    Attributes:
        layers: result of :func:`position_layers`.
        heads: result of :func:`position_heads`; None if attention scores are not ``q . k`` alone
            (soft cap, ALiBi).
        refused: why ``heads`` is None; None if it is not.
    """

    layers: LayerTable
    heads: HeadTable | None
    refused: str | None


@checked
def position_context(
    model: HeadModel,
    texts: Probe | Sequence[str] | str | Path | None = None,
    *,
    length: int | None = None,
    skip: int = 1,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> PositionContext:
    """Split hidden states and attention scores into position and content.

    Runs :func:`position_layers` and :func:`position_heads` on the same texts: shares of the
    variance of hidden states by layer, and the QK panels of every head.

    Args:
        model: model to run.
        texts: texts or a path, as for :func:`headscope.probes.text`, or a probe; None: the bundled
            passages.
        length: cut texts into pieces of this many tokens. Default: 64.
        skip: leave out this many positions at the start, since the first is often an attention
            sink.
        batch_size: texts per pass. Default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if fewer than four texts or three positions are left.

    Source:
        Song and Zhong 2023, arXiv 2310.04861.

    Example:
        >>> found = hs.geometry.position_context(model, length=16)
        >>> "position_share" in found.layers, "qk_position" in found.heads
        (True, True)
    """
    layers = position_layers(
        model, texts, length=length, skip=skip, batch_size=batch_size, progress=progress
    )
    try:
        heads = position_heads(
            model, texts, length=length, skip=skip, batch_size=batch_size, progress=progress
        )
        return PositionContext(layers, heads, None)
    except UnsupportedModelError as error:
        return PositionContext(layers, None, str(error))


def held_out_shares(
    x: Float[Tensor, "text *head pos d"], mean: Float[Tensor, "*head pos d"]
) -> tuple[Float[Tensor, "text *head"], Float[Tensor, "text *head"]]:
    """Share of each text's variance explained by a reference's positions, and by its own tokens.

    Args:
        x: values of the measured texts.
        mean: mean of the reference texts at each position.

    Returns:
        ``position_share`` and ``context_share`` of :func:`position_layers`.
    """
    grand = mean.mean(-2, keepdim=True)
    profile, own = mean - grand, x - grand
    size = own.square().sum((-2, -1))
    position = (own * profile).sum((-2, -1)) / size
    content = own - profile
    elsewhere = (content.sum(-2, keepdim=True) - content) / (x.shape[-2] - 1)
    return position, (content * elsewhere).sum((-2, -1)) / size


def _panels(
    query: Float[Tensor, "text head pos d_head"],
    key: Float[Tensor, "text kv_head pos d_head"],
    queries: Float[Tensor, "head pos d_head"],
    keys: Float[Tensor, "kv_head pos d_head"],
    visible: Bool[Tensor, "text pos pos"],
) -> Float[Tensor, "text head panel"]:
    """Four shares per text and head: position, query content, key content, content."""
    group = query.shape[1] // key.shape[1]
    key, keys = key.repeat_interleave(group, 1), keys.repeat_interleave(group, 0)
    found = []
    for q, k, seen in zip(query - queries, key - keys, visible, strict=True):
        pairs = ((queries, keys), (q, keys), (queries, k), (q, k))
        parts = [_within(left @ right.mT, seen) for left, right in pairs]
        score = torch.stack(parts).sum(0)
        size = score.square().sum((-2, -1))
        found.append(torch.stack([(part * score).sum((-2, -1)) / size for part in parts], -1))
    return torch.stack(found)


def _within(
    scores: Float[Tensor, "*any query key"], visible: Bool[Tensor, "query key"]
) -> Float[Tensor, "*any query key"]:
    """Scores minus the mean of their row over the visible keys; 0 elsewhere."""
    kept = scores.where(visible, 0.0)
    mean = kept.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp_min(1)
    return (kept - mean).where(visible, 0.0)


def _visible(view: TapView, skip: int) -> Bool[Tensor, "text pos pos"]:
    """Mask of the visible keys of every query, from position ``skip`` on."""
    rows = view.rows(slice(None))
    wide = rows.visible.new_zeros(*rows.visible.shape[:2], rows.visible.shape[1])
    wide[..., : rows.visible.shape[-1]] = rows.visible
    return wide[:, skip:, skip:]


def _check_scores(
    model: HeadModel,
    view: TapView,
    query: Float[Tensor, "text head pos d_head"],
    key: Float[Tensor, "text kv_head pos d_head"],
    visible: Bool[Tensor, "text pos pos"],
    skip: int,
) -> None:
    """Check ``q . k`` of the first text against the logarithm of its rows."""
    rows = view.rows(slice(None)).pattern[0, :, skip:, skip:].double()
    k = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
    scores = (query[0] @ k.mT)[..., : rows.shape[-1]]
    seen = visible[0, :, : rows.shape[-1]] & (rows > _VISIBLE_FROM).all(0)
    a, b = _within(scores, seen), _within(rows.clamp_min(_VISIBLE_FROM).log(), seen)
    across, sizes = (a * b).sum(), a.square().sum() * b.square().sum()
    if bool(sizes > 0) and not bool(across.square() >= _EXPLAINED * sizes):
        raise UnsupportedModelError(
            f"{model.name}: the attention rows of layer {view.tap.layer} are not the softmax of "
            "query times key (e.g. a position bias or a soft cap), so their scores cannot be split "
            "into position and content."
        )


def _stable_rank(position: Float[Tensor, "pos d_model"]) -> float:
    values = torch.linalg.svdvals(position.double()).square()
    return float(values.sum() / values.max()) if bool(values.any()) else float("nan")


def _smoothness(position: Float[Tensor, "pos d_model"]) -> float:
    p = position.double()
    sizes = (p[1:].square().sum() * p[:-1].square().sum()).sqrt()
    return float((p[1:] * p[:-1]).sum() / sizes) if bool(sizes) else float("nan")


def _wide(view: TapView) -> Tensor:
    return view.value.double()


def _by_position(view: TapView) -> Float[Tensor, "text head pos d_head"]:
    """Head outputs, queries or keys, heads first."""
    value = view.value.double()
    return value.transpose(1, 2) if view.tap.site == "z" else value


@dataclass(frozen=True, eq=False)
class _PairedTexts:
    """Texts of equal length, split into reference and measured ones, with passes over each."""

    model: HeadModel
    probe: Probe
    skip: int
    size: int

    @classmethod
    def of(
        cls,
        model: HeadModel,
        texts: Probe | Sequence[str] | str | Path | None,
        length: int | None,
        skip: int,
        options: RunOptions,
    ) -> "_PairedTexts":
        if skip < 0:
            raise InputError(f"skip={skip}: give 0 or more positions to leave out.")
        if isinstance(texts, Probe):
            probe = texts
        else:
            probe = text_probe(model, texts, _LENGTH if length is None else length)
            lengths = probe.real.sum(1)
            probe = probe.examples((lengths == lengths.max()).nonzero().squeeze(1))
        need_different(probe)
        if not bool(probe.real.all()):
            raise InputError(
                "the texts differ in length: positions are compared across texts, so give texts of "
                "equal length without padding."
            )
        if len(probe) < _LEAST_TEXTS or probe.length - skip < _LEAST_POSITIONS:
            raise InputError(
                f"{len(probe)} texts of {probe.length} tokens, {skip} of them left out: give at "
                f"least {_LEAST_TEXTS} texts and {_LEAST_POSITIONS} positions."
            )
        return cls(model, probe, skip, options.per_pass(probe.length, _TOKENS_PER_PASS))

    @property
    def reference(self) -> Probe:
        """Every second text, the reference for positional means."""
        return self.probe.examples(slice(0, None, 2))

    @property
    def measured(self) -> Probe:
        """The texts that are not in the reference."""
        return self.probe.examples(slice(1, None, 2))

    def run(
        self,
        probe: Probe,
        reads: dict[Tap, Callable[[TapView], None]],
        advance: Callable[[float], None],
    ) -> None:
        """Run texts batch by batch."""
        last = self.model.shape.n_layers - 1
        for start in range(0, len(probe), self.size):
            batch = probe.examples(slice(start, start + self.size))
            self.model.run(batch, reads=reads, until=Tap("resid_post", last))
            advance(float(len(batch)))

    def means(self, taps: Iterable[Tap], advance: Callable[[float], None]) -> dict[Tap, Tensor]:
        """Mean over the reference at every tap, ``[*head pos d]``, from position ``skip`` on."""
        found: dict[Tap, Tensor] = {}

        def add(view: TapView) -> None:
            value = _by_position(view) if view.tap.site in ATTENTION_SITES else _wide(view)
            part = value[..., self.skip :, :].sum(0) / len(self.reference)
            found[view.tap] = found[view.tap] + part if view.tap in found else part

        self.run(self.reference, dict.fromkeys(taps, add), advance)
        return found


_LAYER_SPECS = {
    name: ScoreSpec(
        name, unit, bounds, description=description, source=_PAPER.format(source)
    )
    for name, unit, bounds, description, source in (
        (
            "position_share", "share of variance", (None, 1.0),
            "States at the same position are similar across texts.", "shares held out",
        ),
        (
            "context_share", "share of variance", (None, 1.0),
            "States of the same text are similar across positions.", "shares held out",
        ),
        (
            "position_rank", "dimensions", (1.0, None),
            "The mean states of positions spread over many directions.", "stable rank",
        ),
        (
            "position_smoothness", "correlation", (-1.0, 1.0),
            "Mean states of neighbouring positions are similar.", "smoothness as lag-1 correlation",
        ),
    )
}  # fmt: skip


_HEAD_SPECS = tuple(
    ScoreSpec(
        name,
        unit="share of variance",
        bounds=(None, 1.0) if name == "output_position" else (None, None),
        source=_PAPER.format("held out, and exact within rows"),
        alternative="greater",
        description=description,
    )
    for name, description in (
        ("output_position", "What the head writes depends on the position, not on the text."),
        ("qk_position", "The scores depend only on the two positions."),
        ("qk_query_content", "The scores depend on the query's content and the key's position."),
        ("qk_key_content", "The scores depend on the key's content, not on the query's."),
        ("qk_content", "The scores depend on the contents of query and key together."),
    )
)


def _head_table(
    study: _PairedTexts, outputs: dict[int, list[Tensor]], panels: dict[int, list[Tensor]]
) -> HeadTable:
    shape = study.model.shape
    values = np.full((5, shape.n_layers, shape.n_heads, len(study.measured)), np.nan)
    for layer, parts in outputs.items():
        values[0, layer] = torch.cat(parts).mT.cpu().numpy()
        values[1:, layer] = torch.cat(panels[layer]).permute(2, 1, 0).cpu().numpy()
    made = []
    for spec, column in zip(_HEAD_SPECS, values, strict=True):
        tested = spec.name in ("output_position", "qk_position")
        none = np.where(np.isnan(column).all(-1, keepdims=True), np.nan, 0.0)
        made.append(
            HeadScores.from_examples(
                spec,
                column,
                kv_heads=shape.n_kv_heads,
                control_per_example=none if tested else None,
                design=Design(clusters=study.measured.cluster_labels),
                provenance=origin(study.model, study.probe, skip=study.skip),
            )
        )
    return HeadTable(made)
