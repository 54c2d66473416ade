"""``HeadModel``: the interface through which headscope runs models."""

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

    ``sum over heads of z @ W_O + bias``, with ``W_O`` from ``model.output_weights``, followed by
    the norm after attention if there is one (gemma2, gemma3, olmo2).

    Attributes:
        bias: bias of the output projection, including the family's multiplier.
        norm: norm after attention, with the multiplier in its gain and bias; None if there is none.
    """

    bias: Float[Tensor, " d_model"]
    norm: Norm | None

    def read_by(self, direction: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """Direction that reads ``z @ W_O`` as ``direction`` reads the stream, at norm scale 1."""
        if self.norm is None:
            return direction
        read = direction * self.norm.gain.float()
        return read - read.mean(-1, keepdim=True) if self.norm.centred else read

    def scale(self, head_sum: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any"]:
        """Denominator of the norm after attention; 1 if there is none."""
        if self.norm is None:
            return torch.ones_like(head_sum[..., 0], dtype=torch.float32)
        return self.norm.scale(head_sum)

    def constant(
        self,
        direction: Float[Tensor, "*any d_model"],
        scale: Float[Tensor, "*any"],
    ) -> Float[Tensor, "*any"]:
        """Part of the write that no head makes, along a direction: projection and norm biases."""
        constant = self.read_by(direction) @ self.bias.float() / scale
        if self.norm is not None:
            constant = constant + direction @ self.norm.bias.float()
        return constant

    def folded(
        self, W_O: Float[Tensor, "head d_head d_model"]
    ) -> Float[Tensor, "head d_head d_model"]:
        """Output weights with a following norm folded in, for a norm scale of 1."""
        return self.vectors(W_O, torch.ones_like(W_O[..., 0]))

    def vectors(
        self, writes: Float[Tensor, "*any d_model"], scale: Float[Tensor, "*any"]
    ) -> Float[Tensor, "*any d_model"]:
        """Contribution of single heads' ``z @ W_O`` to the stream, with the norm's scale frozen."""
        if self.norm is None:
            return writes
        centred = writes - writes.mean(-1, keepdim=True) if self.norm.centred else writes
        return centred * self.norm.gain.float() / scale.unsqueeze(-1)


@runtime_checkable
class HasWrites(Protocol):
    """A model with measured writes from heads to the residual stream."""

    @property
    def shape(self) -> ModelShape:
        """Shape, with the layers that have attention."""

    @property
    def parts(self) -> Any:
        """Parts, with ``attention_write``."""


def unmeasured_write(model: HasWrites) -> dict[str, str]:
    """Limit of a model whose norm after attention cannot be frozen; empty if it can."""
    try:
        for layer in model.shape.attention_layers:
            model.parts.attention_write(layer)
    except UnsupportedModelError as error:
        return {"attention_write": str(error)}
    return {}


# Not from typing: before Python 3.12 that one computes every property of what it checks.


@runtime_checkable
class LayerView(Protocol):
    """One attention layer of a running pass, once it is complete.

    Readers reach it through :class:`headscope.models.taps.TapView`.
    """

    def rows(self, query_pos: Int[Tensor, " query"]) -> AttentionRows:
        """Exact softmax rows of some queries, in fp32."""

    def values(self) -> Float[Tensor, "batch kv_head key d_head"]:
        """Value vectors as used by attention."""

    def query_keys(self, query_pos: Int[Tensor, " query"]) -> QueryKeys:
        """Queries at some positions and all keys, as used by attention, in fp32.

        Raises:
            UnsupportedModelError: if this path does not expose them.
        """


@runtime_checkable
class Edit(Protocol):
    """An intervention on heads during a forward pass.

    ``site`` is the edited value: ``z`` (attention-weighted values ``[batch pos head d_head]``),
    ``query``, ``key``, ``value`` (as attention uses them, ``[batch head pos d_head]``, keys and
    values with key/value heads) or ``pattern`` (``[batch head query key]``).
    """

    @property
    def site(self) -> Literal["z", "query", "key", "value", "pattern"]:
        """Site of the edit."""

    @property
    def layers(self) -> frozenset[int]:
        """Layers that the edit applies to."""

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return the edited value; the input is not modified."""


