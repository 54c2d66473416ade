"""Taps: named points of a model's computation, and what a pass hands to whoever reads one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from headscope.edits import Span
from headscope.errors import InputError, nearest
from headscope.heads import ModelShape
from headscope.models.protocol import LayerView
from headscope.rows import AttentionRows

Site = Literal[
    "embed",
    "resid_pre",
    "query",
    "key",
    "value",
    "pattern",
    "z",
    "attn_out",
    "mlp_out",
    "resid_post",
    "final_resid",
    "logits",
]
SITES: tuple[str, ...] = get_args(Site)
ATTENTION_SITES = ("query", "key", "value", "pattern", "z")
RESIDUAL_SITES = ("embed", "resid_pre", "attn_out", "mlp_out", "resid_post", "final_resid")
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
        """Return the tap if a model has it.

        Args:
            name: of the model.
            shape: of the model.

        Raises:
            InputError: if it does not.
        """
        if self.site not in SITES:
            raise InputError(nearest(self.site, SITES, kind="site"))
        if self.stack:
            raise InputError(f"{name} has a single attention stack, not {self.stack!r}.")
        if self.site in _WHOLE:
            if self.layer is not None:
                raise InputError(f"{self.site} belongs to no layer: write Tap({self.site!r}).")
        elif self.layer is None or not 0 <= self.layer < shape.n_layers:
            raise InputError(
                f"{self.site} needs a layer of {name}, 0 to {shape.n_layers - 1}; got {self.layer}."
            )
        elif self.site in (*ATTENTION_SITES, "attn_out") and self.layer not in (
            shape.attention_layers
        ):
            raise InputError(f"{name} has no attention in layer {self.layer}.")
        return self


@dataclass(frozen=True, eq=False)
class TapView:
    """What one tap holds in a running pass. Valid only during the call that receives it.

    Attributes:
        tap: where it is.
        span: which positions the pass runs, and which of them are decoding.
        view: the attention layer, at the sites of attention.
        seen: the value; None where it would be a whole pattern.
    """

    tap: Tap
    span: Span
    view: LayerView | None = None
    seen: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The tensor at this tap, shaped as :class:`Tap` says, in the model's type.

        A pattern is computed whole when it is asked for: prefer :meth:`rows`.
        """
        if self.seen is not None:
            return self.seen
        return self.rows(slice(None)).pattern

    def rows(self, query_pos: Int[Tensor, " query"] | slice) -> AttentionRows:
        """Exact softmax rows of these queries, in fp32, at a site of attention.

        Args:
            query_pos: positions of queries, or a slice of them.

        Raises:
            InputError: at other sites, or in a pass with gradients.
        """
        if self.view is None:
            raise InputError(f"{self.tap} has no attention rows here: read the tap 'pattern'.")
        if isinstance(query_pos, slice):
            query_pos = torch.arange(self.view.n_queries)[query_pos]
        return self.view.rows(query_pos)

    def keep_rows(self) -> Callable[[Int[Tensor, " query"]], AttentionRows] | None:
        """Return what computes rows after the pass too, holding the layer's queries and keys.

        None where the model computes whole patterns, which are not to be held: run it again.
        """
        keep = getattr(self.view, "keep_rows", None)
        return None if keep is None else keep()


@runtime_checkable
class TextBatch(Protocol):
    """Token sequences and which of their positions are real: a probe is one."""

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Token ids."""

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """False at padding."""


Read = Callable[[TapView], Any]
Write = Callable[[Tensor, Span], Tensor]


def checked(
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
        found[tap] = _held(tap, function) if writing else function
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
