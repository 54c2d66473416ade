"""Clean and corrupt prompts with one-token answers, by the name of the task."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from headscope.errors import InputError, nearest
from headscope.probes.encoding import Encoded, at_positions, encode
from headscope.probes.probe import Probe
from headscope.probes.tasks import TASKS, Pair, ioi
from headscope.probes.vocabulary import (
    HasVocabulary,
    Tokenizer,
    bos_prefix,
    check_length,
    need_onwards,
    need_tokenizer,
)

_TOKENS_PER_PASS = 8192


@runtime_checkable
class CanAnswer(Protocol):
    """What can be run on tokens; every ``HeadModel`` can."""

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Logits ``[batch pos d_vocab]``."""


def with_accuracy(model: object, probe: Probe) -> Probe:
    """The probe and its corrupt pair with what the model makes of them.

    ``facts["right"]`` is 1 where the model gives the target a higher logit than the foil (without
    foils: where the target is the likeliest token), else 0; ``settings["accuracy"]`` is its
    mean, and ``settings["accuracy_corrupt"]`` that of the corrupt prompts where they have answers
    of their own. What cannot be run (a tokenizer alone) is left as it is.
    """
    if not isinstance(model, CanAnswer):
        return probe
    own = _right(model, probe)
    told: dict[str, float] = {"accuracy": float(own.float().mean())}
    facts = {**probe.facts, "right": own.float()}
    other = probe.corrupt
    if other is not None and not torch.equal(other.targets, probe.targets):
        theirs = _right(model, other)
        told["accuracy_corrupt"] = float(theirs.float().mean())
        other = replace(
            other,
            facts={**other.facts, "right": theirs.float()},
            settings={**other.settings, **told},
        )
    return replace(probe, facts=facts, settings={**probe.settings, **told}, corrupt=other)


