"""Taps: named points of a model's computation, and what a pass hands to their readers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from headscope.base.batches import PATCHES, TOKENS, Batch
from headscope.edits import AnyEdit, Span, among, during, edited_heads
from headscope.errors import InputError, nearest
from headscope.heads import ModelShape
from headscope.models.protocol import Edit, LayerView
from headscope.views import AttentionRows, QueryKeys

Site = Literal[
    "embed",
    "resid_pre",
    "query",
    "key",
    "value",
    "pattern",
    "z",
    "head_sum",
    "attn_out",
    "mlp_out",
    "resid_post",
    "final_resid",
    "logits",
]
SITES: tuple[str, ...] = get_args(Site)
ATTENTION_SITES = ("query", "key", "value", "pattern", "z")
RESIDUAL_SITES = ("embed", "resid_pre", "attn_out", "mlp_out", "resid_post", "final_resid")
_OF_ATTENTION = (*ATTENTION_SITES, "head_sum", "attn_out")
# Sites of the whole model, which belong to no layer.
_WHOLE = ("embed", "final_resid", "logits")


class Tap(NamedTuple):
    """A site in a layer of a stack: where a pass is read or written.

    Sites and the shapes of their values:

    - ``embed``: what enters the first block, ``[batch pos d_model]``
    - ``resid_pre``, ``resid_post``: what enters and leaves a block, ``[batch pos d_model]``
    - ``query``, ``key``, ``value``: as attention uses them, ``[batch head pos d_head]``, keys and
      values by key/value head
    - ``pattern``: attention probabilities ``[batch head query key]``; a reader takes rows of it
    - ``z``: attention-weighted values ``[batch pos head d_head]``
    - ``head_sum``: what the output projection makes of ``z``, the sum over heads of ``z @ W_O``
      and its bias, before norms and multipliers, ``[batch pos d_model]``
    - ``attn_out``, ``mlp_out``: what attention and the MLP add to the stream, norms after them and
      multipliers included, ``[batch pos d_model]``
    - ``final_resid``: what enters the final norm, ``[batch pos d_model]``
    - ``logits``: ``[batch at d_vocab]``

    Attributes:
        site: see above.
        layer: the model's own layer number; None at sites of the whole model.
        stack: name of the attention stack; empty in a model with a single one.
    """

    site: str
    layer: int | None = None
    stack: str = ""

    def __str__(self) -> str:
        """Name the site and the layer, as in ``z of layer 3``."""
        return self.site if self.layer is None else f"{self.site} of layer {self.layer}"

    def check(self, name: str, shape: ModelShape) -> "Tap":
        """Return the tap, without the name of the stack, if a model or one of its stacks has it.

        Args:
            name: of the model.
            shape: of the model.

        Raises:
            InputError: if it does not.
        """
        if self.site not in SITES:
            raise InputError(nearest(self.site, SITES, kind="site"))
        if self.stack not in ("", shape.stack):
            here = (
                f"the attention stack {shape.stack!r}"
                if shape.stack
                else "a single attention stack"
            )
            raise InputError(f"{name} has {here}, not {self.stack!r}.")
        if self.site in _WHOLE:
            if self.layer is not None:
                raise InputError(f"{self.site} belongs to no layer: write Tap({self.site!r}).")
        elif self.layer is None or not 0 <= self.layer < shape.n_layers:
            raise InputError(
                f"{self.site} needs a layer of {name}, 0 to {shape.n_layers - 1}; got {self.layer}."
            )
        elif self.site in _OF_ATTENTION and self.layer not in shape.attention_layers:
            raise InputError(f"{name} has no attention in layer {self.layer}.")
        return Tap(self.site, self.layer)


@dataclass(frozen=True, eq=False)
class TapView:
    """What one tap holds in a running pass. Valid only during the call that receives it.

    Attributes:
        tap: where it is.
        span: which positions the pass runs, and which of them are decoding.
        view: the attention layer, at ``z`` and ``pattern``.
        seen: the value; None where it would be a whole pattern.
    """

    tap: Tap
    span: Span
    view: LayerView | None = None
    seen: Tensor | None = None

    @property
    def layer(self) -> int:
        """The model's layer number; -1 at sites of the whole model."""
        return -1 if self.tap.layer is None else self.tap.layer

    @property
    def n_queries(self) -> int:
        """Number of positions that the pass runs."""
        return self.span.count

    @property
    def value(self) -> Tensor:
        """The tensor at this tap, shaped as :class:`Tap` says, in the model's type.

        A pattern is computed whole when it is asked for: prefer :meth:`rows`.
        """
        if self.seen is not None:
            return self.seen
        return self.rows(slice(None)).pattern

    @property
    def z(self) -> Tensor:
        """Attention-weighted values ``[batch pos head d_head]``, at the tap ``z``.

        Raises:
            InputError: at other sites.
        """
        if self.tap.site != "z" or self.seen is None:
            raise InputError(f"{self.tap} is not z: read the tap 'z'.")
        return self.seen

    def rows(self, query_pos: Int[Tensor, " query"] | slice) -> AttentionRows:
        """Exact softmax rows of these queries, in fp32, at ``z`` and ``pattern``.

        Args:
            query_pos: positions of queries, or a slice of them.

        Raises:
            InputError: at other sites, or in a pass with gradients.
        """
        if isinstance(query_pos, slice):
            query_pos = torch.arange(self.n_queries)[query_pos]
        return self._attention.rows(query_pos)

    def values(self) -> Tensor:
        """Value vectors ``[batch kv_head key d_head]`` as attention used them.

        Raises:
            InputError: as :meth:`rows`.
            UnsupportedModelError: if this way of running the model does not show them.
        """
        return self._attention.values()

    def query_keys(self, query_pos: Int[Tensor, " query"]) -> QueryKeys:
        """Queries at these positions and keys, as attention used them, in fp32.

        Raises:
            InputError: as :meth:`rows`.
            UnsupportedModelError: if this way of running the model does not show them.
        """
        return self._attention.query_keys(query_pos)

    def keep_rows(self) -> Callable[[Int[Tensor, " query"]], AttentionRows] | None:
        """Return what computes rows after the pass too, holding the layer's queries and keys.

        None where the model computes whole patterns, which are not to be held: run it again.
        """
        keep = getattr(self.view, "keep_rows", None)
        return None if keep is None else keep()

    @property
    def _attention(self) -> LayerView:
        if self.view is None:
            raise InputError(f"{self.tap} has no attention rows here: read the tap 'pattern'.")
        return self.view


