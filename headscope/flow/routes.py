"""Information flow routes: contributions to one position, traced down through the layers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.statistics import Design
from headscope.capture import check_fits
from headscope.edits import Span
from headscope.errors import InputError
from headscope.flow.contributions import (
    LayerSum,
    LayerSums,
    RowsAt,
    copied,
    layer_sum,
    nan_where_missing,
    need_parts,
    places,
    query_chunks,
    shares_of,
)
from headscope.lens.reading import Prompt, Promptish, read_prompt
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView
from headscope.origin import held_norm, origin
from headscope.probes.probe import Probe
from headscope.table import HeadScores, HeadTable, Routes
from headscope.table.flow import EDGE_KINDS
from headscope.views import AttentionRows

SOURCE = "Ferrando and Voita 2024 (arXiv 2403.00824), information flow routes"
_PARALLEL = 1e-4  # tolerance for changes of an MLP's output that does not read attention


@checked
@own_types()
@torch.no_grad()
def routes(
    model: HeadModel,
    prompt: Promptish,
    *,
    part_threshold: float = 0.01,
    edge_threshold: float = 0.04,
    position: int = -1,
    memory: "str | int | None" = None,
) -> Routes:
    """Trace a position back to the input tokens through heads, MLPs and the residual stream.

    Nodes are the residual stream after attention and after each block, and each MLP, at every
    position. A node ``y`` is a sum of parts ``x_j``: the stream below it, plus for attention a part
    ``A_ij v_j W_O`` for each (key, head) and one for its biases, or the MLP. The share of a part is
    ``max(0, |y| - |y - x_j|)`` in L1 norm, divided by the sum over parts (if all are 0, the part
    nearest to y gets 1). The target, the stream after the last block, has importance 1; every node
    passes its importance down to its parts by their shares; importance that reaches a bias ends
    there. Importances sum to 1 over every cut.

    The two thresholds differ. ``part_threshold`` drops single parts with a smaller share before
    heads are summed, and rescales the others (the largest is always kept): twelve weak heads
    vanish. ``edge_threshold`` hides edges, summed over heads, from the drawn graph: the same twelve
    heads together may survive. Importances are those of the whole graph.

    A norm after attention or an MLP is frozen at its scale in this run. Layers are traced lazily:
    only positions with importance are computed, at ``heads * length * d_model`` operations each:
    all positions up to the target with ``part_threshold=0``, few with the default. Memory holds the
    residual stream, queries, keys and values of the prompt.

    Args:
        model: model with attention in every layer.
        prompt: text or token ids.
        part_threshold: share below which single parts are dropped, from 0 to below 1.
        edge_threshold: share below which edges are not drawn, from 0 to 1.
        position: target position; negative counts from the end. Default: the last.
        memory: memory budget for one chunk of vectors, e.g. ``"2GB"``.

    Returns:
        Routes with ``.edges``, ``.head_flow [layer head]``, ``.on_route [layer head]``,
        ``.entering``, ``.bias``, ``.mlp`` and ``.cuts``.

    Raises:
        InputError: if the prompt or the position does not fit the model, or a threshold is out of
            range.
        UnsupportedModelError: if attention's output cannot be split by head and key.

    Source: Ferrando and Voita 2024, "Information Flow Routes: Automatically Interpreting Language
    Models at Scale". Here biases are a separate part, and the L1 distance has no offset.

    Example:
        >>> found = hs.flow.routes(model, "The cat sat on the mat", edge_threshold=0.1)
        >>> bool(abs(found.cuts - 1).max() < 1e-4)
        True
    """
    _check_thresholds(part_threshold, edge_threshold)
    need_parts(model)
    options = RunOptions(memory=memory)
    text = read_prompt(model, prompt)
    at = text.at(position)
    seen = Prompt(text.ids[: at + 1], text.texts[: at + 1])
    parallel = reads_past_attention(model)
    trace = _Trace(model, seen, parallel, part_threshold, edge_threshold, options)
    return trace.run().result(position=at)


@checked
@own_types()
@torch.no_grad()
def route_scores(
    model: HeadModel,
    probe: Probe,
    *,
    part_threshold: float = 0.01,
    edge_threshold: float = 0.01,
    at: "str | Tensor" = "last",
    memory: "str | int | None" = None,
) -> HeadTable:
    """Score the flow through every head, and how often it is on a route, over a probe's texts.

    ``flow``: importance that passes through the head on the way to the target, as in
    :attr:`Routes.head_flow`. ``on_route``: 1 if an edge of this head alone, of at least
    ``edge_threshold``, enters a node that drawn edges connect to the target, else 0; its mean is
    the paper's activation frequency. Each text is cut to its real tokens and traced separately;
    values are averaged over the targets of a text.

    Args:
        model: model with attention in every layer.
        probe: texts to trace.
        part_threshold: share below which single parts are dropped; see :func:`routes`.
        edge_threshold: smallest share of a drawn edge.
        at: target positions: ``last`` of each text, ``all``, the name of a mark, or a boolean mask
            ``[batch pos]``.
        memory: memory budget for one chunk of vectors.

    Returns:
        A table of ``flow`` and ``on_route``, with values per example.

    Raises:
        InputError: if the probe does not fit the model, no position is a target, or a threshold is
            out of range.
        UnsupportedModelError: if attention's output cannot be split by head and key.

    Source: Ferrando and Voita 2024, activation frequency of heads.

    Example:
        >>> found = hs.flow.route_scores(model, probe)
        >>> sorted(found)
        ['flow', 'on_route']
    """
    _check_thresholds(part_threshold, edge_threshold)
    check_fits(model, probe)
    need_parts(model)
    options, host = RunOptions(memory=memory), probe.host
    targets = places(probe, at)
    if not bool(targets.any()):
        raise InputError("no position is a target: choose at least one.")
    shape, parallel = model.shape, reads_past_attention(model)
    flow = np.full((shape.n_layers, shape.n_heads, len(probe)), np.nan)
    on_route = flow.copy()
    for example in range(len(probe)):
        first, found = int(host.first[example]), []
        for place in targets[example].nonzero().squeeze(1).tolist():
            ids = host.tokens[example, first : place + 1]
            seen = Prompt(ids, tuple(map(str, ids.tolist())))
            trace = _Trace(model, seen, parallel, part_threshold, edge_threshold, options)
            trace.run()
            found.append((trace.head_flow, trace.on_route))
        if found:
            flow[..., example] = np.mean([one for one, _ in found], 0)
            on_route[..., example] = np.mean([one for _, one in found], 0)
    about = origin(
        model, probe, reading="routes", part_threshold=part_threshold,
        edge_threshold=edge_threshold, **held_norm(model),
    )  # fmt: skip

    def score(name: str, values: np.ndarray, unit: str, said: str) -> HeadScores:
        return HeadScores.from_examples(
            name,
            nan_where_missing(model, values),
            kv_heads=shape.n_kv_heads,
            design=Design(clusters=probe.cluster_labels),
            unit=unit,
            bounds=(0.0, 1.0),
            description=said,
            source=SOURCE,
            provenance=about,
        )

    return HeadTable(
        [
            score("flow", flow, "importance", "more of the target's content passes through it"),
            score("on_route", on_route, "share of texts", "it is on the route more often"),
        ]
    )


@checked
def proximity_shares(parts: Float[Tensor, "part d_model"]) -> Float[Tensor, " part"]:
    """Shares of parts in their sum, by how much each reduces the L1 distance to it.

    ``max(0, |y| - |y - x_j|)``, divided by its sum over parts, where y is the sum of the parts. For
    parts without negative entries this is ``|x_j| / |y|``, so parts may be split or merged; in
    general they may not.

    Args:
        parts: vectors to compare with their sum.

    Example:
        >>> hs.flow.proximity_shares(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).tolist()
        [0.75, 0.25]
    """
    whole = parts.sum(0)
    distance = torch.linalg.vector_norm(whole - parts, 1, -1)
    reach = torch.linalg.vector_norm(whole, 1, -1)
    return shares_of(reach - distance, reach)


def _check_thresholds(part: float, edge: float) -> None:
    if not 0 <= part < 1:
        raise InputError(f"part_threshold={part}: give a share from 0 to below 1, such as 0.01.")
    if not 0 <= edge <= 1:
        raise InputError(f"edge_threshold={edge}: give a share from 0 to 1, such as 0.04.")


@dataclass(frozen=True, eq=False)
class _Block:
    """Recorded state of one block of a prompt, for the trace."""

    attention: LayerSum
    mlp: Float[Tensor, "pos d_model"]


@dataclass(frozen=True, eq=False)
class _Edges:
    """Drawn edges of one layer, as index arrays."""

    kind: int
    layer: int
    sources: Int[np.ndarray, " edge"]
    targets: Int[np.ndarray, " edge"]
    weights: Float[np.ndarray, " edge"]
    importances: Float[np.ndarray, " edge"]
    heads: Float[np.ndarray, "edge head"]


class _Trace:
    """Trace in progress, from the target down; importances are fp64 on the CPU."""

    def __init__(
        self,
        model: HeadModel,
        prompt: Prompt,
        parallel: bool,
        part: float,
        edge: float,
        options: RunOptions,
    ) -> None:
        """Run the prompt once and record what the trace needs."""
        self.model, self.prompt, self.options = model, prompt, options
        self.part_threshold, self.edge_threshold = part, edge
        layers, heads, length = model.shape.n_layers, model.shape.n_heads, len(prompt)
        self.entering = np.zeros((layers + 1, length))
        self.bias, self.mlp = np.zeros((layers, length)), np.zeros((layers, length))
        self.head_flow = np.zeros((layers, heads))
        self.on_route = np.zeros((layers, heads), bool)
        self.edges: list[_Edges] = []
        self.entering[layers, -1] = 1
        self.joined = np.arange(length) == length - 1
        self.parallel = parallel
        self.blocks = _recorded(model, prompt)

    def run(self) -> "_Trace":
        """Trace all layers, the last one first."""
        for layer in reversed(range(self.model.shape.n_layers)):
            block = self.blocks.pop(layer)
            live = np.flatnonzero(self.entering[layer + 1])
            if not self.parallel:
                self._past_mlp(layer, block, live)
            self._past_attention(layer, block, live)
        return self

    def _past_mlp(self, layer: int, block: _Block, live: Int[np.ndarray, " pos"]) -> None:
        """Distribute importance from the stream after a block to before its MLP."""
        at = torch.from_numpy(live)
        attention = block.attention
        middle = (attention.entering + attention.written)[0, at]
        mlp = block.mlp[at]
        whole = middle + mlp
        reach = torch.linalg.vector_norm(whole, 1, -1)
        near = torch.stack([_near(whole, reach, middle), _near(whole, reach, mlp)], -1)
        shares = _thresholded(shares_of(near, reach), self.part_threshold).cpu().double().numpy()
        importance = self.entering[layer + 1, live]
        self.mlp[layer, live] = importance * shares[:, 1]
        drawn = self.joined[live, None] & (shares >= self.edge_threshold) & (shares > 0)
        ones = np.ones(len(live))
        for kind, share, chosen, flow in (
            ("past_mlp", shares[:, 0], drawn[:, 0], shares[:, 0]),
            ("mlp", shares[:, 1], drawn[:, 1], shares[:, 1]),
            ("reads", ones, drawn[:, 1], shares[:, 1]),
        ):
            self._draw(kind, layer, live, live, share, importance * flow, chosen)
        self.joined = np.zeros_like(self.joined)
        self.joined[live[drawn.any(1)]] = True

    def _past_attention(self, layer: int, block: _Block, live: Int[np.ndarray, " pos"]) -> None:
        """Distribute importance from the stream after attention to before it."""
        attention, joined = block.attention, self.joined
        self.joined = np.zeros_like(joined)
        moved = attention.moved(0)
        norms = torch.linalg.vector_norm(moved, 1, -1)
        per_query = 4 * 4 * moved.shape[0] * moved.shape[1]
        for chunk in query_chunks(self.model, len(live), per_query, self.options):
            at = live[chunk.numpy()]
            where = torch.from_numpy(at)
            fixed = [attention.entering[0, where], attention.constant[0, where]]
            fixed += [block.mlp[where]] if self.parallel else []
            whole = attention.heads_written[0, where] + torch.stack(fixed).sum(0)
            reach = torch.linalg.vector_norm(whole, 1, -1)
            weights = attention.weights(where)[0]
            near = torch.cat(
                [
                    torch.stack([_near(whole, reach, one) for one in fixed], -1),
                    _near_heads(whole, reach, weights, moved, norms, where).flatten(1),
                ],
                -1,
            )
            shares = _thresholded(shares_of(near, reach), self.part_threshold)
            self._hand_down(layer, at, joined[at], shares, len(fixed))

    def _hand_down(
        self,
        layer: int,
        at: Int[np.ndarray, " query"],
        joined: Bool[np.ndarray, " query"],
        shares: Float[Tensor, "query part"],
        n_fixed: int,
    ) -> None:
        importance = self.entering[layer + 1, at]
        fixed = shares[:, :n_fixed].cpu().double().numpy()
        by_head = shares[:, n_fixed:].unflatten(1, (self.model.shape.n_heads, -1))
        flow = torch.from_numpy(importance).to(by_head)
        summed = by_head.sum(1).cpu().double().numpy()
        self.head_flow[layer] += torch.einsum("qhk,q->h", by_head, flow).cpu().double().numpy()
        keys = summed.shape[1]
        self.entering[layer, :keys] += importance @ summed
        self.entering[layer, at] += importance * fixed[:, 0]
        self.bias[layer, at] = importance * fixed[:, 1]
        kinds = ["residual", "bias"]
        if self.parallel:
            self.mlp[layer, at] = importance * fixed[:, 2]
            self.entering[layer, at] += importance * fixed[:, 2]
            kinds += ["mlp"]
        for number, kind in enumerate(kinds):
            share = fixed[:, number]
            drawn = joined & (share >= self.edge_threshold) & (share > 0)
            self._draw(kind, layer, at, at, share, importance * share, drawn)
            if kind == "mlp":
                self._draw("reads", layer, at, at, np.ones(len(at)), importance * share, drawn)
            if kind != "bias":
                self.joined[at[drawn]] = True
        drawn = joined[:, None] & (summed >= self.edge_threshold) & (summed > 0)
        query, key = np.nonzero(drawn)
        heads = by_head[torch.from_numpy(query), :, torch.from_numpy(key)].cpu().double().numpy()
        self.on_route[layer] |= ((heads >= self.edge_threshold) & (heads > 0)).any(0)
        share = summed[query, key]
        every = np.ones(len(query), bool)
        flowing = importance[query] * share
        self._draw("attention", layer, key, at[query], share, flowing, every, heads)
        self.joined[key] = True

    def _draw(
        self,
        kind: str,
        layer: int,
        sources: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        importances: np.ndarray,
        chosen: np.ndarray,
        heads: np.ndarray | None = None,
    ) -> None:
        """Record edges to draw."""
        count = int(chosen.sum())
        shares = np.zeros((count, self.model.shape.n_heads)) if heads is None else heads
        self.edges.append(
            _Edges(
                EDGE_KINDS.index(kind), layer, sources[chosen], targets[chosen], weights[chosen],
                importances[chosen], shares,
            )
        )  # fmt: skip

    def result(self, position: int) -> Routes:
        """Build the result."""
        columns = {
            name: np.concatenate([getattr(one, name) for one in self.edges])
            for name in ("sources", "targets", "weights", "importances", "heads")
        }
        counts = [len(one.sources) for one in self.edges]
        columns["kinds"] = np.repeat([one.kind for one in self.edges], counts)
        columns["layers"] = np.repeat([one.layer for one in self.edges], counts)
        order = np.lexsort((-columns["importances"], -columns["layers"]))
        columns = {name: values[order] for name, values in columns.items()}
        return Routes(
            tokens=self.prompt.texts,
            position=position,
            part_threshold=self.part_threshold,
            edge_threshold=self.edge_threshold,
            entering=self.entering,
            bias=self.bias,
            mlp=self.mlp,
            head_flow=nan_where_missing(self.model, self.head_flow),
            on_route=self.on_route,
            parallel=self.parallel,
            head_weights=columns.pop("heads"),
            kv_heads=self.model.shape.n_kv_heads,
            source=SOURCE,
            provenance=origin(
                self.model, reading="routes", tokens=len(self.prompt), position=position,
                part_threshold=self.part_threshold, edge_threshold=self.edge_threshold,
                **held_norm(self.model),
            ),
            **columns,
        )  # fmt: skip


def _near(
    whole: Float[Tensor, "query d_model"],
    reach: Float[Tensor, " query"],
    part: Float[Tensor, "query d_model"],
) -> Float[Tensor, " query"]:
    """Reduction of the L1 distance to the sum by one part per query."""
    near: Tensor = reach - torch.linalg.vector_norm(whole - part, 1, -1)
    return near


def _near_heads(
    whole: Float[Tensor, "query d_model"],
    reach: Float[Tensor, " query"],
    weights: Float[Tensor, "head query key"],
    moved: Float[Tensor, "head key d_model"],
    norms: Float[Tensor, "head key"],
    query_pos: Int[Tensor, " query"],
) -> Float[Tensor, "query head key"]:
    """Reduction of the L1 distance by each (head, key) part ``weights * moved``; 0 for zero parts.

    A part with a norm below 1e-7 of the sum's is within fp32 rounding and counts as zero.
    """
    heads, queries, keys = weights.shape
    near = whole.new_zeros(queries, heads, keys)
    size = _block(whole.device, keys * whole.shape[1])
    on_cpu = whole.device.type == "cpu"
    for first in range(0, queries, size):
        at = slice(first, min(first + size, queries))
        last = int(query_pos[at.stop - 1]) + 1
        y, far = whole[at, None], reach[at, None]
        for head in range(heads):
            weight, vectors = weights[head, at, :last], moved[head, :last]
            chosen: Any = slice(None)
            if on_cpu:  # would sync a GPU
                seen = weight.amax(0) * norms[head, :last] > 1e-7 * far.min()
                chosen = seen.nonzero().squeeze(1)
                weight, vectors = weight[:, chosen], vectors[chosen]
            rest = weight[..., None] * vectors
            near[at, head, :last][:, chosen] = far - rest.sub_(y).abs_().sum(-1)
    return near


def _block(device: torch.device, entries: int) -> int:
    """Number of queries whose vectors are computed at once, from the cache size."""
    return max(1, (1 << (19 if device.type == "cpu" else 27)) // max(1, entries))


def _thresholded(shares: Float[Tensor, "query part"], least: float) -> Float[Tensor, "query part"]:
    """Keep shares of at least ``least``, scaled to sum to 1; the largest is always kept."""
    if least == 0:
        return shares
    largest = torch.nn.functional.one_hot(shares.argmax(-1), shares.shape[-1]).bool()
    kept = shares.masked_fill((shares < least) & ~largest, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _recorded(model: HeadModel, prompt: Prompt) -> dict[int, _Block]:
    """Run a prompt once and record every block's stream, attention parts and MLP output."""
    ids, layers = prompt.ids[None], range(model.shape.n_layers)
    entering: dict[int, Tensor] = {}
    sums: dict[int, LayerSum] = {}
    mlps: dict[int, Tensor] = {}
    met = LayerSums(torch.ones_like(ids, dtype=torch.bool).to(model.device))

    def enter(view: TapView) -> None:
        entering[_layer(view)] = copied(view.value)

    def attend(view: TapView) -> None:
        layer = _layer(view)
        kept = view.keep_rows() or _rerun(model, ids, layer)
        made = layer_sum(model, view, entering.pop(layer))
        sums[layer] = replace(made, make_rows=kept)
        met.meet(layer, made.written)

    def add(view: TapView) -> None:
        met.meet(_layer(view), copied(view.value))

    def think(view: TapView) -> None:
        mlps[_layer(view)] = copied(view.value)[0]

    sites = {"resid_pre": enter, "z": attend, "attn_out": add, "mlp_out": think}
    reads = {Tap(site, layer): read for site, read in sites.items() for layer in layers}
    model.run(ids, reads=reads, until=Tap("resid_post", layers[-1]))
    met.check(model)
    return {layer: _Block(sums[layer], mlps[layer]) for layer in layers}


