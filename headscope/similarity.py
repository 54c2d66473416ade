"""Similarity of heads within or between models, by attention, outputs, or queries and keys.

Rows and head outputs are read at a sample of positions, the same for every head, so memory is
``heads x positions x length`` and no whole pattern is kept. Two heads are compared by

- ``pattern``: the Jensen-Shannon divergence of their attention rows (Clark et al. 2019), in nats;
- ``cka``: linear centred kernel alignment of their outputs (Kornblith et al. 2019);
- ``pwcca``: projection-weighted canonical correlation of their outputs (Morcos et al. 2018);
- ``query``, ``key``, ``value``: the divergence of their relations: rows of the softmax of the
  products of queries with queries (keys with keys, values with values), whose shape does not depend
  on the number or size of heads (MiniLMv2, Wang et al. 2021).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.specs import ScoreSpec
from headscope.base.stacks import all_causal
from headscope.capture import chunks, need_probe, on_grid_of, seen_by, stream
from headscope.errors import InputError, nearest, whole
from headscope.heads import ModelShape
from headscope.models.protocol import HeadModel, stack_of
from headscope.models.taps import Reads, TapView, at_layers
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table.similarity import HeadSimilarity

_LN2 = math.log(2.0)
_ROW_SOURCE = "Clark et al. 2019 (arXiv 1906.04341), Jensen-Shannon divergence between heads"
_RELATION_SOURCE = (
    "Wang et al. 2021 (MiniLMv2, arXiv 2012.15828), multi-head self-attention relations"
)
SPECS = {
    "pattern": ScoreSpec(
        "pattern_divergence",
        unit="nats",
        bounds=(0.0, _LN2),
        direction="lower",
        source=_ROW_SOURCE,
        description="Mean Jensen-Shannon divergence of two heads' attention rows.",
    ),
    "cka": ScoreSpec(
        "output_cka",
        unit="cka",
        bounds=(0.0, 1.0),
        direction="higher",
        source="Kornblith et al. 2019 (arXiv 1905.00414), linear centred kernel alignment",
        description="Linear centred kernel alignment of two heads' outputs.",
    ),
    "pwcca": ScoreSpec(
        "output_pwcca",
        unit="correlation",
        bounds=(0.0, 1.0),
        direction="higher",
        source="Morcos et al. 2018 (arXiv 1806.05759), projection-weighted canonical correlation",
        description="Projection-weighted canonical correlation of two heads' outputs.",
    ),
    **{
        side: ScoreSpec(
            f"{side}_relation_divergence",
            unit="nats",
            bounds=(0.0, _LN2),
            direction="lower",
            source=_RELATION_SOURCE,
            description=f"Mean Jensen-Shannon divergence of two heads' {side}-{side} relations.",
        )
        for side in ("query", "key", "value")
    },
}
_OUTPUTS = ("cka", "pwcca")
_POSITIONS = {"rows": 256, "outputs": 2048}
_CHUNK = 1 << 26  # bytes of rows or products computed at once
_MOST = 1 << 31  # bytes of rows or outputs that are kept


@checked
def heads(
    model: HeadModel,
    probe: Probe,
    by: str = "pattern",
    *,
    other: HeadModel | None = None,
    other_probe: Probe | None = None,
    stack: str | None = None,
    other_stack: str | None = None,
    positions: int | None = None,
    draws: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
) -> HeadSimilarity:
    """Compare every head with every other, within a model or between two.

    ``pattern`` (and relations): the Jensen-Shannon divergence of two heads' rows, ``H((p + q) / 2)
    - (H(p) + H(q)) / 2``, averaged over the sampled positions, from 0 (equal rows) to ln 2 (rows
    that share no key). If a learned sink takes a share, rows are renormalised.

    ``cka``: ``|X'Y|^2 / (|X'X| |Y'Y|)``, with Frobenius norms of the two heads' outputs ``z`` at
    the sampled positions, columns centred: 1 for outputs that are equal up to rotation and scale.
    ``pwcca``: canonical correlations, weighted by how much of a head's own output (``sum_j |<h_i,
    x_j>|``) each canonical direction carries, averaged over weighting by either head: 1 for outputs
    that are linear maps of each other.

    Relations: ``softmax(a a' / sqrt(d))`` of queries (keys, values) with those of all real
    positions, as attention uses them, including rotary positions. Heads that share a key/value head
    have the same key and value relations.

    The null shuffles the second head: the visible keys of each row (``pattern`` and relations: a
    head that is as peaked but looks elsewhere) or the positions (``cka``, ``pwcca``). The last two
    are large by chance when there are few positions, so read a value against its null. See
    :attr:`HeadSimilarity.p_value`.

    Args:
        model: the model.
        probe: examples to run.
        by: measure of similarity, as above.
        other: second model, whose heads are the columns. Default: the same model. Numbers and sizes
            of heads and layers may differ.
        other_probe: probe for the second model, with the same words at the same positions. Default:
            the same probe.
        stack: attention stack to compare, in a model with several.
        other_stack: attention stack of the second model. Default: the same.
        positions: largest number of sampled positions over all examples. Default: 256 for rows,
            2048 for outputs.
        draws: number of random orders for the null.
        seed: seed for the sample and the null.
        batch_size: examples per pass.

    Raises:
        InputError: if the measure is unknown, the models do not have the same positions, or the
            sample is too small.
        UnsupportedModelError: if the model does not expose queries, keys or values.

    Example:
        >>> likeness = hs.similarity.heads(model, probe, "pattern")
        >>> likeness.values.shape == (len(model.shape.heads),) * 2
        True
        >>> len(likeness.clusters(3))
        3
    """
    if by not in SPECS:
        raise InputError(nearest(by, SPECS, kind="measure of similarity"))
    whole(draws, "draws", 1)
    need_probe(probe)
    first: HeadModel = stack_of(model, stack=stack)
    alone = _alone((model, other), (probe, other_probe), (stack, other_stack))
    second = stack_of(model if other is None else other, stack=other_stack or stack)
    probes = (probe, other_probe or probe)
    seen = [_read(one, read) for one, read in zip((first, second), probes, strict=True)]
    real = [
        _related(one, read, own, by)
        for one, read, own in zip((first, second), probes, seen, strict=True)
    ]
    _need_alike(first, second, real, by)
    causal = by == "pattern" and all_causal(first.stacks)  # the first row has a single key
    count = _POSITIONS["outputs" if by in _OUTPUTS else "rows"] if positions is None else positions
    chosen = _sample(real[0], count, seed, after_first=causal)
    widest = max(first.shape.d_head, second.shape.d_head)
    if by == "pwcca" and len(chosen) <= widest + 1:
        raise InputError(
            f"outputs of {widest} numbers at {len(chosen)} positions are always linear maps of "
            "each other: give more text, or compare heads by 'cka'."
        )
    kept = [_read_heads(first, seen[0], real[0], by, chosen, batch_size)]
    kept += kept if alone else [_read_heads(second, seen[1], real[1], by, chosen, batch_size)]
    compare = _MEASURES.get(by, divergences)
    values = compare(kept[0].values, kept[1].values)
    null = [compare(kept[0].values, _disordered(kept[1], seed, draw)) for draw in range(draws)]
    return HeadSimilarity(
        SPECS[by],
        values.cpu().double().numpy(),
        torch.stack(null).cpu().double().numpy(),
        first.shape.heads,
        first.shape.heads if alone else second.shape.heads,
        (first.name, second.name),
        provenance=origin(
            first,
            probe,
            control="keys in random order" if by not in _OUTPUTS else "positions in random order",
            seed=seed,
            positions=len(chosen),
            draws=draws,
            other=None if alone else second.name,
            other_weights=None if alone else second.digest(),
        ),
        within=alone,
    )


def _alone(
    models: tuple[HeadModel, HeadModel | None],
    probes: tuple[Probe, Probe | None],
    stacks: tuple[str | None, str | None],
) -> bool:
    """Whether both sides are the same model."""
    return all(two is None or two is one for one, two in (models, probes)) and (
        stacks[1] is None or stacks[1] == stacks[0]
    )


@checked
def divergences(
    first: Float[Tensor, "first pos key"], second: Float[Tensor, "second pos key"]
) -> Float[Tensor, "first second"]:
    """Mean Jensen-Shannon divergence of the rows of every pair, in nats.

    Args:
        first: rows of the first heads, each summing to 1.
        second: rows of the second heads, for the same positions and keys.

    Example:
        >>> one, other = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> round(float(hs.similarity.divergences(one, other)), 4)  # ln 2
        0.6931
    """
    n, keys = first.shape[1:]
    found = torch.zeros(len(first), len(second), device=first.device)
    for part in torch.arange(n).split(max(1, _CHUNK // (4 * len(second) * keys))):
        span = slice(int(part[0]), int(part[-1]) + 1)
        rows, columns = first[:, span], second[:, span]
        own = _entropy(columns)
        for number, row in enumerate(rows):
            mixed = _entropy((row + columns) / 2)
            found[number] += (mixed - (_entropy(row) + own) / 2).clamp_min(0).sum(-1)
    mean: Tensor = found / n
    return mean


def _entropy(rows: Float[Tensor, "*some key"]) -> Float[Tensor, "*some"]:
    entropy: Tensor = -torch.special.xlogy(rows, rows).sum(-1)
    return entropy


@checked
def cka(
    first: Float[Tensor, "first pos d_first"], second: Float[Tensor, "second pos d_second"]
) -> Float[Tensor, "first second"]:
    """Linear centred kernel alignment of every pair, in fp64 on the CPU; NaN for constant outputs.

    Args:
        first: outputs of the first heads.
        second: outputs of the second heads at the same positions.

    Example:
        >>> x = torch.randn(1, 50, 3)
        >>> round(float(hs.similarity.cka(x, 2 * x.flip(-1))), 4)
        1.0
    """
    x, y = (_centred(one) for one in (first, second))
    flat = y.transpose(0, 1).flatten(1)
    sizes = [(one.mT @ one).square().sum((1, 2)).sqrt() for one in (x, y)]
    shared = torch.stack(
        [(one.T @ flat).square().view(one.shape[1], len(y), -1).sum((0, 2)) for one in x]
    )
    found: Tensor = shared / (sizes[0][:, None] * sizes[1])
    return found.clamp(max=1.0)


@checked
def pwcca(
    first: Float[Tensor, "first pos d_first"], second: Float[Tensor, "second pos d_second"]
) -> Float[Tensor, "first second"]:
    """Projection-weighted CCA (PWCCA) of every pair, averaged over both weightings.

    In fp64 on the CPU; NaN for constant outputs.

    Args:
        first: outputs of the first heads.
        second: outputs of the second heads at the same positions.

    Example:
        >>> x = torch.randn(1, 50, 3)
        >>> round(float(hs.similarity.pwcca(x, x @ torch.randn(3, 3))), 4)
        1.0
    """
    x, y = (_centred(one) for one in (first, second))
    bases = [_basis(one) for one in (x, y)]
    found = torch.empty(len(x), len(y), dtype=torch.float64)
    for number, (basis, own) in enumerate(zip(bases[0], x, strict=True)):
        left, shared, right = torch.linalg.svd(basis.T @ bases[1], full_matrices=False)
        shared = shared.clamp(max=1.0)
        mine = (left.mT @ (basis.T @ own)).abs().sum(-1)
        theirs = (right @ (bases[1].mT @ y)).abs().sum(-1)
        found[number] = sum(
            (weight * shared).sum(-1) / weight.sum(-1) / 2 for weight in (mine, theirs)
        )
    return found


def _centred(outputs: Tensor) -> Tensor:
    on_host = outputs.cpu().double()
    return on_host - on_host.mean(1, keepdim=True)


def _basis(centred: Float[Tensor, "head pos d_head"]) -> Float[Tensor, "head pos rank"]:
    """Orthonormal basis of each head's outputs; zero columns beyond its rank."""
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    small = 1e-5 * sizes[:, :1]  # outputs have fp32 precision at best
    spans: Tensor = left * ((sizes > small) & (sizes > 0))[:, None]
    return spans


_MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cka": cka, "pwcca": pwcca}


# Readers.


@dataclass(frozen=True, eq=False)
class _Kept:
    """Rows or outputs of every head at the sampled positions.

    Attributes:
        values: rows or outputs, on the model's device.
        seen: visible keys of each row; None for outputs.
    """

    values: Float[Tensor, "head pos width"]
    seen: Bool[Tensor, "head pos width"] | None


@dataclass(eq=False)
class _Reader:
    """Reader of one batch at its sampled positions.

    Attributes:
        real: real positions to relate: those of queries, or of keys in cross-attention.
        example, place: example and position of each sample, on the CPU.
        width: number of keys in a row.
    """

    by: str
    heads: dict[int, list[int]]
    real: Bool[Tensor, "batch pos"]
    example: Int[Tensor, " some"]
    place: Int[Tensor, " some"]
    width: int
    values: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: every attention layer, in order."""
        return at_layers(shape, self._keep)

    def _keep(self, view: TapView) -> None:
        if not len(self.place):
            return
        device, own = view.z.device, self.heads[view.layer]
        example, place = self.example.to(device), self.place.to(device)
        if self.by in _OUTPUTS:
            self.values.append(view.z[example, place][:, own].float().transpose(0, 1))
            return
        asked, number = self.place.unique(return_inverse=True)
        number = number.to(device)
        vectors = None if self.by == "pattern" else self._vectors(view)
        width = 4 * len(self.real) * view.z.shape[2] * self.width
        rows, seen = [], []
        for start, part in _numbered(chunks(asked, width, _CHUNK)):
            here = (number >= start) & (number < start + len(part))
            pattern, visible = self._rows(view, part, vectors)
            at = (number - start).clamp(0, len(part) - 1)
            picked = pattern[example, :, at] * here[:, None, None]
            rows.append(_wide(picked, self.width))
            seen.append(_wide(visible[example, at] & here[:, None], self.width))
        found = sum(rows[1:], rows[0])[:, own].transpose(0, 1)
        self.values.append(found / found.sum(-1, keepdim=True).clamp_min(1e-30))
        either = torch.stack(seen).any(0)
        self.seen.append(either.expand(len(own), -1, -1))

    def _rows(
        self, view: TapView, part: Int[Tensor, " query"], vectors: Tensor | None
    ) -> tuple[Float[Tensor, "batch head query key"], Bool[Tensor, "batch query key"]]:
        """Rows of some positions, and masks of their visible keys."""
        if vectors is None:
            found = view.rows(part)
            return found.pattern, found.visible
        at = part.to(vectors.device)
        products = vectors[:, :, at] @ vectors.mT / vectors.shape[-1] ** 0.5
        real = self.real.to(vectors.device)
        rows = products.masked_fill(~real[:, None, None], float("-inf")).softmax(-1)
        return rows, real[:, None].expand(-1, len(part), -1)

    def _vectors(self, view: TapView) -> Float[Tensor, "batch head pos d_head"]:
        """Queries, keys or values of every query head, as attention uses them."""
        if self.by == "value":
            found = view.values().float()
        else:
            both = view.query_keys(torch.arange(view.n_queries))
            found = both.query if self.by == "query" else both.key
        return found.repeat_interleave(view.z.shape[2] // found.shape[1], 1)


def _numbered(parts: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Parts with the index of each one's first entry."""
    start = 0
    for part in parts:
        yield start, part
        start += len(part)


def _wide(rows: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[-1]))


