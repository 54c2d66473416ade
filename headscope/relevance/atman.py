"""AtMan: relevance of each token for a continuation, by suppressing attention to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import capture
from headscope.ablation.run import Measurement, present
from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.statistics import rank_correlation
from headscope.edits import Heads, Variant
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.lens.reading import Promptish, read_prompt, token_texts
from headscope.metrics import loss
from headscope.models.decoding import need_continuing
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView
from headscope.origin import origin
from headscope.probes.encoding import bos_prefix, check_length, encode, from_tokens, need_tokenizer
from headscope.probes.probe import Probe
from headscope.probes.prompts import find_span
from headscope.table.relevance import TokenRelevance

Suppression = Literal["suppress", "erase"]
Group = str | Sequence[int]


@dataclass(frozen=True, eq=False)
class Suppressed:
    """Edit of patterns that reduces or removes attention to some keys, in some heads.

    With scores ``s`` (after any soft cap) and ``m`` the smallest score among the keys visible to
    the query, the score of key t becomes ``m + factor_t (s_t - m)``. That is ``A'_j ~ A_j exp(-(1 -
    factor_j) (log A_j - min log A))``, renormalised together with the share of a learned sink. A
    factor of 1 changes nothing, and a constant shift of all scores has no effect. With ``erase``,
    keys with any factor below 1 get zero attention; a query with no other visible key then attends
    to nothing.

    Keys whose attention is 0 in fp32 (scores more than 100 below the largest) count as invisible.

    Attributes:
        heads: head numbers by layer; None: all heads of the layer.
        factors: factor of every key, ``[key]``.
        erase: give keys with a factor below 1 zero attention.
    """

    heads: Mapping[int, tuple[int, ...] | None]
    factors: Float[Tensor, " key"]
    erase: bool = False
    site: Literal["pattern"] = field(init=False, default="pattern")

    @property
    def layers(self) -> frozenset[int]:
        """Layers that the edit applies to."""
        return frozenset(self.heads)

    def __call__(
        self, layer: int, value: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return rows with reduced attention; the input is not modified."""
        chosen = self.heads[layer]
        if chosen is None:
            return suppressed(value, self.factors, erase=self.erase)
        index = torch.tensor(chosen, device=value.device)
        new = suppressed(value.index_select(1, index), self.factors, erase=self.erase)
        kept: Tensor = value.index_copy(1, index, new)
        return kept


@checked
def suppressed(
    pattern: Float[Tensor, "*any query key"],
    factors: Float[Tensor, " key"],
    *,
    erase: bool = False,
) -> Float[Tensor, "*any query key"]:
    """Multiply the attention scores of some keys by factors; see :class:`Suppressed`.

    Args:
        pattern: attention rows, 0 for keys that are not visible.
        factors: factor of every key; 1 leaves the key unchanged.
        erase: give keys with a factor below 1 zero attention.

    Example:
        >>> rows = torch.tensor([[0.25, 0.75]])  # scores 0 and ln 3
        >>> new = hs.relevance.suppressed(rows, torch.tensor([1.0, 0.5]))
        >>> round(float(new[0, 1]), 3)  # 3 ** 0.5 / (1 + 3 ** 0.5)
        0.634
    """
    keys = pattern.shape[-1]
    share = factors[:keys].to(pattern)
    if erase:
        weight = (share >= 1).to(pattern)
    else:
        seen = pattern > 0
        logs = pattern.log()
        least = logs.masked_fill(~seen, torch.inf).amin(-1, keepdim=True)
        weight = (-(1 - share) * (logs - least)).exp().where(seen, 0.0)
    kept = pattern * weight
    sink = 1 - pattern.sum(-1, keepdim=True)
    sink = sink.where(sink > 1e-5, 0.0)  # without a learned sink, this is only rounding
    total = kept.sum(-1, keepdim=True) + sink
    shared: Tensor = kept / total.where(total > 0, 1.0)
    return shared


