"""Composition: how strongly the output of one head is read by a later one, in pairs and chains."""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import Saved, Stored
from headscope.base.result import Glance, Shown, number, sizes
from headscope.base.specs import ScoreSpec
from headscope.circuits.ov_qk import (
    HeadFactors,
    column_space,
    need_write,
    ov,
    over_all_pairs,
    qk,
    thin_qr,
    upward,
    widened,
)
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import of_weights
from headscope.table import PairScores

# Entries of one block of products: 64 MB in fp32.
_BLOCK_ENTRIES = 1 << 24
_READS = {"Q": "queries", "K": "keys", "V": "values"}


@checked
@own_types()
def composition(
    model: HeadModel, mode: str, fold_norm: bool = True, *, subtract_random: bool = False
) -> PairScores:
    """Composition score of every pair of heads: overlap of head 1's output with head 2's input.

    ``|W_OV1 @ W|_F / (|W_OV1|_F * |W|_F)`` with ``W`` the later head's ``W_QK`` (Q), ``W_QK.T``
    (K) or ``W_OV`` (V). Range [0, 1]; independent heads get about ``1 / sqrt(d_model)``.

    Computed from ``R_V1 @ W_O1`` and ``W @ R.T`` (R: triangular factors of the outer sides), one
    matrix product per later layer and never a d_model x d_model matrix.

    Args:
        model: any model whose heads write linearly.
        mode: input of the later head: ``"Q"``, ``"K"`` or ``"V"``.
        fold_norm: fold the later head's norm, and centre under LayerNorm; False: bare weights.
        subtract_random: subtract :func:`random_composition`; values may then be negative.

    Raises:
        UnsupportedModelError: if attention is followed by more than a plain norm, or if queries and
            keys are normalised (Q and K).

    Source: Elhage et al. 2021, "Attention Composition Scores". The norm's gain is folded, which
    they leave open, and the baseline is exact where theirs is sampled. Rotary positions are left
    out (distance 0). Known weakness: the Frobenius norm mixes in directions that no input ever
    takes; in GPT-2 small some heads score high without composing. See
    :func:`component_composition`.

    Example:
        >>> pairs = hs.circuits.composition(model, "K")
        >>> first, second, score = pairs.top(1)[0]
        >>> first.layer < second.layer
        True
    """
    first, second = operands(model, mode, fold_norm)
    values = _all_pairs(first, second)
    baseline = random_composition(model, fold_norm) if subtract_random else 0.0
    present = upward(first.layers)
    values = torch.where(present, values - baseline, torch.zeros_like(values))
    low = -baseline if subtract_random else 0.0
    spec = ScoreSpec(
        f"{mode}_composition",
        unit="share of norm",
        bounds=(low, 1.0 + low),
        description=f"the later head's {_READS[mode]} read what the earlier head writes",
        source="Elhage et al. 2021",
    )
    return PairScores(
        spec,
        over_all_pairs(model, values, first.layers),
        provenance=of_weights(model, circuit="composition", mode=mode, fold_norm=fold_norm),
    )


@checked
@own_types()
def partners(
    model: HeadModel, mode: str, head: "str | tuple[int, int]", fold_norm: bool = True
) -> tuple[list[tuple[HeadIndex, float]], list[tuple[HeadIndex, float]]]:
    """Composition scores of one head with every head in a lower layer, and in a higher one.

    The same values as :func:`composition`, for this head alone: ``|A B C D|_F^2`` of four thin
    factors is the trace of a product of d_head x d_head matrices, in fp64.

    Args:
        model: any model whose heads write linearly.
        mode: input of the later head of each pair: ``"Q"``, ``"K"`` or ``"V"``.
        head: ``"L5H1"``, ``"5.1"`` or ``(5, 1)``.
        fold_norm: as for :func:`composition`.

    Returns:
        Heads that feed it, and heads that it feeds, each with its score, strongest first.

    Raises:
        UnsupportedModelError: if attention is followed by more than a plain norm, or if queries and
            keys are normalised (Q and K).

    Example:
        >>> below, above = hs.circuits.partners(model, "K", "L2H1")
        >>> {one.layer < 2 for one, _ in below}
        {True}
    """
    index = model.shape.check(HeadIndex.parse(head))
    return ranked_partners(index, *operands(model, mode, fold_norm))


