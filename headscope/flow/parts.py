"""What attention of one layer adds to the stream, as a sum over heads and keys, while it runs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.options import RunOptions, chunk_bytes
from headscope.capture import chunks
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.lens.prompt import token_texts
from headscope.models.protocol import AttentionWrite, HeadModel
from headscope.models.taps import Read, Tap, TapView, TextBatch
from headscope.probes.probe import Probe
from headscope.views import AttentionRows

# Share of the largest entry of a layer's write by which the parts' sum may miss it.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 5e-2

Rows = Callable[[Int[Tensor, " query"]], AttentionRows]


@dataclass(frozen=True, eq=False)
class LayerSum:
    """Attention of one layer as a sum, ``written = sum of parts + constant``, in fp32.

    The part of head h and key j at query i is ``A_ij v_j W_O / scale_i``. Where a norm follows
    attention (gemma2, gemma3, olmo2), its gain and centring are in ``W_O`` and its denominator of
    this run is ``scale``; else the scale is 1. Valid only while the pass shows the layer.

    Attributes:
        layer: the model's layer number.
        make_rows: exact rows of some queries.
        entering: residual stream that attention reads and adds to.
        values: as attention used them.
        W_O: output weights as they reach the stream.
        scale: denominator of a norm after attention.
        constant: what attention adds that belongs to no head.
        heads_written: sum of all parts.
    """

    layer: int
    make_rows: Rows
    entering: Float[Tensor, "batch pos d_model"]
    values: Float[Tensor, "batch kv_head key d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    scale: Float[Tensor, "batch pos"]
    constant: Float[Tensor, "batch pos d_model"]
    heads_written: Float[Tensor, "batch pos d_model"]

    @property
    def written(self) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the stream."""
        return self.heads_written + self.constant

    def weights(self, query_pos: Int[Tensor, " query"]) -> Float[Tensor, "batch head query key"]:
        """Attention over the scale: the multiplier of ``v_j W_O`` in every part.

        The key axis ends with the last key that any of the queries sees.
        """
        pattern = self.make_rows(query_pos).pattern
        return pattern / self.scale[:, None, query_pos.to(self.scale.device), None]

    def moved(self, example: int) -> Float[Tensor, "head key d_model"]:
        """``v_j W_O`` of every head and key: ``heads * keys * d_model`` numbers."""
        values = self.values[example].float()
        group = len(self.W_O) // len(values)
        return torch.matmul(values.repeat_interleave(group, 0), self.W_O)

    @cached_property
    def moved_norms(self) -> Float[Tensor, "batch head key"]:
        """Euclidean length of ``v_j W_O``, through the Gram matrix of ``W_O``."""
        group = len(self.W_O) // self.values.shape[1]
        values = self.values.float().repeat_interleave(group, 1)
        gram = self.W_O @ self.W_O.mT
        squared = torch.einsum("bhkd,hde,bhke->bhk", values, gram, values)
        return squared.clamp_min(0).sqrt()