def _read(model: HeadModel, probe: Probe) -> Probe:
    """Probe whose positions are the model's queries."""
    return on_grid_of(model, seen_by(model, probe))


def _related(model: HeadModel, probe: Probe, seen: Probe, by: str) -> Bool[Tensor, "batch pos"]:
    """Real positions to compare: those of the source for keys and values of cross-attention."""
    crosses = by in ("key", "value") and _crosses(model)
    return probe.of_source.host.real if crosses else seen.host.real


def _crosses(model: HeadModel) -> bool:
    return next(iter(model.stacks.values())).mask.kind == "cross"


def _need_alike(first: HeadModel, second: HeadModel, real: Sequence[Tensor], by: str) -> None:
    """Raise InputError if the models' tokens differ.

    Raises:
        InputError: if the shapes or real positions differ.
    """
    if real[0].shape != real[1].shape or not bool((real[0] == real[1]).all()):
        raise InputError(
            f"heads of {first.name} and {second.name} are compared position by position, and their "
            f"probes have shapes {tuple(real[0].shape)} and {tuple(real[1].shape)} [example pos]: "
            "give probes with the same words, one token each."
        )
    if by == "pattern" and _crosses(first) != _crosses(second):
        raise InputError(
            "cross-attention and self-attention have keys from different sequences: compare such "
            "heads by their outputs, 'cka' or 'pwcca'."
        )


