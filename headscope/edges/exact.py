"""Exact attributions: heads that carry a node's effect, and parts of an attention score."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import Saved
from headscope.base.options import RunOptions
from headscope.base.result import Glance, Rows, Section, Shown, Tabular, Words, number
from headscope.base.specs import Provenance
from headscope.circuits.ov_qk import qk_of_run, with_bias
from headscope.edges.contextual import NodeWrite, SplitRun, run_split
from headscope.edges.written import (
    EdgeBatch,
    EdgeMeasurement,
    PaddedTexts,
    check_family,
    heads_write,
    run_apart,
    wiring_of,
)
from headscope.errors import HeadscopeWarning, InputError, UnsupportedModelError, nearest
from headscope.heads import HeadIndex
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView
from headscope.origin import origin
from headscope.probes.probe import Probe

if TYPE_CHECKING:
    import pandas

# Tolerance for the sum of parts, relative to the parts' magnitudes.
_EXACT = 1e-6
_MISSED = 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class HeadLoadings(Saved, Shown, Tabular):
    """Parts that carry a node's effect to the input of a layer.

    ``heads.sum() + mlps.sum() + bypass = effect``, in the metric's unit.

    Attributes:
        upstream: node whose change is traced.
        layer: layer that reads the stream; the number of layers stands for the output.
        heads: effect carried by each head's write, ``[layer head]``; 0 at and above the reader, and
            below the node.
        mlps: effect carried by each MLP's write.
        bypass: effect of the node's own write along the residual stream.
        effect: effect of the total change of the stream, ``change . gradient``, summed over
            positions.
        unit: unit of the metric.
        provenance: where it came from.
    """

    upstream: str
    layer: int
    heads: Float[np.ndarray, "layer head"]
    mlps: Float[np.ndarray, " layer"]
    bypass: float
    effect: float
    unit: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def share(self) -> Float[np.ndarray, "layer head"]:
        """Share of the effect that each head carried; NaN if there is no effect."""
        if not self.effect:
            return np.full(self.heads.shape, np.nan)
        return np.asarray(self.heads / self.effect)

    def top(self, k: int = 10) -> list[tuple[HeadIndex, float]]:
        """Heads that carried the largest effects of either sign."""
        order = np.argsort(-np.abs(self.heads), axis=None, kind="stable")[: max(k, 0)]
        places = zip(*np.unravel_index(order, self.heads.shape), strict=True)
        return [(HeadIndex(int(a), int(b)), float(self.heads[a, b])) for a, b in places]

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = [("residual stream", self.bypass), ("MLPs", float(self.mlps.sum()))]
        rows += [(str(head), value) for head, value in self.top(6) if value]
        whole = self.effect or float("nan")
        return [(name, number(value), f"{100 * value / whole:.1f}%") for name, value in rows]

    def glance(self) -> Glance:
        """Show the bypass, the MLPs and the heads that carried most."""
        where = f"before layer {self.layer}"
        return Glance(
            f"from {self.upstream} to the stream {where}",
            [f"effect {number(self.effect)} {self.unit}", self.provenance.model],
            ("carried by", self.unit or "metric", "share"),
            self._rows(),
            hint="result.heads, result.share, result.bypass",
        )

    def sections(self) -> list[Section]:
        """The same as a table."""
        said = (
            f"What carried the effect of {self.upstream} to the stream before layer {self.layer}."
        )
        rows = self._rows()
        return [
            Section("Head loadings", [Words(said), Rows(("carried by", "effect", "share"), rows)])
        ]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per part: name, effect."""
        import pandas

        rows = [("bypass", self.bypass)]
        rows += [(f"MLP{layer}", float(value)) for layer, value in enumerate(self.mlps)]
        rows += [(str(HeadIndex(*at)), float(value)) for at, value in np.ndenumerate(self.heads)]
        return pandas.DataFrame(rows, columns=["part", "effect"])