def sum_of(
    layer: int,
    make_rows: Rows,
    z: Float[Tensor, "batch pos head d_head"],
    entering: Float[Tensor, "batch pos d_model"],
    values: Float[Tensor, "batch kv_head key d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    write: AttentionWrite,
) -> LayerSum:
    """Put one layer's sum together, the scale of a norm after attention as in this run."""
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


def over_layers(
    model: HeadModel,
    batch: TextBatch,
    visit: Callable[[LayerSum], None],
    also: Mapping[Tap, Read] = MappingProxyType({}),
    until: Tap | None = None,
) -> None:
    """Run a batch once and show every layer with attention as a sum.

    Every layer's sum is held against what the model itself added.

    Args:
        model: that is run.
        batch: what it runs.
        visit: is shown each layer.
        also: other taps that are read.
        until: where the pass stops; default: after the last layer.

    Raises:
        HeadscopeError: if a sum is not what the model added.
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
    """The value in fp32, as a copy: some families write over what they have shown."""
    return value.to(torch.float32, copy=True)


def layer_sum(model: HeadModel, view: TapView, entering: Tensor) -> LayerSum:
    """One layer's sum at its tap ``z``."""
    layer = _layer(view)
    write = model.parts.attention_write(layer)
    weights = model.output_weights(layer)
    return sum_of(layer, view.rows, view.z, entering, view.values(), weights, write)


class LayerSums:
    """What every layer's attention added, by the model and by its parts, in whichever order."""

    def __init__(self, real: Bool[Tensor, "batch pos"]) -> None:
        """Begin a pass whose padding is left out."""
        self._real = real
        self._one: dict[int, Tensor] = {}
        self._gaps: list[Tensor] = []

    def meet(self, layer: int, value: Float[Tensor, "batch pos d_model"]) -> None:
        """Keep the first of a layer's two; measure the gap when the second comes."""
        value = value * self._real[..., None]
        other = self._one.pop(layer, None)
        if other is None:
            self._one[layer] = value
        else:
            largest = torch.maximum(value.abs().max(), other.abs().max()).clamp_min(1e-30)
            self._gaps.append((value - other).abs().max() / largest)

    def check(self, model: HeadModel) -> None:
        """Raise HeadscopeError where a layer's parts do not sum to what the model added."""
        exact = model.dtype in (torch.float32, torch.float64)
        allowed = _TOLERANCE if exact else _HALF_TOLERANCE
        worst = float(torch.stack(self._gaps).max())
        if not worst <= allowed or self._one:
            raise HeadscopeError(
                f"what attention of {model.name} adds is not the sum of what its heads move (a "
                f"gap of {worst:.2g} of the largest entry, allowed {allowed:.2g}), so its flow is "
                "not to be trusted; please report the model."
            )


def need_parts(model: HeadModel) -> None:
    """Raise UnsupportedModelError where attention's write cannot be split by head and key."""
    for need in ("attention_write", "values"):
        if need in model.limits:
            raise UnsupportedModelError(model.limits[need])
    need_attention(model)


def need_attention(model: HeadModel) -> None:
    """Raise UnsupportedModelError where layers without attention may move tokens unseen."""
    others = sorted(set(range(model.shape.n_layers)) - set(model.shape.attention_layers))
    if others:
        raise UnsupportedModelError(
            f"{model.name} has no attention in {len(others)} of its layers (the first is "
            f"{others[0]}), and how these mix tokens is not shown: flow over all layers is not "
            "defined for it."
        )


def query_chunks(
    model: HeadModel, length: int, bytes_per_query: int, options: RunOptions, halvings: int = 0
) -> Iterator[Int[Tensor, " query"]]:
    """All query positions in runs that fit the memory for a chunk, on the CPU."""
    budget = chunk_bytes(model.device, options.memory_bytes) >> halvings
    return chunks(torch.arange(length), bytes_per_query, budget)


def texts_per_pass(probe: Probe) -> int:
    """Texts of one pass where the work per text outweighs the pass: few, as rows are of all."""
    return max(1, 512 // probe.length)


def over_heads(
    model: HeadModel, values: Float[np.ndarray, "layer head *rest"]
) -> Float[np.ndarray, "layer head *rest"]:
    """Values of all heads, NaN at those that do not exist."""
    shape = model.shape
    present = np.zeros((shape.n_layers, shape.n_heads), bool)
    for head in shape.heads:
        present[head] = True
    found = values.astype(np.float64)
    found[~present] = np.nan
    return found


def existing(model: HeadModel, layer: int) -> Float[Tensor, " head"]:
    """1 for heads of a layer that exist, 0 for those that were removed; on the device."""
    shape = model.shape
    kept = [
        HeadIndex(layer, head, shape.stack) not in shape.removed for head in range(shape.n_heads)
    ]
    return torch.tensor(kept, dtype=torch.float32).to(model.device)


def texts_of(model: HeadModel, probe: Probe) -> tuple[tuple[str, ...], ...]:
    """Texts of a probe's tokens."""
    return tuple(tuple(token_texts(model.tokenizer, row)) for row in probe.host.tokens.tolist())


def places(probe: Probe, at: "str | Tensor") -> Bool[Tensor, "batch pos"]:
    """Positions as they are given, or by name: a mark, ``last`` or ``all`` real ones of each text.

    Raises:
        InputError: if there is no such mark, the shape is another, or one is at padding.
    """
    probe = probe.host
    if not isinstance(at, str):
        given = torch.as_tensor(at).cpu()
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
        raise InputError("some of the positions given are padding.")
    return given


def _layer(view: TapView) -> int:
    return int(view.tap.layer or 0)
