"""Sparse attention decomposition: the few directions behind a score, and the heads behind them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.result import Listed
from headscope.circuits.ov_qk import need_write, qk_of_run, with_bias
from headscope.errors import InputError
from headscope.heads import HeadIndex, ModelShape
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Reads, TapView, at_layers


@dataclass(frozen=True, eq=False, repr=False)
class ScoreParts(Listed):
    """One attention score (before scaling and soft cap) in the singular basis of its QK circuit.

    ``score = sum(products)``, with component k contributing ``S[k] * (x_query . U[:, k]) * (x_key .
    Vh[k])``; x are inputs over the norm's scale, with a last coordinate 1 for the biases.

    Attributes:
        score: as attention computes it, before ``1 / sqrt(d_head)``.
        products: contribution of each component.
        kept: components that make up the score, largest first.
        along_query: residual direction at the query position whose product with any part of the
            stream is that part's contribution to the kept components.
        along_key: the same at the key position.
        constants: contribution of biases to that sum, on the query and on the key side.
    """

    head: HeadIndex
    query: int
    key: int
    score: float
    products: Float[Tensor, " component"]
    kept: Int[Tensor, " kept"]
    along_query: Float[Tensor, " d_model"]
    along_key: Float[Tensor, " d_model"]
    constants: tuple[float, float]

    @property
    def kept_score(self) -> float:
        """Part of the score that the kept components contribute."""
        return float(self.products[self.kept].sum())


@dataclass(frozen=True, repr=False)
class TracedEdge(Listed):
    """Contribution of one earlier head to a head's query or key signal.

    Attributes:
        reader: head whose attention from ``query`` to ``key`` is explained.
        side: ``query`` or ``key``.
        writer: earlier head; None: everything else together (embedding, MLPs, output biases).
        position: position at which the writer writes.
        contribution: contribution to the kept components of the score.
        share: the same as a share of their sum.
    """

    reader: HeadIndex
    query: int
    key: int
    side: str
    writer: HeadIndex | None
    position: int
    contribution: float
    share: float


@dataclass(eq=False)
class PromptRecording:
    """Recorded run of one prompt; create it with :func:`record`."""

    residual: dict[int, Float[Tensor, "pos d_model"]] = field(default_factory=dict)
    z: dict[int, Float[Tensor, "pos head d_head"]] = field(default_factory=dict)
    attends: dict[int, Float[Tensor, "head pos key"]] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: the input of every attention layer, and its head outputs."""
        entering = at_layers(shape, self._on_entering, "resid_pre")
        return entering | at_layers(shape, self._on_layer)

    def _on_entering(self, view: TapView) -> None:
        """Store the input of one layer."""
        self.residual[view.layer] = view.value[0].float()

    def _on_layer(self, view: TapView) -> None:
        """Store one layer's head outputs and pattern."""
        every = torch.arange(view.n_queries)
        self.z[view.layer] = view.z[0].float()
        self.attends[view.layer] = view.rows(every).pattern[0]


@checked
@own_types()
@torch.no_grad()
def record(model: HeadModel, tokens: Int[Tensor, " pos"] | Sequence[int]) -> PromptRecording:
    """Run one prompt and record residual inputs, head outputs and patterns of all layers.

    Args:
        model: model to run.
        tokens: token ids of one prompt, ``[pos]``.

    Returns:
        Recording for :func:`score_parts` and :func:`suppliers`.

    Example:
        >>> recording = hs.circuits.record(model, probe.tokens[0])
        >>> type(recording).__name__
        'PromptRecording'
    """
    ids = torch.as_tensor(tokens).reshape(1, -1)
    recording = PromptRecording()
    nothing = torch.empty(0, dtype=torch.long)
    model.run(ids, reads=recording.reads(model.shape), logits_at=nothing)
    return recording


