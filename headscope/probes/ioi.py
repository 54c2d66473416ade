"""Indirect-object prompts: "When Mary and John went to the store, John gave a drink to" -> Mary.

After the task of Wang et al. 2022 (arXiv 2211.00593); the sentences are our own. Every name,
place and object that is used is one token of the model's tokenizer, checked where it stands in
a sentence, so that all prompts of one template have one length.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Literal, NamedTuple

import torch

from headscope.errors import InputError
from headscope.probes.encoding import Encoded, at_positions, encode, pad_right
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import (
    HasVocabulary,
    Tokenizer,
    bos_prefix,
    check_length,
    need_tokenizer,
)

Corruption = Literal["flip", "third"]

_TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {gift} to {io}",
    "After {a} and {b} went to the {place}, {s} handed a {gift} to {io}",
    "While {a} and {b} rested at the {place}, {s} offered a {gift} to {io}",
    "When {a} and {b} returned to the {place}, {s} brought a {gift} to {io}",
    "After {a} and {b} walked to the {place}, {s} sent a {gift} to {io}",
    "While {a} and {b} worked at the {place}, {s} gave a {gift} to {io}",
)
_WORDS = {
    "names": """
        Mary Anna Emma Alice Sarah Laura Julia Kate Lucy Grace Ruth Jane Clara Rosa Helen Amy
        Susan Linda Karen Lisa John Tom James Peter Paul Mark David Simon Henry Jack Adam Max
        Victor Luke Sam Michael Robert Daniel Kevin Brian
    """,
    "places": """
        store park school market station library hospital office church river kitchen museum farm
    """,
    "gifts": """
        drink letter flower present ticket sandwich cake ball computer map snack coin book ring
    """,
}


class _Prompt(NamedTuple):
    """One sentence, with where its words are."""

    encoded: Encoded
    s1: int
    s2: int
    io: int
    answer: int


def ioi(
    model: HasVocabulary,
    batch: int = 32,
    seed: int = 0,
    *,
    corrupt: Corruption = "flip",
    bos: bool | None = None,
) -> Probe:
    """Two names, one of them said twice; the answer is the other (the indirect object, IO).

    Half the prompts name the IO first (ABBA), half the subject S (BABA). Prompts of one template
    and order are a cluster: errors and tests count these (12 at most). The target at ``end``
    is the IO, the foil is S. Marks: ``end``, ``io``, ``s1``, ``s1_next`` (the token after S1),
    ``s2``. ``probe.corrupt`` has the same sentences with another second name, aligned:

    * ``"flip"``: S2 becomes the IO. The right answer becomes S, and the corrupt probe's targets
      and foils say so.
    * ``"third"``: S2 becomes a third name (ABC). There is no right answer; targets and foils
      are kept, and a model has no reason to prefer either.

    Marks always name places: ``s2`` is where S2 stood.

    Raises:
        InputError: if the tokenizer has fewer than three of the names, or no place or object,
            as single tokens.
    """
    if corrupt not in ("flip", "third"):
        raise InputError(f"corrupt={corrupt!r} is unknown: 'flip' or 'third'.")
    if batch < 1:
        raise InputError(f"batch={batch} leaves nothing to run: give 1 or more.")
    tokenizer = need_tokenizer(model, "an IOI probe")
    prefix = bos_prefix(model, bos)
    names, places, gifts = (
        [word for word in words.split() if _is_one_token(tokenizer, word)]
        for words in _WORDS.values()
    )
    if len(names) < 3 or not places or not gifts:
        raise InputError(
            f"the tokenizer of {model.name} has {len(names)} of our names, {len(places)} places "
            f"and {len(gifts)} objects as single tokens; IOI prompts need 3, 1 and 1: "
            "write your own prompts and use from_jsonl."
        )
    templates = _same_length(tokenizer, names, places[0], gifts[0])
    rng = Random(f"ioi {seed}")  # noqa: S311 - sentences, not secrets
    clean, other, forms = [], [], []
    for number in range(batch):
        template = rng.choice(templates)
        io, s, third = rng.sample(names, 3)
        a, b = (io, s) if number % 2 == 0 else (s, io)
        forms.append(2 * templates.index(template) + number % 2)
        words = {"a": a, "b": b, "place": rng.choice(places), "gift": rng.choice(gifts), "io": io}
        clean.append(_prompt(tokenizer, prefix, template, words, s, s))
        swapped = io if corrupt == "flip" else third
        other.append(_prompt(tokenizer, prefix, template, words, s, swapped))
    settings = {"corrupt": corrupt, "bos": bool(prefix), "templates": len(templates)}
    probe = _probe(clean, clean, seed, settings, flipped=False)
    check_length(model, probe.length, what="an IOI prompt", fix="this model is too small for it")
    paired = _probe(other, clean, seed, settings, flipped=corrupt == "flip")
    # Names, places and objects are drawn; what prompts share is the template and its order.
    clusters = torch.tensor(forms)
    return replace(probe, corrupt=replace(paired, clusters=clusters), clusters=clusters)


def _is_one_token(tokenizer: Tokenizer, word: str) -> bool:
    return encode(tokenizer, f"and {word} went").word(4, 4 + len(word)) is not None


def _same_length(tokenizer: Tokenizer, names: list[str], place: str, gift: str) -> list[str]:
    """The largest set of templates that have one length in tokens; of equals the shortest."""
    by_length: dict[int, list[str]] = defaultdict(list)
    for template in _TEMPLATES:
        said = {"a": names[0], "b": names[1], "s": names[0], "io": names[1]}
        full = template.format(**said, place=place, gift=gift)
        by_length[len(encode(tokenizer, full).ids)].append(template)
    return max(by_length.items(), key=lambda item: (len(item[1]), -item[0]))[1]


def _prompt(
    tokenizer: Tokenizer, prefix: list[int], template: str, words: dict[str, str], s: str, said: str
) -> _Prompt:
    """One encoded sentence up to its answer; ``said`` stands where S2 belongs."""
    full = template.format(**words, s=said)
    encoded = encode(tokenizer, full, prefix)
    first, last = full.index(f" {words['a']} ") + 1, full.rindex(" ") + 1
    second, again = full.index(f" {words['b']} ") + 1, full.index(", ") + 2
    s1, io = (first, second) if words["a"] == s else (second, first)
    ends = {s1: s, io: words["io"], again: said, last: words["io"]}
    places = {start: encoded.word(start, start + len(name)) for start, name in ends.items()}
    if None in places.values() or places[last] != len(encoded.ids) - 1:
        raise InputError(f"the tokenizer does not keep the names of {full!r} as single tokens.")
    s1_at, io_at, s2_at, answer_at = (int(places[at] or 0) for at in (s1, io, again, last))
    cut = Encoded(full, encoded.ids[:answer_at], encoded.spans[:answer_at])
    return _Prompt(cut, s1_at, s2_at, io_at, encoded.ids[answer_at])


def _probe(
    prompts: list[_Prompt],
    clean: list[_Prompt],
    seed: int,
    settings: Mapping[str, str | int | float | bool | None],
    *,
    flipped: bool,
) -> Probe:
    """Stack prompts; answers and places are those of the clean ones."""
    tokens, real = pad_right([one.encoded.ids for one in prompts])
    end = [len(one.encoded.ids) - 1 for one in prompts]
    rows = torch.arange(len(prompts))
    answers = torch.tensor([one.answer for one in clean])
    subjects = torch.tensor([one.encoded.ids[one.s1] for one in clean])
    right, wrong = (subjects, answers) if flipped else (answers, subjects)
    targets, foils = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
    targets[rows, end], foils[rows, end] = right, wrong
    places = {
        "end": end,
        "io": [one.io for one in clean],
        "s1": [one.s1 for one in clean],
        "s1_next": [one.s1 + 1 for one in clean],
        "s2": [one.s2 for one in clean],
    }
    return Probe(
        tokens=tokens,
        real=real,
        structure=tokens.where(real, -1),
        targets=targets,
        foils=foils,
        marks={name: at_positions(tokens.shape[1], where) for name, where in places.items()},
        name="ioi",
        seed=seed,
        settings=settings,
    )