def ranked_partners(
    index: HeadIndex, first: HeadFactors, second: HeadFactors
) -> tuple[list[tuple[HeadIndex, float]], list[tuple[HeadIndex, float]]]:
    """Partners of a head, from the two sides that :func:`operands` returns."""
    place = first.layers.index(index.layer)
    writer, reader = (factors.only(index) for factors in (first, second))
    below = _pair_norms(first.at(slice(0, place)), reader)
    above = _pair_norms(writer, second.at(slice(place + 1, None)))
    return _ranked(below, first.layers[:place]), _ranked(above, first.layers[place + 1 :])


def _ranked(
    values: Float[Tensor, "layer head"], layers: Sequence[int]
) -> list[tuple[HeadIndex, float]]:
    found = [
        (HeadIndex(layer, head), value)
        for layer, row in zip(layers, values.tolist(), strict=True)
        for head, value in enumerate(row)
    ]
    return sorted(found, key=lambda one: -one[1])


def _pair_norms(first: HeadFactors, second: HeadFactors) -> Float[Tensor, "layer head"]:
    """Normalised norms of the products of one head with many, on either side."""
    sides = (first.left.mT, first.right, second.left.mT, second.right)
    exact = torch.float64 if first.left.device.type == "cpu" else torch.float32
    W_V, W_O, left, right = (side.to(exact) for side in sides)
    written, out = (first.per_head(side @ side.mT) for side in (W_V, W_O))
    inner, read = (second.per_head(side @ side.mT) for side in (left, right))
    between = first.per_head(W_O) @ second.per_head(left).mT
    squared = ((written @ between) * (between @ read)).sum((-2, -1))
    scale = (written * out).sum((-2, -1)) * (inner * read).sum((-2, -1))
    return (squared.clamp_min(0) / scale.clamp_min(torch.finfo(exact).tiny)).sqrt()


@checked
def random_composition(model: HeadModel, fold_norm: bool = True) -> float:
    """Composition score of independent random heads: ``1 / sqrt(d_model)``.

    The root mean square over all rotations of one head against the other, whatever their spectra;
    random Gaussian factors, as in Elhage et al. 2021, have the same mean to within a percent. If
    both sides are centred, the dimension is one less.

    Args:
        model: model to analyse.
        fold_norm: whether the composition scores fold in norms.

    Returns:
        A score above 0.

    Example:
        >>> 0 < hs.circuits.random_composition(model) < 1
        True
    """
    centred = fold_norm and model.parts.input_norm(model.shape.attention_layers[-1]).centred
    return 1 / math.sqrt(model.shape.d_model - int(centred))


@dataclass(frozen=True, eq=False, repr=False)
class ComponentScores(Saved, Shown):
    """Composition scores of single singular directions of the earlier head.

    Attributes:
        values: score by (earlier layer, head, component; later layer, head); 0 if the first is not
            in a lower layer.
        layers: layer number of each entry of the layer axes.
        mode: input of the later head.
    """

    values: Float[np.ndarray, "layer head component layer head"]
    layers: tuple[int, ...]
    mode: str

    def glance(self) -> Glance:
        """Show shape and the strongest components."""
        order = np.argsort(-self.values, axis=None, kind="stable")[:6]
        places = zip(*np.unravel_index(order, self.values.shape), strict=True)
        rows = [
            (
                f"{HeadIndex(self.layers[i], int(j))} component {c}",
                str(HeadIndex(self.layers[m], int(n))),
                number(float(self.values[i, j, c, m, n])),
            )
            for i, j, c, m, n in places
        ]
        return Glance(
            f"{self.mode}-composition of singular components",
            [sizes(("layer", "head", "component"), self.values.shape[:3])],
            ("component", "later head", "score"),
            rows,
            hint="scores.values[layer, head, component]",
        )


