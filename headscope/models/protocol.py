"""``HeadModel``: the interface that the rest of headscope uses to run models."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from headscope.base.result import Glance, reasons, sizes
from headscope.base.stacks import Stack, all_causal, grid_of
from headscope.edits import Heads, Span, head_list
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import ModelShape
from headscope.views import (
    AttentionRows,
    HeadWeights,
    Norm,
    QueryKey,
    QueryKeys,
    Rotation,
    Unembedding,
)


@dataclass(frozen=True, eq=False)
class AttentionWrite:
    """Map from one layer's head outputs to the residual stream.

    ``sum over heads of z @ W_O + bias``, with ``W_O`` of ``model.output_weights``; where a norm
    follows attention (gemma2, gemma3, olmo2), that norm of it.

    Attributes:
        bias: of the output projection, the family's multiplier included.
        norm: norm after attention, the multiplier in its gain and bias; None where there is none.
    """

    bias: Float[Tensor, " d_model"]
    norm: Norm | None

    def read_by(self, direction: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """Direction that reads ``z @ W_O`` as ``direction`` reads the stream, norm's scale at 1."""
        if self.norm is None:
            return direction
        read = direction * self.norm.gain.float()
        return read - read.mean(-1, keepdim=True) if self.norm.centred else read

    def scale(self, head_sum: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any"]:
        """Denominator of the norm after attention; 1 where there is none."""
        if self.norm is None:
            return torch.ones_like(head_sum[..., 0], dtype=torch.float32)
        return self.norm.scale(head_sum)

    def constant(
        self,
        direction: Float[Tensor, "*any d_model"],
        scale: Float[Tensor, "*any"],
    ) -> Float[Tensor, "*any"]:
        """What belongs to no head, along a direction: biases of projection and norm."""
        constant = self.read_by(direction) @ self.bias.float() / scale
        if self.norm is not None:
            constant = constant + direction @ self.norm.bias.float()
        return constant

    def folded(
        self, W_O: Float[Tensor, "head d_head d_model"]
    ) -> Float[Tensor, "head d_head d_model"]:
        """Output weights as they reach the stream with the scale of a norm at 1."""
        return self.vectors(W_O, torch.ones_like(W_O[..., 0]))

    def vectors(
        self, writes: Float[Tensor, "*any d_model"], scale: Float[Tensor, "*any"]
    ) -> Float[Tensor, "*any d_model"]:
        """What ``z @ W_O`` of single heads adds to the stream, with the norm's scale held."""
        if self.norm is None:
            return writes
        centred = writes - writes.mean(-1, keepdim=True) if self.norm.centred else writes
        return centred * self.norm.gain.float() / scale.unsqueeze(-1)


@runtime_checkable
class HasWrites(Protocol):
    """The part of a model that knows how heads reach the residual stream."""

    @property
    def shape(self) -> ModelShape:
        """Gives the layers that have attention."""

    @property
    def parts(self) -> Any:
        """Gives ``attention_write``."""


def unmeasured_write(model: HasWrites) -> dict[str, str]:
    """Limit of a model with a norm after attention that cannot be held fixed; else none."""
    try:
        for layer in model.shape.attention_layers:
            model.parts.attention_write(layer)
    except UnsupportedModelError as error:
        return {"attention_write": str(error)}
    return {}


# Not from typing: before Python 3.12 that one computes every property of what it checks.


@runtime_checkable
class LayerView(Protocol):
    """What one attention layer of a running pass can be asked, once it is complete.

    Readers reach it through :class:`headscope.models.taps.TapView`.
    """

    def rows(self, query_pos: Int[Tensor, " query"]) -> AttentionRows:
        """Exact softmax rows of these queries, in fp32."""

    def values(self) -> Float[Tensor, "batch kv_head key d_head"]:
        """Value vectors as attention used them."""

    def query_keys(self, query_pos: Int[Tensor, " query"]) -> QueryKeys:
        """Queries at these positions and keys, as attention used them, in fp32.

        Raises:
            UnsupportedModelError: if this way of running the model does not show them.
        """


@runtime_checkable
class Edit(Protocol):
    """An intervention on heads during a forward pass.

    ``site`` says what is edited: ``z`` (attention-weighted values ``[batch pos head d_head]``),
    ``query``, ``key``, ``value`` (as attention uses them, ``[batch head pos d_head]``, keys and
    values with key/value heads) or ``pattern`` (``[batch head query key]``).
    """

    @property
    def site(self) -> Literal["z", "query", "key", "value", "pattern"]:
        """What is edited."""

    @property
    def layers(self) -> frozenset[int]:
        """Layers that it touches."""

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return the edited value; the input is left as it is."""


@runtime_checkable
class ModelParts(Protocol):
    """What stands between weights and what they do: norms, positions, embedding, first MLP."""

    def input_norm(self, layer: int) -> Norm:
        """Norm between the residual stream and one layer's attention, measured.

        Raises:
            UnsupportedModelError: if something else is there.
        """

    def rotation(self, layer: int) -> Rotation:
        """Rotary positions of one layer, measured; no planes where there are none.

        Raises:
            UnsupportedModelError: if queries and keys are changed by more than a norm and a
                rotation.
        """

    def query_key(self, layer: int) -> QueryKey:
        """What turns queries and keys as weights give them into those of the scores, measured.

        Raises:
            UnsupportedModelError: if it is more than norms, a rotation and constant multipliers.
        """

    def need_values(self, layer: int) -> None:
        """Refuse where the values of a layer are not what its weights give.

        Raises:
            UnsupportedModelError: with the reason.
        """

    @property
    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding as it enters the first block, without positions.

        Raises:
            UnsupportedModelError: if a norm or a projection is in between.
        """

    def first_mlp(self, residual: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the first block adds to each row when its attention writes nothing."""

    def layer_inputs(
        self, tokens: Int[Tensor, "batch pos"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """Residual stream that enters each of these layers."""

    def attention_write(self, layer: int) -> AttentionWrite:
        """How head outputs of one layer reach the residual stream.

        Raises:
            UnsupportedModelError: if what stands in between is not a norm, or cannot be told.
        """


@runtime_checkable
class HeadModel(Protocol):
    """A language model seen head by head. ``hf.py`` and ``bridge.py`` implement it.

    Attributes:
        name: as it was loaded; of an absolute path the last part.
    """

    name: str
    shape: ModelShape
    tokenizer: Any | None
    path: Literal["hf", "bridge"]
    revision: str | None

    @property
    def device(self) -> torch.device:
        """Where token ids go."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""

    @property
    def limits(self) -> Mapping[str, str]:
        """What this family cannot be asked, and why: e.g. ``{"linear_write": "gemma2 ..."}``."""

    @property
    def unembedding(self) -> Unembedding:
        """Current final norm and unembedding: hold it for a call, never longer."""

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        real: Bool[Tensor, "batch pos"] | None = None,
        edits: Sequence[Edit] = (),
        logits_at: Int[Tensor, " at"] | None = None,
        prompt: int | None = None,
        grad: bool = False,
    ) -> Float[Tensor, "batch at d_vocab"]:
        """Logits of a run with edits of heads: short for :meth:`run` with edits as writes.

        Args:
            tokens: token ids.
            real: False at padding (either side); None means no padding.
            edits: applied in order.
            logits_at: positions whose logits are returned; None means all, an empty tensor none.
            prompt: positions from this one on count as decoding, for edits that ask; default: the
                whole text is a prompt.
            grad: track gradients.

        Raises:
            HeadscopeError: if another thread has a scope of edits open on this model.
        """

    @property
    def stacks(self) -> Mapping[str, Stack]:
        """Attention stacks by name; a text model with a single one has it under an empty name."""

    def run(
        self,
        batch: Any,
        *,
        reads: Mapping[Any, Callable[[Any], Any]] = ...,
        writes: Mapping[Any, Callable[[Tensor, Span], Tensor]] = ...,
        until: Any = None,
        logits_at: Int[Tensor, " at"] | None = None,
        prompt: int | None = None,
        grad: bool = False,
    ) -> Float[Tensor, "batch at d_vocab"] | None:
        """Run the model once, reading and writing named points of the computation.

        It runs in evaluation mode and in its own types. At a tap that is both written and read,
        the reader sees what was written.

        Args:
            batch: a probe, a :class:`headscope.base.batches.Batch`, or token ids ``[batch pos]``.
            reads: ``{tap: read}``; ``read(view)`` is called as the pass comes by, with a
                :class:`headscope.models.taps.TapView` that is valid during the call.
            writes: ``{tap: write}``; ``write(value, span)`` returns the value to go on with.
            until: tap after which the pass stops.
            logits_at: positions whose logits are returned; None: all; empty: none, and then the
                pass stops once every tap was seen.
            prompt: positions from this one on count as decoding, for writes that ask; default: the
                whole text is a prompt.
            grad: track gradients; what reads see is then part of the graph.

        Returns:
            Logits; None where the pass stops earlier or none were asked for.

        Raises:
            InputError: if a tap is not one of the model's.
            UnsupportedModelError: if this family does not show it.

        Example:
            >>> norms = {}
            >>> def keep(view):
            ...     norms[view.tap.layer] = view.value.norm(dim=-1).mean().item()
            >>> _ = model.run(probe, reads={("resid_post", layer): keep for layer in range(2)})
            >>> sorted(norms)
            [0, 1]
        """

    def edited(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """Scope in which every pass is edited, also those of generation; restored after."""

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """``W_O`` of one layer, cheaply."""

    def weights(self, layer: int) -> HeadWeights:
        """All attention weights of one layer; key/value heads not repeated."""

    @property
    def parts(self) -> ModelParts:
        """What weight-level readings need besides the weights."""

    def digest(self) -> str:
        """SHA-256 that stands for all bytes of the weights: which model this was."""


def need_model(model: object) -> None:
    """Refuse what is not a loaded model, as a name or a module of transformers.

    Raises:
        InputError: with what to do.

    Example:
        >>> need_model(hs.load())
    """
    if not hasattr(type(model), "limits") and not hasattr(model, "limits"):
        given = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise InputError(f"{given} is not a loaded model: give what hs.load returns.")


def lacks(model: HeadModel, need: str) -> str | None:
    """Return why a model cannot give what is needed; None where it can.

    Args:
        model: that is asked.
        need: a key of ``model.limits`` (``one_sequence``: keys and queries of one text), or
            ``bidirectional``: queries that see later keys.

    Example:
        >>> lacks(model, "causal") is None
        True
    """
    need_model(model)
    if need == "bidirectional" and all_causal(model.stacks):
        return f"{model.name} reads from left to right, so no token sees the ones after it."
    if need == "patches" and grid_of(model.stacks) is None:
        return f"{model.name} reads texts, whose positions are tokens and not patches of an image."
    return model.limits.get(need)


def views_of(model: Any) -> tuple[HeadModel, ...]:
    """The attention stacks of a model with several, each as a model; else the model itself.

    Example:
        >>> views_of(model) == (model,)
        True
    """
    view = getattr(model, "stack", None)
    return tuple(view(name) for name in model.stacks) if callable(view) else (model,)


def stack_of(model: Any, heads: Heads | None = None, stack: str | None = None) -> HeadModel:
    """The attention stack that a name or heads choose, as a model.

    Args:
        model: of one stack, which is returned as it is, or of several.
        heads: all of one stack.
        stack: its name; None: that of the heads.

    Raises:
        InputError: if neither chooses, both choose others, or the model has no such stack.

    Example:
        >>> stack_of(model, "L0H1") is model
        True
    """
    need_model(model)
    named = dict.fromkeys(head.stack for head in head_list(heads or ()))
    if stack is not None:
        named = dict.fromkeys([stack, *(one for one in named if one)])
    if len(views_of(model)) == 1:
        own = next(iter(model.stacks))
        if other := [one for one in named if one not in ("", own)]:
            raise InputError(
                f"{model.name} has no stack {other[0]!r} here: "
                + (f"it is the stack {own!r}." if own else "it has a single one.")
            )
        return cast(HeadModel, model)
    chosen = [one for one in named if one]
    if len(named) == 1 and chosen:
        return cast(HeadModel, model.stack(chosen[0]))
    names = ", ".join(model.stacks)
    if not chosen:
        raise InputError(
            f"{model.name} has the attention stacks {names}: say which, e.g. stack='cross', or "
            "name heads as X0H1."
        )
    raise InputError(
        f"heads of {', '.join(one or 'no named stack' for one in named)} were given: choose those "
        f"of one stack ({names}) a call."
    )


def embedding_of(model: HeadModel, pooling: str | None = None) -> HeadModel:
    """The model with its embeddings of whole examples in the place of logits.

    What it gives at every position is the one vector that it makes of the example.

    Args:
        model: from :func:`headscope.load`.
        pooling: which vector; see :class:`headscope.metrics.EmbeddingMetric`.

    Raises:
        UnsupportedModelError: if the model does not give the vector that was asked for, or is seen
            through transformer-lens.
    """
    embedded = getattr(model, "embedded", None)
    if embedded is None:
        raise UnsupportedModelError(
            f"{model.name} is seen through transformer-lens, which gives logits and no embeddings: "
            "load the transformers model itself."
        )
    found: HeadModel = embedded(pooling)
    return found


def glance_of(model: HeadModel) -> Glance:
    """Size, path and limits of a model, without reading its weights."""
    shape = model.shape
    heads = f"{shape.n_heads} heads"
    if shape.n_kv_heads != shape.n_heads:
        heads += f" on {shape.n_kv_heads} key/value heads"
    rows = [
        ("heads", f"{sizes(('layer',), (shape.n_layers,))} of {heads}, d_head {shape.d_head}"),
        ("width", f"d_model {shape.d_model}, vocabulary {shape.d_vocab:,}"),
        ("context", "no limit" if shape.n_ctx is None else f"{shape.n_ctx:,} tokens"),
    ]
    grid = grid_of(model.stacks)
    if grid is not None:
        channels, height, width = grid.size
        rows[1:] = [
            ("width", f"d_model {shape.d_model}, classes {shape.n_logits:,}"),
            ("images", f"{channels} channels of {width} x {height} pixels (width x height)"),
            ("patches", sizes(("row", "column"), (grid.rows, grid.columns))),
            ("in front", ", ".join(grid.specials) or "no special tokens"),
        ]
    windows = sorted({one for one in shape.windows if one is not None})
    if windows:
        rows.append(("windows", ", ".join(f"{one:,} tokens" for one in windows)))
    if len(shape.attention_layers) < shape.n_layers:
        rows.append(("attention", f"in {len(shape.attention_layers)} of the layers"))
    if shape.removed:
        rows.append(("pruned", f"{len(shape.removed)} heads"))
    rows += [(f"no {names}", why) for names, why in reasons(model.limits, model.name)]
    kind = str(model.dtype).removeprefix("torch.")
    return Glance(
        f"model {model.name}",
        [f"{kind} on {model.device}", f"read through {model.path}"],
        ("what", ""),
        rows,
        hint="hs.score(model), hs.circuits.survey(model), hs.explain('L1H0', model)",
    )
