"""Random tokens said twice: the work-horse for induction, duplicate and copying heads."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.errors import InputError, whole
from headscope.probes.encoding import next_tokens
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import (
    HasVocabulary,
    check_length,
    frame,
    ordinary_tokens,
    reads_onwards,
)


def repeated_tokens(
    model: HasVocabulary,
    length: int = 50,
    batch: int = 8,
    seed: int = 0,
    copies: int = 2,
    *,
    bos: bool | None = None,
) -> Probe:
    """``[BOS] R R`` per row, R uniform over the vocabulary; ``[CLS] R R [SEP]`` for an encoder.

    No token occurs twice within R where the vocabulary is large enough, so each query of the
    second copy has exactly one earlier occurrence; in a smaller one tokens are drawn with
    replacement, and ``structure`` (the tokens themselves) shows every occurrence.

    Marks ``first_copy`` and ``second_copy`` (all later copies). Targets are the next tokens; an
    encoder, which sees them, has none.
    The control is paired: each later copy is a permutation of the example's first. Every other
    token of a copy stays where it was, the rest change places, none keeping its own, so that no
    token follows the one that it followed before. ``structure`` is kept at the tokens that moved:
    a scorer then asks of the same positions, for a key that holds a token of R which the later
    copy has not said yet, just as in the probe. A head that only looks back a fixed distance
    scores what it scored, and so does one whose attention follows from which tokens there are,
    whatever their order. With fewer than three tokens in R nothing can change places; the later
    copies of the control are then new tokens.

    Args:
        model: whose vocabulary is drawn from; no tokenizer is needed.
        length: tokens in R.
        batch: examples.
        seed: the same seed gives the same bytes.
        copies: how often R is said.
        bos: whether a BOS stands in front; None does what the model's tokenizer does.

    Raises:
        InputError: if it does not fit the model's context, or a number is too small.

    Example:
        >>> probe = hs.probes.repeated_tokens(model, length=5, batch=2)
        >>> probe.tokens.shape == (2, 1 + 5 + 5)  # a BOS in front, since this model uses one
        True
    """
    if copies < 2:
        raise InputError(f"copies={copies} is not a repetition: give 2 or more.")
    draw = _Draw(model, whole(length, "length") * copies, batch, seed, bos)
    part = draw(length)
    tokens = draw.framed(part.repeat(1, copies))
    start, said = len(draw.prefix), length * copies
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    marks = {
        "first_copy": (position >= start) & (position < start + length),
        "second_copy": (position >= start + length) & (position < start + said),
    }
    settings = {
        "length": length,
        "copies": copies,
        "bos": start > 0,
        "replacement": draw.replaces(length),
    }
    probe = draw.probe(tokens, "repeated_tokens", settings)
    later, moved = _unrepeated(draw, part, copies)
    control = draw.probe(
        draw.framed(torch.cat([part, later], 1)), "repeated_tokens_control", settings
    )
    asked = torch.ones_like(tokens, dtype=torch.bool)
    asked[:, start + length : start + said] = moved
    control = replace(control, structure=tokens.where(asked, -1), marks=marks, paired=True)
    return replace(probe, marks=marks, control=control)


def _unrepeated(
    draw: "_Draw", part: Int[Tensor, "batch pos"], copies: int
) -> tuple[Int[Tensor, "batch later"], Bool[Tensor, "batch later"]]:
    """The control's later copies, and which of their tokens changed places.

    Even places move in half the examples, odd ones in the others, so that over the examples all
    places count alike.
    """
    batch, length = part.shape
    if length < 3:
        new = draw(length * (copies - 1))
        return new, torch.ones_like(new, dtype=torch.bool)
    later = part.repeat(1, copies - 1).unflatten(1, (copies - 1, length))
    moved = torch.zeros_like(later, dtype=torch.bool)
    for row in range(batch):
        first = row % 2 if length > 3 else 0  # of three tokens only both ends can change places
        for copy in range(copies - 1):
            places = torch.arange(first, length, 2)
            order = places[torch.randperm(len(places), generator=draw.generator)]
            later[row, copy, order] = part[row, order.roll(1)]
            moved[row, copy, order] = True
            # What follows a moved token must stay: not so at the seam of an odd number of places.
            moved[row, copy, -1] &= first == 1
    return later.flatten(1), moved.flatten(1)


def random_tokens(
    model: HasVocabulary,
    length: int = 100,
    batch: int = 8,
    seed: int = 0,
    *,
    bos: bool | None = None,
) -> Probe:
    """``[BOS]`` and ``length`` random tokens, none twice where the vocabulary allows.

    The shape of a :func:`repeated_tokens` control, on its own.

    Example:
        >>> hs.probes.random_tokens(model, length=8, batch=3).length
        9
    """
    draw = _Draw(model, length, batch, seed, bos)
    tokens = draw.framed(draw(length))
    settings = {
        "length": length,
        "bos": len(draw.prefix) > 0,
        "replacement": draw.replaces(length),
    }
    return draw.probe(tokens, "random_tokens", settings)


class _Draw:
    """Random rows of one model's vocabulary, from one seeded stream."""

    def __init__(
        self, model: HasVocabulary, length: int, batch: int, seed: int, bos: bool | None
    ) -> None:
        for name, value in (("length", length), ("batch", batch)):
            if whole(value, name) < 1:
                raise InputError(f"{name}={value} leaves nothing to run: give 1 or more.")
        self.batch, self.seed = batch, seed
        self.prefix, self.suffix = frame(model, bos)
        self.onwards = reads_onwards(model)
        check_length(
            model,
            length + len(self.prefix) + len(self.suffix),
            what="the probe",
            fix="ask for a smaller length",
        )
        self.vocabulary = ordinary_tokens(model)
        self.generator = torch.Generator().manual_seed(seed)

    def replaces(self, length: int) -> bool:
        """Whether ``length`` tokens cannot all be different."""
        return length > len(self.vocabulary)

    def __call__(self, length: int) -> Int[Tensor, "batch pos"]:
        size = len(self.vocabulary)
        if self.replaces(length):
            index = torch.randint(size, (self.batch, length), generator=self.generator)
        else:
            rows = [torch.randperm(size, generator=self.generator) for _ in range(self.batch)]
            index = torch.stack([row[:length] for row in rows])
        return self.vocabulary[index]

    def framed(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch longer"]:
        """The same rows with what stands around a text of the model: a BOS, [CLS] and [SEP]."""
        before, after = (
            torch.tensor(ids).expand(self.batch, -1).long() for ids in (self.prefix, self.suffix)
        )
        return torch.cat([before, tokens, after], 1)

    def probe(
        self,
        tokens: Int[Tensor, "batch pos"],
        name: str,
        settings: Mapping[str, str | int | float | bool | None],
    ) -> Probe:
        """A probe of these tokens, all real, structure and targets their own."""
        real = torch.ones_like(tokens, dtype=torch.bool)
        return Probe(
            tokens=tokens,
            real=real,
            structure=tokens,
            targets=next_tokens(tokens, real) if self.onwards else torch.full_like(tokens, -1),
            next_token=self.onwards,
            name=name,
            seed=self.seed,
            settings=settings,
        )
