"""Direct logit attribution: a logit as an exact sum over embedding, heads, MLPs and biases.

For one prompt, or for every head averaged over a probe. Every part is read where the model computes
it, at a few positions; only its product with the direction is kept, never the vector. Each
attribution checks that its reading of the last stream equals the model's logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import capture
from headscope.base.arguments import checked
from headscope.base.statistics import Design
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import ModelShape
from headscope.lens.reading import Promptish, Token, read_prompt, read_token, token_texts, top_of
from headscope.models.protocol import AttentionWrite, HeadModel
from headscope.models.running import own_types
from headscope.models.taps import BlockStates, Reads, TapView, at_blocks, at_final, at_layers
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import HeadScores
from headscope.table.lens import Attribution, Tolerance, check_sum


@dataclass
class Split:
    """Products of all parts with one direction per row, divided by the final norm's scale.

    A row is one position of one example. The division happens at the end of the pass.

    Attributes:
        example, position: example and position of each row.
        direction: residual direction that is read, per row.
        with_sources: also split every head by source token.
        heads: products by layer.
        biases: products of attention biases, by layer.
        mlps: products by layer.
        sources: products by layer; keys beyond the query's reach are 0.
        embedding: product of the input of the first block.
        scale: scale of the final norm.
        residual: input of the final norm.
    """

    model: HeadModel
    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    direction: Float[Tensor, "row d_model"]
    with_sources: bool = False
    heads: dict[int, Float[Tensor, "row head"]] = field(default_factory=dict)
    biases: dict[int, Float[Tensor, " row"]] = field(default_factory=dict)
    mlps: dict[int, Float[Tensor, " row"]] = field(default_factory=dict)
    sources: dict[int, Float[Tensor, "row head key"]] = field(default_factory=dict)
    embedding: Float[Tensor, " row"] = field(default_factory=lambda: torch.empty(0))
    scale: Float[Tensor, " row"] = field(default_factory=lambda: torch.empty(0))
    residual: Float[Tensor, "row d_model"] = field(default_factory=lambda: torch.empty(0, 0))

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: head outputs, the norms after them, and the input of the final norm."""
        layers = at_layers(shape, self._on_layer)
        return layers | at_blocks(shape, self._on_block) | at_final(self._on_final)

    def _on_layer(self, view: TapView) -> None:
        """Read every head, before a norm that may follow attention."""
        layer = view.layer
        read = self._write(layer).read_by(self.direction)
        per_head = einsum(
            self.model.output_weights(layer).float(), read,
            "head d_head d_model, row d_model -> row head d_head",
        )  # fmt: skip
        z = view.z[self.example, self.position].float()
        self.heads[layer] = (z * per_head).sum(-1)
        if self.with_sources:
            self.sources[layer] = self._moved(view, per_head)

    def _moved(
        self, view: TapView, per_head: Float[Tensor, "row head d_head"]
    ) -> Float[Tensor, "row head key"]:
        """``pattern[i, j] * (v_j W_O) . direction``, one value product per key/value head."""
        positions, place = self.position.unique(return_inverse=True)
        pattern = view.rows(positions).pattern[self.example, :, place]
        values = view.values()[self.example][:, :, : pattern.shape[-1]].float()
        grouped = rearrange(per_head, "row (kv share) d -> row kv share d", kv=values.shape[1])
        moved = einsum(values, grouped, "row kv key d, row kv share d -> row kv share key")
        return rearrange(moved, "row kv share key -> row (kv share) key") * pattern

    def _on_block(self, states: BlockStates) -> None:
        """Read the MLP and attention's biases; divide by the scale of a norm after attention."""
        if states.layer == 0:
            self.embedding = self._along(states.entering)
        self.mlps[states.layer] = self._along(states.mlp)
        if states.head_sum is None:
            return
        write = self._write(states.layer)
        scale = write.scale(states.head_sum[self.example, self.position])
        self.heads[states.layer] /= scale[:, None]
        self.biases[states.layer] = write.constant(self.direction, scale)
        if self.with_sources:
            self.sources[states.layer] /= scale[:, None, None]

    def _on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Divide everything by the final norm's scale."""
        self.read_final(residual)
        self.scale = self.model.unembedding.scale(self.residual)
        self.embedding = self.embedding / self.scale
        for parts in (self.heads, self.biases, self.mlps, self.sources):
            for layer, values in parts.items():
                parts[layer] = values / self.scale.view(-1, *[1] * (values.ndim - 1))

    def read_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Store the input of the final norm."""
        self.residual = residual[self.example, self.position].float()

    def _along(self, states: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " row"]:
        return (states[self.example, self.position] * self.direction).sum(-1)

    def _write(self, layer: int) -> AttentionWrite:
        return self.model.parts.attention_write(layer)

    @property
    def whole(self) -> Float[Tensor, " row"]:
        """Sum that all parts must equal: the last residual stream along the direction."""
        return (self.residual * self.direction).sum(-1) / self.scale

    @property
    def total(self) -> Float[Tensor, " row"]:
        """Sum of all parts, in double precision."""
        return self._stacked().sum(0)

    @property
    def largest(self) -> Float[Tensor, " row"]:
        """Size of the largest part."""
        return self._stacked().abs().amax(0)

    def _stacked(self) -> Float[Tensor, "part row"]:
        heads = [one for values in self.heads.values() for one in values.T]
        parts = [self.embedding, *heads, *self.biases.values(), *self.mlps.values()]
        return torch.stack(parts).cpu().double()


def row_positions(
    read: Bool[Tensor, "batch pos"],
) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Example and position of every row."""
    example, position = read.nonzero(as_tuple=True)
    return example, position


