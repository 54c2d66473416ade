"""Cross-attention heads: alignment of target tokens with their source, and concept heads.

A query of cross-attention is the decoder position that predicts a target token; its keys are source
tokens or audio frames. Word timestamps of speech models come from the heads whose attention follows
the alignment (``generation_config.alignment_heads``); word alignments of translations can be read
the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design
from headscope.capture import check_fits, chunks, need_probe, seen_by, stream
from headscope.errors import InputError, UnsupportedModelError, whole
from headscope.heads import HeadIndex, ModelShape
from headscope.models.protocol import HeadModel, stack_of
from headscope.models.taps import Reads, TapView, at_layers
from headscope.origin import origin
from headscope.probes.encoding import frame, from_tokens, need_tokenizer, pad_right
from headscope.probes.probe import Probe
from headscope.probes.translation import translation
from headscope.table import ConceptHeads, HeadScores, HeadTable

Links = Sequence[Sequence[Sequence[int]]] | Bool[Tensor, "batch target source"]
# Memory budget for rows held at once, in bytes.
_ROWS_BYTES = 1 << 28

_AER = "Och & Ney 2003 (alignment error rate)"
_ACCURACY = ScoreSpec(
    "alignment_accuracy",
    unit="share",
    bounds=(0.0, 1.0),
    source="Li et al. 2019 (arXiv 1906.10282); Och & Ney 2003",
    threshold=0.5,
    description="Share of linked target tokens whose most attended source token is a correct one.",
)
_PRECISION = ScoreSpec(
    "alignment_precision",
    unit="share",
    bounds=(0.0, 1.0),
    source=_AER,
    description="Share of a head's links, one per target token, that are possible links.",
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
    description="Alignment error rate of a head: 1 - (|A and S| + |A and P|) / (|A| + |S|).",
)
_MONOTONE = ScoreSpec(
    "monotonicity",
    unit="tau",
    bounds=(-1.0, 1.0),
    alternative="two-sided",
    source="Kendall 1938, tau-b",
    description="Rank correlation of target positions and their most attended source positions.",
)
_PATH = ScoreSpec(
    "path_mass",
    unit="attention",
    bounds=(0.0, 1.0),
    source="Radford et al. 2022 (arXiv 2212.04356), dynamic time warping of cross-attention",
    description="Attention on the best monotone path through source and target.",
)
_COVERAGE = ScoreSpec(
    "coverage",
    unit="share",
    bounds=(0.0, 1.0),
    source="Tu et al. 2016 (arXiv 1601.04811), coverage",
    description="Total attention each source token but the last received, capped at 1, averaged.",
)
_END = ScoreSpec(
    "source_end",
    unit="attention",
    bounds=(0.0, 1.0),
    source="Voita et al. 2018 (arXiv 1805.10163), attention to the end of the source",
    description="Attention to the last source token, a sink for heads with nothing to do.",
)


@checked
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
    """Score every cross-attention head as an aligner of source and target.

    Let ``S`` be the sure links, ``P`` the possible links (including sure ones), and ``A`` the links
    of a head: each target token with its most attended source token (the first on ties).
    ``alignment_accuracy``: share of target tokens with a link in P whose link in A is one of them;
    ``alignment_precision``: ``|A and P| / |A|``; ``alignment_recall``: ``|A and S| / |S|``;
    ``alignment_error``: ``1 - (|A and S| + |A and P|) / (|A| + |S|)``, lower is better. A target's
    last token, usually the end of the text, is left out of A if it has no link; other tokens
    without a link count against the head. Scores that need no links: ``path_mass``: attention on
    the monotone path with the largest sum (dynamic time warping, with steps of one token on either
    or both sides), divided by the number of target tokens; ``monotonicity``: Kendall's tau between
    target positions and A (given links, also without an unlinked last token), -1 for a reversed
    order; ``coverage``: mean over source tokens except the last of ``min(1, total attention
    received)``; ``source_end``: attention to the last source token.

    The null of all but the last two scores is the same rows with target tokens in random order,
    paired by example: a head that always attends to the same place gets the same score there.

    Args:
        model: encoder-decoder model, or its cross-attention, ``model.stack("cross")``.
        probe: sources and targets, from :func:`headscope.probes.translation`.
        links: sure links: for every example, pairs ``(target, source)`` of positions from 0, or
            booleans ``[batch target source]``. Target position i refers to ``probe.targets[i]``.
        possible: further links that are not wrong.
        at: ``output``: use the row of the position that predicts a target token; ``input``: that of
            the position that reads it.
        seed: seed for the null.
        draws: number of random orders averaged in the null.
        batch_size: examples per pass.

    Returns:
        A table for the stack ``cross``.

    Raises:
        InputError: if the probe has no source, or links are outside of it.

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
        raise InputError(f"draws={draws}: give 1 or more random orders for the null.")
    if at not in ("output", "input"):
        raise InputError(f"at={at!r}: give 'output' or 'input'.")
    if possible is not None and links is None:
        raise InputError("possible= extends the sure links: give links too.")
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