@checked
@own_types()
def head_loadings(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    upstream: str,
    layer: int | None = None,
    *,
    ablation: str | None = None,
    held: bool = True,
    batch_size: int | None = None,
) -> HeadLoadings:
    """Split a node's effect on a later layer's input by the parts that carry it.

    The node's write is replaced by its ablated write, and the change is traced. At the stream that
    enters ``layer``, the change is a sum: the node's own change, which stayed on the stream, and
    the changes in the writes of each head and MLP in between. Each is multiplied by the gradient of
    the metric at that stream.

    Args:
        model: as in :func:`attribute`.
        probe: texts with answers.
        metric: as in :func:`attribute`.
        upstream: ``embed``, a head such as ``L0H1``, or an MLP such as ``MLP0``.
        layer: layer that reads the stream. Default: the output.
        ablation: what the ablated node writes; see :func:`attribute`.
        held: freeze attention patterns and norm scales, so heads carry effects through their values
            only, as in attribution graphs; False: recompute everything.
        batch_size: examples per pass; affects only time and memory.

    Returns:
        Loadings averaged over examples, in the metric's unit; parts sum to the effect.

    Raises:
        InputError: if there is no such node, or the layer is not above it.

    Source:
        Kamath et al. 2025, "Tracing attention computation through feature interactions",
        transformer-circuits.pub.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> found = hs.edges.head_loadings(model, names, hs.metrics.logit_difference, "MLP0")
        >>> parts = found.heads.sum() + found.mlps.sum() + found.bypass
        >>> bool(abs(parts - found.effect) < 1e-4)
        True
    """
    study = EdgeMeasurement.of(model, probe, metric, ablation, RunOptions(batch_size))
    wiring = study.wiring
    if upstream not in wiring.sources:
        raise InputError(nearest(upstream, wiring.sources, kind="node"))
    node = wiring.sources.index(upstream)
    reader = wiring.n_layers if layer is None else layer
    if not 0 <= reader <= wiring.n_layers or wiring.before(reader) <= node:
        raise InputError(
            f"layer={layer!r} does not read {upstream}: give a later layer, up to "
            f"{wiring.n_layers} for the output."
        )
    parts: list[Float[np.ndarray, "part batch"]] = []
    for batch in study.batches():
        parts.append(_loaded(batch, node, reader, held))
    mean = np.concatenate(parts, 1).mean(1)
    heads, mlps = np.zeros((wiring.n_layers, wiring.n_heads)), np.zeros(wiring.n_layers)
    for at in range(wiring.n_layers):
        here = wiring.heads_of(at)
        heads[at], mlps[at] = mean[here], mean[here.stop]
    bypass = float(mean[node])
    if node:
        place = HeadIndex.parse(upstream) if upstream.startswith("L") else None
        if place is None:
            mlps[int(upstream[3:])] = 0.0
        else:
            heads[place.layer, place.head] = 0.0
    return HeadLoadings(
        upstream, reader, heads, mlps, bypass, float(mean[-1]), study.metric.unit,
        origin(
            model, probe, attention="patterns held" if held else "whole passes",
            metric=study.metric.name, method="head loadings", ablation=study.ablation,
        ),
    )  # fmt: skip


def _loaded(
    batch: EdgeBatch, node: int, reader: int, held: bool
) -> Float[np.ndarray, "part batch"]:
    """Contribution of each node's write, in the order of the sources, and the total effect."""
    wiring = batch.study.wiring
    last = reader == wiring.n_layers
    stream = Tap("resid_post", reader - 1) if last else Tap("resid_pre", reader)
    slope = _slope(batch, stream)
    taps = [Tap(site, at) for at in range(reader) for site in ("z", "mlp_out")]
    run = run_split(
        batch, [NodeWrite.of(batch, node)], [*taps, stream],
        share_biases=False, held=held, logits=False,
    )  # fmt: skip
    found = torch.zeros(len(wiring.sources) + 1, len(batch.texts.tokens))
    for at in range(reader):
        found[wiring.heads_of(at)] = _carried(batch, run, at, slope)
        mlp = run.relevant(Tap("mlp_out", at))[0].float()
        found[wiring.heads_of(at).stop] = _times(mlp, slope)
    found[node] = _times(-batch.change[:, node], slope)
    found[-1] = _times(run.relevant(stream)[0].float(), slope)
    # effects of ablating the node
    values: np.ndarray = -found[:, batch.measured.counted.cpu()].double().numpy()
    return values