@checked
@own_types()
def score_parts(
    model: HeadModel,
    recording: PromptRecording,
    head: "str | tuple[int, int]",
    query: int,
    key: int,
    share: float = 0.7,
) -> ScoreParts:
    """Decompose one attention score in its singular basis and keep the main directions.

    Keeps the shortest run of components, sorted by product (largest first; most negative first if
    the score is negative), whose sum reaches ``share`` of the score. Under rotary positions the
    basis is that of the exact circuit at this distance; under norms on queries and keys (qwen3,
    gemma3) at these positions, whose scales are frozen.

    Args:
        model: model of the recording.
        recording: recording from :func:`record`.
        head: head that the score belongs to, e.g. ``"L5H1"``.
        query: query position.
        key: key position, not after the query.
        share: share of the score that the kept components must reach.

    Returns:
        The score with its components and the directions of the kept ones.

    Raises:
        UnsupportedModelError: if queries and keys are changed by more than norms and a rotation.

    Source: Franco and Crovella 2024, "Sparse Attention Decomposition Applied to Circuit Tracing".

    Example:
        >>> recording = hs.circuits.record(model, probe.tokens[0])
        >>> parts = hs.circuits.score_parts(model, recording, "L2H1", query=15, key=6)
        >>> parts.head
        L2H1
    """
    index = model.shape.check(HeadIndex.parse(head))
    if not 0 <= key <= query < len(recording.residual[index.layer]):
        raise InputError(f"query {query} cannot attend to key {key} in this prompt.")
    streams = recording.residual[index.layer]
    factors = qk_of_run(model, index.layer, streams[query], streams[key], query - key)
    svd = with_bias(factors).svd()
    U, S, Vh = (part[0, index.head] for part in (svd.U, svd.S, svd.Vh))
    x, y = (_normed(model, recording, index.layer, position) for position in (query, key))
    products = S * (x @ U) * (Vh @ y)
    total = products.sum()
    order = products.argsort(descending=bool(total >= 0), stable=True)
    reached = products[order].cumsum(0) * total.sign() >= share * total.abs() - 1e-6
    count = int(reached.nonzero()[0]) + 1 if bool(reached.any()) else len(order)
    kept = order[:count]
    along_query = U[:, kept] @ (S[kept] * (Vh[kept] @ y))
    along_key = (S[kept] * (x @ U[:, kept])) @ Vh[kept]
    norm = model.parts.input_norm(index.layer)
    scales = norm.scale(recording.residual[index.layer][[query, key]])
    return ScoreParts(
        head=index,
        query=query,
        key=key,
        score=float(total),
        products=products,
        kept=kept,
        along_query=along_query[:-1] / scales[0],
        along_key=along_key[:-1] / scales[1],
        constants=(float(along_query[-1]), float(along_key[-1])),
    )


@checked
@own_types()
def suppliers(model: HeadModel, recording: PromptRecording, parts: ScoreParts) -> list[TracedEdge]:
    """Contribution of every earlier head, and of the rest of the stream, to the kept components.

    Exact with the norms' scales frozen, also those of norms on queries and keys and of a norm after
    attention (gemma2): on either side the contributions and that side's constant sum to
    ``kept_score``. Unlike the paper, which projects on the signal directions with weights
    ``sqrt(S)``, contributions are in units of the score, and the bias is counted once.

    Args:
        model: model of the recording.
        recording: recording from :func:`record`.
        parts: score to trace, from :func:`score_parts`.

    Returns:
        One edge per side (query, key) and earlier head, and one for the rest of each stream.

    Example:
        >>> recording = hs.circuits.record(model, probe.tokens[0])
        >>> parts = hs.circuits.score_parts(model, recording, "L2H1", query=15, key=6)
        >>> len(hs.circuits.suppliers(model, recording, parts)) > 0
        True
    """
    need_write(model, "what earlier heads supply")
    edges = []
    for side, position, along in (
        ("query", parts.query, parts.along_query),
        ("key", parts.key, parts.along_key),
    ):
        rest = float(recording.residual[parts.head.layer][position] @ along)
        found: list[tuple[HeadIndex | None, float]] = []
        for layer in model.shape.attention_layers:
            if layer >= parts.head.layer:
                break
            supplied = _supplied(model, layer, recording.z[layer][position], along)
            for head, value in enumerate(supplied.tolist()):
                found.append((HeadIndex(layer, head), value))
                rest -= value
        for writer, value in [*found, (None, rest)]:
            part = value / parts.kept_score if parts.kept_score else 0.0
            at = (parts.head, parts.query, parts.key, side, writer, position)
            edges.append(TracedEdge(*at, contribution=value, share=part))
    return edges


