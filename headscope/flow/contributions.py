"""Norm-based attention analysis: per-head and fused norms, mixing ratios, ALTI."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import probes
from headscope.base.arguments import checked
from headscope.base.options import RunOptions, chunk_bytes
from headscope.base.statistics import Design
from headscope.capture import check_fits, chunks, passes
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError, nearest
from headscope.heads import HeadIndex
from headscope.lens.attribution import need_unembedding, tolerance
from headscope.lens.reading import Promptish, Token, read_prompt, read_token, token_texts
from headscope.models.hf.seq2seq import StackView
from headscope.models.hf.sublayers import (
    Sublayer,
    arounds,
    keeping_streams,
    need_encoder_decoder,
    sublayer,
)
from headscope.models.protocol import AttentionWrite, HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Read, Tap, TapView, TextBatch, at_layers
from headscope.origin import held_norm, origin
from headscope.probes.probe import Probe
from headscope.table import Contributions, HeadScores, SourceContribution, TokenFlow, TokenLogits
from headscope.views import AttentionRows

# Tolerance of the parts' sum, relative to the largest entry of a layer's write.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 5e-2

RowsAt = Callable[[Int[Tensor, " query"]], AttentionRows]


@dataclass(frozen=True, eq=False)
class LayerSum:
    """Attention output of one layer as a sum, ``written = sum of parts + constant``, in fp32.

    The part of head h and key j at query i is ``A_ij v_j W_O / scale_i``. If a norm follows
    attention (gemma2, gemma3, olmo2), its gain and centring are folded into ``W_O`` and its
    denominator in this run is ``scale``; otherwise the scale is 1. Valid only during the layer's
    callback.

    Attributes:
        layer: the model's layer number.
        make_rows: computes exact pattern rows of given queries.
        entering: residual stream before attention.
        values: value vectors used by attention.
        W_O: output weights, with a following norm's gain and centring folded in.
        scale: denominator of the norm after attention, else 1.
        constant: part of attention's output that no head writes, such as biases.
        heads_written: sum of all parts.
    """

    layer: int
    make_rows: RowsAt
    entering: Float[Tensor, "batch pos d_model"]
    values: Float[Tensor, "batch kv_head key d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    scale: Float[Tensor, "batch pos"]
    constant: Float[Tensor, "batch pos d_model"]
    heads_written: Float[Tensor, "batch pos d_model"]

    @property
    def written(self) -> Float[Tensor, "batch pos d_model"]:
        """Attention's output, as added to the residual stream."""
        return self.heads_written + self.constant

    def weights(self, query_pos: Int[Tensor, " query"]) -> Float[Tensor, "batch head query key"]:
        """Attention weights divided by the norm's scale: the multipliers of ``v_j W_O``.

        The key axis ends at the last key visible to any of the queries.
        """
        pattern = self.make_rows(query_pos).pattern
        return pattern / self.scale[:, None, query_pos.to(self.scale.device), None]

    def moved(self, example: int) -> Float[Tensor, "head key d_model"]:
        """``v_j W_O`` for every head and key: ``heads * keys * d_model`` numbers."""
        values = self.values[example].float()
        group = len(self.W_O) // len(values)
        return torch.matmul(values.repeat_interleave(group, 0), self.W_O)

    @cached_property
    def moved_norms(self) -> Float[Tensor, "batch head key"]:
        """Euclidean norm of ``v_j W_O``, from the Gram matrix of ``W_O``."""
        group = len(self.W_O) // self.values.shape[1]
        values = self.values.float().repeat_interleave(group, 1)
        gram = self.W_O @ self.W_O.mT
        squared = torch.einsum("bhkd,hde,bhke->bhk", values, gram, values)
        return squared.clamp_min(0).sqrt()