@runtime_checkable
class ModelParts(Protocol):
    """Measured parts around the weights: norms, positions, embedding, first MLP."""

    def input_norm(self, layer: int) -> Norm:
        """Norm between the residual stream and one layer's attention, measured.

        Raises:
            UnsupportedModelError: if it is not a plain norm.
        """

    def rotation(self, layer: int) -> Rotation:
        """Rotary positions of one layer, measured; without planes if there are none.

        Raises:
            UnsupportedModelError: if queries and keys go through more than a norm and a rotation.
        """

    def query_key(self, layer: int) -> QueryKey:
        """Measured map from projected queries and keys to those in attention scores.

        Raises:
            UnsupportedModelError: if there is more than norms, a rotation and constant multipliers.
        """

    def need_values(self, layer: int) -> None:
        """Raise if a layer's values are not given by its weights.

        Raises:
            UnsupportedModelError: if they are not, with the reason.
        """

    @property
    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings at the input of the first block, without positions.

        Raises:
            UnsupportedModelError: if a norm or a projection is in between.
        """

    def first_mlp(self, residual: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Contribution of the first block to each row when its attention writes nothing."""

    def layer_inputs(
        self, tokens: Int[Tensor, "batch pos"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """Residual stream at the input of some layers."""

    def attention_write(self, layer: int) -> AttentionWrite:
        """Map from one layer's head outputs to the residual stream.

        Raises:
            UnsupportedModelError: if anything but a norm is in between, or it cannot be measured.
        """


@runtime_checkable
class HeadModel(Protocol):
    """A model with access to its heads, implemented in ``models/hf`` and ``models/bridge``.

    Attributes:
        name: The name that it was loaded under (the last part of an absolute path).
    """

    name: str
    shape: ModelShape
    tokenizer: Any | None
    path: Literal["hf", "bridge"]
    revision: str | None

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""

    @property
    def limits(self) -> Mapping[str, str]:
        """Unsupported capabilities with reasons, e.g. ``{"linear_write": "gemma2 ..."}``."""

    @property
    def unembedding(self) -> Unembedding:
        """Current final norm and unembedding; do not keep it beyond a call."""

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
        """Logits of a run with edits of heads; shorthand for :meth:`run` with edits as writes.

        Args:
            tokens: token ids.
            real: False at padding (either side); None means no padding.
            edits: edits, applied in order.
            logits_at: positions of the returned logits; None: all; empty: none.
            prompt: length of the prompt; later positions count as decoding for edits with a scope.
                Default: the whole text is the prompt.
            grad: track gradients.

        Raises:
            HeadscopeError: if another thread has a scope of edits open on this model.
        """

    @property
    def stacks(self) -> Mapping[str, Stack]:
        """Attention stacks by name; a text model with a single stack has it under an empty name."""

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
        """Run the model once, with reads and writes at named points of the computation.

        The model runs in evaluation mode and in its own dtypes. At a tap with both a write and a
        read, the reader sees the written value.

        Args:
            batch: a probe, a :class:`headscope.base.batches.Batch`, or token ids ``[batch pos]``.
            reads: ``{tap: read}``; ``read(view)`` is called during the pass, with a
                :class:`headscope.models.taps.TapView` that is valid only during the call.
            writes: ``{tap: write}``; ``write(value, span)`` returns the replacement value.
            until: tap after which the pass stops.
            logits_at: positions of the returned logits; None: all; empty: none, and the pass stops
                once every tap has been read.
            prompt: length of the prompt; later positions count as decoding for writes with a scope.
                Default: the whole text is the prompt.
            grad: track gradients; values seen by reads are then part of the graph.

        Returns:
            Logits; None if the pass stops earlier or none were requested.

        Raises:
            InputError: if the model has no such tap.
            UnsupportedModelError: if this family does not expose a tap.

        Example:
            >>> norms = {}
            >>> def keep(view):
            ...     norms[view.tap.layer] = view.value.norm(dim=-1).mean().item()
            >>> _ = model.run(probe, reads={("resid_post", layer): keep for layer in range(2)})
            >>> sorted(norms)
            [0, 1]
        """

    def edited(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """Scope in which every pass is edited, including generation."""

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """``W_O`` of one layer, without the other weights."""

    def weights(self, layer: int) -> HeadWeights:
        """All attention weights of one layer, with key/value heads not repeated."""

    @property
    def parts(self) -> ModelParts:
        """Measured parts that weight-level analyses need besides the weights."""

    def digest(self) -> str:
        """SHA-256 digest of all weights, which identifies the model."""


def need_model(model: object) -> None:
    """Raise InputError for anything but a loaded model, such as a name or a transformers module.

    Raises:
        InputError: if it is not a loaded model.

    Example:
        >>> need_model(hs.load())
    """
    if not hasattr(type(model), "limits") and not hasattr(model, "limits"):
        given = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise InputError(f"{given} is not a loaded model: pass the result of hs.load.")


def lacks(model: HeadModel, need: str) -> str | None:
    """Return why a model lacks a capability; None if it has it.

    Args:
        model: model to check.
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
    """Attention stacks of a model, each as a model; the model itself if it has only one.

    Example:
        >>> views_of(model) == (model,)
        True
    """
    view = getattr(model, "stack", None)
    return tuple(view(name) for name in model.stacks) if callable(view) else (model,)


def stack_of(model: Any, heads: Heads | None = None, stack: str | None = None) -> HeadModel:
    """Attention stack chosen by name or by heads, as a model.

    Args:
        model: model with several stacks; a model with one stack is returned unchanged.
        heads: heads of a single stack.
        stack: name of the stack; None: that of the heads.

    Raises:
        InputError: if the choice is missing or contradictory, or the model has no such stack.

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
        f"heads of {', '.join(one or 'no named stack' for one in named)} were given: choose heads "
        f"of one stack ({names}) per call."
    )


def embedding_of(model: HeadModel, pooling: str | None = None) -> HeadModel:
    """Model view that returns embeddings of whole examples in place of logits.

    Every position returns the same vector, the example's embedding.

    Args:
        model: from :func:`headscope.load`.
        pooling: how the vector is pooled; see :class:`headscope.metrics.EmbeddingMetric`.

    Raises:
        UnsupportedModelError: if the model does not provide the requested vector, or is loaded
            through transformer-lens.
    """
    embedded = getattr(model, "embedded", None)
    if embedded is None:
        raise UnsupportedModelError(
            f"{model.name} is loaded through transformer-lens, which returns logits and no "
            "embeddings: load the transformers model itself."
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