# Largest gap between the parts and the whole: a number, and a share of the largest part. Half
# precision rounds the residual stream itself, block by block, to 8 or 11 bits.
_TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-4, 1e-5)}
_HALF_TOLERANCE = (5e-2, 5e-2)


def tolerance(model: HeadModel) -> Tolerance:
    """Largest allowed gap between the parts and the whole."""
    return _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)


def check_unembedding(
    model: HeadModel,
    residual: Float[Tensor, "row d_model"],
    logits: Float[Tensor, "row d_vocab"],
) -> None:
    """Raise HeadscopeError if our logits of the residual stream are not the model's own."""
    read = model.unembedding.logits(residual).cpu().double().numpy()
    own = logits.cpu().double().numpy()
    largest = np.abs(own).max(1, keepdims=True).repeat(own.shape[1], 1).ravel()
    allowed = (tolerance(model)[0],) * 2  # kernels differ more than sums
    check_sum(read.ravel(), own.ravel(), largest, allowed, f"logits of {model.name}")


def check_first(model: HeadModel, probe: Probe) -> None:
    """Check the unembedding at one position of a probe."""
    one = probe.examples(slice(0, 1))
    last = one.last
    place = torch.zeros(1, dtype=torch.long, device=model.device)
    split = Split(
        model,
        place,
        last.to(model.device),
        torch.zeros(1, model.shape.d_model, dtype=torch.float32).to(model.device),
    )
    logits = model.run(one, reads=at_final(split.read_final), logits_at=last)
    assert logits is not None  # noqa: S101  # they were asked for
    check_unembedding(model, split.residual, logits[:, 0].float())


def need_unembedding(model: HeadModel) -> None:
    """Raise UnsupportedModelError if the model has no plain final norm."""
    if "unembedding" in model.limits:
        raise UnsupportedModelError(model.limits["unembedding"])


def over_layers(model: HeadModel, parts: dict[int, Tensor]) -> Float[np.ndarray, "layer row"]:
    """Scatter parts over all layers; NaN elsewhere."""
    result = np.full((model.shape.n_layers, len(next(iter(parts.values())))), np.nan)
    for layer, values in parts.items():
        result[layer] = values.cpu().double().numpy()
    return result


def over_heads(model: HeadModel, parts: dict[int, Tensor]) -> Float[np.ndarray, "layer head *rest"]:
    """Scatter parts of heads over all layers; NaN without attention or where pruned.

    Args:
        model: the model.
        parts: by layer, ``[row head ...]``; rows come last in the result.
    """
    rows, _, *rest = next(iter(parts.values())).shape
    shape = (model.shape.n_layers, model.shape.n_heads, *rest, rows)
    result = np.full(shape, np.nan)
    for layer, values in parts.items():
        result[layer] = values.movedim(0, -1).cpu().double().numpy()
    for head in model.shape.removed:
        result[head] = np.nan
    return result


