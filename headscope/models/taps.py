"""Taps: named points of a model's computation, and the views that their readers receive."""

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
# Sites of the whole model, outside layers.
_WHOLE = ("embed", "final_resid", "logits")


class Tap(NamedTuple):
    """A site in a layer of a stack, where a pass can be read or written.

    Sites and the shapes of their values:

    - ``embed``: input of the first block, ``[batch pos d_model]``
    - ``resid_pre``, ``resid_post``: input and output of a block, ``[batch pos d_model]``
    - ``query``, ``key``, ``value``: as attention uses them, ``[batch head pos d_head]``, keys and
      values by key/value head
    - ``pattern``: attention probabilities ``[batch head query key]``; readers request rows
    - ``z``: attention-weighted values ``[batch pos head d_head]``
    - ``head_sum``: what the output projection makes of ``z``, the sum over heads of ``z @ W_O``
      and its bias, before norms and multipliers, ``[batch pos d_model]``
    - ``attn_out``, ``mlp_out``: what attention and the MLP add to the stream, norms after them and
      multipliers included, ``[batch pos d_model]``
    - ``final_resid``: input of the final norm, ``[batch pos d_model]``
    - ``logits``: ``[batch at d_vocab]``

    Attributes:
        site: name of the site.
        layer: the model's own layer number; None for sites of the whole model.
        stack: name of the attention stack; empty in a model with a single one.
    """

    site: str
    layer: int | None = None
    stack: str = ""

    def __str__(self) -> str:
        """Name the site and the layer, as in ``z of layer 3``."""
        return self.site if self.layer is None else f"{self.site} of layer {self.layer}"

    def check(self, name: str, shape: ModelShape) -> "Tap":
        """Check that a model or one of its stacks has the tap; return it without the stack's name.

        Args:
            name: name of the model, for messages.
            shape: shape of the model.

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
                raise InputError(f"{self.site} is not in a layer: write Tap({self.site!r}).")
        elif self.layer is None or not 0 <= self.layer < shape.n_layers:
            raise InputError(
                f"{self.site} needs a layer of {name}, 0 to {shape.n_layers - 1}; got {self.layer}."
            )
        elif self.site in _OF_ATTENTION and self.layer not in shape.attention_layers:
            raise InputError(f"{name} has no attention in layer {self.layer}.")
        return Tap(self.site, self.layer)


@dataclass(frozen=True, eq=False)
class TapView:
    """Value of a tap in a running pass, valid only during the call that receives it.

    Attributes:
        tap: tap that is read.
        span: positions that the pass runs, and which of them are decoding.
        view: attention layer, at the sites ``z`` and ``pattern``.
        seen: the value; None if it would be a whole pattern.
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
        """Tensor at this tap, with the shape given in :class:`Tap`, in the model's dtype.

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
        """Return a function that computes rows also after the pass; it holds the queries and keys.

        None if the model computes whole patterns, which should not be kept: run it again.
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
    """Token sequences with a padding mask; probes are text batches."""

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Token ids."""

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """False at padding."""


class Texts(NamedTuple):
    """Token sequences that are not a probe.

    Attributes:
        inputs: further inputs of the model, by argument name of its ``forward``; the first axis is
            examples.
    """

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"] | None = None
    inputs: Mapping[str, Tensor] = MappingProxyType({})

    @classmethod
    def of(cls, batch: "Batch | TextBatch | Texts | Int[Tensor, 'batch pos']") -> "Texts":
        """Convert any accepted input of a run."""
        if isinstance(batch, Tensor):
            return cls(batch)
        if (
            isinstance(batch, Batch) and batch.sequence == PATCHES
        ):  # without explicit position numbers
            return cls(torch.zeros(len(batch), 1, dtype=torch.long), None, batch.inputs)
        if isinstance(batch, Batch):
            beside = {name: one for name, one in batch.inputs.items() if name != TOKENS}
            return cls(batch.tokens, batch.real, beside)
        return cls(batch.tokens, batch.real, getattr(batch, "inputs", {}))

    def repeated(self, copies: int) -> "Texts":
        """Repeat the whole batch, with copies one after another."""
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
    """Object that reads a pass and holds the results."""

    def reads(self, shape: ModelShape) -> Mapping[Any, Read]:
        """Read functions by tap, or by pairs ``(site, layer)``."""


def at_layers(shape: ModelShape, read: Read, site: str = "z") -> Reads:
    """Use one function as the reader of every attention layer.

    Args:
        shape: shape of the model.
        read: function that takes a :class:`TapView`.
        site: attention site; at ``z`` a view also has rows, values, queries and keys.
    """
    return {Tap(site, layer): read for layer in shape.attention_layers}


def at_final(read: Callable[[Tensor], Any]) -> Reads:
    """Use a function as the reader of the final norm's input."""
    return {Tap("final_resid"): lambda view: read(view.value)}


