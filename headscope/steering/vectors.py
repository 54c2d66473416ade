"""Steering vectors of heads: extraction, injection, and readings as words."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope import capture
from headscope.ablation.run import Positions, marked, present
from headscope.base.arguments import checked
from headscope.base.files import Saved
from headscope.base.result import Glance, Shown, Tabular, number, readable, sizes
from headscope.edits import AnyEdit, HeadEdit, Heads, Scope, Span
from headscope.errors import InputError, UnsupportedModelError, nearest
from headscope.heads import HeadIndex, ModelShape
from headscope.lens.reading import Promptish, read_prompt, token_texts
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Reads, Tap, TapView, at_layers
from headscope.origin import origin
from headscope.probes.encoding import bos_prefix, encode, need_tokenizer
from headscope.probes.probe import Probe
from headscope.probes.prompts import find_span
from headscope.table import HeadScores, Provenance

Strength = float | Mapping[Any, float] | Float[np.ndarray, "layer head"]


@dataclass(frozen=True, eq=False, repr=False)
class HeadVectors(Saved, Shown, Tabular):
    """One vector per head, in the space of its output ``z`` before the output projection.

    Attributes:
        name: description, e.g. ``mean at end``.
        values: vectors, ``[layer, head, d_head]``; NaN for heads that do not exist.
        provenance: where they came from; its weight digest identifies the model they fit.
        auc: AUC of each head's vector for separating two classes on held-out examples, ``[layer,
            head]``; None if there are no classes.
    """

    name: str
    values: Float[Tensor, "layer head d_head"]
    provenance: Provenance = field(default_factory=Provenance)
    auc: HeadScores | None = None

    @property
    def by_layer(self) -> dict[int, Float[Tensor, "head d_head"]]:
        """Vectors by layer, in the form that :func:`headscope.edits.mean` takes."""
        there = ~self.values.isnan().all(-1).all(-1)
        return {layer: self.values[layer] for layer in there.nonzero()[:, 0].tolist()}

    @property
    def norm(self) -> Float[Tensor, "layer head"]:
        """Euclidean norm of each vector."""
        length: Tensor = self.values.norm(dim=-1)
        return length

    def cosine(self, other: "HeadVectors") -> Float[Tensor, "layer head"]:
        """Cosine similarity with another set, per head; NaN for zero vectors."""
        _same_shape(self, other)
        both = (self.values * other.values).sum(-1)
        return both / (self.norm * other.norm)

    def minus(self, other: "HeadVectors") -> "HeadVectors":
        """Subtract another set; with the mean over several tasks, this is mean-centring."""
        _same_shape(self, other)
        made = self.values - other.values
        return replace(self, name=f"{self.name} minus {other.name}", values=made, auc=None)

    def random(self, seed: int = 0) -> "HeadVectors":
        """Random directions with the same norms, as a control."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.values.shape, generator=generator)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True) * self.norm[..., None]
        return replace(self, name=f"random as {self.name}", values=drawn, auc=None)

    def check(self, model: HeadModel) -> "HeadVectors":
        """Return the vectors if they belong to this model, else raise.

        Raises:
            InputError: if they belong to another model.
        """
        shape = model.shape
        wanted = (shape.n_layers, shape.n_heads, shape.d_head)
        if tuple(self.values.shape) != wanted:
            raise InputError(
                f"the vectors {self.name!r} are {list(self.values.shape)} (layer, head, d_head), "
                f"and {model.name} has {list(wanted)}: they are of another model."
            )
        known = self.provenance.weight_digest
        if known and known != model.digest():
            raise InputError(
                f"the vectors {self.name!r} are of {self.provenance.model} with other weights "
                f"than {model.name} has: compute them with this model."
            )
        return self

    def glance(self) -> Glance:
        """Show the vectors with the largest norms."""
        flat = self.norm.nan_to_num(-1).flatten()
        order = flat.argsort(descending=True, stable=True)[:6].tolist()
        heads = [HeadIndex(at // self.values.shape[1], at % self.values.shape[1]) for at in order]
        return Glance(
            f"head vectors, {self.name}",
            [sizes(("layer", "head", "number"), self.values.shape), self.provenance.model],
            ("head", "length"),
            [(str(head), number(float(self.norm[head]))) for head in heads],
            hint="hs.steering.inject(model, vectors, heads, strength)",
        )

    def to_pandas(self) -> Any:
        """One row per head, with the norm of its vector."""
        import pandas

        rows = np.argwhere(~self.values.isnan().all(-1).numpy())
        return pandas.DataFrame(
            [
                {"layer": int(layer), "head": int(head), "norm": float(self.norm[layer, head])}
                for layer, head in rows
            ]
        )


def _same_shape(first: HeadVectors, second: HeadVectors) -> None:
    if first.values.shape != second.values.shape:
        raise InputError(
            f"the vectors {first.name!r} and {second.name!r} have shapes "
            f"{list(first.values.shape)} and {list(second.values.shape)}: they are of two models."
        )


@dataclass
class Outputs:
    """Reader of head outputs at marked positions, summed per example."""

    where: Bool[Tensor, "batch pos"]
    found: dict[int, Float[Tensor, "batch head d_head"]] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Read the outputs of every layer."""
        return at_layers(shape, self._add)

    def _add(self, view: TapView) -> None:
        weight = self.where.to(view.z.device)[:, :, None, None]
        self.found[view.layer] = (view.z.float() * weight).sum(1)


@checked
def outputs_at(
    model: HeadModel, probe: Probe, at: Positions, batch_size: int | None = None
) -> Float[Tensor, "example layer head d_head"]:
    """Mean output of every head over each example's marked positions, on the CPU.

    Args:
        model: model to run.
        probe: examples to run.
        at: a mark or positions. None: the mark ``end`` if the probe has it, else every real
            position.
        batch_size: examples per pass.

    Raises:
        InputError: if an example has no such position.

    Example:
        >>> z = hs.steering.outputs_at(model, probe, None)
        >>> z.shape == (len(probe), model.shape.n_layers, model.shape.n_heads, model.shape.d_head)
        True
    """
    where = _where(probe, at)
    counts = where.sum(1)
    if not bool((counts > 0).all()):
        raise InputError("an example has no position to read: mark at least one of its tokens.")
    shape = model.shape
    size = (len(probe), shape.n_layers, shape.n_heads, shape.d_head)
    found = torch.full(size, torch.nan)
    numbered = replace(probe, marks={**probe.marks, "read": where})
    for chosen, part in capture.stream(
        model, numbered, lambda batch, _: Outputs(batch.mark("read")), batch_size=batch_size
    ):
        sums = torch.stack(list(part.found.values()), 1).cpu()
        found[chosen, list(part.found)] = sums / counts[chosen, None, None, None].cpu()
    for layer, head in shape.removed:
        found[:, layer, head] = torch.nan
    return found


def _where(probe: Probe, at: Positions) -> Bool[Tensor, "batch pos"]:
    if at is None:
        at = "end" if "end" in probe.marks else probe.real
    where = marked(probe, at)
    assert where is not None  # noqa: S101  # positions were given
    return where & probe.real


@checked
@own_types()
@torch.no_grad()
def head_means(
    model: HeadModel, probe: Probe, *, at: Positions = None, batch_size: int | None = None
) -> HeadVectors:
    """Mean output of every head over a probe's examples, at chosen positions.

    Taken at the last token of a task's in-context prompts, these means make up function vectors.

    Args:
        model: model to run.
        probe: examples, such as those of :func:`headscope.probes.in_context`.
        at: a mark or positions. Default: the mark ``end`` if the probe has it, else every real
            position. Several positions of an example are averaged first.
        batch_size: examples per pass.

    Raises:
        InputError: if the probe does not fit the model, or an example has no such position.

    Source: Todd et al. 2023 (arXiv 2310.15213), section 2.2.

    Example:
        >>> vectors = hs.steering.head_means(model, probe)
        >>> vectors.values.shape[:2] == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    capture.check_fits(model, probe)
    name = at if isinstance(at, str) else "end" if "end" in probe.marks else "every position"
    values = outputs_at(model, probe, at, batch_size).mean(0)
    return HeadVectors(f"mean at {name}", values, origin(model, probe, at=name))


@dataclass(frozen=True, eq=False)
class AtLast:
    """Edit of heads at the last token of the prompt only, and not at generated tokens.

    Attributes:
        edit: edit for every position.
    """

    edit: HeadEdit
    site: Literal["z"] = field(init=False, default="z")

    @property
    def layers(self) -> frozenset[int]:
        """Layers that the edit applies to."""
        return self.edit.layers

    def during(self, span: Span) -> HeadEdit:
        """Restrict the edit to a pass; no heads if the last prompt token is not in it."""
        if self.edit.scope == "decode" or span.first >= span.prompt:
            return replace(self.edit, heads={}, donors=None, positions=None, scope="all")
        where = _last_of_prompt(span)[:, span.first : span.end]
        return replace(self.edit, positions=where, scope="all")

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return the edited value for a text run in one pass."""
        return self.during(Span.whole(value.shape[1]))(layer, value)


def _last_of_prompt(span: Span) -> Bool[Tensor, "batch pos"]:
    """Mask of the last token of every prompt, for any padding."""
    if span.real is None:
        where = torch.zeros(1, max(span.end, span.prompt), dtype=torch.bool)
        where[:, span.prompt - 1] = True
        return where
    behind = span.real[:, : span.prompt].flip(1).int().argmax(1, keepdim=True)
    places = torch.arange(max(span.end, span.prompt), device=span.real.device)
    return places == span.prompt - 1 - behind


InjectionMode = Literal["replace", "add"]


@checked
def injection(
    model: HeadModel,
    vectors: HeadVectors,
    heads: Heads | None = None,
    strength: Strength = 1.0,
    *,
    mode: str = "replace",
    positions: Positions = "last",
    scope: Scope = "all",
) -> list[AnyEdit]:
    """Edits that add vectors to heads; :func:`inject` is the context manager.

    Args:
        model: see :func:`inject`.
        vectors: see :func:`inject`.
        heads: see :func:`inject`.
        strength: see :func:`inject`.
        mode: see :func:`inject`.
        positions: see :func:`inject`.
        scope: see :func:`inject`.

    Returns:
        The edits, for ``model.run``.

    Raises:
        InputError: see :func:`inject`.

    Example:
        >>> edits = hs.steering.injection(model, hs.steering.head_means(model, probe), "L0H1")
        >>> model.forward(probe.tokens, edits=edits).shape[0] == len(probe)
        True
    """
    if mode not in ("replace", "add"):
        raise InputError(nearest(str(mode), ("replace", "add"), kind="mode"))
    if isinstance(positions, str) and positions != "last":
        raise InputError(
            f"positions={positions!r}: give 'last', positions [batch pos] (probe.mark(...)), or "
            "None for all."
        )
    if not isinstance(positions, str | None):
        _need_places(positions)
    vectors.check(model)
    chosen = present(model, heads)
    amounts = _amounts(model, chosen, strength)
    for head in chosen:
        if not bool(vectors.values[head].isfinite().all()):
            raise InputError(
                f"the vector of {head} in {vectors.name!r} has values that are not finite: leave "
                "the head out, or recompute the vectors."
            )
    values = vectors.values.nan_to_num(0.0)
    by_amount: dict[float, list[HeadIndex]] = {}
    for head in chosen:
        by_amount.setdefault(amounts[head], []).append(head)
    where = None if isinstance(positions, str) else positions
    made: list[AnyEdit] = []
    for amount, some in by_amount.items():
        donors = {layer: values[layer] * amount for layer in {head.layer for head in some}}
        kept = 1 - amount if mode == "replace" else 1.0
        edit = HeadEdit.at("inject", some, donors=donors, factor=kept, positions=where, scope=scope)
        made.append(AtLast(edit) if isinstance(positions, str) else edit)
    return made


def _need_places(positions: Any) -> None:
    """Raise InputError unless positions are a boolean mask."""
    is_mask = isinstance(positions, Tensor) and positions.dtype == torch.bool
    if not is_mask or positions.ndim != 2:
        raise InputError(
            f"positions={positions!r}: give true or false for every position, [batch pos], such "
            "as probe.mark('end')."
        )


def _amounts(
    model: HeadModel, heads: Sequence[HeadIndex], strength: Strength
) -> dict[HeadIndex, float]:
    """Strength of every head, checked to be finite."""
    given: Mapping[HeadIndex, Any] = dict.fromkeys(heads, strength)
    if isinstance(strength, Mapping):
        given = {HeadIndex.parse(name): one for name, one in strength.items()}
        if strange := sorted(given.keys() - {*heads}):
            raise InputError(
                f"there is a strength for {strange[0]}, whose vector is not injected: leave it out."
            )
    elif isinstance(strength, np.ndarray | Tensor) and strength.ndim:
        shape = (model.shape.n_layers, model.shape.n_heads)
        if tuple(strength.shape) != shape:
            raise InputError(
                f"strengths have the shape {list(strength.shape)}, and {model.name} has {shape[0]} "
                f"layers of {shape[1]} heads."
            )
        given = {head: float(strength[head]) for head in heads}
    for head in heads:
        one: Any = given.get(head)
        is_number = isinstance(one, int | float) and not isinstance(one, bool)
        if not is_number or not abs(one) < float("inf"):
            raise InputError(
                f"the strength of {head} is {one!r}: give a finite number for all heads, or one "
                "per head (a mapping, or an array [layer head])."
            )
    return {head: float(given[head]) for head in heads}


@checked
def inject(
    model: HeadModel,
    vectors: HeadVectors,
    heads: Heads | None = None,
    strength: Strength = 1.0,
    *,
    mode: str = "replace",
    positions: Positions = "last",
    scope: Scope = "all",
) -> AbstractContextManager[None]:
    """Context manager that adds vectors to heads, also during generation.

    ``replace``: ``z`` becomes ``(1 - strength) z + strength v``: 0 changes nothing, 1 is a patch.
    ``add``: ``z + strength v``.

    Args:
        model: model to run.
        vectors: vectors of this model, e.g. from :func:`head_means` or :func:`contrast`.
        heads: heads to inject into. Default: all.
        strength: one number, a mapping per head (``{"L5H1": 0.4}``), or an array ``[layer head]``.
        mode: ``replace`` or ``add``, as above.
        positions: ``last``: the last token of each prompt, ignoring padding; a mask ``[batch pos]``
            for texts run in one pass; None: all positions.
        scope: with ``positions=None``: ``all``, or only ``prefill`` or ``decode``.

    Raises:
        InputError: if the vectors belong to another model, a strength is not finite, or there is no
            such head or mode.

    Source: Todd et al. 2023 (arXiv 2310.15213); soft injection, arXiv 2507.20906.

    Example:
        >>> vectors = hs.steering.head_means(model, probe)
        >>> plain = model.forward(probe.tokens)
        >>> with hs.steering.inject(model, vectors, "L0H1", strength=0.0):
        ...     bool(torch.allclose(model.forward(probe.tokens), plain, atol=1e-5))
        True
    """
    edits = injection(model, vectors, heads, strength, mode=mode, positions=positions, scope=scope)
    return model.edited(edits)


@dataclass(frozen=True, eq=False, repr=False)
class ResidualVector(Saved, Shown, Tabular):
    """Residual-stream vector written jointly by some heads.

    Attributes:
        name: description.
        values: ``sum over heads of v_h W_O``, ``[d_model]``.
        heads: heads that the vector comes from.
        provenance: where it came from.
    """

    name: str
    values: Float[Tensor, " d_model"]
    heads: tuple[HeadIndex, ...]
    provenance: Provenance = field(default_factory=Provenance)

    def check(self, model: HeadModel) -> "ResidualVector":
        """Return the vector if it belongs to this model, else raise.

        Raises:
            InputError: if it belongs to another model.
        """
        known = self.provenance.weight_digest
        if len(self.values) != model.shape.d_model or (known and known != model.digest()):
            raise InputError(
                f"the vector {self.name!r} is of {self.provenance.model or 'another model'}, not "
                f"of {model.name}: compute it with this model."
            )
        return self

    def glance(self) -> Glance:
        """Show its norm and heads."""
        return Glance(
            f"residual vector, {self.name}",
            [f"length {number(float(self.values.norm()))}", self.provenance.model],
            ("heads", ""),
            [(" ".join(map(str, self.heads)), "")],
        )

    def to_pandas(self) -> Any:
        """Its numbers."""
        import pandas

        return pandas.DataFrame({"value": self.values.numpy()})


@checked
def function_vector(model: HeadModel, vectors: HeadVectors, heads: Heads) -> ResidualVector:
    """Joint write of some heads, each with its vector: ``sum of v_h W_O``.

    The bias of the output projection does not belong to a head and is left out.

    Args:
        model: model in which a head's write is ``z @ W_O``.
        vectors: vectors of this model.
        heads: heads to sum, e.g. the ten with the largest indirect effects.

    Raises:
        InputError: if the vectors belong to another model, or a head does not exist.
        UnsupportedModelError: if a norm follows attention, since its scale varies.

    Source: Todd et al. 2023 (arXiv 2310.15213), section 2.3.

    Example:
        >>> vectors = hs.steering.head_means(model, probe)
        >>> found = hs.steering.function_vector(model, vectors, ["L0H1", "L2H0"])
        >>> found.values.shape[0] == model.shape.d_model
        True
    """
    if (reason := model.limits.get("linear_write")) is not None:
        raise UnsupportedModelError(f"a function vector is a sum of z @ W_O: {reason}")
    vectors.check(model)
    chosen = present(model, heads)
    total = torch.zeros(model.shape.d_model)
    for head in chosen:
        write = model.output_weights(head.layer)[head.head].float().cpu()
        total += vectors.values[head] @ write.detach()
    return ResidualVector(f"function vector of {vectors.name}", total, chosen, vectors.provenance)


IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n? ->"


@dataclass(frozen=True, eq=False, repr=False)
class HeadReading(Saved, Shown, Tabular):
    """Next-token prediction with a head's output in place of a token.

    Attributes:
        head: head whose write was decoded.
        said: most likely next tokens with the write.
        probabilities: probabilities of these tokens with the write.
        plain: probabilities of these tokens without it.
        scale: norm of the replaced state over that of the write.
        provenance: where it came from.
    """

    head: HeadIndex
    said: tuple[str, ...]
    probabilities: Float[np.ndarray, " token"]
    plain: Float[np.ndarray, " token"]
    scale: float
    provenance: Provenance = field(default_factory=Provenance)

    def glance(self) -> Glance:
        """Show the most likely tokens."""
        rows = [
            (readable(repr(one)), number(float(p)), number(float(q)))
            for one, p, q in zip(self.said, self.probabilities, self.plain, strict=True)
        ]
        return Glance(
            f"what {self.head} writes, in words",
            [self.provenance.model],
            ("next token", "with the write", "without"),
            rows,
        )

    def to_pandas(self) -> Any:
        """One row per token."""
        import pandas

        return pandas.DataFrame(
            {"token": self.said, "probability": self.probabilities, "plain": self.plain}
        )


@checked
@own_types()
@torch.no_grad()
def patchscope(
    model: HeadModel,
    head: "str | tuple[int, int]",
    prompt: Promptish,
    position: int = -1,
    *,
    template: str = IDENTITY,
    place: str = "the last '?'",
    layer: int = 0,
    scaled: bool = True,
    k: int = 8,
) -> HeadReading:
    """Decode a head's output into words, by patching it into another prompt.

    The head's write ``z W_O`` at a position of the prompt replaces the residual stream after a
    layer at the template's placeholder. The reading is the model's next-token prediction at the end
    of the template, next to its prediction without the patch. With ``scaled`` the write is rescaled
    to the norm of the state it replaces, since single heads write little.

    Args:
        model: model in which a head's write is ``z @ W_O``.
        head: head to decode, e.g. ``"L5H1"``.
        prompt: text or token ids.
        position: position of the write in the prompt; negative counts from the end.
        template: prompt with a placeholder. Default: one that asks to repeat a token.
        place: where the placeholder is in the template, written as a text span of
            :func:`headscope.probes.from_jsonl`; its last token is replaced.
        layer: layer after which the residual stream is replaced.
        scaled: rescale the write to the norm of the state it replaces.
        k: number of tokens to return.

    Raises:
        InputError: if the head, position, place or layer does not exist.
        UnsupportedModelError: if a norm follows attention.

    Source: Ghandeharioun et al. 2024 (arXiv 2401.06102).

    Example:
        >>> found = hs.steering.patchscope(
        ...     model, "L2H1", "Mary went to the", template="Mary and Mary. the and", place="the"
        ... )
        >>> len(found.said)
        8
    """
    if (reason := model.limits.get("linear_write")) is not None:
        raise UnsupportedModelError(f"a head's write cannot be read alone: {reason}")
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r}: give 1 or more.")
    which = model.shape.check(HeadIndex.parse(head))
    read = read_prompt(model, prompt)
    at = read.at(position)
    target = Tap("resid_post", layer).check(model.name, model.shape)
    tokenizer = need_tokenizer(model, "a template")
    into = encode(tokenizer, template, bos_prefix(model, None))
    covered = into.covering(*find_span(template, place))
    if not covered:
        raise InputError(
            f"the place {place!r} covers no token of the template: choose a longer span."
        )
    spot, ids = covered[-1], read_prompt(model, into.ids).ids
    write = _write(model, which, read.ids, at)
    scales: list[Tensor] = []

    def replaced(value: Tensor, _span: Span) -> Tensor:
        old = value[:, spot]
        size = old.norm(dim=-1, keepdim=True) / write.norm().clamp_min(1e-12).to(value)
        scales.append(size[0, 0] if scaled else torch.ones(()))
        new = value.clone()
        new[:, spot] = write.to(value) * (size if scaled else 1.0)
        return new

    last = torch.tensor([len(ids) - 1])
    with_write = model.run(ids[None], writes={target: replaced}, logits_at=last)
    plain = model.forward(ids[None], logits_at=last)
    assert with_write is not None  # noqa: S101  # they were asked for
    likely, before = (one[0, 0].float().softmax(-1).cpu() for one in (with_write, plain))
    top = likely.argsort(descending=True, stable=True)[:k]
    return HeadReading(
        which,
        tuple(token_texts(model.tokenizer, top.tolist())),
        likely[top].double().numpy(),
        before[top].double().numpy(),
        float(scales[0]),
        origin(model, read.probe, head=str(which), layer=layer, position=at),
    )


def _write(
    model: HeadModel, head: HeadIndex, ids: Tensor, position: int
) -> Float[Tensor, " d_model"]:
    found: list[Tensor] = []

    def keep(view: TapView) -> None:
        found.append(view.z[0, position, head.head].float().clone())

    model.run(
        ids[None], reads={Tap("z", head.layer): keep}, logits_at=torch.empty(0, dtype=torch.long)
    )
    return found[0] @ model.output_weights(head.layer)[head.head].float()