def _supplied(
    model: HeadModel,
    layer: int,
    z: Float[Tensor, "head d_head"],
    along: Float[Tensor, " d_model"],
) -> Float[Tensor, " head"]:
    """Contribution of a layer's heads along a direction, with the norm after attention frozen."""
    W_O = model.output_weights(layer).float()
    if "linear_write" not in model.limits:
        return (z * (W_O @ along)).sum(-1)
    write = model.parts.attention_write(layer)
    scale = write.scale(
        einsum(z, W_O, "head d_head, head d_head d_model -> d_model") + write.bias.float()
    )
    return (z * (W_O @ write.read_by(along))).sum(-1) / scale


@checked
@own_types()
def trace(
    model: HeadModel,
    tokens: Int[Tensor, " pos"] | Sequence[int],
    head: "str | tuple[int, int]",
    query: int,
    key: int,
    share: float = 0.7,
    firing: float = 0.5,
) -> list[TracedEdge]:
    """Trace one attention score back through the heads that contribute to it.

    On each side the largest contributions are kept until they reach ``share`` of all those with the
    score's own sign, heads and rest together. A kept head that attends with at least ``firing`` to
    one key other than the first position, by a score above 0, is traced in turn.

    Args:
        model: any model whose attention scores are a bilinear form at given positions.
        tokens: one prompt.
        head: head to start from.
        query: query position.
        key: key position.
        share: share of the score for components, and of the contributions for heads.
        firing: smallest attention weight that is traced further.

    Returns:
        Edges in the order of tracing; each score is traced once.

    Example:
        >>> edges = hs.circuits.trace(model, probe.tokens[0], "L2H1", query=15, key=6)
        >>> {type(edge).__name__ for edge in edges}
        {'TracedEdge'}
    """
    recording = record(model, tokens)
    pending, done = [(HeadIndex.parse(head), query, key)], set()
    edges: list[TracedEdge] = []
    while pending:
        place = pending.pop(0)
        if place in done:
            continue
        done.add(place)
        parts = score_parts(model, recording, *place, share)
        if edges and parts.score <= 0:  # it attends here because other scores are lower
            continue
        supplied = suppliers(model, recording, parts)
        for side in ("query", "key"):
            for edge in _largest([one for one in supplied if one.side == side], share):
                edges.append(edge)
                if edge.writer is None:
                    continue
                row = recording.attends[edge.writer.layer][edge.writer.head, edge.position]
                target = int(row.argmax())
                if float(row[target]) >= firing and target != 0:
                    pending.append((edge.writer, edge.position, target))
    return edges


def _largest(edges: list[TracedEdge], share: float) -> list[TracedEdge]:
    """Edges that support the score, largest first, up to a share of their sum."""
    helpful = sorted((one for one in edges if one.share > 0), key=lambda one: -one.share)
    wanted, kept, reached = share * sum(one.share for one in helpful), [], 0.0
    for edge in helpful:
        if reached >= wanted:
            break
        kept.append(edge)
        reached += edge.share
    return kept


def _normed(model: HeadModel, recording: PromptRecording, layer: int, position: int) -> Tensor:
    """Residual stream over the norm's scale, with the bias coordinate."""
    x = recording.residual[layer][position]
    x = x / model.parts.input_norm(layer).scale(x)
    return torch.cat([x, torch.ones_like(x[:1])])