@checked
@own_types()
def atman(
    model: HeadModel,
    text: Promptish,
    target: str | Sequence[int] | None = None,
    *,
    factor: float = 0.1,
    mode: str = "suppress",
    groups: Mapping[str, Group] | None = None,
    similar: float | None = None,
    heads: Heads | None = None,
    top: int | None = None,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> TokenRelevance:
    """Measure how much each token of a text supports a continuation, by suppressing it.

    Relevance of a token is the loss on the target with attention to the token suppressed, minus the
    loss without suppression: positive if the token supports the target. Suppression acts in all
    layers and heads at once, or only in ``heads``. Each token (or group) takes one pass; as many as
    fit are stacked in a batch. Target tokens that precede other target tokens are measured too.

    The smallest score is taken over the keys visible to each query, so nothing depends on later
    tokens; the authors' code takes it over all keys. Suppressing the token with the smallest score
    has no effect, and ``factor=0`` does not hide a token but moves it to the smallest score.
    ``mode="erase"`` hides it from all queries.

    Args:
        model: decoder with causal attention.
        text: text or token ids.
        target: continuation of the text, as text or ids. Default: the model's most likely next
            token.
        factor: multiplier of the scores, from 0 to 1.
        mode: ``suppress`` or ``erase``.
        groups: tokens to suppress together instead of one at a time, by name: a span of the text,
            e.g. ``the second 'Mary'``, or positions.
        similar: also suppress keys whose embedding has at least this cosine with the token's, each
            by the factor ``(1 - factor) (1 - cosine) + factor``; above 0, up to 1.
        heads: heads in which attention is suppressed. Default: all.
        top: also measure single heads, as many as this, in order of their estimates. The estimate
            is first-order in the pattern, ``sum of d loss / d A (A' - A)``, for all heads and
            tokens from one forward and one backward pass, which keeps one pattern per layer. If the
            target is nearly certain, it underestimates heads that matter; its rank correlation with
            the measured values is in ``provenance.checks["rank_correlation"]``.
        batch_size: see :func:`headscope.ablate_heads`.
        memory: see :func:`headscope.ablate_heads`.
        progress: see :func:`headscope.ablate_heads`.

    Returns:
        Relevance in nats: ``.relevance [unit]``, ``.per_target [unit target]`` and ``.by_head
        [layer head unit]``.

    Raises:
        InputError: if an argument does not fit the text or the model.
        UnsupportedModelError: if the model has no logits or is bidirectional.

    Source: Deiseroth et al. 2023 (arXiv 2301.08110), from the paper.

    Example:
        >>> found = hs.relevance.atman(model, "Mary went home. Mary", target=" went")
        >>> len(found.relevance) == len(found.tokens)
        True
    """
    _check(factor, mode, similar, top)
    need_continuing(model)
    chosen = present(model, heads)
    asked = _Asked.of(model, text, target)
    units = _units(model, asked, factor, groups, similar)
    by_layer = _by_layer(model, chosen)
    erase = mode == "erase"
    study = Measurement.of(
        model,
        asked.probe,
        loss.at("target_0"),
        others=[loss.at(f"target_{n}") for n in range(1, asked.count)],
        options=RunOptions(batch_size, memory, progress=progress),
    )
    variants: list[Variant] = [(Suppressed(by_layer, one, erase),) for one in units.values()]
    edited, clean = study.measure_all(lambda _, __: variants, len(variants), "suppressing tokens")
    by_head: np.ndarray | None = None
    estimate: np.ndarray | None = None
    if top is not None:
        estimate = _estimates(model, asked, units, chosen, erase=erase)
        by_head = _exact(study, units, chosen, estimate, top, erase=erase)
    facts: dict[str, Any] = {"factor": factor, "mode": mode, "similar": similar}
    checks = {}
    if estimate is not None and by_head is not None:
        checks["rank_correlation"] = rank_correlation(estimate, by_head)
    return TokenRelevance(
        tokens=asked.texts,
        units=tuple(units),
        targets=asked.every[asked.start :],
        per_target=(edited - clean[:, None])[:, :, 0].T,
        base=clean[:, 0],
        by_head=by_head,
        estimate=estimate,
        provenance=origin(
            model, asked.probe, attention="edited rows, fp32", checks=checks, **facts
        ),
    )


def _check(factor: float, mode: str, similar: float | None, top: int | None) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= 1:
        raise InputError(f"factor={factor!r}: give a number from 0 to 1.")
    if mode not in get_args(Suppression):
        raise InputError(nearest(str(mode), get_args(Suppression), kind="mode"))
    if similar is not None and not (
        isinstance(similar, int | float) and not isinstance(similar, bool) and 0 < similar <= 1
    ):
        raise InputError(f"similar={similar!r} is not a cosine: give a number above 0, up to 1.")
    if top is not None and (not isinstance(top, int) or isinstance(top, bool) or top < 1):
        raise InputError(f"top={top!r}: give 1 or more, or leave top out.")


@dataclass(frozen=True, eq=False)
class _Asked:
    """A text followed by its target, and the losses to read.

    Attributes:
        ids, every: tokens of text and target, as ids and as texts.
        start: position of the first target token.
        said, spans: the text and the character spans of its tokens, if it was given as text.
    """

    ids: Int[Tensor, " pos"]
    every: tuple[str, ...]
    start: int
    said: str | None = None
    spans: tuple[tuple[int, int], ...] = ()
    probe: Probe = field(init=False)

    def __post_init__(self) -> None:
        """Mark each position whose loss is read."""
        marks = {}
        for number in range(self.count):
            mark = torch.zeros(1, len(self.ids) - 1, dtype=torch.bool)
            mark[0, self.start + number - 1] = True
            marks[f"target_{number}"] = mark
        made = from_tokens(self.ids[None, :-1], marks=marks, targets=self.ids[None, 1:])
        object.__setattr__(self, "probe", made)

    @property
    def count(self) -> int:
        return len(self.ids) - self.start

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts of the tokens that the model reads: all but the last."""
        return self.every[:-1]

    @classmethod
    def of(cls, model: HeadModel, text: Promptish, target: str | Sequence[int] | None) -> "_Asked":
        """Tokenize a text and its target. Default target: the most likely next token."""
        if isinstance(target, str):
            return cls._of_text(model, text, target)
        prompt = read_prompt(model, text)
        if target is None:
            with torch.no_grad():
                logits = model.forward(prompt.ids[None], logits_at=torch.tensor([len(prompt) - 1]))
            target = [int(logits[0, 0].argmax())]
        following = read_prompt(model, [int(one) for one in target])
        _need_room(model, len(prompt) + len(following))
        ids, every = torch.cat([prompt.ids, following.ids]), prompt.texts + following.texts
        if not isinstance(text, str):
            return cls(ids, every, len(prompt))
        return cls(ids, every, len(prompt), text, tuple(_encoded(model, text).spans))

    @classmethod
    def _of_text(cls, model: HeadModel, text: Promptish, target: str) -> "_Asked":
        if not isinstance(text, str):
            raise InputError(
                "the text is token ids and the target is not: give both in the same form."
            )
        if not target.strip():
            raise InputError("the target is empty: give at least one token, or leave it out.")
        read_prompt(model, text)  # raises for ids outside the vocabulary
        both = _encoded(model, text + target)
        ends = [end > len(text) for _, end in both.spans]
        first = ends.index(True)
        if both.spans[first][0] < len(text):
            raise InputError(
                f"the target {target!r} begins inside a token of the text that it follows: "
                "begin the target, or end the text, with a space."
            )
        if first == 0:
            raise InputError("there is no token before the target: give a longer text.")
        _need_room(model, len(both.ids))
        every = tuple(token_texts(model.tokenizer, both.ids))
        return cls(torch.tensor(both.ids), every, first, text + target, tuple(both.spans))


def _need_room(model: HeadModel, length: int) -> None:
    check_length(model, length - 1, what="the text with its target", fix="shorten it")


def _encoded(model: HeadModel, text: str) -> Any:
    return encode(need_tokenizer(model, "a text"), text, bos_prefix(model, None))


def _units(
    model: HeadModel,
    asked: _Asked,
    factor: float,
    groups: Mapping[str, Group] | None,
    similar: float | None,
) -> dict[str, Float[Tensor, " key"]]:
    """Factors of all keys, for each token or group to suppress."""
    length = len(asked.texts)
    if groups is None:
        places = {_label(asked.texts, at): [at] for at in range(length)}
    else:
        if not groups:
            raise InputError(
                "groups= is empty: name at least one group, or leave it out for single tokens."
            )
        places = {name: _positions(asked, name, group) for name, group in groups.items()}
    found = {}
    for name, chosen in places.items():
        factors = torch.ones(length)
        if similar is not None:
            cosines = _cosines(model, asked, chosen)
            graded = (1 - factor) * (1 - cosines) + factor
            factors = graded.where(cosines >= similar, factors)
        factors[chosen] = factor
        found[name] = factors
    return found


def _label(texts: tuple[str, ...], at: int) -> str:
    """Text of a token, with its position if another token has the same text."""
    return texts[at] if texts.count(texts[at]) == 1 else f"{texts[at]} ({at})"


def _positions(asked: _Asked, name: str, group: Group) -> list[int]:
    length = len(asked.texts)
    if isinstance(group, str):
        if asked.said is None:
            raise InputError(
                f"group {name!r} is a span of a text, and only ids were given: give positions."
            )
        start, end = find_span(asked.said, group)
        chosen = [
            at for at, (a, b) in enumerate(asked.spans[:length]) if a < end and b > start and b > a
        ]
    else:
        chosen = [int(one) for one in group]
    wrong = [at for at in chosen if not 0 <= at < length]
    if wrong or not chosen:
        raise InputError(
            f"group {name!r} holds no position" if not chosen else
            f"group {name!r} holds position {wrong[0]}: the text has 0 to {length - 1}."
        )  # fmt: skip
    return chosen


def _cosines(model: HeadModel, asked: _Asked, chosen: Sequence[int]) -> Float[Tensor, " key"]:
    """Largest cosine similarity of each key's embedding with those of a unit's tokens."""
    table = model.parts.embedding
    own = table[asked.ids[: len(asked.texts)].to(table.device)].float().cpu()
    unit = own / own.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    nearness: Tensor = (unit @ unit[list(chosen)].T).amax(-1).clamp(0, 1)
    return nearness


def _by_layer(model: HeadModel, heads: Sequence[HeadIndex]) -> dict[int, tuple[int, ...] | None]:
    """Heads by layer; None for a whole layer."""
    found: dict[int, tuple[int, ...]] = {}
    for head in heads:
        found[head.layer] = (*found.get(head.layer, ()), head.head)
    whole = model.shape.n_heads
    return {layer: None if len(some) == whole else some for layer, some in found.items()}


def _estimates(
    model: HeadModel,
    asked: _Asked,
    units: Mapping[str, Float[Tensor, " key"]],
    heads: Sequence[HeadIndex],
    *,
    erase: bool,
) -> Float[np.ndarray, "layer head unit"]:
    """First-order change in the summed loss when each unit is suppressed in one head alone."""
    patterns: dict[int, Tensor] = {}
    layers = sorted({head.layer for head in heads})

    def keep(view: TapView) -> None:
        patterns[view.layer] = view.value

    targets = torch.full((1, len(asked.ids)), -1)
    targets[0, asked.start - 1 : -1] = asked.ids[asked.start :].cpu()
    reads = {Tap("pattern", layer): keep for layer in layers}
    with torch.enable_grad():
        total = capture.loss_sum(model, asked.probe, targets, reads=reads)
        slopes = torch.autograd.grad(total, [patterns[layer] for layer in layers])
    shape = (model.shape.n_layers, model.shape.n_heads, len(units))
    found = torch.full(shape, torch.nan, dtype=torch.float64)
    for layer, slope in zip(layers, slopes, strict=True):
        rows = patterns[layer].detach()
        values = [
            ((suppressed(rows, one, erase=erase) - rows) * slope).sum((0, 2, 3))
            for one in units.values()
        ]
        found[layer] = torch.stack(values, -1).cpu().double()
    kept: Bool[Tensor, "layer head"] = torch.zeros(shape[:2], dtype=torch.bool)
    kept[tuple(torch.tensor(heads).T)] = True
    return found.masked_fill(~kept[..., None], torch.nan).numpy()


def _exact(
    study: Measurement,
    units: Mapping[str, Float[Tensor, " key"]],
    heads: Sequence[HeadIndex],
    estimate: Float[np.ndarray, "layer head unit"],
    top: int,
    *,
    erase: bool,
) -> Float[np.ndarray, "layer head unit"]:
    """Measured relevance in the heads with the largest estimates; NaN for other heads."""
    size = {head: float(np.abs(estimate[head]).sum()) for head in heads}
    chosen = sorted(heads, key=lambda head: (-size[head], head))[:top]
    variants: list[Variant] = [
        (Suppressed({head.layer: (head.head,)}, one, erase),)
        for head in chosen
        for one in units.values()
    ]
    edited, clean = study.measure_all(lambda _, __: variants, len(variants), "suppressing heads")
    changes = (edited - clean[:, None]).sum(0)[:, 0].reshape(len(chosen), len(units))
    found = np.full(estimate.shape, np.nan)
    for head, row in zip(chosen, changes, strict=True):
        found[head] = row
    return found