@checked
@own_types()
@torch.no_grad()
def attribute(
    model: HeadModel,
    prompt: Promptish,
    target: Token | None = None,
    foil: Token | None = None,
    *,
    position: int = -1,
    sources: bool = True,
) -> Attribution:
    """Decompose one logit, or a difference of two, into contributions of the model's parts.

    ``logit = sum over parts of (part . d) / s + biases``: d is the residual direction of the
    target's logit (minus that of the foil), s the final norm's denominator in this run, held fixed.
    Parts: token embedding, position embedding, every head, attention biases, every MLP, and biases
    of the final norm and the unembedding. Multipliers of a family (granite, cohere) are included in
    the parts. If a norm follows attention (gemma2, gemma3, olmo2), its scale is held fixed as well,
    which keeps the split over heads exact; if it follows the MLP, the part is its output. Logits
    are those before a soft cap, of any sign.

    Every call checks that the parts sum to the logit, to 1e-4 (or 1e-5 of the largest part; in half
    precision, which rounds the residual stream at every block, 5e-2 of it), and that the logit is
    the model's own.

    Args:
        model: from :func:`headscope.load`.
        prompt: text, or token ids.
        target: token, as its text or id; default: the model's most likely next token.
        foil: token whose logit is subtracted; default: none.
        position: position whose next token is predicted.
        sources: also attribute each head's contribution to source tokens.

    Raises:
        InputError: if the prompt, position or a token does not fit the model.
        UnsupportedModelError: if the model has no plain final norm, or its blocks are not sums.
        HeadscopeError: if a check fails.

    Source: Elhage et al. 2021; Wang et al. 2022, appendix on direct effects. Unlike in the scorer
    ``direct_logit_attribution``, the mean over the vocabulary is not subtracted.

    Example:
        >>> import headscope as hs
        >>> split = attribute(hs.load(), [5, 9, 5, 9], target=5, foil=9)
        >>> abs(sum(part.value for part in split) - split.whole) < 1e-4
        True
    """
    text = read_prompt(model, prompt)
    at = text.at(position)
    wanted = None if target is None else read_token(model, target)
    other = None if foil is None else read_token(model, foil, "foil")
    need_unembedding(model)
    tokens, where = text.ids[None], torch.tensor([at])
    if wanted is None:
        likely = model.forward(tokens, logits_at=where)[:, 0].float()
        wanted = int(top_of(likely, 1).ids[0, 0])
    if wanted == other:
        raise InputError("target and foil are the same token: their difference is always 0.")
    pair = torch.tensor([wanted] if other is None else [wanted, other], device=model.device)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float32, device=model.device)[: len(pair)]
    direction = (model.unembedding.directions(pair) * sign[:, None]).sum(0, keepdim=True)
    place = torch.zeros(1, dtype=torch.long, device=model.device)
    split = Split(model, place, place + at, direction, with_sources=sources)
    logits = model.run(tokens, reads=split.reads(model.shape), logits_at=where)
    assert logits is not None  # noqa: S101  # they were asked for
    check_unembedding(model, split.residual, logits[:, 0].float())
    constant = float((model.unembedding.constant(pair) * sign).sum())
    whole = (model.unembedding.uncapped(split.residual)[0, pair] * sign).sum()
    names = token_texts(model.tokenizer, pair.tolist())
    return Attribution(
        target=names[0],
        foil=None if other is None else names[1],
        position=at,
        tokens=text.texts[: at + 1],
        embedding=_embedding(model, int(text.ids[at]), split),
        heads=over_heads(model, split.heads)[..., 0],
        biases=over_layers(model, split.biases)[:, 0],
        mlps=over_layers(model, split.mlps)[:, 0],
        constant=constant,
        whole=float(whole),
        sources=over_heads(model, split.sources)[..., 0] if sources else None,
        tolerance=tolerance(model),
        kv_heads=model.shape.n_kv_heads,
        provenance=origin(
            model, reading="attribution", tokens=len(text), position=at, target=wanted, foil=other
        ),
    )


def _embedding(model: HeadModel, token: int, split: Split) -> dict[str, float]:
    """Contributions of token and position, separately if tokens enter as embedding rows."""
    whole = float(split.embedding[0])
    try:
        row = model.parts.embedding[token].float()
    except UnsupportedModelError:
        return {"embedding": whole}
    by_token = float((row * split.direction[0]).sum() / split.scale[0])
    rest = whole - by_token
    # Allowed rounding of the row itself; half precision has its own tolerance.
    rounding = 4 * torch.finfo(model.dtype).eps * row.norm() * split.direction[0].norm()
    if abs(rest) < max(1e-5 * max(1.0, abs(whole)), float(rounding / split.scale[0])):
        return {"token embedding": whole}
    return {"token embedding": by_token, "position embedding": rest}


Against = Literal["foil", "mean", "nothing"]