@runtime_checkable
class TextBatch(Protocol):
    """Token sequences and which of their positions are real: a probe is one."""

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Token ids."""

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """False at padding."""


class Texts(NamedTuple):
    """Token sequences that are not a probe.

    Attributes:
        inputs: what else the model reads, by the name that its ``forward`` has for it; examples
            are the first axis.
    """

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"] | None = None
    inputs: Mapping[str, Tensor] = MappingProxyType({})

    @classmethod
    def of(cls, batch: "Batch | TextBatch | Texts | Int[Tensor, 'batch pos']") -> "Texts":
        """What a run was given, whatever it was given as."""
        if isinstance(batch, Tensor):
            return cls(batch)
        if (
            isinstance(batch, Batch) and batch.sequence == PATCHES
        ):  # whose positions nobody numbered
            return cls(torch.zeros(len(batch), 1, dtype=torch.long), None, batch.inputs)
        if isinstance(batch, Batch):
            beside = {name: one for name, one in batch.inputs.items() if name != TOKENS}
            return cls(batch.tokens, batch.real, beside)
        return cls(batch.tokens, batch.real, getattr(batch, "inputs", {}))

    def repeated(self, copies: int) -> "Texts":
        """The whole batch several times over, one copy after another."""
        inputs = {name: _times(value, copies) for name, value in self.inputs.items()}
        real = None if self.real is None else _times(self.real, copies)
        return Texts(_times(self.tokens, copies), real, inputs)


def _times(value: Tensor, copies: int) -> Tensor:
    return value.repeat(copies, *[1] * (value.ndim - 1))


Read = Callable[[TapView], Any]
Write = Callable[[Tensor, Span], Tensor]
Reads = dict[Tap, Read]


@runtime_checkable
class Reader(Protocol):
    """Something that reads a pass, and holds what it made of it afterwards."""

    def reads(self, shape: ModelShape) -> Mapping[Any, Read]:
        """What it reads: functions by tap, or by pairs ``(site, layer)``."""


def at_layers(shape: ModelShape, read: Read, site: str = "z") -> Reads:
    """One function as the reader of every attention layer.

    Args:
        shape: of the model.
        read: function of a :class:`TapView`.
        site: of attention; at ``z`` a view also has rows, values and matches.
    """
    return {Tap(site, layer): read for layer in shape.attention_layers}


def at_final(read: Callable[[Tensor], Any]) -> Reads:
    """A function of the residual stream that enters the final norm, as its reader."""
    return {Tap("final_resid"): lambda view: read(view.value)}


@dataclass(frozen=True, eq=False)
class BlockStates:
    """One block of a running pass: ``leaving = entering + attention + mlp``, up to rounding.

    Valid only during the call that receives it. Each part was recorded where the model computes
    it; none is the difference of others, but in a block without attention.

    Attributes:
        layer: the model's layer number.
        attention: what attention added, a norm after it and multipliers included; None where the
            block has no attention.
        mlp: what the MLP (or experts) added; without attention, all that the block added.
        head_sum: output projection's output, ``sum over heads of z @ W_O``, with its bias and
            without multipliers; None where the block has no attention.
    """

    layer: int
    entering: Float[Tensor, "batch pos d_model"]
    leaving: Float[Tensor, "batch pos d_model"]
    attention: Float[Tensor, "batch pos d_model"] | None
    mlp: Float[Tensor, "batch pos d_model"]
    head_sum: Float[Tensor, "batch pos d_model"] | None


def at_blocks(shape: ModelShape, read: Callable[[BlockStates], Any]) -> Reads:
    """A function of whole blocks as their reader, layer by layer as they complete.

    Args:
        shape: of the model.
        read: function of a block's states; its attention layer, if it has one, was read before.
    """
    found: Reads = {}
    for layer in range(shape.n_layers):
        sites = ["resid_pre", "resid_post"]
        if layer in shape.attention_layers:
            sites[1:1] = ["head_sum", "attn_out", "mlp_out"]
        gathered = _Gathered(layer, read)
        found |= {Tap(site, layer): gathered for site in sites}
    return found


@dataclass(eq=False)
class _Gathered:
    """Keeps what one block reads and writes until it is complete."""

    layer: int
    read: Callable[[BlockStates], Any]
    held: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, view: TapView) -> None:
        """Keep one tap, copied: some families write over what they were given."""
        site, copies = view.tap.site, view.tap.site not in ("resid_pre", "resid_post")
        self.held[site] = view.value.detach().to(torch.float32, copy=copies)
        if site == "resid_post":
            held, self.held = self.held, {}
            entering, leaving = held["resid_pre"], held["resid_post"]
            leaving = leaving.reshape(entering.shape)
            mlp = held["mlp_out"] if "mlp_out" in held else leaving - entering
            attention, head_sum = held.get("attn_out"), held.get("head_sum")
            self.read(BlockStates(self.layer, entering, leaving, attention, mlp, head_sum))


@dataclass(frozen=True, eq=False)
class Edited:
    """Edits of heads in one layer, in order, as the function that writes their tap."""

    layer: int
    edits: tuple[AnyEdit, ...]

    def __call__(self, value: Tensor, span: Span) -> Tensor:
        """Edit the positions that a pass runs."""
        for edit in during(self.edits, span):
            value = edit(self.layer, value)
        return value

    @property
    def heads(self) -> tuple[int, ...] | None:
        """Heads that are edited; None if an edit does not say."""
        return edited_heads(self.edits, self.layer)

    def acting(self, span: Span) -> "Edited":
        """Those edits that touch some of the positions that a pass runs."""
        return Edited(self.layer, tuple(edit for edit in self.edits if during((edit,), span)))

    def among(self, heads: tuple[int, ...]) -> "Edited":
        """The same edits for a value that holds some heads alone."""
        return Edited(self.layer, tuple(among(edit, self.layer, heads) for edit in self.edits))


def writes_of(edits: Sequence[Edit]) -> dict[Tap, Edited]:
    """Edits of heads by the taps that they write.

    Args:
        edits: applied in order.
    """
    by_tap: dict[Tap, list[AnyEdit]] = {}
    for edit in edits:
        for layer in sorted(edit.layers):
            by_tap.setdefault(Tap(edit.site, layer), []).append(edit)
    return {tap: Edited(tap.layer or 0, tuple(some)) for tap, some in by_tap.items()}


def checked_taps(
    taps: Mapping[Any, Any], name: str, shape: ModelShape, writing: bool = False
) -> dict[Tap, Any]:
    """Return functions by tap; plain pairs ``(site, layer)`` are taken as taps.

    Raises:
        InputError: if a key names no tap of the model.
    """
    found = {}
    for key, function in taps.items():
        parts = (key,) if isinstance(key, str) else tuple(key)
        if not 1 <= len(parts) <= 3:
            raise InputError(f"{key!r} is not a tap: write Tap('z', layer).")
        tap = Tap(*parts).check(name, shape)
        if not callable(function):
            what = "write(value, span)" if writing else "read(view)"
            raise InputError(f"{tap}: give a function {what}, not {function!r}.")
        plain = writing and not isinstance(function, Edited)
        found[tap] = _held(tap, function) if plain else function
    return found


def _held(tap: Tap, write: Write) -> Write:
    """The write, held to what a pass can go on with: same shape, type and device."""

    def held(value: Tensor, span: Span) -> Tensor:
        made: Any = write(value, span)
        if not isinstance(made, Tensor):
            raise InputError(
                f"the write of {tap} returned {type(made).__name__}: return the tensor to go on "
                "with."
            )
        if made.shape != value.shape:
            raise InputError(
                f"the write of {tap} returned {list(made.shape)} for {list(value.shape)}: a write "
                "keeps the shape."
            )
        kept: Tensor = made.to(value)
        return kept.contiguous() if tap.site == "z" else kept  # output projections take views of it

    return held