def _rerun(model: HeadModel, ids: Int[Tensor, "1 pos"], layer: int) -> RowsAt:
    """Rows of one layer, computed in a separate pass on first use."""
    found: list[AttentionRows] = []

    def rows(query_pos: Int[Tensor, " query"]) -> AttentionRows:
        if not found:
            tap = Tap("pattern", layer)
            model.run(
                ids, reads={tap: lambda view: found.append(view.rows(slice(None)))}, until=tap
            )
        whole, last = found[0], int(query_pos.max()) + 1
        at = query_pos.to(whole.pattern.device)
        return AttentionRows(layer, at, whole.pattern[:, :, at, :last], whole.visible[:, at, :last])

    return rows


@torch.no_grad()
def reads_past_attention(model: HeadModel) -> bool:
    """Whether MLPs read the same stream as attention (parallel blocks), by a tiny pass.

    In example l of a batch, the attention output of layer l is changed; if that layer's MLP does
    not respond, blocks are parallel.

    Example:
        >>> reads_past_attention(model)
        False
    """
    layers = range(model.shape.n_layers)
    ids = (torch.arange(3) * 7 % max(model.shape.d_vocab - 1, 1)).repeat(len(layers) + 1, 1)
    changes: list[Tensor] = []

    def change(layer: int) -> Callable[[Tensor, Span], Tensor]:
        def write(value: Tensor, _span: Span) -> Tensor:
            changed = value.clone()
            ramp = torch.linspace(-1, 1, value.shape[-1], dtype=torch.float32)
            size = 1 + value[layer].float().abs().amax()
            changed[layer] = (value[layer].roll(1, -1).float() + size * ramp.to(value.device)).to(
                value.dtype
            )
            return changed

        return write

    def answer(view: TapView) -> None:
        moved = (view.value[_layer(view)] - view.value[-1]).float().abs().amax()
        changes.append(torch.stack([moved, view.value[-1].float().abs().amax()]))

    model.run(
        ids,
        reads={Tap("mlp_out", layer): answer for layer in layers},
        writes={Tap("attn_out", layer): change(layer) for layer in layers},
        until=Tap("resid_post", layers[-1]),
    )
    moved, size = torch.stack(changes).unbind(1)
    least = _PARALLEL if model.dtype in (torch.float32, torch.float64) else 1e-2
    return bool((size > 0).any()) and not bool((moved > least * size).any())


def _layer(view: TapView) -> int:
    return int(view.tap.layer or 0)