@checked
def heads(
    table: HeadTable, top: int | None = None, *, score: str | None = None, alpha: float = 0.05
) -> list[list[int]]:
    """Pick alignment heads from a table, in the form of ``generation_config.alignment_heads``.

    Args:
        table: table from :func:`find`.
        top: number of best heads to return; None: heads above the null at false discovery rate
            ``alpha`` that reach the score's threshold.
        score: score to rank by. Default: ``alignment_accuracy``, or ``path_mass`` for a table
            without links.
        alpha: false discovery rate, between 0 and 1.

    Returns:
        Pairs ``[layer, head]``, best first.

    Raises:
        InputError: if the table lacks the score, or ``top`` is below 1.

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
        raise InputError(f"top={top}: give 1 or more.")
    lower = chosen.spec.direction == "lower"
    ranked = chosen.bottom(chosen.mean.size) if lower else chosen.top(chosen.mean.size)
    if top is not None:
        return [[head.layer, head.head] for head, _ in ranked[:top]]
    better = chosen.mean < chosen.null if lower else chosen.mean > chosen.null
    kept = chosen.significant(alpha) & better
    return [[head.layer, head.head] for head, _ in ranked if kept[head]]


@checked
@torch.no_grad()
def matrix(
    model: HeadModel,
    probe: Probe,
    heads: Sequence[str | tuple[int, int] | Sequence[int]],
    *,
    at: str = "output",
    batch_size: int | None = None,
) -> Float[Tensor, "batch target source"]:
    """Average attention of some cross-attention heads: a soft alignment of target and source.

    Args:
        model: encoder-decoder model, or its cross-attention.
        probe: sources and targets.
        heads: pairs ``[layer, head]`` such as :func:`heads` returns, or addresses such as ``X3H2``.
        at: see :func:`find`.
        batch_size: examples per pass.

    Returns:
        Attention ``[batch target source]``, fp32 on the CPU; 0 at padding.

    Raises:
        InputError: if no heads are given, or a head does not exist in the stack.

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
        raise InputError("no heads given: give alignment heads, e.g. hs.alignment.heads(table).")
    parts = [
        part.total / len(chosen)
        for _, part in stream(view, probe, lambda *_: _Sum(chosen), batch_size=batch_size)
    ]
    return _shifted(torch.cat(parts), at) * _rows_of_targets(probe, at)[:, :, None]