def _right(model: CanAnswer, probe: Probe) -> Bool[Tensor, " example"]:
    """Whether each example's answer wins."""
    at = (probe.targets >= 0).int().argmax(1)
    found: list[Bool[Tensor, " some"]] = []
    for rows in torch.arange(len(probe)).split(max(1, _TOKENS_PER_PASS // probe.length)):
        places: Sequence[int] = sorted(set(at[rows].tolist()))
        with torch.no_grad():
            logits = model.forward(
                probe.tokens[rows], real=probe.real[rows], logits_at=torch.tensor(places)
            )
        column = torch.tensor([places.index(place) for place in at[rows].tolist()])
        one = logits.cpu().float()[torch.arange(len(rows)), column]
        target = one.gather(1, probe.targets[rows, at[rows]][:, None])[:, 0]
        if probe.foils is None:
            found.append(target >= one.amax(1))
        else:
            found.append(target > one.gather(1, probe.foils[rows, at[rows]][:, None])[:, 0])
    return torch.cat(found)


NAMES = ("ioi", *TASKS)
# Prompts that are drawn for every one that is wanted; the rest do not fit or are the same.
_DRAWN = 60


def pairs(
    model: HasVocabulary,
    task: str = "ioi",
    batch: int = 32,
    seed: int = 0,
    **options: bool | str | None,
) -> Probe:
    """Paired prompts of a known task: ``probe`` is the clean batch, ``probe.corrupt`` the other.

    Both are aligned position by position and have one length; answers and foils are single tokens
    where they follow the text, checked for the model's tokenizer. Targets and foils stand at
    ``end``. Where in the corrupt prompts the foil is right their targets and foils say so
    (``settings["flipped"]``).

    A model may not be able to do the task. Where the model can be run, ``settings["accuracy"]``
    is the share of the prompts in which the answer has a higher logit than the foil (0.5 by
    guessing), ``settings["accuracy_corrupt"]`` that of the corrupt ones where they are flipped,
    and ``facts["right"]`` says it of every example.

    Args:
        model: whose tokenizer reads the prompts.
        task: ``"ioi"`` (:func:`headscope.probes.tasks.ioi`), ``"greater_than"``, ``"agreement"``
            (of subject and verb), ``"docstring"``, ``"colour_objects"`` or ``"capital_of"``, which
            :mod:`headscope.probes.tasks` describes one by one; a hyphen is as good.
        batch: examples, all different pairs.
        seed: the same seed gives the same prompts.
        options: ``bos``, whether a BOS stands in front; of IOI also ``corrupt="third"``.

    Raises:
        InputError: if the task is unknown, the tokenizer cannot do it, or it has fewer prompts.

    Example:
        >>> probe = hs.probes.pairs(model, "ioi", batch=4)
        >>> probe.corrupt.tokens.shape == probe.tokens.shape
        True
    """
    task = task.replace("-", "_")
    if task == "ioi":
        make: Callable[..., Probe] = ioi
        return with_accuracy(model, make(model, batch, seed, **options))
    if task not in TASKS:
        raise InputError(nearest(task, NAMES, kind="task"))
    unknown = sorted(set(options) - {"bos"})
    if unknown:
        raise InputError(f"task {task!r} has no option {unknown[0]!r}; it takes bos.")
    bos = options.get("bos")
    if bos is not None and not isinstance(bos, bool):
        raise InputError(f"bos={bos!r} must be True, False or None.")
    return with_accuracy(model, _paired(model, task, batch, seed, bos))


class _Fitted(NamedTuple):
    """A pair as tokens, with the ids of its answers and the positions of its marks."""

    clean: list[int]
    corrupt: list[int]
    answer: int
    foil: int
    flipped: bool
    marks: dict[str, list[int]]


def _paired(model: HasVocabulary, task: str, batch: int, seed: int, bos: bool | None) -> Probe:
    if batch < 1:
        raise InputError(f"batch={batch} leaves nothing to run: give 1 or more.")
    need_onwards(model, f"the task {task!r}")
    tokenizer = need_tokenizer(model, f"the task {task!r}")
    prefix = bos_prefix(model, bos)
    drawn = TASKS[task](Random(f"{task} {seed}"))  # noqa: S311 - sentences, not secrets
    by_length = _by_length(tokenizer, prefix, drawn, batch)
    found = max(by_length.values(), key=len, default=[])
    if len(found) < batch:
        raise InputError(_too_few(model, task, batch, len(found)))
    probe = _probe(found, task, seed, bool(prefix))
    check_length(model, probe.length, what=f"a prompt of {task!r}", fix="use a larger model")
    return probe


def _by_length(
    tokenizer: Tokenizer, prefix: list[int], drawn: Iterator[Pair], batch: int
) -> dict[int, list[_Fitted]]:
    """Different pairs that fit, by their tokens, until one length has enough."""
    found: dict[int, list[_Fitted]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for pair in islice(drawn, _DRAWN * batch + 1000):
        if (pair.clean, pair.corrupt) in seen:
            continue
        one = _fitted(tokenizer, prefix, pair)
        if one is None:
            continue
        seen.add((pair.clean, pair.corrupt))
        found[len(one.clean)].append(one)
        if len(found[len(one.clean)]) == batch:
            break
    return found


def _too_few(model: HasVocabulary, task: str, batch: int, there: int) -> str:
    if there == 0:
        return (
            f"the tokenizer of {model.name} reads no prompt of {task!r} with single tokens as "
            "answers and both prompts in equally many tokens: write your own with from_jsonl."
        )
    return (
        f"the tokenizer of {model.name} reads only {there} different prompts of {task!r} with "
        f"one-token answers in one length: give batch={there} or fewer."
    )


def _fitted(tokenizer: Tokenizer, prefix: list[int], pair: Pair) -> _Fitted | None:
    """The pair as tokens; None unless answers are single tokens and both texts are aligned."""
    clean, corrupt = (encode(tokenizer, text, prefix) for text in (pair.clean, pair.corrupt))
    if len(clean.ids) != len(corrupt.ids):
        return None
    words = (pair.answer, pair.foil)
    answer, foil = (_following(tokenizer, prefix, clean, word) for word in words)
    after = tuple(_following(tokenizer, prefix, corrupt, word) for word in words)
    if answer is None or foil is None or answer == foil or after != (answer, foil):
        return None
    marks = {name: clean.covering(*span) for name, span in pair.marks.items()}
    return _Fitted(clean.ids, corrupt.ids, answer, foil, pair.flipped, marks)


def _following(tokenizer: Tokenizer, prefix: list[int], before: Encoded, word: str) -> int | None:
    """Id of the one token that a word adds to a text; None if it is not one."""
    both = encode(tokenizer, before.text + word, prefix).ids
    added = both[len(before.ids) :]
    return added[0] if len(added) == 1 and both[:-1] == before.ids else None


def _probe(found: list[_Fitted], task: str, seed: int, bos: bool) -> Probe:
    rows = len(found)
    clean = torch.tensor([one.clean for one in found])
    flipped = found[0].flipped
    settings: dict[str, str | int | float | bool | None] = {
        "task": task,
        "bos": bos,
        "flipped": flipped,
    }
    right = torch.tensor([one.answer for one in found])
    wrong = torch.tensor([one.foil for one in found])
    end = clean.shape[1] - 1
    marks = {
        name: at_positions(clean.shape[1], [one.marks[name] for one in found])
        for name in found[0].marks
    }
    marks["end"] = at_positions(clean.shape[1], [end] * rows)

    def made(tokens: torch.Tensor, target: torch.Tensor, foil: torch.Tensor) -> Probe:
        targets, foils = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
        targets[:, end], foils[:, end] = target, foil
        return Probe(
            tokens=tokens,
            real=torch.ones_like(tokens, dtype=torch.bool),
            structure=tokens,
            targets=targets,
            foils=foils,
            marks=marks,
            name=task,
            seed=seed,
            settings=settings,
        )

    corrupt = torch.tensor([one.corrupt for one in found])
    other = made(corrupt, wrong, right) if flipped else made(corrupt, right, wrong)
    return replace(made(clean, right, wrong), corrupt=other)
