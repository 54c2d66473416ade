"""Inputs of the evaluation: from other seeds than training, with held-out keys and name pairs."""

from dataclasses import dataclass
from random import Random

import torch

from headscope.models import bundled

from .data import Rows


@dataclass(frozen=True)
class Prompt:
    """A prompt that stops right before its answer."""

    ids: list[int]
    answer: int
    wrong: int
    """For a name-sentence the subject, for a fact some other value told in the prompt."""
    depth: float
    """Where in the prompt the answer was told: 0 at its start, 1 at its end."""


def repeated(rows: Rows, count: int, span: int, seed: int) -> torch.Tensor:
    """`[BOS] R R`, `[batch pos]`: R is `span` different random tokens."""
    rng = Random(f"evaluate repeated {seed}")
    blocks = [rng.sample(rows.ids, span) for _ in range(count)]
    return torch.tensor([[rows.bos, *block, *block] for block in blocks])


def stories(rows: Rows, count: int, length: int, seed: int) -> torch.Tensor:
    """Plain text, `[batch pos]`."""
    rng = Random(f"evaluate stories {seed}")
    return torch.tensor([rows.story(rng, length)[0] for _ in range(count)])


def fact_prompts(
    rows: Rows, count: int, length: int, seed: int, held_out: bool = True
) -> list[Prompt]:
    """Facts and filler over nearly `length` tokens, then one of the facts again, without its value.

    The place of the asked fact among the other sentences is uniform; half of the prompts hold as
    many facts as fit, the others fewer facts and more filler.
    """
    rng = Random(f"evaluate facts {seed}")
    return [_fact_prompt(rows, rng, length, held_out) for _ in range(count)]


def _fact_prompt(rows: Rows, rng: Random, length: int, held_out: bool) -> Prompt:
    known = bundled.facts(rng, 24, held_out)
    asked, others = known[0], known[1:]
    others = [fact for fact in others if fact.value != asked.value]
    most = len(others) if rng.random() < 0.5 else rng.randint(2, 12)
    question = rows.encode(asked.before)
    told = rows.encode(asked.before) + rows.encode(asked.value) + rows.encode(asked.after)
    room = length - 1 - len(question) - len(told)
    pieces: list[list[int]] = []
    while True:
        if len(pieces) < most:
            fact = others[len(pieces)]
            piece = rows.encode(fact.before) + rows.encode(fact.value) + rows.encode(fact.after)
        else:
            piece = rows.encode(bundled.story_sentence(rng))
        if len(piece) > room:
            break
        room -= len(piece)
        pieces.append(piece)
    rng.shuffle(pieces)
    place = rng.randint(0, len(pieces))
    pieces.insert(place, told)
    ids = [rows.bos] + [token for piece in pieces for token in piece] + question
    start = 1 + sum(len(piece) for piece in pieces[:place])
    return Prompt(
        ids, rows.encode(asked.value)[0], rows.encode(others[0].value)[0], start / len(ids)
    )


def name_prompts(rows: Rows, count: int, seed: int) -> list[Prompt]:
    """One name-sentence each, of a held-out pair of names, cut before the indirect object."""
    rng = Random(f"evaluate names {seed}")
    prompts = []
    for _ in range(count):
        sentence = bundled.name_sentence(rng, held_out=True)
        answer, wrong = rows.encode(sentence.indirect_object)[0], rows.encode(sentence.subject)[0]
        prompts.append(Prompt([rows.bos, *rows.encode(sentence.before)], answer, wrong, 0.0))
    return prompts