@checked
def path(
    weights: Float[Tensor, "target source"] | Float[np.ndarray, "target source"],
) -> list[tuple[int, int]]:
    """Best monotone path through an alignment, by dynamic time warping.

    Args:
        weights: alignment of target and source positions, e.g. one example of :func:`matrix`.

    Returns:
        Pairs ``(target, source)`` from the first positions to the last.

    Raises:
        InputError: if the weights are not a matrix.

    Source:
        Radford et al. 2022 (arXiv 2212.04356), word timestamps of Whisper.

    Example:
        >>> hs.alignment.path(torch.eye(3))
        [(0, 0), (1, 1), (2, 2)]
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise InputError(f"weights have shape {list(values.shape)}: give a matrix [target source].")
    best = _best_paths(values[None])[0]
    i, j = values.shape[0] - 1, values.shape[1] - 1
    found = [(i, j)]
    while i or j:
        steps = [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
        i, j = max(steps, key=lambda step: best[step])
        found.append((i, j))
    return found[::-1]


# Concept heads.

_CONCEPT_SOURCE = "Park et al. 2024 (arXiv 2412.02237), head relevance vectors of cross-attention"
_EQUAL = 1e-6  # precision of fp32 keys
SourceWords = Mapping[str, Sequence[str] | Sequence[Sequence[int]]]


@checked
def concepts(
    model: HeadModel,
    probe: Probe,
    words: SourceWords,
    *,
    mark: str | None = None,
    draws: int = 8,
    deals: int = 39,
    seed: int = 0,
    batch_size: int | None = None,
) -> ConceptHeads:
    """Find which cross-attention heads respond to which concept (head relevance vectors).

    For each example, layer and draw, one word is drawn per concept. Every head attends from the
    example's own queries to the keys of these words only, each encoded separately (tokens before
    the first word, such as a start token, are keys too; those after it are not), with a softmax
    over all keys, averaged over queries and over a word's tokens. The concept with the largest
    share gets the head's vote; ties split the vote. A concept's votes by head, scaled to a mean of
    1 over heads, are its relevance vector.

    The null reassigns the words to concepts at random, ``deals`` times: a head that is attracted by
    a single word votes as often for whatever concept that word is assigned to.

    Args:
        model: encoder-decoder or other model with a stack ``cross``, or a decoder-only or
            encoder-only model whose keys do not depend on position (no rotary positions, no
            position bias).
        probe: examples that provide the queries.
        words: words of each concept, as texts or as token ids without special tokens, for at least
            two concepts; ten words each are typical.
        mark: mark on the query positions. Default: all real positions.
        draws: word draws per example and layer.
        deals: random assignments of words to concepts, for the null; the smallest p-value is ``1 /
            (1 + deals)``.
        seed: seed for draws and assignments.
        batch_size: examples per pass.

    Raises:
        InputError: if there are fewer than two concepts, a concept has no word, or a word has no
            token.
        UnsupportedModelError: if the model's keys depend on position.

    Source: Park et al. 2024 (arXiv 2412.02237). The null is headscope's.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> small = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        >>> small.decoder_start_token_id = 0
        >>> t5 = hs.load(T5ForConditionalGeneration(small).eval())
        >>> probe = hs.probes.translation(t5, [[5, 6, 7, 1]], [[7, 6, 5, 1]])
        >>> words = {"fruit": [[8], [9]], "colour": [[10], [11, 12]]}
        >>> found = hs.alignment.concepts(t5, probe, words, deals=3)
        >>> bool(np.allclose(found.shares.sum(0), 1))
        True
    """
    need_probe(probe)
    for given, what, least in ((draws, "draws", 1), (deals, "deals", 1), (seed, "seed", 0)):
        whole(given, what, least)
    view = stack_of(model, stack="cross" if "cross" in model.stacks else None)
    crosses = next(iter(view.stacks.values())).mask.kind == "cross"
    if not crosses and "rotary" not in view.limits:
        raise UnsupportedModelError(
            f"{view.name} rotates its keys by position, so a word has no fixed key: use "
            "cross-attention, or a model without rotary positions."
        )
    read = seen_by(view, probe)
    check_fits(view, probe)
    asked = read.real if mark is None else read.mark(mark) & read.real
    if not bool(asked.any(1).all()):
        raise InputError("an example of the probe has no query position: choose another mark.")
    lexicon = _Lexicon.of(view, model, words, crosses=crosses)
    keys = _word_keys(view, lexicon, batch_size)
    dealt = lexicon.deals(deals, seed)
    parts = [
        (part.votes, part.null)
        for _, part in stream(
            view,
            _numbered(probe),
            lambda batch, _: _Voter(_numbers_of(batch), asked, keys, lexicon, dealt, draws, seed),
            batch_size=batch_size,
        )
    ]
    heads, layers = view.shape.heads, view.shape.attention_layers
    total = len(probe) * draws

    def joined(number: int) -> Float[np.ndarray, "*deal concept head"]:
        by_layer = [sum(part[number][layer] for part in parts) / total for layer in layers]
        every: Tensor = torch.cat([torch.as_tensor(one) for one in by_layer], -1)
        return every.numpy()

    return ConceptHeads(
        tuple(words),
        heads,
        joined(0),
        joined(1),
        total,
        provenance=origin(
            view,
            probe,
            control="random assignment of words to concepts",
            seed=seed,
            draws=draws,
            deals=deals,
            mark=mark,
            words={name: len(some) for name, some in words.items()},
            source_of_method=_CONCEPT_SOURCE,
        ),
    )


@dataclass(frozen=True, eq=False)
class _Lexicon:
    """Words of concepts, each encoded as a separate text.

    Attributes:
        probe: one example per word.
        owned: positions that belong to the word.
        before: positions before the word.
        sizes: number of words of each concept; the words are in the order of concepts.
    """

    probe: Probe
    owned: Bool[Tensor, "word pos"]
    before: Bool[Tensor, "word pos"]
    sizes: tuple[int, ...]

    @classmethod
    def of(
        cls, view: HeadModel, model: HeadModel, words: SourceWords, *, crosses: bool
    ) -> "_Lexicon":
        """Encode all words, with the tokenizer's special tokens around each."""
        if len(words) < 2 or not all(len(some) for some in words.values()):
            raise InputError("words: give at least two concepts, each with at least one word.")
        rows = [_word_ids(view, one) for some in words.values() for one in some]
        prefix, suffix = frame(view, None) if view.tokenizer is not None else ([], [])
        framed = [[*prefix, *row, *suffix] for row in rows]
        if crosses:
            probe = translation(model, framed, [[row[-1]] for row in framed])
            real = probe.of_source.real
        else:
            tokens, real = pad_right(framed)
            probe = from_tokens(tokens, real)
        place = torch.arange(real.shape[1])
        ends = torch.tensor([[len(prefix) + len(row)] for row in rows])
        before = (place < len(prefix)).expand_as(real)
        return cls(probe, (place < ends) & ~before, before, tuple(map(len, words.values())))

    def deals(self, count: int, seed: int) -> Int[Tensor, "deal word"]:
        """Orders in which words are assigned to concepts; the first is the true one."""
        draw = torch.Generator().manual_seed(seed)
        total = sum(self.sizes)
        orders = [torch.randperm(total, generator=draw) for _ in range(count)]
        return torch.stack([torch.arange(total), *orders])

    def drawn(
        self, examples: Sequence[int], layer: int, draws: int, seed: int
    ) -> Int[Tensor, "batch draw concept"]:
        """Index of the word drawn for each concept, for every example and draw."""
        chance = np.stack(
            [
                np.random.default_rng([seed, layer, one]).random((draws, len(self.sizes)))
                for one in examples
            ]
        )
        sizes = np.array(self.sizes)
        first = np.concatenate([[0], sizes.cumsum()[:-1]])
        return torch.from_numpy(first + np.floor(chance * sizes).astype(np.int64))


