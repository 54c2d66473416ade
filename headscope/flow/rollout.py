"""Attention rollout, maximum flow, and the share of rollout that passes through each head."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.statistics import Design
from headscope.capture import check_fits, passes
from headscope.errors import InputError, nearest
from headscope.flow.contributions import (
    existing,
    nan_where_missing,
    need_attention,
    places,
    query_chunks,
    texts_of,
)
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import HeadScores, TokenFlow

_FUSIONS = ("mean", "max", "min")
_UNIT = 1 << 30  # scipy takes integer capacities
_LONGEST = 64

ROLLOUT_SOURCE = "Abnar and Zuidema 2020 (arXiv 2005.00928), attention rollout"
FLOW_SOURCE = "Abnar and Zuidema 2020 (arXiv 2005.00928), attention flow"

# Receives one chunk of a layer's rows: (layer, query positions, rows of all heads).
ReadRows = Callable[[int, Tensor, Float[Tensor, "batch head query key"]], None]


@checked
@own_types()
@torch.no_grad()
def rollout(
    model: HeadModel,
    probe: Probe,
    *,
    heads: str = "mean",
    batch_size: int | None = None,
    memory: "str | int | None" = None,
) -> TokenFlow:
    """Attention rollout: attention multiplied over layers, with an equal share for the residual.

    ``R_l = B_l R_(l-1)``, where ``B`` is the attention fused over heads plus the identity, with
    each row divided by its sum: half attention and half residual if attention rows sum to 1. Rows
    of the result sum to 1, and causal attention stays lower-triangular. Values are ignored: a head
    with zero values counts like any other (compare :func:`alti`).

    Rows are streamed. On top of attention itself, the cost is ``layers * length^3`` operations per
    text; memory is that of the result.

    Args:
        model: model with attention in every layer.
        probe: texts to run.
        heads: how heads are fused: ``mean``, ``max`` or ``min``.
        batch_size: texts per pass; affects only time and memory.
        memory: memory budget for one chunk of rows, e.g. ``"2GB"``.

    Returns:
        Token flow with ``.matrix [batch query key]`` in [0, 1].

    Raises:
        InputError: if the probe does not fit the model, or ``heads`` is not a known fusion.
        UnsupportedModelError: if the model has layers without attention.

    Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers".

    Example:
        >>> flow = hs.flow.rollout(model, probe)
        >>> torch.tensor(flow.matrix).sum(-1).allclose(torch.tensor(1.0))
        True
    """
    if heads not in _FUSIONS:
        raise InputError(nearest(heads, _FUSIONS, kind="fusion of heads"))
    need_attention(model)
    options = RunOptions(batch_size, memory)

    def run(batch: Probe, halvings: int) -> Tensor:
        state = _identity(model, batch)

        def multiply(layer: int, at: Tensor, rows: Tensor) -> None:
            mixing = _mixing(_fused(rows, existing(model, layer), heads), at)
            after[:, _span(at)] = torch.matmul(mixing, state[:, : mixing.shape[-1]])

        after = torch.empty_like(state)

        def end(_layer: int) -> None:
            state.copy_(after)

        _over_rows(model, batch, multiply, end, options, halvings)
        return state.cpu()

    parts = [found for _, found in passes(model, probe, run, batch_size=batch_size)]
    return TokenFlow(
        "rollout",
        torch.cat(parts).numpy(),
        probe.host.real.numpy(),
        texts_of(model, probe),
        "share of the product of attention and residual stream over all layers",
        ROLLOUT_SOURCE,
        origin(model, probe, reading="rollout", heads=heads),
    )


@checked
def rolled_out(
    mixing: Float[Tensor, "layer *batch query key"],
) -> Float[Tensor, "*batch query key"]:
    """Multiply mixing matrices over layers, with the first layer rightmost.

    Args:
        mixing: mixing matrix of each layer; rows usually sum to 1.

    Example:
        >>> layer = torch.tensor([[1.0, 0.0], [0.2, 0.8]])
        >>> round(hs.flow.rolled_out(torch.stack([layer, layer]))[1, 0].item(), 4)
        0.36
    """
    result = mixing[0]
    for one in mixing[1:]:
        result = one @ result
    return result


@checked
@own_types()
@torch.no_grad()
def through_heads(
    model: HeadModel,
    probe: Probe,
    inputs: "str | Tensor",
    *,
    at: "str | Tensor" = "last",
    batch_size: int | None = None,
    memory: "str | int | None" = None,
) -> HeadScores:
    """Share of the rollout onto chosen input tokens that passes through each head.

    Head h of layer l carries ``(B_L ... B_(l+1)) (A^h / (2 heads)) R_(l-1)`` of the rollout from a
    target to the chosen inputs: the part that its own attention moves in its layer. The heads of a
    layer and its residual stream sum to the total. Summed over all inputs, every head carries ``1 /
    (2 heads)`` whatever it does, so the inputs must be a proper subset of the tokens.

    Rows are streamed; memory holds ``length * heads of all layers`` numbers per text.

    Args:
        model: model with attention in every layer.
        probe: texts to run.
        inputs: chosen input tokens: name of a mark, or a boolean mask ``[batch pos]``.
        at: target positions, averaged over: ``last`` of each text, ``all``, the name of a mark, or
            a boolean mask ``[batch pos]``.
        batch_size: texts per pass.
        memory: memory budget for one chunk of rows.

    Returns:
        A score per head in [0, 1], with values per example; NaN for texts without an input or a
        target.

    Raises:
        InputError: if a mark is unknown, or no tokens or all tokens of a text are chosen.
        UnsupportedModelError: if the model has layers without attention.

    Source: Abnar and Zuidema 2020, rollout; the split by head follows from the sum inside the
    product.

    Example:
        >>> score = hs.flow.through_heads(model, probe, inputs="first_copy")
        >>> score.mean.shape[1] == model.shape.n_heads
        True
    """
    check_fits(model, probe)
    need_attention(model)
    options, host = RunOptions(batch_size, memory), probe.host
    chosen, targets = places(probe, inputs), places(probe, at)
    if not bool(chosen.any()):
        raise InputError("no input token is chosen: mark at least one.")
    if bool(((chosen == host.real).all(1)).any()):
        raise InputError(
            "the inputs are all tokens of a text, so every head passes the same share, 1 / (2 "
            "heads): choose some of the tokens."
        )
    shape = model.shape

    def run(batch: Probe, halvings: int) -> Tensor:
        reach = batch.mark("inputs").to(model.device).float()
        carried = torch.zeros(
            *reach.shape, shape.n_layers * shape.n_heads, dtype=torch.float32, device=model.device
        )
        new_reach, new_carried = torch.empty_like(reach), torch.empty_like(carried)

        def step(layer: int, query: Tensor, rows: Tensor) -> None:
            present = existing(model, layer)
            mixing = _mixing(_fused(rows, present, "mean"), query)
            keys, heads = (
                mixing.shape[-1],
                slice(layer * shape.n_heads, (layer + 1) * shape.n_heads),
            )
            total = rows.sum(-1).mul(present[:, None]).sum(1) / present.sum() + 1
            own = (
                einsum(rows, reach[:, :keys], "batch head query key, batch key -> batch query head")
                * present
            )
            here = _span(query)
            new_carried[:, here, : heads.start] = mixing @ carried[:, :keys, : heads.start]
            new_carried[:, here, heads] = own / (present.sum() * total[..., None])
            new_reach[:, here] = einsum(
                mixing, reach[:, :keys], "batch query key, batch key -> batch query"
            )

        def end(layer: int) -> None:
            done = (layer + 1) * shape.n_heads
            carried[..., :done] = new_carried[..., :done]
            reach.copy_(new_reach)

        _over_rows(model, batch, step, end, options, halvings)
        weights = batch.mark("targets").to(model.device).float()
        weights = weights / weights.sum(1, keepdim=True)  # NaN for texts without a target
        mean = einsum(weights, carried, "batch pos, batch pos head -> batch head")
        return rearrange(mean.cpu(), "batch (layer head) -> batch layer head", head=shape.n_heads)

    marked = replace(host, marks={"inputs": chosen, "targets": targets}, control=None, corrupt=None)
    parts = [found for _, found in passes(model, marked, run, batch_size=batch_size)]
    values = torch.cat(parts).movedim(0, -1).double().numpy()
    values[..., ~chosen.any(1).numpy()] = np.nan
    return HeadScores.from_examples(
        "through_mass",
        nan_where_missing(model, values),
        kv_heads=shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels),
        unit="share of rollout",
        bounds=(0.0, 1.0),
        description="more of the rollout from the target to the chosen inputs passes through it",
        source=ROLLOUT_SOURCE,
        provenance=origin(
            model, probe, reading="through_heads",
            inputs=inputs if isinstance(inputs, str) else "given",
            at=at if isinstance(at, str) else "given",
        ),
    )  # fmt: skip


@checked
@own_types()
@torch.no_grad()
def max_flow(
    model: HeadModel,
    probe: Probe,
    *,
    at: "str | Tensor" = "all",
    longest: int = _LONGEST,
    batch_size: int | None = None,
) -> TokenFlow:
    """Maximum flow from a position down to each input token, with attention as capacities.

    The graph has a node per layer and position, and edges with the capacities of :func:`rollout`'s
    ``B``. Each entry is the value of a maximum flow in [0, 1], accurate to 1e-6; rows do not sum to
    1, since each input is computed separately. A row of 64 tokens and 12 layers takes 0.2 seconds,
    and time grows with the cube of the length.

    Args:
        model: model with attention in every layer.
        probe: texts to run.
        at: query positions to compute (NaN elsewhere): ``all``, ``last`` of each text, the name of
            a mark, or a boolean mask ``[batch pos]``.
        longest: longest text that is accepted, in tokens.
        batch_size: texts per pass.

    Raises:
        InputError: if a text is longer than ``longest``, or a mark is unknown.
        UnsupportedModelError: if the model has layers without attention.

    Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers".

    Example:
        >>> flow = hs.flow.max_flow(model, probe)
        >>> bool((flow.into(0, -1) <= 1).all())
        True
    """
    check_fits(model, probe)
    need_attention(model)
    options, host = RunOptions(batch_size), probe.host
    tokens = int(host.real.sum(1).max())
    if tokens > longest:
        raise InputError(
            f"a text has {tokens} tokens, and maximum flows take minutes beyond {longest}: shorten "
            f"it, or pass longest={tokens}."
        )
    asked = places(probe, at)

    def run(batch: Probe, halvings: int) -> Tensor:
        one = _identity(model, batch)
        kept = one.new_empty(model.shape.n_layers, *one.shape)

        def keep(layer: int, query: Tensor, rows: Tensor) -> None:
            mixing = _mixing(_fused(rows, existing(model, layer), "mean"), query)
            missing = batch.length - mixing.shape[-1]
            kept[layer, :, _span(query)] = torch.nn.functional.pad(mixing, (0, missing))

        _over_rows(model, batch, keep, lambda _layer: None, options, halvings)
        return kept.cpu()

    parts = [found for _, found in passes(model, probe, run, batch_size=batch_size)]
    mixing = torch.cat(parts, 1).double().numpy()
    matrix = np.full((len(probe), probe.length, probe.length), np.nan)
    if isinstance(at, str) and at == "all":
        matrix[:] = np.eye(probe.length)  # at padding
    for example, query in asked.nonzero().tolist():
        matrix[example, query] = flow_of(mixing[:, example], query)
    return TokenFlow(
        "max_flow",
        matrix,
        host.real.numpy(),
        texts_of(model, probe),
        "value of a maximum flow over attention and residual stream",
        FLOW_SOURCE,
        origin(model, probe, reading="max_flow"),
    )


@checked
def flow_of(mixing: Float[np.ndarray, "layer query key"], query: int) -> Float[np.ndarray, " key"]:
    """Maximum flow from one position above the last layer to each position below the first.

    Args:
        mixing: capacities; ``mixing[l, i, j]`` is from position i above layer l to j below it.
        query: position above the last layer.

    Example:
        >>> layer = np.array([[1.0, 0.0], [0.2, 0.8]])
        >>> hs.flow.flow_of(np.stack([layer, layer]), 1).round(6).tolist()
        [0.4, 0.8]
    """
    layers, length, _ = mixing.shape
    level, end, start = np.nonzero(mixing)
    capacity = np.rint(mixing[level, end, start] * _UNIT).astype(np.int32)
    size = (layers + 1) * length
    nodes = ((level + 1) * length + end, level * length + start)
    graph = csr_matrix((capacity, nodes), (size, size))
    source = layers * length + query
    flows = [
        maximum_flow(graph, source, key).flow_value if _reaches(mixing, query)[key] else 0
        for key in range(length)
    ]
    return np.array(flows) / _UNIT


def _reaches(mixing: np.ndarray, query: int) -> np.ndarray:
    """Positions below the first layer that are reachable from the query."""
    reached = np.zeros(mixing.shape[1], bool)
    reached[query] = True
    for one in mixing[::-1]:
        reached = (one[reached] > 0).any(0)
    return reached


def _over_rows(
    model: HeadModel,
    batch: Probe,
    read: ReadRows,
    end: Callable[[int], None],
    options: RunOptions,
    halvings: int,
) -> None:
    """Stream all rows of every layer, chunk by chunk, from the first layer up."""
    per_query = 4 * len(batch) * model.shape.n_heads * batch.length

    def attend(view: TapView) -> None:
        layer = int(view.tap.layer or 0)
        for at in query_chunks(model, batch.length, per_query, options, halvings):
            read(layer, at, view.rows(at).pattern)
        end(layer)

    layers = model.shape.attention_layers
    reads = {Tap("pattern", layer): attend for layer in layers}
    model.run(batch, reads=reads, until=Tap("pattern", layers[-1]))


def _fused(
    rows: Float[Tensor, "batch head query key"], present: Float[Tensor, " head"], fusion: str
) -> Float[Tensor, "batch query key"]:
    """Fuse the matrices of the existing heads."""
    if fusion == "mean":
        return einsum(
            rows,
            present / present.sum().clamp_min(1),
            "batch head query key, head -> batch query key",
        )
    hidden = (present == 0)[:, None, None]
    if fusion == "max":
        return rows.masked_fill(hidden, 0.0).amax(1)
    return rows.masked_fill(hidden, 1.0).amin(1)


def _mixing(
    fused: Float[Tensor, "batch query key"], query_pos: Tensor
) -> Float[Tensor, "batch query key"]:
    """Mix attention with the residual stream and normalise the rows."""
    itself = torch.nn.functional.one_hot(query_pos, fused.shape[-1]).to(fused)
    mixed = fused + itself
    return mixed / mixed.sum(-1, keepdim=True)


def _identity(model: HeadModel, batch: Probe) -> Float[Tensor, "batch query key"]:
    one = torch.eye(batch.length, dtype=torch.float32, device=model.device)
    return one.repeat(len(batch), 1, 1)


def _span(query_pos: Tensor) -> slice:
    """Slice of a chunk of consecutive positions, without a device sync."""
    return slice(int(query_pos[0]), int(query_pos[-1]) + 1)