@checked
@own_types()
def component_composition(
    model: HeadModel, mode: str, components: int | None = 8, fold_norm: bool = True
) -> ComponentScores:
    """Composition of every singular component of the earlier head's OV with every later head.

    For component ``s u v.T`` the score ``|s u v.T @ W| / (s * |W|_F)`` is ``|v.T @ W| / |W|_F``,
    independent of its singular value. Range [0, 1]; a random direction gets ``1 / sqrt(d_model)``.

    Args:
        model: any model whose heads write linearly.
        mode: ``"Q"``, ``"K"`` or ``"V"``.
        components: number of largest components of each head; None: all.
        fold_norm: fold the norms.

    Source: Merullo et al. 2024, "Talking Heads", section 3 (they decompose one matrix of the pair
    and keep the other whole, as done here).

    Example:
        >>> scores = hs.circuits.component_composition(model, "V", components=2)
        >>> type(scores).__name__
        'ComponentScores'
    """
    first, second = operands(model, mode, fold_norm)
    directions = first.svd().Vh[:, :, :components]
    collapsed, norms = _collapsed(second), second.norm()
    n_layers, n_heads, count = directions.shape[:3]
    values = torch.zeros(n_layers, n_heads, count, n_layers, n_heads, dtype=torch.float32)
    for later in range(1, n_layers):
        rows = rearrange(directions[:later], "layer head component d -> (layer head component) d")
        products = _squared_by_head(rows, collapsed[later], second.n_heads)
        score = products.sqrt() / norms[later].clamp_min(1e-30)
        values[:later, :, :, later] = rearrange(
            score.cpu(), "(layer head component) second -> layer head component second",
            layer=later, head=n_heads,
        )  # fmt: skip
    return ComponentScores(values.numpy(), first.layers, mode)


@checked
@own_types()
def direction_composition(
    model: HeadModel,
    first: "str | tuple[int, int]",
    second: "str | tuple[int, int]",
    mode: str,
    fold_norm: bool = True,
) -> Float[Tensor, "component component"]:
    """Cosines between output directions of one head and input directions of another.

    Entry (i, j): ``v_i . u_j`` of the earlier head's OV and the later head's input circuit, both
    sorted by singular value. Range [-1, 1]; signs follow :class:`HeadSVD`.

    Args:
        model: model to analyse.
        first: earlier head, e.g. ``"L0H1"``.
        second: later head.
        mode: input of the later head: ``"Q"``, ``"K"`` or ``"V"``.
        fold_norm: fold in the gains of norms and centre.

    Returns:
        Cosines ``[component component]`` of the first head's outputs and the second head's inputs.

    Raises:
        InputError: if a head or mode does not exist, or the first head is not in a lower layer.

    Example:
        >>> cosines = hs.circuits.direction_composition(model, "L0H0", "L1H0", "Q")
        >>> cosines.shape == (model.shape.d_head, model.shape.d_head)
        True
    """
    one, two = (model.shape.check(HeadIndex.parse(head)) for head in (first, second))
    if one.layer >= two.layer:
        raise InputError(f"{one} is not in a lower layer than {two}, so it cannot feed it.")
    writer = ov(model, fold_norm, layers=[one.layer]).svd()
    reader = _reader(model, mode, fold_norm, [two.layer]).svd()
    return writer.Vh[0, one.head] @ reader.U[0, two.head]


def operands(model: HeadModel, mode: str, fold_norm: bool) -> tuple[HeadFactors, HeadFactors]:
    """Circuits of the earlier and of the later head; the rows of the latter are its input."""
    if mode not in _READS:
        raise InputError(nearest(str(mode), _READS, kind="composition"))
    need_write(model, "composition")
    first = ov(model, fold_norm)
    return first, first if mode == "V" else _reader(model, mode, fold_norm, None)


def _reader(model: HeadModel, mode: str, fold_norm: bool, layers: list[int] | None) -> HeadFactors:
    if mode == "V":
        return ov(model, fold_norm, layers=layers)
    factors = qk(model, fold_norm, layers=layers)
    return factors if mode == "Q" else factors.transposed()


def _collapsed(factors: HeadFactors) -> list[Float[Tensor, "d_model column"]]:
    """Per layer ``left @ R.T`` of all heads side by side: thin, with the norms of the product."""
    triangle = factors.per_head(thin_qr(factors.right.mT)[1])
    wide = widened(factors.left, triangle.mT)
    return [rearrange(layer, "head d_model column -> d_model (head column)") for layer in wide]