def _sample(
    real: Bool[Tensor, "batch pos"], count: int, seed: int, *, after_first: bool
) -> Int[Tensor, "some 2"]:
    """Sample of examples and positions, in order.

    Args:
        real: positions to draw from.
        count: largest size of the sample.
        seed: seed for the sample.
        after_first: leave out the first real position of each example.

    Raises:
        InputError: if there are fewer than two positions.
    """
    whole(count, "positions", 2)
    asked = real.clone()
    if after_first:
        asked[torch.arange(len(real)), real.int().argmax(1)] = False
    every = asked.nonzero()
    if len(every) < 2:
        raise InputError("the probe has fewer than two positions to compare: give longer texts.")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count]
    return every[order.sort().values]


def _read_heads(
    model: HeadModel,
    probe: Probe,
    real: Bool[Tensor, "batch pos"],
    by: str,
    chosen: Int[Tensor, "some 2"],
    batch_size: int | None,
) -> _Kept:
    """Rows or outputs of every head of a model at the chosen positions."""
    keys = probe.of_source if by == "pattern" and _crosses(model) else None
    width = real.shape[1] if keys is None else keys.length
    size = model.shape.d_head if by in _OUTPUTS else width
    every = model.shape.heads
    if 4 * len(every) * len(chosen) * size > _MOST:
        raise InputError(
            f"{len(chosen)} positions of {len(every)} heads, {size} numbers each, do not fit in "
            "memory: give fewer positions= or shorter texts."
        )
    own = {
        layer: [head.head for head in every if head.layer == layer]
        for layer in model.shape.attention_layers
    }

    def reader(span: slice) -> _Reader:
        here = chosen[(chosen[:, 0] >= span.start) & (chosen[:, 0] < span.stop)]
        return _Reader(by, own, real[span], here[:, 0] - span.start, here[:, 1], width)

    numbered = replace(
        probe, facts={**probe.facts, "example": torch.arange(len(probe), dtype=torch.float32)}
    )
    parts = [
        found
        for _, found in stream(
            model, numbered, lambda batch, _: reader(_span(batch)), batch_size=batch_size
        )
    ]
    read = [part for part in parts if part.values]
    values = torch.cat([torch.cat(part.values) for part in read], 1)
    seen = None if by in _OUTPUTS else torch.cat([torch.cat(part.seen) for part in read], 1)
    return _Kept(values, seen)


def _span(batch: Probe) -> slice:
    """Slice of the full probe's examples in a batch."""
    numbers = batch.host.facts["example"].tolist()
    return slice(int(numbers[0]), int(numbers[-1]) + 1)


def _disordered(kept: _Kept, seed: int, draw: int) -> Tensor:
    """Shuffle the visible keys of each row, or the positions, for the null."""
    values = kept.values
    generator = torch.Generator().manual_seed(1 + seed * 1_000_003 + draw)
    if kept.seen is None:
        order = torch.randperm(values.shape[1], generator=generator)
        return values[:, order.to(values.device)]
    noise = torch.rand(values.shape[1:], generator=generator).to(values.device)
    placed = torch.argsort((~kept.seen).to(torch.uint8), dim=-1, stable=True)
    drawn = torch.argsort(noise.masked_fill(~kept.seen, 2.0), dim=-1)
    return torch.zeros_like(values).scatter_(-1, placed, values.gather(-1, drawn))