def _word_ids(model: HeadModel, word: str | Sequence[int]) -> list[int]:
    if isinstance(word, str):
        tokenizer = need_tokenizer(model, "a word of a concept")
        ids = list(tokenizer(word, add_special_tokens=False)["input_ids"])
    else:
        ids = [int(one) for one in word]
    if not ids:
        raise InputError(f"the word {word!r} has no token: leave it out.")
    return ids


@torch.no_grad()
def _word_keys(
    view: HeadModel, lexicon: _Lexicon, batch_size: int | None
) -> dict[int, Float[Tensor, "word head pos d_head"]]:
    """Keys of every word, as multiplied with queries by attention, by layer."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer in view.shape.attention_layers}

    def keep(seen: TapView) -> None:
        both = seen.query_keys(torch.tensor([0]))
        if both.bias is not None and bool((both.bias != 0).any()):
            raise UnsupportedModelError(
                f"{view.name} adds a position bias to its attention scores, so a word's weight "
                "depends on its position: use a model without one."
            )
        groups = view.shape.n_heads // both.key.shape[1]
        kept[seen.layer].append(both.key.repeat_interleave(groups, 1))

    for _ in stream(
        view, lexicon.probe, lambda *_: _Each(keep), batch_size=batch_size or len(lexicon.probe)
    ):
        pass
    width = lexicon.owned.shape[1]
    return {layer: torch.cat([_fitted(one, width) for one in some]) for layer, some in kept.items()}


def _fitted(keys: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(keys, (0, 0, 0, width - keys.shape[2]))


@dataclass
class _Each:
    """Reader that passes every attention layer to one function."""

    read: Callable[[TapView], None]

    def reads(self, shape: ModelShape) -> Reads:
        return at_layers(shape, self.read)


def _numbers_of(batch: Probe) -> list[int]:
    return [int(one) for one in batch.host.facts["example"].tolist()]


@dataclass
class _Voter:
    """Reader of every head's votes in a batch, summed over examples, layer by layer."""

    numbers: list[int]
    asked: Bool[Tensor, "all query"]
    keys: Mapping[int, Tensor]
    lexicon: _Lexicon
    dealt: Int[Tensor, "deal word"]
    draws: int
    seed: int
    votes: dict[int, Tensor] = field(default_factory=dict)
    null: dict[int, Tensor] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        return at_layers(shape, self._vote)

    def _vote(self, view: TapView) -> None:
        device = view.z.device
        drawn = self.lexicon.drawn(self.numbers, view.layer, self.draws, self.seed)
        size, heads = len(self.numbers), view.z.shape[2]
        places = drawn.flatten(1)
        sums = torch.zeros(
            len(self.dealt), size, heads, places.shape[1], dtype=torch.float64, device=device
        )
        asked = self.asked[self.numbers][:, : view.n_queries]
        width = 8 * size * heads * self.lexicon.owned.numel()
        for part in chunks(torch.arange(view.n_queries), width, _ROWS_BYTES):
            whole_word, start = self._weights(view, part)
            real = asked[:, part].to(device, torch.float64)
            for deal, order in enumerate(self.dealt):
                at = order[places].to(device)[:, None, None].expand(-1, heads, len(part), -1)
                mass, mean = (one.gather(-1, at) for one in whole_word)
                together = mass.unflatten(-1, drawn.shape[1:]).sum(-1, keepdim=True)
                share = mean.unflatten(-1, drawn.shape[1:]) / (together + start[..., None])
                sums[deal] += (share.flatten(-2) * real[:, None, :, None]).sum(2)
        scores = sums.unflatten(-1, drawn.shape[1:])
        best = (scores >= scores.amax(-1, keepdim=True) * (1 - _EQUAL)).double()
        votes = (best / best.sum(-1, keepdim=True)).sum((1, 3))
        counted = votes.mT.cpu()  # [deal concept head]
        self.votes[view.layer], self.null[view.layer] = counted[0], counted[1:]

    def _weights(
        self, view: TapView, part: Int[Tensor, " query"]
    ) -> tuple[tuple[Tensor, Tensor], Float[Tensor, "batch head query 1"]]:
        """Unnormalised weights of words (sum and mean over their tokens) and of tokens before.

        ``[batch head query word]``; the largest weight of a query is 1.
        """
        both = view.query_keys(part)
        keys = self.keys[view.layer].to(both.query.device).double()
        scores = torch.einsum("bhqd,whkd->bhqwk", both.query.double() * both.scaling, keys)
        if both.soft_cap is not None:
            scores = both.soft_cap * torch.tanh(scores / both.soft_cap)
        owned, before = (one.to(scores.device) for one in (self.lexicon.owned, self.lexicon.before))
        scores = scores.masked_fill(~(owned | before), float("-inf"))
        scores = (scores - scores.amax((-2, -1), keepdim=True)).exp()
        mass = (scores * owned).sum(-1)
        return (mass, mass / owned.sum(1)), (scores[..., :1, :] * before[:1]).sum(-1)