def _all_pairs(first: HeadFactors, second: HeadFactors) -> Float[Tensor, "layer head layer head"]:
    """Normalised norms of all products whose first factor is in a lower layer."""
    triangle = first.per_head(thin_qr(first.left)[1])
    written = triangle @ first.per_head(first.right)
    columns = _collapsed(second)
    first_norm = torch.linalg.vector_norm(written, dim=(-2, -1))
    n_layers, n_heads, rank = written.shape[:3]
    values = written.new_zeros(n_layers, n_heads, n_layers, n_heads)
    for later in range(1, n_layers):
        read = rearrange(
            columns[later], "d_model (head column) -> d_model head column", head=n_heads
        )
        second_norm = torch.linalg.vector_norm(read, dim=(0, 2))
        rows = rearrange(written[:later], "layer head rank d -> (layer head rank) d")
        squared = _squared_by_head(rows, columns[later], n_heads)
        squared = reduce(
            squared, "(layer head rank) second -> layer head second", "sum",
            head=n_heads, rank=rank,
        )  # fmt: skip
        scale = first_norm[:later, :, None] * second_norm
        values[:later, :, later] = squared.sqrt() / scale.clamp_min(1e-30)
    return values.cpu()


def _squared_by_head(
    rows: Float[Tensor, "row d_model"], columns: Float[Tensor, "d_model column"], n_heads: int
) -> Float[Tensor, "row head"]:
    """Squared norms of ``rows @ columns`` over each head's columns, in blocks."""
    result = rows.new_empty(len(rows), n_heads)
    for block in _blocks(len(rows), columns.shape[1]):
        product = rows[block] @ columns
        result[block] = product.square_().unflatten(1, (n_heads, -1)).sum(-1)
    return result