@dataclass(frozen=True, eq=False)
class BlockStates:
    """One block of a running pass: ``leaving = entering + attention + mlp``, up to rounding.

    Valid only during the call that receives it. Each part is recorded where the model computes it,
    not as a difference, except in blocks without attention.

    Attributes:
        layer: the model's layer number.
        attention: contribution of attention, including a norm after it and multipliers; None if the
            block has no attention.
        mlp: contribution of the MLP (or experts); without attention, everything that the block
            adds.
        head_sum: output of the output projection, ``sum over heads of z @ W_O``, with its bias and
            without multipliers; None if the block has no attention.
    """

    layer: int
    entering: Float[Tensor, "batch pos d_model"]
    leaving: Float[Tensor, "batch pos d_model"]
    attention: Float[Tensor, "batch pos d_model"] | None
    mlp: Float[Tensor, "batch pos d_model"]
    head_sum: Float[Tensor, "batch pos d_model"] | None


def at_blocks(shape: ModelShape, read: Callable[[BlockStates], Any]) -> Reads:
    """Use a function as the reader of whole blocks, called as each block completes.

    Args:
        shape: shape of the model.
        read: function of a block's states, called after the readers of its attention layer.
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
    """Collects one block's states until it is complete."""

    layer: int
    read: Callable[[BlockStates], Any]
    held: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, view: TapView) -> None:
        """Store a copy of one tap, since some families overwrite their inputs."""
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
    """Edits of heads in one layer, in order, as the write of their tap."""

    layer: int
    edits: tuple[AnyEdit, ...]

    def __call__(self, value: Tensor, span: Span) -> Tensor:
        """Edit the positions that a pass runs."""
        for edit in during(self.edits, span):
            value = edit(self.layer, value)
        return value

    @property
    def heads(self) -> tuple[int, ...] | None:
        """Edited heads; None if an edit does not declare them."""
        return edited_heads(self.edits, self.layer)

    def acting(self, span: Span) -> "Edited":
        """Edits that apply to some of a pass's positions."""
        return Edited(self.layer, tuple(edit for edit in self.edits if during((edit,), span)))

    def among(self, heads: tuple[int, ...]) -> "Edited":
        """The same edits for a value that holds only some heads."""
        return Edited(self.layer, tuple(among(edit, self.layer, heads) for edit in self.edits))


def writes_of(edits: Sequence[Edit]) -> dict[Tap, Edited]:
    """Group edits of heads by the taps that they write.

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
    """Validate functions by tap; plain pairs ``(site, layer)`` are converted to taps.

    Raises:
        InputError: if a key is not a tap of the model.
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
    """Wrap a write to check that it returns the same shape, dtype and device."""

    def held(value: Tensor, span: Span) -> Tensor:
        made: Any = write(value, span)
        if not isinstance(made, Tensor):
            raise InputError(
                f"the write of {tap} returned {type(made).__name__}: return the replacement tensor."
            )
        if made.shape != value.shape:
            raise InputError(
                f"the write of {tap} returned {list(made.shape)} for {list(value.shape)}: return "
                "the same shape."
            )
        kept: Tensor = made.to(value)
        return (
            kept.contiguous() if tap.site == "z" else kept
        )  # output projections create views of it

    return held