def sum_of(
    layer: int,
    make_rows: RowsAt,
    z: Float[Tensor, "batch pos head d_head"],
    entering: Float[Tensor, "batch pos d_model"],
    values: Float[Tensor, "batch kv_head key d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    write: AttentionWrite,
) -> LayerSum:
    """Decompose one layer's attention output, with a norm after attention frozen."""
    W_O = W_O.float()
    head_sum = torch.einsum("bphe,hed->bpd", z.float(), W_O)
    bias = write.bias.float()
    scale = write.scale(head_sum + bias)
    constant = write.vectors(bias.expand_as(head_sum), scale)
    if write.norm is not None:
        constant = constant + write.norm.bias.float()
    return LayerSum(
        layer=layer,
        make_rows=make_rows,
        entering=entering,
        values=values,
        W_O=write.folded(W_O),
        scale=scale,
        constant=constant,
        heads_written=write.vectors(head_sum, scale),
    )


def each_layer(
    model: HeadModel,
    batch: TextBatch,
    visit: Callable[[LayerSum], None],
    also: Mapping[Tap, Read] = MappingProxyType({}),
    until: Tap | None = None,
) -> None:
    """Run a batch once and call ``visit`` with every layer's decomposed attention output.

    Every layer's sum is checked against the model's own attention output.

    Args:
        model: model to run.
        batch: batch to run.
        visit: called with each layer.
        also: further taps to read.
        until: tap at which the pass stops. Default: after the last layer.

    Raises:
        HeadscopeError: if a sum differs from the model's own attention output.
    """
    entering: dict[int, Tensor] = {}
    sums = LayerSums(batch.real.to(model.device))

    def enter(view: TapView) -> None:
        entering[_layer(view)] = copied(view.value)

    def attend(view: TapView) -> None:
        layer = _layer(view)
        made = layer_sum(model, view, entering.pop(layer))
        sums.meet(layer, made.written)
        visit(made)

    def add(view: TapView) -> None:
        sums.meet(_layer(view), copied(view.value))

    layers = model.shape.attention_layers
    sites = {"resid_pre": enter, "z": attend, "attn_out": add}
    reads = {Tap(site, layer): read for site, read in sites.items() for layer in layers}
    model.run(batch, reads=reads | dict(also), until=until or Tap("resid_post", layers[-1]))
    sums.check(model)


def copied(value: Tensor) -> Tensor:
    """Copy a value in fp32, since some families overwrite their tensors."""
    return value.to(torch.float32, copy=True)


def layer_sum(model: HeadModel, view: TapView, entering: Tensor) -> LayerSum:
    """Decompose one layer's attention output at its tap ``z``."""
    layer = _layer(view)
    write = model.parts.attention_write(layer)
    weights = model.output_weights(layer)
    return sum_of(layer, view.rows, view.z, entering, view.values(), weights, write)


class LayerSums:
    """Check of every layer's attention output against the sum of its parts."""

    def __init__(self, real: Bool[Tensor, "batch pos"]) -> None:
        """Start a check; padding positions are left out."""
        self._real = real
        self._one: dict[int, Tensor] = {}
        self._gaps: list[Tensor] = []

    def meet(self, layer: int, value: Float[Tensor, "batch pos d_model"]) -> None:
        """Store the first of a layer's two values; measure the gap when the second arrives."""
        value = value * self._real[..., None]
        other = self._one.pop(layer, None)
        if other is None:
            self._one[layer] = value
        else:
            largest = torch.maximum(value.abs().max(), other.abs().max()).clamp_min(1e-30)
            self._gaps.append((value - other).abs().max() / largest)

    def check(self, model: HeadModel) -> None:
        """Raise HeadscopeError if a layer's parts do not sum to the model's attention output."""
        exact = model.dtype in (torch.float32, torch.float64)
        allowed = _TOLERANCE if exact else _HALF_TOLERANCE
        worst = float(torch.stack(self._gaps).max())
        if not worst <= allowed or self._one:
            raise HeadscopeError(
                f"what attention of {model.name} adds is not the sum of what its heads move "
                f"(relative gap {worst:.2g}, tolerance {allowed:.2g}), so its flow cannot be "
                "computed; please report the model."
            )


def need_parts(model: HeadModel) -> None:
    """Raise UnsupportedModelError if attention's output cannot be split by head and key."""
    for need in ("attention_write", "values"):
        if need in model.limits:
            raise UnsupportedModelError(model.limits[need])
    need_attention(model)


def need_attention(model: HeadModel) -> None:
    """Raise UnsupportedModelError if layers without attention may mix tokens."""
    others = sorted(set(range(model.shape.n_layers)) - set(model.shape.attention_layers))
    if others:
        raise UnsupportedModelError(
            f"{model.name} has no attention in {len(others)} of its layers (the first is "
            f"{others[0]}), and how these mix tokens is unknown: flow over all layers is not "
            "defined for it."
        )


def query_chunks(
    model: HeadModel, length: int, bytes_per_query: int, options: RunOptions, halvings: int = 0
) -> Iterator[Int[Tensor, " query"]]:
    """All query positions, in chunks that fit the memory budget, on the CPU."""
    budget = chunk_bytes(model.device, options.memory_bytes) >> halvings
    return chunks(torch.arange(length), bytes_per_query, budget)


def texts_per_pass(probe: Probe) -> int:
    """Number of texts per pass; small, since rows are computed for all queries."""
    return max(1, 512 // probe.length)


def nan_where_missing(
    model: HeadModel, values: Float[np.ndarray, "layer head *rest"]
) -> Float[np.ndarray, "layer head *rest"]:
    """Copy values into an array of all heads, with NaN for heads that do not exist."""
    shape = model.shape
    present = np.zeros((shape.n_layers, shape.n_heads), bool)
    for head in shape.heads:
        present[head] = True
    found = values.astype(np.float64)
    found[~present] = np.nan
    return found


def existing(model: HeadModel, layer: int) -> Float[Tensor, " head"]:
    """Mask of a layer's heads on the device: 1 for existing heads, 0 for removed ones."""
    shape = model.shape
    kept = [
        HeadIndex(layer, head, shape.stack) not in shape.removed for head in range(shape.n_heads)
    ]
    return torch.tensor(kept, dtype=torch.float32).to(model.device)


def texts_of(model: HeadModel, probe: Probe) -> tuple[tuple[str, ...], ...]:
    """Texts of a probe's tokens."""
    return tuple(tuple(token_texts(model.tokenizer, row)) for row in probe.host.tokens.tolist())


def places(probe: Probe, at: "str | Tensor") -> Bool[Tensor, "batch pos"]:
    """Boolean mask of positions given as a mask or by name: a mark, ``last``, or ``all``.

    Raises:
        InputError: if the mark is unknown, the shape is wrong, or a position is padding.
    """
    probe = probe.host
    if not isinstance(at, str | Tensor):
        raise InputError(
            f"at={at!r}: give the name of a mark, or True and False in the shape of the tokens "
            f"{tuple(probe.tokens.shape)}."
        )
    if isinstance(at, Tensor):
        given = at.cpu()
    elif at == "last" and at not in probe.marks:
        given = torch.nn.functional.one_hot(probe.last, probe.length).bool()
    elif at == "all" and at not in probe.marks:
        given = probe.real
    else:
        given = probe.mark(at)
    if given.shape != probe.tokens.shape or given.dtype != torch.bool:
        raise InputError(
            f"positions are a mark's name or True and False in the shape of the tokens "
            f"{tuple(probe.tokens.shape)}; got {given.dtype} in shape {tuple(given.shape)}."
        )
    if bool((given & ~probe.real).any()):
        raise InputError("some of the given positions are padding.")
    return given


def _layer(view: TapView) -> int:
    return int(view.tap.layer or 0)


_FORMS = ("per_head", "fused", "residual")

_ROUNDING = 1e-6  # relative rounding error allowed in a difference of norms

NORM_SOURCE = "Kobayashi et al. 2020 (arXiv 2004.10102) and 2021 (arXiv 2109.07152)"
ALTI_LOGIT_SOURCE = "Ferrando et al. 2023 (arXiv 2305.12535), ALTI-Logit"
ALTI_SOURCE = "Ferrando et al. 2022 (arXiv 2203.04212), ALTI"


@checked
@own_types()
@torch.no_grad()
def alti(
    model: HeadModel,
    probe: Probe,
    *,
    batch_size: int | None = None,
    memory: "str | int | None" = None,
) -> TokenFlow:
    """Aggregate token-to-token contributions over layers, measured on vectors (ALTI).

    In each layer, key j contributes the vector ``T_i(x_j) = sum over heads of A_ij v_j W_O`` to
    query i, plus ``x_i`` if ``j = i``; together with attention's biases, these sum to ``y_i``, the
    residual stream after attention. ``C_ij = max(0, |y_i| - |y_i - T_i(x_j)|)`` in L1 norm, with
    each row divided by its sum (if all entries are 0, the nearest key gets 1), and the matrices are
    multiplied over layers as in :func:`rollout`. MLPs act on one position at a time and are left
    out. A head with zero values contributes nothing: if all values are zero, the result is the
    identity.

    A norm after attention (gemma2, gemma3, olmo2) is frozen at its scale in this run. The cost is
    ``heads * d_model`` operations per pair of positions, in chunks; memory holds ``heads * length *
    d_model`` numbers for one layer and text.

    Args:
        model: model with attention in every layer.
        probe: texts to run.
        batch_size: texts per pass; affects only time and memory.
        memory: memory budget for one chunk of vectors, e.g. ``"2GB"``.

    Returns:
        Token flow with ``.matrix [batch query key]`` in [0, 1]; rows sum to 1.

    Raises:
        InputError: if the probe does not fit the model.
        UnsupportedModelError: if attention's output cannot be split by head and key.

    Source: Ferrando, Gállego and Costa-jussà 2022, "Measuring the Mixing of Contextual
    Information in the Transformer". Pre-norm models: no norm is applied to the vectors.

    Example:
        >>> flow = hs.flow.alti(model, probe)
        >>> torch.tensor(flow.matrix).sum(-1).allclose(torch.tensor(1.0))
        True
    """
    options = RunOptions(batch_size, memory)
    check_fits(model, probe)
    need_parts(model)

    def run(batch: Probe, halvings: int) -> Tensor:
        state = torch.eye(batch.length, dtype=torch.float32, device=model.device)
        state = state.repeat(len(batch), 1, 1)

        def multiply(made: LayerSum) -> None:
            whole = made.entering + made.written
            for example in range(len(batch)):
                vectors = Vectors.of(model, made, example, options, halvings)
                state[example] = _alti_step(vectors, whole[example], state[example])

        each_layer(model, batch, multiply)
        padding = ~batch.real.to(model.device)
        itself = torch.eye(batch.length, dtype=torch.float32, device=model.device)
        return torch.where(padding[..., None], itself, state).cpu()

    size = options.batch_size or texts_per_pass(probe)
    parts = [found for _, found in passes(model, probe, run, batch_size=size)]
    return TokenFlow(
        "alti",
        torch.cat(parts).numpy(),
        probe.host.real.numpy(),
        texts_of(model, probe),
        "share of the contribution over all layers, by the L1 norm of the moved vectors",
        ALTI_SOURCE,
        origin(model, probe, reading="alti", **held_norm(model)),
    )


def _alti_step(
    vectors: "Vectors",
    whole: Float[Tensor, "pos d_model"],
    state: Float[Tensor, "query key"],
) -> Float[Tensor, "query key"]:
    """Multiply one layer's contributions by those of the layers below."""
    after = torch.zeros_like(state)
    for at in vectors.chunks():
        shares = _alti_rows(vectors, at, whole)
        after[at] = shares @ state[: shares.shape[-1]]
    return after


def _alti_rows(
    vectors: "Vectors", at: slice, whole: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "query key"]:
    """Normalised rows of C for one chunk of queries."""
    rest, visible = vectors.fused(at, own=True, minus_from=whole[at])
    reach = torch.linalg.vector_norm(whole[at], 1, -1)
    near = reach[:, None] - torch.linalg.vector_norm(rest, 1, -1).T
    near = near.masked_fill(~visible, float("-inf"))
    return shares_of(near, reach)


def shares_of(
    near: Float[Tensor, "*any part"], reach: Float[Tensor, " *any"]
) -> Float[Tensor, "*any part"]:
    """Proximities clamped at 0 and normalised; if none is above 0, the largest gets 1.

    Args:
        near: proximities; minus infinity where a part does not exist.
        reach: norm of the whole. A proximity within 1e-6 of it counts as that of a zero vector.

    Example:
        >>> near = torch.tensor([[3.0, 1.0, 0.0], [-1.0, -2.0, 0.0]])
        >>> shares_of(near, torch.tensor([4.0, 1.0])).tolist()
        [[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]
    """
    floor = _ROUNDING * reach[..., None]
    kept = near.clamp_min(0)
    some = near.amax(-1, keepdim=True) > floor
    nearest_part = near.masked_fill(near.abs() <= floor, float("-inf")).argmax(-1)
    largest = torch.nn.functional.one_hot(nearest_part, near.shape[-1]).to(near)
    return torch.where(some, kept / kept.sum(-1, keepdim=True).clamp_min(1e-38), largest)


@checked
@own_types()
@torch.no_grad()
def alti_logits(
    model: HeadModel,
    prompt: Promptish,
    target: Token | None = None,
    foil: Token | None = None,
    *,
    position: int = -1,
    memory: "str | int | None" = None,
) -> TokenLogits:
    """Split a logit, or a difference of two, over the input tokens.

    What attention of layer l moves from position j to the target position, projected onto the
    logit's residual direction and divided by the frozen scale of the final norm, is spread over
    input tokens by row j of :func:`alti`'s matrix of the layers below. The embedding at the target
    position belongs to that token. MLPs and biases stay separate parts, so the parts sum to the
    logit.

    Args:
        model: model with attention in every layer and a plain final norm.
        prompt: text or token ids.
        target: target token, as text or id. Default: the model's most likely next token.
        foil: token whose logit is subtracted. Default: none.
        position: position whose next token is predicted; negative counts from the end.
        memory: memory budget for one chunk of vectors.

    Raises:
        InputError: if the prompt, the position or a token does not fit the model.
        UnsupportedModelError: if the model has no plain final norm, or attention's output cannot be
            split by head and key.
        HeadscopeError: if the parts do not sum to the logit.

    Source: Ferrando et al. 2023 (arXiv 2305.12535), ALTI-Logit: attention and embedding parts; MLPs
    are not spread over tokens here.

    Example:
        >>> found = hs.flow.alti_logits(model, [5, 9, 5, 9], target=5, foil=9)
        >>> total = found.values.sum() + found.mlp.sum() + found.bias + found.constant
        >>> bool(abs(total - found.whole) < 1e-3)
        True
    """
    options = RunOptions(memory=memory)
    text = read_prompt(model, prompt)
    at = text.at(position)
    wanted = None if target is None else read_token(model, target)
    other = None if foil is None else read_token(model, foil, "foil")
    need_parts(model)
    need_unembedding(model)
    ids = text.ids[None, : at + 1]
    if wanted is None:
        logits = model.forward(ids, logits_at=torch.tensor([at]))
        wanted = int(logits[0, 0].float().argmax())
    if wanted == other:
        raise InputError("target and foil are the same token: their difference is always 0.")
    pair = torch.tensor([wanted] if other is None else [wanted, other], device=model.device)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float32, device=model.device)[: len(pair)]
    direction = (model.unembedding.directions(pair) * sign[:, None]).sum(0)
    state = torch.eye(at + 1, dtype=torch.float32, device=model.device)
    values, mlps, biases, final = torch.zeros_like(state[0]), [], [], []

    def add(made: LayerSum) -> None:
        nonlocal state
        if made.layer == model.shape.attention_layers[0]:
            values[at] += made.entering[0, at] @ direction
        vectors = Vectors.of(model, made, 0, options, 0)
        moved, _ = vectors.fused(slice(at, at + 1), own=False)
        values.add_((moved[:, 0] @ direction) @ state)
        biases.append(made.constant[0, at] @ direction)
        state = _alti_step(vectors, (made.entering + made.written)[0], state)

    def think(view: TapView) -> None:
        mlps.append(view.value[0, at].float() @ direction)

    also: dict[Tap, Read] = {Tap("mlp_out", n): think for n in range(model.shape.n_layers)}
    end = Tap("final_resid")
    also[end] = lambda view: final.append(view.value[0, at].float())
    each_layer(model, probes.from_tokens(ids), add, also, until=end)
    scale = model.unembedding.scale(final[0])
    whole = (model.unembedding.uncapped(final[0])[pair] * sign).sum()
    names = token_texts(model.tokenizer, pair.tolist())
    return TokenLogits(
        target=names[0],
        foil=None if other is None else names[1],
        position=at,
        tokens=text.texts[: at + 1],
        values=(values / scale).cpu().double().numpy(),
        mlp=(torch.stack(mlps) / scale).cpu().double().numpy(),
        bias=float(torch.stack(biases).sum() / scale),
        constant=float((model.unembedding.constant(pair) * sign).sum()),
        whole=float(whole),
        tolerance=tolerance(model),
        source=ALTI_LOGIT_SOURCE,
        provenance=origin(model, reading="alti_logits", tokens=at + 1, target=wanted, foil=other),
    )


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors that one layer moves in one text, summed over heads, in chunks of queries."""

    made: LayerSum
    example: int
    moved: Float[Tensor, "key head d_model"]
    size: int

    @classmethod
    def of(
        cls, model: HeadModel, made: LayerSum, example: int, options: RunOptions, halvings: int
    ) -> "Vectors":
        """Compute ``v_j W_O`` once; chunks fit the memory budget."""
        length, width = made.entering.shape[1:]
        per_query = 4 * 2 * length * width
        first = next(query_chunks(model, length, per_query, options, halvings))
        return cls(made, example, made.moved(example).transpose(0, 1).contiguous(), len(first))

    def chunks(self) -> list[slice]:
        """Consecutive slices of queries."""
        length = self.made.entering.shape[1]
        return [slice(at, min(at + self.size, length)) for at in range(0, length, self.size)]

    def fused(
        self, at: slice, *, own: bool, minus_from: Tensor | None = None
    ) -> tuple[Float[Tensor, "key query d_model"], Bool[Tensor, "query key"]]:
        """``T_i(x_j)`` for all keys, and which keys are visible.

        Args:
            at: slice of queries.
            own: add the query's own residual stream where j = i.
            minus_from: return ``minus_from - T`` instead.
        """
        query_pos = torch.arange(at.start, at.stop)
        rows = self.made.make_rows(query_pos)
        scale = self.made.scale[self.example, at]
        weights = (rows.pattern[self.example] / scale[:, None]).permute(2, 1, 0)
        keys = len(weights)
        if minus_from is None:
            found = torch.bmm(weights, self.moved[:keys])
        else:
            found = torch.baddbmm(
                minus_from.expand(keys, -1, -1), weights, self.moved[:keys], alpha=-1
            )
        if own:
            sign = 1 if minus_from is None else -1
            place = torch.arange(at.stop - at.start, device=found.device)
            found[place + at.start, place] += sign * self.made.entering[self.example, at]
        return found, rows.visible[self.example]


@checked
@own_types()
@torch.no_grad()
def norms(
    model: HeadModel,
    probe: Probe,
    *,
    batch_size: int | None = None,
    memory: "str | int | None" = None,
) -> Contributions:
    """Norms of the vectors that attention moves, per head and summed over heads, and mixing ratios.

    Head h moves the vector ``A_ij v_j W_O`` from key j to query i (values include their bias; the
    output projection's bias is left out). The per-head norm is its Euclidean norm. The fused norm
    is that of the sum over heads, which is never larger than the sum of the per-head norms and may
    rank keys differently. ``norm_share`` of a head is the sum of its norms over ``j != i``, divided
    by the sum over all heads of its layer and all keys, both over the queries of a text. The mixing
    ratio of a position is ``a / (a + b)`` with ``a`` the norm of the fused sum over other positions
    and ``b`` the norm of its own part; the form ``residual`` adds the residual stream to its own
    part.

    Means leave out first positions, which can only attend to themselves. A norm after attention
    (gemma2, gemma3, olmo2) is frozen at its scale in this run.

    Args:
        model: model with attention in every layer.
        probe: texts to run.
        batch_size: texts per pass; affects only time and memory.
        memory: memory budget for one chunk of vectors.

    Returns:
        Contributions with ``.per_head_norm``, ``.fused_norm``, ``.mixing_ratio``, ``.norm_share``
        and ``.moved``.

    Raises:
        InputError: if the probe does not fit the model.
        UnsupportedModelError: if attention's output cannot be split by head and key.

    Source: Kobayashi et al. 2020, "Attention is Not Only a Weight"; 2021, "Incorporating Residual
    and Normalization Layers into Analysis of Masked Language Models", forms 1 and 2. Their form
    with the norm after the sum applies to models with a norm there.

    Example:
        >>> found = hs.flow.norms(model, probe)
        >>> bool((found.fused_norm <= found.per_head_norm.sum(1) + 1e-4)[:, :, 1:].all())
        True
    """
    options = RunOptions(batch_size, memory)
    check_fits(model, probe)
    need_parts(model)
    shape = model.shape

    def run(batch: Probe, halvings: int) -> dict[str, Tensor]:
        made = _Norms.empty(model, batch)
        each_layer(model, batch, lambda layer: made.add(model, layer, options, halvings))
        return {name: value.cpu() for name, value in vars(made).items()}

    size = options.batch_size or texts_per_pass(probe)
    parts = [found for _, found in passes(model, probe, run, batch_size=size)]
    joined = {name: torch.cat([part[name] for part in parts], -2) for name in parts[0]}
    real = probe.host.real
    joined = {name: value.masked_fill(~real, float("nan")) for name, value in joined.items()}
    elsewhere, everything = (joined[name].double().numpy() for name in ("elsewhere", "everything"))
    counted = (real & (probe.host.position_in_text > 0)).numpy()
    moving = np.where(counted, elsewhere, 0.0).sum(-1)
    total = np.where(counted, everything, 0.0).sum(-1).sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share, mean = moving / total, moving / counted.sum(-1)
    about = origin(model, probe, reading="norms", **held_norm(model))

    def scores(
        name: str, values: np.ndarray, unit: str, top: float | None, said: str
    ) -> HeadScores:
        return HeadScores.from_examples(
            name,
            nan_where_missing(model, values),
            kv_heads=shape.n_kv_heads,
            design=Design(clusters=probe.cluster_labels),
            unit=unit,
            bounds=(0.0, top),
            description=said,
            source=NORM_SOURCE,
            provenance=about,
        )

    return Contributions(
        per_head_norm=nan_where_missing(model, elsewhere),
        fused_norm=joined["fused"].numpy(),
        mixing={form: joined[form].numpy() for form in ("attention", "residual")},
        norm_share=scores(
            "norm_share",
            share,
            "share",
            1.0,
            "it moves a larger share of its layer's norm between tokens",
        ),
        moved=scores("moved_norm", mean, "norm", None, "it moves larger vectors between tokens"),
        real=real.numpy(),
        tokens=texts_of(model, probe),
        provenance=about,
    )


@dataclass(eq=False)
class _Norms:
    """Accumulator of :func:`norms`; positions are the last axis."""

    elsewhere: Float[Tensor, "layer head batch pos"]
    everything: Float[Tensor, "layer head batch pos"]
    fused: Float[Tensor, "layer batch pos"]
    attention: Float[Tensor, "layer batch pos"]
    residual: Float[Tensor, "layer batch pos"]

    @classmethod
    def empty(cls, model: HeadModel, batch: Probe) -> "_Norms":
        shape = model.shape
        per_head = (shape.n_layers, shape.n_heads, len(batch), batch.length)
        sizes = [per_head, per_head] + [(shape.n_layers, len(batch), batch.length)] * 3
        return cls(*(torch.zeros(size, dtype=torch.float32, device=model.device) for size in sizes))

    def add(self, model: HeadModel, made: LayerSum, options: RunOptions, halvings: int) -> None:
        layer = made.layer
        for example in range(len(made.entering)):
            vectors = Vectors.of(model, made, example, options, halvings)
            for at in vectors.chunks():
                per_head = _per_head(made, example, at)
                own = _diagonal(per_head, at)
                self.everything[layer, :, example, at] = per_head.sum(-1)
                self.elsewhere[layer, :, example, at] = per_head.sum(-1) - own
                found, _ = vectors.fused(at, own=False)
                place = torch.arange(at.stop - at.start, device=found.device)
                itself = found[place + at.start, place]
                rest = torch.linalg.vector_norm(found.sum(0) - itself, dim=-1)
                fused = torch.linalg.vector_norm(found, dim=-1).T
                self.fused[layer, example, at] = fused.sum(-1) - _diagonal(fused, at)
                for form, kept in (
                    ("attention", itself),
                    ("residual", itself + made.entering[example, at]),
                ):
                    length_kept = torch.linalg.vector_norm(kept, dim=-1)
                    whole = (rest + length_kept).clamp_min(1e-38)
                    getattr(self, form)[layer, example, at] = rest / whole


def _per_head(made: LayerSum, example: int, at: slice) -> Float[Tensor, "head query key"]:
    """``|A_ij v_j W_O|`` for a chunk of queries, without forming the vectors."""
    weights = made.weights(torch.arange(at.start, at.stop))[example]
    return weights * made.moved_norms[example, :, None, : weights.shape[-1]]


def _diagonal(values: Float[Tensor, "*any query key"], at: slice) -> Float[Tensor, "*any query"]:
    """Entries of each query at its own position."""
    return values[..., at.start : at.stop].diagonal(dim1=-2, dim2=-1)


@checked
@own_types()
@torch.no_grad()
def norm_matrix(
    model: HeadModel,
    probe: Probe,
    layer: int,
    form: str = "fused",
    *,
    batch_size: int | None = None,
) -> Float[np.ndarray, "batch *head query key"]:
    """Matrix of norms of one layer: attention weighted by the norm of what it moves.

    Args:
        model: model with attention in every layer.
        probe: texts to run.
        layer: layer number.
        form: ``per_head``: ``|A_ij v_j W_O|``, with a head axis; ``fused``: norm of the sum over
            heads; ``residual``: the same, with the position's own residual stream added where j =
            i.
        batch_size: texts per pass.

    Raises:
        InputError: if there is no such layer or form.

    Source: Kobayashi et al. 2020 and 2021; see :func:`norms`.

    Example:
        >>> hs.flow.norm_matrix(model, probe, layer=1, form="per_head").ndim
        4
    """
    if form not in _FORMS:
        raise InputError(nearest(form, _FORMS, kind="form"))
    if layer not in model.shape.attention_layers:
        raise InputError(f"{model.name} has no attention in layer {layer}.")
    options = RunOptions(batch_size)
    check_fits(model, probe)
    need_parts(model)

    def run(batch: Probe, halvings: int) -> Tensor:
        length = batch.length
        shape = (len(batch), *([model.shape.n_heads] if form == "per_head" else []), length, length)
        found = torch.zeros(shape, dtype=torch.float32, device=model.device)

        def fill(made: LayerSum) -> None:
            for example in range(len(batch) if made.layer == layer else 0):
                vectors = Vectors.of(model, made, example, options, halvings)
                for at in vectors.chunks():
                    if form == "per_head":
                        rows = _per_head(made, example, at)
                    else:
                        moved, _ = vectors.fused(at, own=form == "residual")
                        rows = torch.linalg.vector_norm(moved, dim=-1).T
                    found[example, ..., at, : rows.shape[-1]] = rows

        each_layer(model, batch, fill)
        return found.cpu()

    size = options.batch_size or texts_per_pass(probe)
    parts = [found for _, found in passes(model, probe, run, batch_size=size)]
    result: np.ndarray = torch.cat(parts).numpy()
    return result


SOURCE = "Ferrando et al. 2022 (arXiv 2205.11631), ALTI+"
_CHUNK = 1 << 27  # memory budget for vectors, in bytes


@checked
@own_types()
@torch.no_grad()
def source_contribution(
    model: HeadModel, probe: Probe, *, batch_size: int | None = None
) -> SourceContribution:
    """Share of the source and of the target prefix in each target token of a translation (ALTI+).

    In every attention, key j moves the vector ``T_i(x_j) = sum over heads of A_ij v_j W_O`` to
    query i. The residual stream counts as one more vector: self-attention adds it to the query's
    own key, cross-attention keeps it as a separate part. If a layer norm follows (BART, Marian),
    each vector goes through it with the scale frozen at this run. With ``y_i`` the sum, ``C_ij =
    max(0, |y_i| - |y_i - T_i(x_j)|)`` in L1 norm, and each row is divided by its sum. In a decoder
    layer, the cross-attention share goes to the source and its residual share to the prefix, as
    distributed by self-attention. The layers are multiplied, so each row sums to 1 over source and
    prefix together. MLPs act on one position at a time and are left out.

    A translation with a small share of its source is detached from it: a low mean of
    :attr:`SourceContribution.share` over a sentence indicates a hallucination.

    Args:
        model: encoder-decoder model.
        probe: sources and targets, from :func:`headscope.probes.translation`.
        batch_size: examples per pass.

    Returns:
        Contributions with ``.source [batch target source]``, ``.prefix [batch target target]`` and
        ``.share [batch target]``, each in [0, 1].

    Raises:
        InputError: if the model is not an encoder-decoder, or the probe has no source.
        UnsupportedModelError: if the norms around attention are not plain norms.

    Source: Ferrando et al. 2022, "Towards Opening the Black Box of Neural Machine Translation:
    Source and Target Interpretations of the Transformer"; hallucinations: Dale et al. 2022 (arXiv
    2212.08597).

    Example:
        >>> model = hs.load("tiny-marian")
        >>> probe = hs.probes.translation(model, ["reverse moon key boat"], ["boat key moon"])
        >>> found = hs.flow.source_contribution(model, probe)
        >>> [round(float(one), 3) for one in (found.source.sum(-1) + found.prefix.sum(-1))[0]]
        [1.0, 1.0, 1.0, 1.0]
    """
    whole = need_encoder_decoder(model)
    views = {name: whole.stack(name) for name in ("encoder", "decoder", "cross")}
    probe.of_source  # noqa: B018  # refuses a probe without one
    check_fits(views["cross"], probe)
    makers = {name: _Maker.of(view) for name, view in views.items()}

    def run(batch: Probe, _halvings: int) -> tuple[Tensor, Tensor]:
        made = {name: maker.shares(batch) for name, maker in makers.items()}
        return _joined(made)

    parts = [found for _, found in passes(views["cross"], probe, run, batch_size=batch_size or 8)]
    source, prefix = (torch.cat([part[side] for part in parts]).cpu() for side in (0, 1))
    real, read = probe.host.real, probe.of_source.host.real
    source = source.masked_fill(~real[:, :, None], 0.0)
    prefix = prefix.masked_fill(~real[:, :, None], 0.0)
    return SourceContribution(
        source.numpy(),
        prefix.numpy(),
        real.numpy(),
        read.numpy(),
        texts_of(views["decoder"], probe),
        texts_of(views["encoder"], probe.of_source),
        origin(views["cross"], probe, reading="source_contribution", source=SOURCE),
    )


def _joined(made: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Multiply the layers of the encoder, then those of decoder and cross-attention together."""
    first = made["encoder"][0]
    encoder = torch.eye(first.shape[1], device=first.device).expand_as(first)
    for shares in made["encoder"]:
        encoder = shares @ encoder
    own = made["decoder"][0]
    prefix = torch.eye(own.shape[1], device=own.device).expand_as(own)
    source = torch.zeros_like(made["cross"][0][..., :-1])
    for self_shares, cross_shares in zip(made["decoder"], made["cross"], strict=True):
        stays = cross_shares[..., -1:]
        source = cross_shares[..., :-1] @ encoder + stays * (self_shares @ source)
        prefix = stays * (self_shares @ prefix)
    return source, prefix


@dataclass(eq=False)
class _Maker:
    """Computes contribution shares of every layer of one stack."""

    view: StackView
    known: dict[int, Any]
    constants: dict[int, Sublayer]
    kept: dict[int, Tensor] = field(default_factory=dict)
    made: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, view: StackView) -> "_Maker":
        known = arounds(view)
        return cls(view, known, {n: sublayer(view, one, n) for n, one in known.items()})

    def shares(self, batch: Probe) -> list[Float[Tensor, "batch query part"]]:
        """Share matrix of each layer, from one pass."""
        self.kept, self.made = {}, []
        with keeping_streams(self.view, self.kept, self.known):
            self.view.run(
                batch,
                reads=at_layers(self.view.shape, self._read),
                logits_at=torch.empty(0, dtype=torch.long),
            )
        return self.made

    def _read(self, seen: TapView) -> None:
        stream = self.kept.pop(seen.layer)
        crosses = self.view.stack_name == "cross"
        moved = moved_by_head(seen, self.view.output_weights(seen.layer))
        found = []
        per_query = 4 * 2 * moved.shape[2] * moved.shape[3]
        for example in range(len(moved)):
            rows = []
            for at in chunks(torch.arange(seen.n_queries), per_query, _CHUNK):
                vectors = vectors_of(seen, moved[example], at, example)
                rows.append(
                    shares(vectors, stream[example], at, self.constants[seen.layer], crosses)
                )
            found.append(torch.cat(rows))
        self.made.append(torch.stack(found))