def _carried(
    batch: EdgeBatch, run: SplitRun, layer: int, slope: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "head batch"]:
    """Relevant part of a layer's head outputs, times the gradient."""
    z = run.relevant(Tap("z", layer))[0]
    written = heads_write(batch.study.model, layer, z).transpose(0, 1)
    return torch.stack([_times(one, slope) for one in written])


def _times(
    part: Float[Tensor, "batch pos d_model"], slope: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, " batch"]:
    return (part.double() * slope.double()).sum((1, 2)).float().cpu()


def _slope(batch: EdgeBatch, stream: Tap) -> Float[Tensor, "batch pos d_model"]:
    """Gradient of the metric at the stream, in the clean run; 0 at padding."""
    with torch.enable_grad():
        run = run_apart(batch.study.model, batch.texts, logits_at=batch.measured.at, grad=True)
        assert run.logits is not None  # noqa: S101  # they were asked for
        total = batch.measured(run.logits)[0].sum()
        (slope,) = torch.autograd.grad(total, run.taps[stream])
    real = batch.texts.real.to(slope.device)
    return slope.float() * real[..., None]


@dataclass(frozen=True, eq=False, repr=False)
class ScoreAttribution(Saved, Shown, Tabular):
    """One attention score as a sum over pairs of query-stream and key-stream parts.

    Attributes:
        head: head that the score belongs to.
        query, key: positions of query and key.
        names: names of the parts: every earlier node, ``biases written`` (output biases, which no
            node writes), and ``bias`` (of the query or key projection).
        pairs: contribution of each pair; they sum to the score.
        score: attention score, scaled, before soft cap and softmax.
        provenance: where it came from.
    """

    head: HeadIndex
    query: int
    key: int
    names: tuple[str, ...]
    pairs: Float[np.ndarray, "query_part key_part"]
    score: float
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def gap(self) -> float:
        """Gap between sum and score, relative to the pairs' magnitudes."""
        size = float(np.abs(self.pairs).sum())
        return abs(float(self.pairs.sum()) - self.score) / size if size else 0.0

    def top(self, k: int = 10) -> list[tuple[str, str, float]]:
        """Pairs with the largest contributions of either sign."""
        order = np.argsort(-np.abs(self.pairs), axis=None, kind="stable")[: max(k, 0)]
        places = zip(*np.unravel_index(order, self.pairs.shape), strict=True)
        return [(self.names[a], self.names[b], float(self.pairs[a, b])) for a, b in places]

    def glance(self) -> Glance:
        """Show the score and the pairs with the largest contributions."""
        return Glance(
            f"score of {self.head} from {self.query} to {self.key}",
            [f"{self.score:.4g}", self.provenance.model],
            ("of the query", "of the key", "adds"),
            [(a, b, number(value)) for a, b, value in self.top(6)],
            hint="result.pairs, result.names, result.top(20)",
        )

    def sections(self) -> list[Section]:
        """The same as a table."""
        said = f"The score of {self.head} from position {self.query} to {self.key}, by pairs."
        grid = Rows(("of the query", "of the key", "adds"), self.top(20))
        return [Section("Score by pairs", [Words(said), grid])]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per pair."""
        import pandas

        rows = self.top(self.pairs.size)
        return pandas.DataFrame(rows, columns=["query_part", "key_part", "value"])


@checked
@own_types()
@torch.no_grad()
def score_attribution(
    model: HeadModel,
    probe: Probe,
    head: "str | tuple[int, int] | HeadIndex",
    query: int,
    key: int,
    *,
    example: int = 0,
) -> ScoreAttribution:
    """Split an attention score over pairs of earlier nodes' writes at its two positions.

    With frozen norm scales, a score is bilinear in the two residual streams, so it is exactly a sum
    over pairs of their parts. This includes norms before attention and on queries and keys, biases,
    rotary positions and grouped keys.

    Args:
        model: as in :func:`attribute`.
        probe: texts.
        head: head that the score belongs to.
        query: query position.
        key: key position.
        example: index of the text.

    Raises:
        InputError: if there is no such head, text or position.
        UnsupportedModelError: if queries and keys go through more than norms and a rotation.

    Warns:
        HeadscopeWarning: if the sum misses the score by more than 1e-6 of the parts' magnitudes, as
            in bfloat16.

    Source:
        Kamath et al. 2025, "Tracing attention computation through feature interactions",
        transformer-circuits.pub (QK attributions).

    Example:
        >>> found = hs.edges.score_attribution(model, probe, "L1H0", query=10, key=3)
        >>> bool(abs(found.pairs.sum() - found.score) < 1e-4)
        True
    """
    index = model.shape.check(HeadIndex.parse(head))
    if not 0 <= example < len(probe):
        raise InputError(f"there are {len(probe)} texts, and none has number {example}.")
    real = probe.real[example].nonzero().squeeze(1).tolist()
    if query not in real or key not in real or key > query:
        raise InputError(f"query {query} cannot attend to key {key} in text {example}.")
    check_family(model)
    part = probe.examples(slice(example, example + 1))
    texts = PaddedTexts(part.tokens, part.real)
    wiring = wiring_of(model, part)
    run = run_apart(model, texts, logits_at=torch.empty(0, dtype=torch.long))
    stream = run.taps[Tap("resid_pre", index.layer)][0].float()
    sources = run.sources[0, : wiring.before(index.layer)]
    factors = qk_of_run(model, index.layer, stream[query], stream[key], query - key)
    exact = with_bias(factors)
    shared = index.head // (model.shape.n_heads // exact.right.shape[1])
    left, right = exact.left[0, index.head].double(), exact.right[0, shared].double()
    sides = [_side(model, index.layer, stream[at], sources[:, at]) for at in (query, key)]
    product, scaling = _score(model, texts, index, query, key)
    between = model.parts.query_key(index.layer)
    scaling *= between.query_scale * between.key_scale
    pairs = scaling * (sides[0] @ left) @ (right @ sides[1].mT)
    names = (*wiring.sources[: len(sources)], "biases written", "bias")
    found = ScoreAttribution(
        index, query, key, names, pairs.cpu().numpy(), product,
        origin(model, probe, attention="whole passes", method="QK attribution", example=example),
    )  # fmt: skip
    if found.gap > _EXACT and model.dtype in (torch.float32, torch.float64):
        if found.gap > _MISSED:
            raise UnsupportedModelError(
                f"the scores of {model.name} are not a sum over pairs of earlier nodes' writes "
                f"(relative gap {found.gap:.2g}): use hs.edges.attribute."
            )
    elif found.gap > _EXACT:
        warnings.warn(
            f"the parts of this score do not add up to it (relative gap {found.gap:.2g}): the "
            f"model runs in {str(model.dtype).removeprefix('torch.')}; load it in float32 for "
            "exact sums.",
            HeadscopeWarning,
            stacklevel=2,
        )
    return found


def _side(
    model: HeadModel,
    layer: int,
    stream: Float[Tensor, " d_model"],
    sources: Float[Tensor, "source d_model"],
) -> Float[Tensor, "part wider"]:
    """Parts of one stream divided by the norm's scale, with a bias coordinate."""
    rest = stream.double() - sources.double().sum(0)
    parts = torch.cat([sources.double(), rest[None]])
    parts = parts / model.parts.input_norm(layer).scale(stream).double()
    wider = torch.cat([parts, torch.zeros_like(parts[:, :1])], 1)
    bias = torch.zeros_like(wider[:1])
    bias[:, -1] = 1.0
    return torch.cat([wider, bias])


def _score(
    model: HeadModel, texts: PaddedTexts, head: HeadIndex, query: int, key: int
) -> tuple[float, float]:
    """One attention score before any soft cap, and its scaling factor."""
    found: list[tuple[float, float]] = []

    def read(view: TapView) -> None:
        seen = view.query_keys(torch.tensor([query]))
        group = seen.query.shape[1] // seen.key.shape[1]
        q, k = seen.query[0, head.head, 0], seen.key[0, head.head // group, key]
        found.append((float(q.double() @ k.double()) * seen.scaling, seen.scaling))

    tap = Tap("z", head.layer)
    model.run(texts, reads={tap: read}, logits_at=torch.empty(0, dtype=torch.long))
    return found[0]
