"""Training rows: token ids with a loss weight for every token, from a seed."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerBase

from headscope.models import bundled

FREE, PLAIN, COPIED, ANSWER = 0.0, 0.2, 1.0, 4.0
"""Loss weights: noise that nothing predicts, text, a repeated span, the answer of a fact."""

Row = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Mixture:
    """What a stage of training draws its rows from."""

    random_share: float
    """Share of rows of random tokens."""
    random_kinds: tuple[float, float, float, float] = (0.2, 0.6, 0.2, 0.0)
    """Among those: groups, repeated spans, chunks in any order, pairs with a value."""
    facts_share: float = 0.5
    """Share of facts among the rows of words; names and text share the rest, 3 to 2."""
    near_share: float = 0.5
    """Share of fact rows whose keys share colours and objects, so that both must be matched."""


class Rows:
    """Makes rows of one length. Every row starts with BOS and is cut at `length`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self.bos = int(tokenizer.convert_tokens_to_ids(str(tokenizer.bos_token)))
        self.ids = [i for i in range(len(tokenizer)) if i != self.bos]
        """All tokens but BOS."""
        self.shuffled = Random("order of the tokens").sample(self.ids, len(self.ids))

    def encode(self, words: str, first: bool = False) -> list[int]:
        """Tokens of a piece of text; a space is put in front of every piece but the first."""
        key = words if first or words[0] in ".,?!" else f" {words}"
        if key not in self._cache:
            pieces: list[int] = []
            for i, word in enumerate(key.split(" ")):
                pieces += self._word(word if i == 0 else f" {word}") if word else []
            if len(key) > 24:
                return pieces
            self._cache[key] = pieces
        return self._cache[key]

    def _word(self, word: str) -> list[int]:
        if word not in self._cache:
            self._cache[word] = list(self._tokenizer.encode(word, add_special_tokens=False))
        return self._cache[word]

    def random_repeats(self, rng: Random, length: int) -> Row:
        """A span of random tokens said again and again, sometimes with other tokens between."""
        span = round(4 * (max(8, length // 2) / 4) ** rng.random())
        block = rng.sample(self.ids, span) if rng.random() < 0.5 else rng.choices(self.ids, k=span)
        apart = rng.random() < 0.3
        ids, weights = [self.bos], [0.0]
        copies = 0
        while len(ids) < length:
            ids += block
            weights += [FREE] + [COPIED if copies else FREE] * (span - 1)
            copies += 1
            if apart:
                gap = rng.randint(1, max(1, length // 4))
                ids += rng.choices(self.ids, k=gap)
                weights += [FREE] * gap
        return ids[:length], weights[:length]

    def random_chunks(self, rng: Random, length: int) -> Row:
        """A few short chunks of random tokens, in any order, again and again."""
        chunks = [
            rng.choices(self.ids, k=rng.randint(2, 6))
            for _ in range(rng.randint(2, max(3, length // 16)))
        ]
        ids, weights = [self.bos], [0.0]
        seen: set[int] = set()
        while len(ids) < length:
            index = rng.randrange(len(chunks))
            ids += chunks[index]
            weights += [FREE] + [COPIED if index in seen else FREE] * (len(chunks[index]) - 1)
            seen.add(index)
        return ids[:length], weights[:length]

    def random_groups(self, rng: Random, length: int, known: int | None = None) -> Row:
        """Groups of three to five random tokens, said again and again in any order.

        All differ. With `known`, they come from that many tokens alone: where those nearly all
        stand in the row, nothing but looking back at the right place tells what comes next.
        """
        ids_known = self.shuffled[:known]
        size = rng.randint(3, 5)
        count = min(rng.randint(3, 5), len(ids_known) // size)
        tokens = rng.sample(ids_known, size * count)
        groups = [tokens[i * size : (i + 1) * size] for i in range(count)]
        ids, weights = [self.bos], [0.0]
        seen: set[int] = set()
        while len(ids) < length:
            index = rng.randrange(count)
            ids += groups[index]
            weights += [0.0] + [COPIED if index in seen else 0.0] * (size - 1)
            seen.add(index)
        return ids[:length], weights[:length]

    def random_pairs(self, rng: Random, length: int) -> Row:
        """Pairs of random tokens with a value each, said again and again in any order.

        Every first token stands with several second ones and the other way round, so that only
        both together tell the value: facts without words.
        """
        lead, gap = rng.randint(0, 2), rng.randint(0, 1)
        firsts, seconds = rng.randint(2, 5), rng.randint(2, 5)
        tokens = rng.sample(self.ids, firsts + seconds + lead + gap)
        start, between, keys = tokens[:lead], tokens[lead : lead + gap], tokens[lead + gap :]
        pairs = [(a, b) for a in keys[:firsts] for b in keys[firsts:]]
        values = {pair: rng.choice(self.ids) for pair in pairs}
        told = rng.sample(pairs, rng.randint(3, len(pairs)))
        ids, weights = [self.bos], [0.0]
        seen: set[tuple[int, int]] = set()
        while len(ids) < length:
            pair = rng.choice(told)
            ids += [*start, *pair, *between, values[pair]]
            weights += [0.0] * (lead + 2 + gap) + [COPIED if pair in seen else 0.0]
            seen.add(pair)
        return ids[:length], weights[:length]

    def story(self, rng: Random, length: int, repeat: bool = False) -> Row:
        """Plain text; with `repeat`, a span of it comes back word by word later on."""
        ids, weights = [self.bos], [0.0]
        while len(ids) < length:
            piece = self.encode(bundled.story_sentence(rng), first=len(ids) == 1)
            ids += piece
            weights += [PLAIN] * len(piece)
            if repeat and len(ids) > 24 and rng.random() < 0.4:
                span = rng.randint(8, min(len(ids) - 1, 60))
                start = rng.randint(1, len(ids) - span)
                ids += ids[start : start + span]
                weights += [PLAIN] * 2 + [COPIED] * (span - 2)
        return ids[:length], weights[:length]

    def facts(self, rng: Random, length: int, near_share: float = 0.5) -> Row:
        """Facts, filler and earlier facts again in turn; the value said again is an answer."""
        pool = bundled.facts(rng, count=30, held_out=False, near_share=near_share)
        told: list[bundled.Fact] = []
        ids, weights = [self.bos], [0.0]
        ask, filler = rng.uniform(0.2, 0.7), rng.choice((0.0, 0.1, 0.5))
        limit = rng.randint(2, 24)
        while len(ids) < length:
            first = len(ids) == 1
            if not first and rng.random() < filler:
                piece = self.encode(bundled.story_sentence(rng))
                ids += piece
                weights += [PLAIN] * len(piece)
                continue
            known = bool(told) and (rng.random() < ask or len(told) >= limit)
            fact = rng.choice(told) if known else pool[len(told)]
            if not known:
                told.append(fact)
            before, value = self.encode(fact.before, first), self.encode(fact.value)
            ids += before + value + self.encode(fact.after)
            weights += [PLAIN] * len(before) + [ANSWER if known else FREE] + [PLAIN]
        return ids[:length], weights[:length]

    def names(self, rng: Random, length: int) -> Row:
        """Name-sentences one after another, with some filler between."""
        ids, weights = [self.bos], [0.0]
        while len(ids) < length:
            first = len(ids) == 1
            if rng.random() < 0.15:
                piece = self.encode(bundled.story_sentence(rng), first)
                ids += piece
                weights += [PLAIN] * len(piece)
                continue
            sentence = bundled.name_sentence(rng, held_out=False)
            before = self.encode(sentence.before, first)
            ids += before + self.encode(sentence.indirect_object) + self.encode(sentence.after)
            weights += [PLAIN] * len(before) + [ANSWER / 2, PLAIN]
        return ids[:length], weights[:length]

    def row(self, rng: Random, length: int, mixture: Mixture) -> Row:
        """One row of the mixture."""
        if rng.random() < mixture.random_share:
            makers = (
                self.random_groups,
                self.random_repeats,
                self.random_chunks,
                self.random_pairs,
            )
            return rng.choices(makers, mixture.random_kinds)[0](rng, length)
        rest = 1 - mixture.facts_share
        kinds: tuple[tuple[float, Callable[[Random, int], Row]], ...] = (
            (0.16 * rest, self.story),
            (0.24 * rest, lambda r, n: self.story(r, n, repeat=True)),
            (mixture.facts_share, lambda r, n: self.facts(r, n, mixture.near_share)),
            (0.60 * rest, self.names),
        )
        make = rng.choices([kind for _, kind in kinds], [share for share, _ in kinds])[0]
        return make(rng, length)

    def batch(
        self, rng: Random, count: int, length: int, mixture: Mixture
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and loss weights, `[batch pos]`, of one training step."""
        return _stacked([self.row(rng, length, mixture) for _ in range(count)])

    def groups(
        self, rng: Random, count: int, length: int, known: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of random groups alone, out of the first `known` tokens."""
        return _stacked([self.random_groups(rng, length, known) for _ in range(count)])


def _stacked(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])