def moved_by_head(
    seen: TapView, W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "batch head key d_model"]:
    """``v_j W_O`` for every head and key."""
    values = seen.values().float()
    group = len(W_O) // values.shape[1]
    return torch.matmul(values.repeat_interleave(group, 1), W_O.float())


def vectors_of(
    seen: TapView, moved: Float[Tensor, "head key d_model"], at: Int[Tensor, " query"], example: int
) -> Float[Tensor, "query key d_model"]:
    """``T_i(x_j)`` for some queries of one example, summed over heads."""
    rows = seen.rows(at).pattern[example]
    found = torch.einsum("hqk,hkd->qkd", rows, moved[:, : rows.shape[-1]])
    missing = moved.shape[1] - rows.shape[-1]
    return torch.nn.functional.pad(found, (0, 0, 0, missing))


def shares(
    vectors: Float[Tensor, "query key d_model"],
    stream: Float[Tensor, "pos d_model"],
    at: Int[Tensor, " query"],
    constant: Sublayer,
    crosses: bool,
) -> Float[Tensor, "query part"]:
    """Share of each key in the stream after attention; in cross-attention the residual is last."""
    place = at.to(stream.device)
    own = stream[place]
    if crosses:
        parts = torch.cat([vectors, own[:, None]], 1)
    else:
        parts = vectors.clone()
        parts[torch.arange(len(at), device=place.device), place] += own
    whole = parts.sum(1) + constant.bias
    if constant.gain is not None and constant.offset is not None:
        scale = (whole.var(-1, unbiased=False, keepdim=True) + constant.epsilon).sqrt()
        parts = (parts - parts.mean(-1, keepdim=True)) / scale[:, None] * constant.gain
        whole = (whole - whole.mean(-1, keepdim=True)) / scale * constant.gain + constant.offset
    reach = torch.linalg.vector_norm(whole, 1, -1)
    near = reach[:, None] - torch.linalg.vector_norm(whole[:, None] - parts, 1, -1)
    return shares_of(near, reach)