def _blocks(rows: int, width: int) -> Iterator[slice]:
    size = max(1, _BLOCK_ENTRIES // max(width, 1))
    return (slice(start, start + size) for start in range(0, rows, size))


@checked
@own_types()
def subspace_affinity(model: HeadModel, mode: str, fold_norm: bool = True) -> PairScores:
    """Overlap of every head's output subspace with every later head's input subspace.

    ``|P.T @ Q|_F^2 / min(rank)`` with P and Q orthonormal bases of the row space of ``W_O`` and of
    the column space of the later head's ``W_Q``, ``W_K`` or ``W_V``: the mean squared cosine of
    their principal angles. Range [0, 1]; by chance d_head / d_model if both have full rank. Unlike
    composition it weights all directions of a subspace equally. Heads that share keys and values
    have equal entries.

    Source: the projection kernel of Grassmann learning (Hamm and Lee 2008).

    Args:
        model: model to analyse.
        mode: input of the later head: ``"Q"``, ``"K"`` or ``"V"``.
        fold_norm: fold in the gains of norms and centre.

    Returns:
        Pair scores ``[layer head layer head]``, from 0 to 1.

    Example:
        >>> pairs = hs.circuits.subspace_affinity(model, "K")
        >>> pairs.values.ndim
        4
    """
    writer, reader = operands(model, mode, fold_norm)
    written, writes = column_space(writer.right.mT)
    read, reads = column_space(reader.left)
    size = written.shape[-1]
    layers, heads = written.shape[:2]
    rows = rearrange(written, "layer head d_model rank -> layer (head rank) d_model")
    values = written.new_zeros(layers, heads, layers, heads)
    for later in range(1, layers):
        columns = rearrange(read[later], "head d_model rank -> d_model (head rank)")
        product = (rows[:later] @ columns).square_()
        shared = reduce(
            product, "layer (head rank) (second other) -> layer head second", "sum",
            rank=size, other=read.shape[-1],
        )  # fmt: skip
        shared = shared / torch.minimum(writes[:later, :, None], reads[later]).clamp_min(1)
        values[:later, :, later] = shared.repeat_interleave(heads // shared.shape[-1], dim=-1)
    values = torch.where(upward(writer.layers), values.cpu(), 0.0)
    spec = ScoreSpec(
        f"{mode}_affinity",
        unit="share of subspace",
        bounds=(0.0, 1.0),
        description="the later head reads the subspace that the earlier head writes",
        source="projection kernel, Hamm and Lee 2008",
    )
    return PairScores(
        spec,
        over_all_pairs(model, values, writer.layers),
        provenance=of_weights(model, circuit="affinity", mode=mode, fold_norm=fold_norm),
    )


@dataclass(frozen=True)
class Path(Stored):
    """Chain of heads, each reading the previous one's output.

    Attributes:
        heads: from the lowest layer up.
        modes: how each head but the first reads: ``Q``, ``K`` or ``V``.
        strength: geometric mean of the composition scores along it, in units of chance.
    """

    heads: tuple[HeadIndex, ...]
    modes: tuple[str, ...]
    strength: float

    def __str__(self) -> str:
        """Format as ``L1H3 -K-> L2H0 (4.2)``."""
        parts = [str(self.heads[0])]
        parts += [f"-{m}-> {h}" for m, h in zip(self.modes, self.heads[1:], strict=True)]
        return f"{' '.join(parts)} ({self.strength:.1f})"


@checked
@own_types()
def strongest_paths(
    model: HeadModel,
    k: int = 10,
    modes: Sequence[str] = ("Q", "K", "V"),
    length: int = 2,
    fold_norm: bool = True,
) -> list[Path]:
    """Strongest chains of heads by composition, from weights alone.

    Args:
        model: any model whose heads write linearly.
        k: number of chains.
        modes: kinds of composition to follow; ``["K"]`` shows previous-token -> induction.
        length: heads in a chain, at least 2.
        fold_norm: fold the norms.

    Known weakness: high composition is not proof of use (see :func:`composition`); ablate.

    Example:
        >>> paths = hs.circuits.strongest_paths(model, k=3, modes=["K"])
        >>> len(paths)
        3
    """
    chance = random_composition(model, fold_norm)
    return chains([composition(model, mode, fold_norm) for mode in modes], chance, k, length)


@checked
def chains(scores: Iterable[PairScores], chance: float, k: int, length: int) -> list[Path]:
    """The k strongest chains over given pair scores; exact, on ties the lowest heads.

    The logarithm of a chain's strength is a sum over its links, so the k best chains that end in a
    head extend the k best that end in lower heads (dynamic programming).

    Args:
        scores: pair scores, one per kind of composition; a link takes the best of them.
        chance: score of independent random heads, by which every link is divided; see
            :func:`random_composition`.
        k: number of chains.
        length: number of heads in a chain, at least 2.

    Returns:
        Chains, strongest first; the strength is the geometric mean of its links over chance.

    Raises:
        InputError: if the length is below 2.

    Example:
        >>> pairs = hs.circuits.composition(model, "K")
        >>> len(hs.circuits.chains([pairs], hs.circuits.random_composition(model), k=2, length=2))
        2
    """
    if length < 2:
        raise InputError(f"length={length}: a chain needs at least two heads.")
    best: dict[tuple[HeadIndex, HeadIndex], tuple[float, str]] = {}  # best mode of each pair
    for one in scores:
        for i, j, m, n in np.argwhere(one.present & (one.values > 0)).tolist():
            pair = (HeadIndex(i, j), HeadIndex(m, n))
            link = (float(one.values[i, j, m, n]), one.name.partition("_")[0])
            if pair not in best or link[0] > best[pair][0]:
                best[pair] = link
    ending: dict[HeadIndex, list[tuple[float, tuple[HeadIndex, ...], tuple[str, ...]]]]
    ending = {head: [(0.0, (head,), ())] for pair in best for head in pair}
    for _ in range(length - 1):
        longer: dict[HeadIndex, list[tuple[float, tuple[HeadIndex, ...], tuple[str, ...]]]] = {}
        for (first, second), (value, mode) in best.items():
            step = math.log(value / chance)
            longer.setdefault(second, []).extend(
                (total + step, (*heads, second), (*links, mode))
                for total, heads, links in ending.get(first, [])
            )
        ending = {head: heapq.nsmallest(k, found, key=_order) for head, found in longer.items()}
    found = heapq.nsmallest(k, (one for many in ending.values() for one in many), key=_order)
    return [Path(heads, links, math.exp(total / (length - 1))) for total, heads, links in found]


def _order(
    chain: tuple[float, tuple[HeadIndex, ...], tuple[str, ...]],
) -> tuple[float, tuple[HeadIndex, ...]]:
    return -chain[0], chain[1]
