"""Alignment heads: which heads of cross-attention say what source token a target token comes from.

A query of cross-attention is the decoder's position that predicts a target token; its keys are
source tokens, or frames of sound. Word timestamps of speech models are read off the heads whose
attention follows the alignment (``generation_config.alignment_heads``), and alignments of
translations likewise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design
from headscope.capture import check_fits, chunks, need_probe, stream
from headscope.errors import InputError
from headscope.heads import HeadIndex, ModelShape
from headscope.models.protocol import HeadModel, stack_of
from headscope.models.taps import Reads, TapView, at_layers
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import HeadScores, HeadTable

Links = Sequence[Sequence[Sequence[int]]] | Bool[Tensor, "batch target source"]
# Queries whose rows are held at once, as bytes.
_ROWS_BYTES = 1 << 28

_AER = "Och & Ney 2003 (alignment error rate)"
_ACCURACY = ScoreSpec(
    "alignment_accuracy",
    unit="share",
    bounds=(0.0, 1.0),
    source="Li et al. 2019 (arXiv 1906.10282); Och & Ney 2003",
    threshold=0.5,
    description="Share of linked target tokens that attend most to a source token of theirs.",
)
_PRECISION = ScoreSpec(
    "alignment_precision",
    unit="share",
    bounds=(0.0, 1.0),
    source=_AER,
    description="Share of a head's links, one for each target token, that are possible links.",
)
_RECALL = ScoreSpec(
    "alignment_recall",
    unit="share",
    bounds=(0.0, 1.0),
    source=_AER,
    description="Share of the sure links that are among a head's links.",
)
_ERROR = ScoreSpec(
    "alignment_error",
    unit="share",
    bounds=(0.0, 1.0),
    direction="lower",
    alternative="two-sided",
    source=_AER,
    description="Error rate of a head's links: 1 less (|A and S| + |A and P|) / (|A| + |S|).",
)
_MONOTONE = ScoreSpec(
    "monotonicity",
    unit="tau",
    bounds=(-1.0, 1.0),
    alternative="two-sided",
    source="Kendall 1938, tau-b",
    description="Rank correlation of target positions and the source positions attended most.",
)
_PATH = ScoreSpec(
    "path_mass",
    unit="attention",
    bounds=(0.0, 1.0),
    source="Radford et al. 2022 (arXiv 2212.04356), dynamic time warping of cross-attention",
    description="Attention on the monotone path through source and target that holds most of it.",
)
_COVERAGE = ScoreSpec(
    "coverage",
    unit="share",
    bounds=(0.0, 1.0),
    source="Tu et al. 2016 (arXiv 1601.04811), coverage",
    description="Mean over source tokens but the last of the attention that each got, 1 at most.",
)
_END = ScoreSpec(
    "source_end",
    unit="attention",
    bounds=(0.0, 1.0),
    source="Voita et al. 2018 (arXiv 1805.10163), attention to the end of the source",
    description="Attention to the last source token, where heads with nothing to do park it.",
)


def find(
    model: HeadModel,
    probe: Probe,
    links: Links | None = None,
    possible: Links | None = None,
    *,
    at: str = "output",
    seed: int = 0,
    draws: int = 4,
    batch_size: int | None = None,
) -> HeadTable:
    """Score every head of cross-attention as an alignment of source and target.

    With links ``S`` (sure) and ``P`` (possible, sure ones included), and ``A`` the links of a head,
    each target token with the source token that it attends to most (of equals the first):
    ``alignment_accuracy``: share of target tokens with a link in P whose own is one of them;
    ``alignment_precision``: ``|A and P| / |A|``; ``alignment_recall``: ``|A and S| / |S|``;
    ``alignment_error``: ``1 - (|A and S| + |A and P|) / (|A| + |S|)``, lower is better. A target's
    last token, mostly the end of the text, is left out of A where it has no link; others without
    one count against the head. Without links, and beside them: ``path_mass``: attention on the
    monotone path with the largest sum (dynamic time warping, steps of one token on either or both
    sides), over the number of target tokens; ``monotonicity``: Kendall's tau of target positions
    and A (with links, again without a last token that has none), -1 where the order is reversed;
    ``coverage``: mean over source tokens but the last of
    ``min(1, attention that the token got in all)``; ``source_end``: attention to the last source
    token.

    The null of all but the last two is the same rows in a random order of target tokens, paired by
    example: a head that looks at one place whatever is asked scores there what it scores here.

    Args:
        model: an encoder-decoder, or its cross-attention, ``model.stack("cross")``.
        probe: sources and targets, as :func:`headscope.probes.translation` makes them.
        links: sure links: for every example pairs ``(target, source)`` of positions from 0, or
            booleans ``[batch target source]``. Target position i is that of ``probe.targets[i]``.
        possible: more links that are not wrong.
        at: ``output``: a target token's row is that of the position that predicts it; ``input``:
            that of the position that reads it.
        seed: of the null.
        draws: random orders that the null averages.
        batch_size: examples per pass.

    Returns:
        A table of the stack ``cross``.

    Raises:
        InputError: if the probe has no source, or links lie outside of it.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> small = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        >>> small.decoder_start_token_id = 0
        >>> t5 = hs.load(T5ForConditionalGeneration(small).eval())
        >>> probe = hs.probes.translation(t5, [[5, 6, 7, 1]], [[7, 6, 5, 1]])
        >>> table = hs.alignment.find(t5, probe, links=[[(0, 2), (1, 1), (2, 0)]])
        >>> table["alignment_accuracy"].mean.shape
        (1, 2)
    """
    need_probe(probe)
    view = stack_of(model, stack="cross")
    check_fits(view, probe)
    if draws < 1:
        raise InputError(f"draws={draws}: the null needs one random order or more.")
    if at not in ("output", "input"):
        raise InputError(f"at={at!r}: give 'output' or 'input'.")
    if possible is not None and links is None:
        raise InputError("possible links go beside sure ones: give links too.")
    source = probe.of_source
    sure = None if links is None else _as_matrix(links, probe, source)
    wide = sure if possible is None or sure is None else sure | _as_matrix(possible, probe, source)
    shown = _rows_of_targets(probe, at)
    parts = [
        (part.found, part.null)
        for _, part in stream(
            view,
            _numbered(probe),
            lambda batch, _: _Reader(batch, source.real, shown, sure, wide, at, seed, draws),
            batch_size=batch_size,
        )
    ]
    found = {name: np.concatenate([one[0][name] for one in parts], -1) for name in parts[0][0]}
    null = {name: np.concatenate([one[1][name] for one in parts], -1) for name in parts[0][1]}
    about = origin(view, probe, control="rows in random order", seed=seed, at=at, draws=draws)
    scores = [
        HeadScores.from_examples(
            spec,
            found[spec.name],
            kv_heads=view.shape.n_kv_heads,
            control_per_example=null.get(spec.name),
            design=Design(paired=spec.name in null, clusters=probe.cluster_labels),
            provenance=about,
        ).of_stack("cross")
        for spec in _SPECS
        if spec.name in found
    ]
    return HeadTable(scores)


def heads(
    table: HeadTable, top: int | None = None, *, score: str | None = None, alpha: float = 0.05
) -> list[list[int]]:
    """Heads of a table of alignments, as ``generation_config.alignment_heads`` takes them.

    Args:
        table: from :func:`find`.
        top: the best so many; None: those that are above the null at false discovery rate
            ``alpha`` and reach the score's threshold.
        score: by which; default: ``alignment_accuracy``, or ``path_mass`` of a table without links.
        alpha: see above.

    Returns:
        Pairs ``[layer, head]``, best first.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> small = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        >>> small.decoder_start_token_id = 0
        >>> t5 = hs.load(T5ForConditionalGeneration(small).eval())
        >>> probe = hs.probes.translation(t5, [[5, 6, 7, 1]], [[7, 6, 5, 1]])
        >>> len(hs.alignment.heads(hs.alignment.find(t5, probe), top=2))
        2
    """
    own = table if len(table.stacks) == 1 else table.stack("cross")
    name = score or (_ACCURACY.name if _ACCURACY.name in own else _PATH.name)
    chosen = own[name]
    if top is not None and top < 1:
        raise InputError(f"top={top}: ask for one head or more.")
    lower = chosen.spec.direction == "lower"
    ranked = chosen.bottom(chosen.mean.size) if lower else chosen.top(chosen.mean.size)
    if top is not None:
        return [[head.layer, head.head] for head, _ in ranked[:top]]
    better = chosen.mean < chosen.null if lower else chosen.mean > chosen.null
    kept = chosen.significant(alpha) & better
    return [[head.layer, head.head] for head, _ in ranked if kept[head]]


@torch.no_grad()
def matrix(
    model: HeadModel,
    probe: Probe,
    heads: Sequence[str | tuple[int, int] | Sequence[int]],
    *,
    at: str = "output",
    batch_size: int | None = None,
) -> Float[Tensor, "batch target source"]:
    """Attention of some cross heads, averaged: an alignment of each target with its source.

    Args:
        model: an encoder-decoder, or its cross-attention.
        probe: sources and targets.
        heads: pairs ``[layer, head]``, as :func:`heads` gives them, or addresses ``X3H2``.
        at: as :func:`find` takes it.
        batch_size: examples per pass.

    Returns:
        Rows of target tokens, in fp32 on the CPU; 0 where there is no such token.

    Raises:
        InputError: if no heads are given, or the stack lacks one.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> small = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        >>> small.decoder_start_token_id = 0
        >>> t5 = hs.load(T5ForConditionalGeneration(small).eval())
        >>> probe = hs.probes.translation(t5, [[5, 6, 7, 1]], [[7, 6, 1]])
        >>> hs.alignment.matrix(t5, probe, [[0, 1]]).shape
        torch.Size([1, 3, 4])
    """
    view = stack_of(model, stack="cross")
    pairs = [one if isinstance(one, str) else (int(one[0]), int(one[1])) for one in heads]
    chosen = [view.shape.check(HeadIndex.parse(one)) for one in pairs]
    if not chosen:
        raise InputError("no heads given: name those that align, e.g. hs.alignment.heads(table).")
    parts = [
        part.total / len(chosen)
        for _, part in stream(view, probe, lambda *_: _Sum(chosen), batch_size=batch_size)
    ]
    return _shifted(torch.cat(parts), at) * _rows_of_targets(probe, at)[:, :, None]


def path(
    weights: Float[Tensor, "target source"] | Float[np.ndarray, "target source"],
) -> list[tuple[int, int]]:
    """The monotone path through an alignment that holds most of it, by dynamic time warping.

    Args:
        weights: of target and source positions, e.g. of one example of :func:`matrix`.

    Returns:
        Pairs ``(target, source)`` from the first of both to the last of both.

    Source:
        Radford et al. 2022 (arXiv 2212.04356), word timestamps of Whisper.

    Example:
        >>> hs.alignment.path(torch.eye(3))
        [(0, 0), (1, 1), (2, 2)]
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise InputError(f"a path goes through numbers [target source]; got {values.shape}.")
    best = _best_paths(values[None])[0]
    i, j = values.shape[0] - 1, values.shape[1] - 1
    found = [(i, j)]
    while i or j:
        steps = [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
        i, j = max(steps, key=lambda step: best[step])
        found.append((i, j))
    return found[::-1]


_SPECS = (_ACCURACY, _PRECISION, _RECALL, _ERROR, _PATH, _MONOTONE, _COVERAGE, _END)
_WITHOUT_NULL = (_COVERAGE.name, _END.name)


def _best_paths(values: Float[np.ndarray, "some target source"]) -> Float[np.ndarray, "some t s"]:
    """Largest sum of a monotone path from the first cell to every cell, diagonal by diagonal."""
    some, rows, columns = values.shape
    best = np.full((some, rows + 1, columns + 1), -np.inf)
    best[:, 0, 0] = 0.0
    for diagonal in range(rows + columns - 1):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        before = np.maximum(np.maximum(best[:, i, j], best[:, i, j + 1]), best[:, i + 1, j])
        best[:, i + 1, j + 1] = values[:, i, j] + before
    return best[:, 1:, 1:]


def _numbered(probe: Probe) -> Probe:
    number = torch.arange(len(probe), dtype=torch.float32)
    return replace(probe, facts={**probe.facts, "example": number})


def _rows_of_targets(probe: Probe, at: str) -> Bool[Tensor, "batch target"]:
    """Target tokens that have a row."""
    asked = probe.real & (probe.targets >= 0)
    if at == "output":
        return asked
    return asked & torch.cat([probe.real[:, 1:], torch.zeros_like(probe.real[:, :1])], 1)


def _shifted(rows: Tensor, at: str) -> Tensor:
    """Rows by target token, of rows ``[... query source]`` by decoder position."""
    if at == "output":
        return rows
    return torch.cat([rows[..., 1:, :], torch.zeros_like(rows[..., :1, :])], -2)


def _as_matrix(links: Links, probe: Probe, source: Probe) -> Bool[Tensor, "batch target source"]:
    """Links as booleans.

    Raises:
        InputError: if they are of other examples, or outside of source or target.
    """
    size = (len(probe), probe.length, source.length)
    if isinstance(links, Tensor):
        if links.shape != size:
            raise InputError(f"the links have shape {tuple(links.shape)}, not {size}.")
        found = links.bool()
    else:
        if len(links) != len(probe):
            raise InputError(f"there are links of {len(links)} examples and {len(probe)} examples.")
        found = torch.zeros(size, dtype=torch.bool)
        for number, pairs in enumerate(links):
            for pair in pairs:
                if len(pair) != 2 or not all(
                    0 <= one < n for one, n in zip(pair, size[1:], strict=True)
                ):
                    raise InputError(
                        f"link {tuple(pair)} of example {number + 1} is not (target, source) among "
                        f"{size[1]} and {size[2]} positions, counted from 0."
                    )
                found[number, pair[0], pair[1]] = True
    outside = found & ~(_rows_of_targets(probe, "output")[:, :, None] & source.real[:, None])
    if bool(outside.any()):
        example, target, place = (int(one) for one in outside.nonzero()[0])
        raise InputError(
            f"link ({target}, {place}) of example {example + 1} is at padding, or at a position "
            "without a target."
        )
    return found


@dataclass
class _Sum:
    """Sum of the rows of some heads."""

    heads: Sequence[HeadIndex]
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def reads(self, shape: ModelShape) -> Reads:
        layers = {head.layer for head in self.heads}
        return {
            tap: read for tap, read in at_layers(shape, self._add).items() if tap.layer in layers
        }

    def _add(self, view: TapView) -> None:
        own = [head.head for head in self.heads if head.layer == view.layer]
        rows = view.rows(torch.arange(view.n_queries)).pattern
        self.total = self.total + rows[:, own].sum(1).cpu()


@dataclass
class _Reader:
    """Measures every head of a batch, layer by layer."""

    batch: Probe
    source_real: Bool[Tensor, "all source"]
    shown: Bool[Tensor, "all target"]
    sure: Bool[Tensor, "all target source"] | None
    possible: Bool[Tensor, "all target source"] | None
    at: str
    seed: int
    draws: int
    layers: int = 0
    found: dict[str, np.ndarray] = field(default_factory=dict)
    null: dict[str, np.ndarray] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        self.layers = shape.n_layers
        return at_layers(shape, self._measure)

    @property
    def _numbers(self) -> list[int]:
        return [int(one) for one in self.batch.facts["example"].tolist()]

    def _measure(self, view: TapView) -> None:
        """Rows of one layer, example by example on the CPU."""
        queries = torch.arange(view.n_queries)
        width = 4 * len(self.batch) * view.z.shape[2] * self.source_real.shape[1]
        rows = [view.rows(part).pattern.cpu() for part in chunks(queries, width, _ROWS_BYTES)]
        pattern = _shifted(torch.cat(rows, 2), self.at)
        for place, number in enumerate(self._numbers):
            targets, keys = self.shown[number], self.source_real[number]
            own = pattern[place][:, targets][:, :, keys].double().numpy()
            links = [
                None if one is None else one[number][targets][:, keys].numpy()
                for one in (self.sure, self.possible)
            ]
            self._keep(self.found, view.layer, place, _measures(own, *links))
            draw = np.random.default_rng([self.seed, number])
            orders = [draw.permutation(own.shape[1]) for _ in range(self.draws)]
            shuffled = np.concatenate([own[:, order] for order in orders])
            null = _measures(shuffled, *links)
            kept = {
                name: one.reshape(self.draws, -1).mean(0)
                for name, one in null.items()
                if name not in _WITHOUT_NULL
            }
            self._keep(self.null, view.layer, place, kept)

    def _keep(
        self, kept: dict[str, np.ndarray], layer: int, place: int, values: Mapping[str, np.ndarray]
    ) -> None:
        for name, by_head in values.items():
            size = (self.layers, len(by_head), len(self.batch))
            kept.setdefault(name, np.full(size, np.nan))[layer, :, place] = by_head


def _measures(
    rows: Float[np.ndarray, "head target source"],
    sure: Bool[np.ndarray, "target source"] | None,
    possible: Bool[np.ndarray, "target source"] | None,
) -> dict[str, Float[np.ndarray, " head"]]:
    """Every measure of every head on one example; NaN where it says nothing."""
    heads, targets, sources = rows.shape
    nothing = np.full(heads, np.nan)
    if targets == 0:
        names = [spec.name for spec in _SPECS if sure is not None or spec not in _SPECS[:4]]
        return dict.fromkeys(names, nothing)
    most = rows.argmax(-1)
    ordered = most
    if possible is not None and not possible[-1].any():
        ordered = most[:, :-1]  # the end of a text is linked to nothing, mostly
    found = {
        _PATH.name: _best_paths(rows)[:, -1, -1] / targets,
        _MONOTONE.name: np.array([_tau(one) for one in ordered]),
        _COVERAGE.name: nothing if sources < 2 else np.minimum(rows.sum(1)[:, :-1], 1.0).mean(-1),
        _END.name: rows[:, :, -1].mean(-1),
    }
    if sure is None or possible is None:
        return found
    linked: Bool[np.ndarray, " target"] = np.asarray(possible.any(1))
    counted = targets - int(not linked[-1])
    at = np.arange(targets)
    in_possible = np.stack([possible[at, one] for one in most]).sum(1)
    in_sure = np.stack([sure[at, one] for one in most]).sum(1)
    return found | {
        _ACCURACY.name: _share(in_possible, int(linked.sum())),
        _PRECISION.name: _share(in_possible, counted),
        _RECALL.name: _share(in_sure, int(sure.sum())),
        _ERROR.name: 1 - _share(in_sure + in_possible, counted + int(sure.sum())),
    }


def _share(number: Int[np.ndarray, " head"], of: int) -> Float[np.ndarray, " head"]:
    return number / of if of else np.full(len(number), np.nan)


def _tau(places: Int[np.ndarray, " target"]) -> float:
    """Kendall's tau-b of positions and what they attend to; NaN where nothing varies."""
    from scipy.stats import kendalltau

    if len(places) < 2 or (places == places[0]).all():
        return float("nan")
    return float(kendalltau(np.arange(len(places)), places).statistic)