@checked
@own_types()
@torch.no_grad()
def head_attribution(
    model: HeadModel,
    probe: Probe,
    against: Against | None = None,
    *,
    mark: str | None = None,
    batch_size: int | None = None,
) -> HeadScores:
    """Direct contribution of every head to the logits of a probe's targets, averaged.

    Like :func:`attribute`, at every position with a target: the mean over an example's positions,
    then over examples; tested against no effect. With ``mean`` this is the scorer
    ``direct_logit_attribution`` (which reads only the second copy, if there is one), with ``foil``
    the scorer ``direct_logit_difference``. Unlike these it also works with a norm after attention,
    and its sums are checked.

    Args:
        model: from :func:`headscope.load`.
        probe: with targets.
        against: what is subtracted from the target's logit: that of the ``foil``, the ``mean`` over
            the vocabulary, or ``nothing``; default: the foil if the probe has foils, else the mean.
        mark: read only positions with this mark of the probe.
        batch_size: examples per pass.

    Raises:
        InputError: if the probe does not fit the model or has nothing to read.
        UnsupportedModelError: as in :func:`attribute`.
        HeadscopeError: if the parts do not sum to the whole.

    Example:
        >>> scores = hs.lens.head_attribution(model, probe)
        >>> scores.mean.shape == (model.shape.n_layers, model.shape.n_heads)
        True
        >>> scores.unit
        'logits'
    """
    need_unembedding(model)
    chosen: Against = against or ("mean" if probe.foils is None else "foil")
    if chosen == "foil" and probe.foils is None:
        raise InputError("this probe has no foils: use against='mean', or a probe of pairs.")
    capture.check_fits(model, probe, answers=True)
    if mark is not None:
        probe = replace(probe, targets=probe.targets.where(probe.mark(mark), -1))
    if not bool(_read(probe, chosen).any()):
        raise InputError("the probe has no targets to attribute.")
    check_first(model, probe)
    values = np.full((model.shape.n_layers, model.shape.n_heads, len(probe)), np.nan)
    for where, split in _splits(model, probe, chosen, batch_size):
        if len(split.example):
            values[..., where] = _per_example(model, split, where.stop - where.start)
    return HeadScores.from_effects(
        "direct_attribution",
        values,
        kv_heads=model.shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels),
        unit="logits",
        description=f"What each head adds directly to the target's logit, minus {_WORDS[chosen]}.",
        source="Elhage et al. 2021, direct path; Wang et al. 2022, direct effect",
        provenance=origin(model, probe, reading="attribution", against=chosen, mark=mark),
    ).of_stack(model.shape.stack)


_WORDS = {"foil": "the foil's", "mean": "the mean over the vocabulary", "nothing": "nothing"}


def _splits(
    model: HeadModel, probe: Probe, against: Against, batch_size: int | None
) -> Iterator[tuple[slice, Split]]:
    """Yield each batch of a probe, decomposed and checked."""

    def make(batch: Probe, _halvings: int) -> Split:
        example, position = (one.to(model.device) for one in row_positions(_read(batch, against)))
        direction = _directions(model, batch, example, position, against)
        return Split(model, example, position, direction)

    for where, split in capture.stream(model, probe, make, batch_size=batch_size):
        if len(split.example):
            total, whole, largest = (
                one.cpu().double().numpy() for one in (split.total, split.whole, split.largest)
            )
            check_sum(total, whole, largest, tolerance(model), f"attribution on {model.name}")
        yield where, split


def _read(probe: Probe, against: Against) -> Tensor:
    read = probe.real & (probe.targets >= 0)
    return read & (probe.foils >= 0) if against == "foil" and probe.foils is not None else read


def _directions(
    model: HeadModel,
    probe: Probe,
    example: Int[Tensor, " row"],
    position: Int[Tensor, " row"],
    against: Against,
) -> Float[Tensor, "row d_model"]:
    unembedding = model.unembedding
    direction = unembedding.directions(probe.to(model.device).targets[example, position])
    if against == "mean":
        return direction - unembedding.mean_direction
    if against == "foil" and probe.foils is not None:
        return direction - unembedding.directions(probe.foils.to(model.device)[example, position])
    return direction


def _per_example(
    model: HeadModel, split: Split, examples: int
) -> Float[np.ndarray, "layer head example"]:
    """Mean over each example's rows; NaN without rows."""
    heads = over_heads(model, split.heads)
    example = split.example.cpu().numpy()
    member = np.eye(examples)[example]
    count = member.sum(0)
    return np.asarray(heads @ member / np.where(count > 0, count, np.nan))
