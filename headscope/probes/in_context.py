"""In-context prompts of a user's examples: demonstrations with their labels, then a query."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from headscope.errors import InputError
from headscope.probes.encoding import Encoded, at_positions, encode, pad_right
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import (
    HasVocabulary,
    Tokenizer,
    bos_prefix,
    check_length,
    need_onwards,
    need_tokenizer,
)

Example = tuple[str, str]
TEMPLATE = "{text} : {label}\n"
# Classes up to this number are marked by themselves.
_MOST_CLASSES = 12


class _Said(NamedTuple):
    """One prompt: its tokens up to the answer, the answer, and where its words are."""

    ids: list[int]
    answer: int
    labels: list[int]
    query: list[int]


def in_context(
    model: HasVocabulary,
    demonstrations: Sequence[Example],
    queries: Sequence[Example] | None = None,
    *,
    template: str = TEMPLATE,
    shots: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
) -> Probe:
    """Prompts with demonstrations of a task of yours; the target at ``end`` is the query's label.

    Every prompt holds ``shots`` demonstrations in a seeded order, drawn class by class so that
    classes are as even as can be, and then the query without its label. A query is never among its
    own demonstrations. Marks: ``label`` (label words of the demonstrations), ``label_0``,
    ``label_1``, ... by class, in the order of ``settings["classes"]`` (up to 12 classes, where
    every prompt shows each), ``query`` (the query's text) and ``end``. Fact: ``class``.

    ``probe.corrupt`` has the same prompts with the labels of the demonstrations in another order:
    same words, no task. Where all labels of a prompt are equal they stay.

    Args:
        model: whose tokenizer reads the prompts.
        demonstrations: pairs of a text and its label; a label is one token where it stands.
        queries: the same; default: every demonstration in turn.
        template: holds ``{text}`` and then ``{label}``, each once.
        shots: demonstrations a prompt; default: one of each class, at most 10.
        batch: keep this many queries, drawn with the seed; default: all.
        seed: of the draws.
        bos: whether a BOS stands in front; None does what the model's tokenizer does.

    Raises:
        InputError: if a label is more than one token, a class has no demonstration, or the numbers
            do not fit.

    Example:
        >>> shown = [("cat", " Mary"), ("dog", " John"), ("park", " Mary"), ("box", " John")]
        >>> probe = hs.probes.in_context(model, shown, template="the {text} and{label} .")
        >>> probe.settings["classes"]
        ' Mary; John'
    """
    need_onwards(model, "an in-context probe")
    tokenizer = need_tokenizer(model, "an in-context probe")
    _check_template(template)
    shown = [_pair(one, "demonstration") for one in demonstrations]
    asked = shown if queries is None else [_pair(one, "query") for one in queries]
    classes = list(dict.fromkeys(label for _, label in shown))
    count = min(len(classes), 10) if shots is None else shots
    _check_numbers(shown, asked, classes, count, batch)
    rng = Random(f"in context {seed}")  # noqa: S311  prompts, not secrets
    order = list(range(len(asked)))
    if batch is not None:
        order = sorted(rng.sample(order, batch))
    prefix = bos_prefix(model, bos)
    said, other, rows = [], [], []
    for number in order:
        left = [one for one in shown if one != asked[number]]
        chosen = _drawn(left, classes, count, rng)
        labels = _moved([label for _, label in chosen], rng)
        swapped = [(text, label) for (text, _), label in zip(chosen, labels, strict=True)]
        rows.append(([label for _, label in chosen], labels))
        said.append(_said(tokenizer, prefix, template, chosen, asked[number]))
        other.append(_said(tokenizer, prefix, template, swapped, asked[number]))
    facts = torch.tensor([float(classes.index(asked[number][1])) for number in order])
    settings: dict[str, str | int | float | bool | None] = {
        "classes": ";".join(classes), "shots": count, "template": template, "bos": bool(prefix)
    }  # fmt: skip
    clean = _probe(said, [one for one, _ in rows], classes, facts, seed, settings)
    check_length(model, clean.length, what="an in-context prompt", fix="give fewer shots")
    corrupt = _probe(other, [one for _, one in rows], classes, facts, seed, settings)
    if [len(one.ids) for one in said] != [len(one.ids) for one in other]:
        return clean  # a label changed the tokens around it: there is no aligned pair
    return replace(clean, corrupt=corrupt)


def _check_template(template: str) -> None:
    parts = [template.count("{text}"), template.count("{label}")]
    if parts != [1, 1] or template.index("{text}") > template.index("{label}"):
        raise InputError(
            f"the template {template!r} must hold {{text}} and then {{label}}, each once."
        )


def _pair(one: object, what: str) -> Example:
    if (
        not isinstance(one, Sequence) or isinstance(one, str) or len(one) != 2
        or not all(isinstance(part, str) and part.strip() for part in one)
    ):  # fmt: skip
        raise InputError(f"a {what} is a pair of texts, (text, label); got {one!r}.")
    return str(one[0]), str(one[1])


def _check_numbers(
    shown: Sequence[Example],
    asked: Sequence[Example],
    classes: Sequence[str],
    shots: int,
    batch: int | None,
) -> None:
    if not shown or not asked:
        raise InputError("there are no examples: give pairs (text, label).")
    for text, label in asked:
        if label not in classes:
            raise InputError(
                f"the class {label!r} of the query {text!r} has no demonstration: give one, or "
                "leave the query out."
            )
        if (
            not any(one != (text, label) and one[1] == label for one in shown)
            and len(classes) <= shots
        ):
            raise InputError(
                f"the class {label!r} has one example, which is asked for: give a second one to be "
                "shown beside it."
            )
    if shots < 1 or shots >= len(shown) + (asked is not shown):
        raise InputError(
            f"shots={shots}: there are {len(shown)} demonstrations, and a query is not its own."
        )
    if batch is not None and not 1 <= batch <= len(asked):
        raise InputError(f"batch={batch}: there are {len(asked)} queries.")


def _drawn(
    shown: Sequence[Example], classes: Sequence[str], count: int, rng: Random
) -> list[Example]:
    """Demonstrations, class by class, in a random order."""
    by_class = {name: [one for one in shown if one[1] == name] for name in classes}
    for some in by_class.values():
        rng.shuffle(some)
    names, chosen = list(classes), list[Example]()
    while len(chosen) < count:
        rng.shuffle(names)
        for name in names:
            if by_class[name] and len(chosen) < count:
                chosen.append(by_class[name].pop())
    rng.shuffle(chosen)
    return chosen


def _moved(labels: list[str], rng: Random) -> list[str]:
    """The same labels in another order; as they were where all are equal."""
    if len(set(labels)) < 2:
        return labels
    while True:
        moved = rng.sample(labels, len(labels))
        if moved != labels:
            return moved


def _said(
    tokenizer: Tokenizer,
    prefix: list[int],
    template: str,
    shown: Sequence[Example],
    asked: Example,
) -> _Said:
    """Tokens of one prompt, found by characters in the text with all its labels."""
    text, labels, query = "", [], (0, 0)
    for words, label in (*shown, asked):
        before, between, after = template.replace("{text}", "{label}").split("{label}")
        start = len(text) + len(before)
        query = (start, start + len(words))
        text += before + words + between
        labels.append((len(text), len(text) + len(label)))
        text += label + after
    encoded = encode(tokenizer, text, prefix)
    places = [_one_token(encoded, span) for span in labels]
    end = places.pop()
    return _Said(encoded.ids[:end], encoded.ids[end], places, encoded.covering(*query))


def _one_token(encoded: Encoded, span: tuple[int, int]) -> int:
    found = encoded.word(*span)
    if found is None:
        label = encoded.text[slice(*span)]
        pieces = [encoded.text[slice(*encoded.spans[at])] for at in encoded.covering(*span)]
        raise InputError(
            f"the label {label!r} is not a token of its own where it stands ({pieces}): take "
            "another word, or end the template before it with a space."
        )
    return found


def _probe(
    said: Sequence[_Said],
    labels: Sequence[Sequence[str]],
    classes: Sequence[str],
    facts: Tensor,
    seed: int,
    settings: dict[str, str | int | float | bool | None],
) -> Probe:
    tokens, real = pad_right([one.ids for one in said])
    length = tokens.shape[1]
    ends = [len(one.ids) - 1 for one in said]
    targets: Int[Tensor, "batch pos"] = torch.full_like(tokens, -1)
    targets[torch.arange(len(said)), torch.tensor(ends)] = torch.tensor(
        [one.answer for one in said]
    )
    marks = {
        "end": at_positions(length, ends),
        "label": at_positions(length, [one.labels for one in said]),
        "query": at_positions(length, [one.query for one in said]),
    }
    if len(classes) <= _MOST_CLASSES and all(set(row) == set(classes) for row in labels):
        for number, name in enumerate(classes):
            places = [
                [at for at, word in zip(one.labels, row, strict=True) if word == name]
                for one, row in zip(said, labels, strict=True)
            ]
            marks[f"label_{number}"] = at_positions(length, places)
    return Probe(
        tokens=tokens,
        real=real,
        structure=tokens.where(real, -1),
        targets=targets,
        marks=marks,
        facts={"class": facts},
        name="in_context",
        seed=seed,
        settings=settings,
    )
