"""The bundled tiny models: their folders, checkpoints and training-like texts."""

import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

from headscope.errors import InputError, nearest

DEFAULT = "tiny-gpt2"
# Those that read the stories; the others read what headscope.models.bundled.tasks draws.
READERS = ("tiny-gpt2", "tiny-llama")
_FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Names of the bundled models, decoders and others."""
    return tuple(sorted(path.parent.name for path in _FOLDER.glob("*/config.json")))


def checkpoints(name: str) -> tuple[str, ...]:
    """Training checkpoints of a bundled model, earliest first; empty if it ships none.

    Each is a revision: ``hs.load(name, revision=checkpoint)``.
    """
    return tuple(
        sorted(path.parent.name for path in _folder(name).glob("checkpoints/*/config.json"))
    )


def folder(name: str, revision: str | None = None) -> Path:
    """Folder with the weights of a bundled model.

    Raises:
        InputError: if there is no such model or checkpoint.
    """
    home = _folder(name)
    if revision is None:
        return home
    known = checkpoints(name)
    if revision not in known:
        raise InputError(nearest(revision, known, kind=f"revision of {name}"))
    return home / "checkpoints" / revision


def stories(count: int = 12, sentences: int = 25, seed: int = 0) -> list[str]:
    """Draw texts like those that the bundled decoders were trained on.

    The sentences come from the same templates, so that single ones may have been seen.
    """
    rng = Random(f"stories {seed}")  # noqa: S311  seeded, not secret
    return [" ".join(story_sentence(rng) for _ in range(sentences)) for _ in range(count)]


def _folder(name: str) -> Path:
    if name not in names():
        raise InputError(nearest(name, names(), kind="bundled model"))
    return _FOLDER / name


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FEMALE = _words(
    """
    Mary Anna Emma Alice Sarah Laura Julia Kate Lucy Grace Ruth Jane Clara Rosa Helen Nora Ivy
    Eve Amy Ella
    """
)
MALE = _words(
    """
    John Tom James Peter Paul Mark David Simon Henry Jack Adam Leo Max Oscar Victor Felix Hugo
    Noah Luke Sam
    """
)
NAMES = FEMALE + MALE
COLOURS = _words(
    """
    red blue green yellow black white brown orange pink grey purple golden silver dark bright
    old new small large round
    """
)
OBJECTS = _words(
    """
    door box house car boat table chair lamp book key bag coat hat clock bell cup bottle ring
    stone tower bridge gate wall window room garden truck train wheel basket
    """
)
VALUES = _words(
    """
    zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty
    fifty sixty hundred thousand
    """
)
RELATIONS = _words("code number price name size mark sign weight")
GIFTS = _words(
    """
    drink letter flower present ticket pencil sandwich cake apple ball computer map snack coin
    kiss
    """
)
PLACES = _words(
    """
    store park school beach market station library hospital office church river village forest
    kitchen museum farm
    """
)
ANIMALS = _words("dog cat bird horse cow fox fish mouse bear rabbit sheep duck")
PEOPLE = _words(
    """
    man woman boy girl teacher doctor farmer king queen child friend neighbour baker sailor
    """
)
ADJECTIVES = _words(
    """
    happy sad tired hungry angry quiet young kind brave clever lazy poor rich cold warm strong
    """
)
ADVERBS = _words("slowly quickly quietly happily again together alone early late away")
WENT = _words("walked ran went came drove travelled returned")
SAW = _words(
    """
    saw found took liked wanted bought lost carried watched opened painted cleaned forgot
    remembered
    """
)
SAID = _words("said thought knew believed hoped dreamed")
GAVE = _words("gave handed brought sent offered")
DID = _words("slept waited laughed cried sang danced worked rested smiled talked")
TIMES = _words("morning evening day night summer winter week year")
WEATHER = _words("sunny rainy windy cloudy snowy foggy")
FUNCTION = _words(
    """
    The the A a an of is was were are and but or so because while when When After after While
    Then then in In on at to from with for by near under behind One one Every every It it He he
    She she They they his her their him them that this there very not no had has have did would
    could will all some many more other same next first last only also never always soon later
    before who what where how than as be been into out up down over between Yesterday Today
    Everyone Nobody But And Both both once long time way people thing place sky sun moon rain
    wind water bread milk house home world story end began ended looked felt became Question
    Answer
    """
)
PUNCTUATION = (".", ",", "?", "!", ":", ";")


def all_words() -> list[str]:
    """Every word once, in a fixed order."""
    groups = (
        NAMES,
        COLOURS,
        OBJECTS,
        VALUES,
        RELATIONS,
        GIFTS,
        PLACES,
        ANIMALS,
        PEOPLE,
        ADJECTIVES,
        ADVERBS,
        WENT,
        SAW,
        SAID,
        GAVE,
        DID,
        TIMES,
        WEATHER,
        FUNCTION,
    )
    return list(dict.fromkeys(word for group in groups for word in group))


def is_held_out_key(colour: str, thing: str) -> bool:
    """Whether a (colour, object) key never occurs in a training fact: every fifth combination."""
    return (2 * COLOURS.index(colour) + OBJECTS.index(thing)) % 5 == 0


def is_held_out_pair(first: str, second: str) -> bool:
    """Whether two names never meet in a training name-sentence: every fifth unordered pair."""
    return (NAMES.index(first) + NAMES.index(second)) % 5 == 0


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
    "adjective": ADJECTIVES,
    "adverb": ADVERBS,
    "animal": ANIMALS,
    "did": DID,
    "gave": GAVE,
    "gift": GIFTS,
    "object": OBJECTS,
    "person": PEOPLE,
    "place": PLACES,
    "said": SAID,
    "saw": SAW,
    "time": TIMES,
    "value": VALUES,
    "weather": WEATHER,
    "went": WENT,
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
        "name": rng.choice(FEMALE if female else MALE),
        "pronoun": "she" if female else "he",
        "possessive": "her" if female else "his",
        "thing": f"{rng.choice(COLOURS[:14])} {rng.choice(GIFTS)}",
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
    keys = [(c, o) for c in COLOURS for o in OBJECTS if is_held_out_key(c, o) == held_out]
    if rng.random() < near_share:  # both colour and object are needed to tell the keys apart
        colours = set(rng.sample(COLOURS, 6))
        things = set(rng.sample(OBJECTS, 15))
        near = [(c, o) for c, o in keys if c in colours and o in things]
        keys = near if len(near) >= count else keys
    relation = rng.choice(RELATIONS)
    return [Fact(relation, c, o, rng.choice(VALUES)) for c, o in rng.sample(keys, count)]


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
        first, second = rng.sample(NAMES, 2)
        if is_held_out_pair(first, second) == held_out:
            break
    subject, other = (first, second) if rng.random() < 0.5 else (second, first)
    given = {
        "first": first,
        "second": second,
        "subject": subject,
        "place": rng.choice(PLACES),
        "gift": rng.choice(GIFTS),
        "gave": rng.choice(GAVE),
        "went": rng.choice(WENT),
    }
    before = _fill(rng, rng.choice(_NAME_SENTENCES), given)
    return NameSentence(before, other, subject, ".")
