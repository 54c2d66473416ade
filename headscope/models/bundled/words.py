"""The words of the generated texts. Each becomes one token when a space precedes it."""


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