_SPECS = (_ACCURACY, _PRECISION, _RECALL, _ERROR, _PATH, _MONOTONE, _COVERAGE, _END)
_WITHOUT_NULL = (_COVERAGE.name, _END.name)


def _best_paths(values: Float[np.ndarray, "some target source"]) -> Float[np.ndarray, "some t s"]:
    """Largest sum along a monotone path to every cell, computed diagonal by diagonal."""
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
    """Mask of target tokens that have a row."""
    asked = probe.real & (probe.targets >= 0)
    if at == "output":
        return asked
    return asked & torch.cat([probe.real[:, 1:], torch.zeros_like(probe.real[:, :1])], 1)


def _shifted(rows: Tensor, at: str) -> Tensor:
    """Shift rows ``[... query source]`` from decoder positions to target tokens."""
    if at == "output":
        return rows
    return torch.cat([rows[..., 1:, :], torch.zeros_like(rows[..., :1, :])], -2)


def _as_matrix(links: Links, probe: Probe, source: Probe) -> Bool[Tensor, "batch target source"]:
    """Convert links to a boolean mask.

    Raises:
        InputError: if the number of examples differs, or a link is outside of source or target.
    """
    size = (len(probe), probe.length, source.length)
    if isinstance(links, Tensor):
        if links.shape != size:
            raise InputError(f"the links have shape {tuple(links.shape)}, not {size}.")
        found = links.bool()
    else:
        if len(links) != len(probe):
            raise InputError(
                f"there are links for {len(links)} examples, and the probe has {len(probe)}."
            )
        found = torch.zeros(size, dtype=torch.bool)
        for number, pairs in enumerate(links):
            for pair in pairs:
                if len(pair) != 2 or not all(
                    0 <= whole(one, "position of a link") < n
                    for one, n in zip(pair, size[1:], strict=True)
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
    """Reader that sums the rows of some heads."""

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
    """Reader that measures every head of a batch, layer by layer."""

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
        """Measure one layer, one example at a time on the CPU."""
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
    """All measures of every head on one example; NaN if undefined."""
    heads, targets, sources = rows.shape
    nothing = np.full(heads, np.nan)
    if targets == 0:
        names = [spec.name for spec in _SPECS if sure is not None or spec not in _SPECS[:4]]
        return dict.fromkeys(names, nothing)
    most = rows.argmax(-1)
    ordered = most
    if possible is not None and not possible[-1].any():
        ordered = most[:, :-1]  # the end of a text usually has no link
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
    """Kendall's tau-b of positions and attended positions; NaN for constant values."""
    from scipy.stats import kendalltau

    if len(places) < 2 or (places == places[0]).all():
        return float("nan")
    return float(kendalltau(np.arange(len(places)), places).statistic)
