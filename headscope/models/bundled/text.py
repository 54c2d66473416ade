"""Sentences from templates: stories, facts, name-sentences. Plain strings, no tokens."""

import re
from dataclasses import dataclass
from random import Random

from . import words as w

_STORIES = (
    "The {adjective} {person} {went} to the {place}.",
    "{name} {saw} a {thing} in the {place}.",
    "One {time} the {person} {saw} a {adjective} {animal}.",
    "It was a {weather} {time} and {name} was very {adjective}.",
    "The {animal} and the {animal} {did} {adverb}.",
    "{name} {said} that {pronoun} would {adverb} become {adjective}.",
    "Then {pronoun} {went} {adverb} from the {place} to the {place}.",
    "When the {person} {did}, the {animal} {did} too.",
    "{name} {went} home because {pronoun} was {adjective} and {adjective}.",
    "Nobody {saw} the {thing} under the {object}.",
    "{name} {gave} {possessive} {animal} some bread and milk.",
    "Every {time} {name} {saw} {possessive} {person} near the {place}.",
    "What did the {person} find? The {person} {saw} the {gift}.",
    "There were {value} people in the {place}, and all of them {did}.",
    "The sun and the moon looked {adjective} over the {place}.",
)

_NAME_SENTENCES = (
    "When {first} and {second} {went} to the {place}, {subject} {gave} a {gift} to",
    "After {first} and {second} {went} to the {place}, {subject} {gave} the {gift} to",
    "Then, {first} and {second} had a long day at the {place}. {subject} {gave} a {gift} to",
    "While {first} and {second} {did} in the {place}, {subject} {gave} a {gift} to",
    "One {time} {first} and {second} {went} to the {place}, and {subject} {gave} a {gift} to",
    "{first} and {second} {saw} a {gift} at the {place}. Then {subject} {gave} it to",
)

_SLOTS = {
    "adjective": w.ADJECTIVES,
    "adverb": w.ADVERBS,
    "animal": w.ANIMALS,
    "did": w.DID,
    "gave": w.GAVE,
    "gift": w.GIFTS,
    "object": w.OBJECTS,
    "person": w.PEOPLE,
    "place": w.PLACES,
    "said": w.SAID,
    "saw": w.SAW,
    "time": w.TIMES,
    "value": w.VALUES,
    "weather": w.WEATHER,
    "went": w.WENT,
}


def _fill(rng: Random, template: str, given: dict[str, str]) -> str:
    """Put words in the slots of a template, from left to right: the given ones, or random ones."""
    return re.sub(
        r"\{(\w+)\}", lambda slot: given.get(slot[1]) or rng.choice(_SLOTS[slot[1]]), template
    )


def story_sentence(rng: Random) -> str:
    """One sentence of the plain text."""
    female = rng.random() < 0.5
    given = {
        "name": rng.choice(w.FEMALE if female else w.MALE),
        "pronoun": "she" if female else "he",
        "possessive": "her" if female else "his",
        "thing": f"{rng.choice(w.COLOURS[:14])} {rng.choice(w.GIFTS)}",
    }
    return _fill(rng, rng.choice(_STORIES), given)


@dataclass(frozen=True)
class Fact:
    """The value of one (colour, object) key. `before` ends where the value is to be said."""

    relation: str
    colour: str
    thing: str
    value: str

    @property
    def before(self) -> str:
        """The sentence up to its value."""
        return f"The {self.relation} of the {self.colour} {self.thing} is"

    @property
    def after(self) -> str:
        """What follows the value."""
        return "."


def facts(rng: Random, count: int, held_out: bool, near_share: float = 0.5) -> list[Fact]:
    """Facts with distinct keys and one relation, all held out from training or none.

    In `near_share` of all calls the keys share few colours and few objects.
    """
    keys = [(c, o) for c in w.COLOURS for o in w.OBJECTS if w.is_held_out_key(c, o) == held_out]
    if rng.random() < near_share:  # both colour and object are needed to tell the keys apart
        colours = set(rng.sample(w.COLOURS, 6))
        things = set(rng.sample(w.OBJECTS, 15))
        near = [(c, o) for c, o in keys if c in colours and o in things]
        keys = near if len(near) >= count else keys
    relation = rng.choice(w.RELATIONS)
    return [Fact(relation, c, o, rng.choice(w.VALUES)) for c, o in rng.sample(keys, count)]


@dataclass(frozen=True)
class NameSentence:
    """A sentence with a subject said twice and an indirect object said once in `before`."""

    before: str
    indirect_object: str
    subject: str
    after: str


def name_sentence(rng: Random, held_out: bool) -> NameSentence:
    """One name-sentence, either order of the two names, several templates."""
    while True:
        first, second = rng.sample(w.NAMES, 2)
        if w.is_held_out_pair(first, second) == held_out:
            break
    subject, other = (first, second) if rng.random() < 0.5 else (second, first)
    given = {
        "first": first,
        "second": second,
        "subject": subject,
        "place": rng.choice(w.PLACES),
        "gift": rng.choice(w.GIFTS),
        "gave": rng.choice(w.GAVE),
        "went": rng.choice(w.WENT),
    }
    before = _fill(rng, rng.choice(_NAME_SENTENCES), given)
    return NameSentence(before, other, subject, ".")
