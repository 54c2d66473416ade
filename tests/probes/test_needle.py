"""Needle probes: what is hidden is where the marks say, at every length, depth and tokenizer."""

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import headscope as hs
from headscope.base.configs import parse
from headscope.errors import InputError
from headscope.models import bundled
from headscope.probes import Needle, needle
from headscope.probes.config import ProbeConfig, build_probe
from headscope.probes.needle import (
    DRAWN,
    Piece,
    _hide,
    _words,
    assemble,
    read_haystack,
    split_sentences,
)
from tests.probes.support import Reader, reader, real_reader, small_tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] | trim }} [/INST]{% endfor %}"
    "{% if add_generation_prompt %} {% endif %}"
)


def long_reader(bos: bool = True) -> Reader:
    return reader(bos, n_ctx=None)


def said(model: Reader, probe: hs.Probe, mark: str, row: int = 0) -> str:
    """Text of the tokens of a mark."""
    return str(model.tokenizer.decode(probe.tokens[row][probe.mark(mark)[row]]))


def said_apart(model: Reader, probe: hs.Probe, mark: str, row: int = 0) -> list[str]:
    """Texts of the unbroken runs of a mark."""
    at = probe.mark(mark)[row].nonzero().flatten()
    runs = at.tensor_split((at.diff() > 1).nonzero().flatten() + 1)
    return [str(model.tokenizer.decode(probe.tokens[row][run])) for run in runs]


@pytest.mark.parametrize("kind", [*DRAWN, "prose"])
@pytest.mark.parametrize("bos", [True, False])
def test_marks_hold_what_they_name(kind: str, bos: bool) -> None:
    model = long_reader(bos=bos)
    probe = needle(model, lengths=400, depths=[0.0, 0.6, 1.0], needles=kind, distractors=0)
    for row in range(len(probe)):
        ids = probe.tokens[row]
        whole = model.tokenizer.decode(ids[probe.real[row]])
        question, hidden = said(model, probe, "question", row), said(model, probe, "needle", row)
        assert question.strip() in whole
        for run in said_apart(model, probe, "needle_answer", row):
            assert run.strip() in hidden
        at = probe.mark("answer")[row].nonzero().flatten()
        assert at.tolist() == list(range(int(at[0]), int(probe.last[row]) + 1))
        assert (probe.targets[row][at - 1] == ids[at]).all()
        assert int((probe.targets[row] >= 0).sum()) == len(at)
        # what can be copied is what the answering positions predict
        asking = probe.mark("answering")[row].nonzero().flatten()
        key = set(ids[probe.mark("needle_answer")[row]].tolist())
        assert set(probe.targets[row][asking].tolist()) <= key
        assert not bool((probe.mark("needle_answer") & ~probe.mark("needle")).any())
        assert whole.endswith(said(model, probe, "answer", row))
    assert bool(probe.mark("end").sum(1).eq(1).all())


@settings(max_examples=15, deadline=None)
@given(length=st.integers(120, 700), depth=st.floats(0, 1), seed=st.integers(0, 99))
@example(length=236, depth=0.3361742653693183, seed=61)  # into a sentence of 41 tokens
def test_a_needle_stands_between_sentences(length: int, depth: float, seed: int) -> None:
    model = long_reader()
    probe = needle(model, lengths=length, depths=[depth], per_cell=1, distractors=0, seed=seed)
    assert probe.length <= length
    marked = probe.mark("needle")[0].nonzero().flatten()
    before = model.tokenizer.decode(probe.tokens[0][1 : int(marked[0])])
    after = model.tokenizer.decode(probe.tokens[0][int(marked[-1]) + 1 : probe.length])
    assert before == "" or before.rstrip()[-1] in ".!?"
    assert re.match(r" [A-Z]", after)  # the next sentence, or the question
    # the place is the one asked for, less the part of a sentence before it, which now follows the
    # needle (a question and what answers it are one); up to 3 tokens of space
    end = int(probe.mark("question")[0].int().argmax())
    room = end - 1 - len(marked)
    first, *others = re.split(r"(?<=[.!?]) ", after.strip())
    split = " ".join([first, *others[:1]]) if first.endswith("?") else first
    longest = len(model.tokenizer(split, add_special_tokens=False)["input_ids"])
    assert -3 <= depth * room - (int(marked[0]) - 1) <= longest + 3


def test_depth_one_is_the_end_and_zero_the_start() -> None:
    model = long_reader()
    for extra in (0, 3):
        probe = needle(model, 300, [0.0, 1.0], per_cell=1, distractors=extra)
        start, end = (row.nonzero().flatten() for row in probe.mark("needle"))
        assert not model.tokenizer.decode(probe.tokens[0][1 : int(start[0])]).strip()
        first = int(probe.mark("question")[1].int().argmax())
        assert not model.tokenizer.decode(probe.tokens[1][int(end[-1]) + 1 : first]).strip()


def test_texts_are_filled_as_far_as_whole_sentences_go() -> None:
    model = long_reader()
    probe = needle(model, [200, 500], [0.3], per_cell=3)
    lengths = probe.real.sum(1)
    assert (lengths <= probe.facts["length"]).all()
    assert (lengths > probe.facts["length"] - 60).all()


def test_same_seed_same_bytes_other_seed_other_ones() -> None:
    model = long_reader()
    first, again, other = (needle(model, 300, 2, seed=seed) for seed in (1, 1, 2))
    assert first.tokens.equal(again.tokens)
    assert first.control is not None
    assert again.control is not None
    assert first.control.tokens.equal(again.control.tokens)
    assert first.tokens.shape != other.tokens.shape or not first.tokens.equal(other.tokens)


@pytest.mark.parametrize("kind", [*DRAWN, "prose"])
def test_the_control_hides_another_needle_and_says_its_answer(kind: str) -> None:
    model = long_reader()
    probe = needle(model, 400, 3, kind, distractors=1, control="removed")
    control = probe.control
    assert control is not None
    assert control.paired
    assert int(control.real.sum(1).max()) <= 400
    for row in range(len(probe)):
        assert said(model, probe, "question", row) == said(model, control, "question", row)
        own, other = (said(model, one, "needle", row) for one in (probe, control))
        assert own != other
        assert own not in model.tokenizer.decode(control.tokens[row])
        place, stood = (int(one.mark("needle")[row].int().argmax()) for one in (probe, control))
        assert abs(place - stood) <= 30  # depth is that of the same sentences
        asked = control.mark("answering")[row].nonzero().flatten()
        key = set(control.tokens[row][control.mark("needle_answer")[row]].tolist())
        assert set(control.targets[row][asked].tolist()) <= key


def test_one_needle_has_a_control_too() -> None:
    """Other sentences stand where it stood, and what stands in its answer's place is asked for."""
    model = long_reader()
    alone = Needle(("The cat ate the blue cheese.",), "What was eaten?", "blue cheese", ("blue",))
    probe = needle(model, 300, 3, [alone], control="removed")
    control = probe.control
    assert control is not None
    for row in range(len(probe)):
        changed = probe.tokens[row] != control.tokens[row]
        asking = probe.mark("answering")[row].nonzero().flatten()
        inside = probe.mark("needle")[row].clone()
        inside[asking + 1] = True
        assert not bool((changed & ~inside).any())
        key = control.mark("needle_answer")[row]
        assert control.targets[row, asking].equal(control.tokens[row, key])
        assert control.tokens[row, asking + 1].equal(control.tokens[row, key])
        assert not control.tokens[row, key].equal(probe.tokens[row, key])


def test_the_other_control_asks_about_something_else() -> None:
    model = long_reader()
    probe = needle(model, 300, 2, "numbers", control="other_question", distractors=2)
    control = probe.control
    assert control is not None
    for row in range(len(probe)):
        assert said(model, probe, "needle", row) == said(model, control, "needle", row)
        assert said(model, probe, "question", row) != said(model, control, "question", row)
        assert said(model, probe, "answer", row) == said(model, control, "answer", row)
        asked_for = said(model, control, "question", row).rstrip("?").split()[-1]
        start = int(control.mark("question")[row].int().argmax())
        assert asked_for not in model.tokenizer.decode(control.tokens[row][:start])


def test_distractors_are_like_the_needle_with_other_answers() -> None:
    model = long_reader()
    probe = needle(model, 300, [0.5], "facts", distractors=4, per_cell=2)
    for row in range(2):
        text = said(model, probe, "distractor", row)
        found = re.findall(r"The (\w+) of the (\w+ \w+) is (\w+)\.", text)
        own = re.findall(
            r"The (\w+) of the (\w+ \w+) is (\w+)\.", said(model, probe, "needle", row)
        )
        assert len(found) == 4
        assert len(own) == 1
        assert len({relation for relation, _, _ in found + own}) == 1
        assert len({key for _, key, _ in found + own}) == 5
        assert len({value for _, _, value in found + own}) == 5


def test_facts_are_the_language_of_the_bundled_models_with_keys_they_never_saw() -> None:
    known = _words()["facts"]
    assert tuple(known["colours"]) == bundled.COLOURS
    assert tuple(known["objects"]) == bundled.OBJECTS
    assert tuple(known["values"]) == bundled.VALUES
    assert tuple(known["relations"]) == bundled.RELATIONS
    for fact in DRAWN["facts"](Random(0)):
        colour, thing = fact.question.split()[-3:-1]
        assert bundled.is_held_out_key(colour, thing)


def test_random_content_is_random() -> None:
    for kind in DRAWN:
        answers = [next(DRAWN[kind](Random(seed))).answer for seed in range(40)]
        assert len(set(answers)) > 10


def test_several_needles_stand_apart() -> None:
    model = long_reader()
    probe = needle(model, 600, [0.5], "several", per_cell=1, distractors=0, seed=3)
    hidden = said_apart(model, probe, "needle")
    assert len(hidden) == 3
    assert all(re.fullmatch(r" ?One of the magic numbers of \w+ is \d{5}\.", h) for h in hidden)


def test_ones_own_needles_and_haystack(tmp_path: Path) -> None:
    model = long_reader()
    file, folder = tmp_path / "own.jsonl", tmp_path / "hay"
    folder.mkdir()
    (folder / "b.txt").write_text("Later on it rained. Nobody minded!", "utf-8")
    (folder / "a.txt").write_text('He said "Stop." Then he went.\n\nA new part. ' * 20, "utf-8")
    lines = [
        {"needle": "The cat ate the blue cheese.", "question": "Who ate?", "answer": "The cat"},
        {"needle": ["A is in B.", "B is in C."], "question": "Where?", "real_needle": "C"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    probe = needle(model, 200, [0.5], file, haystack=folder, distractors=1)
    assert len(probe) == 2
    assert said(model, probe, "needle_answer", 0).strip() == "The cat"
    assert said(model, probe, "needle_answer", 1).strip() == "C"
    others = {one.strip() for one in said_apart(model, probe, "distractor", 0)}
    assert " ".join(sorted(others)).replace(". ", ".") in (
        "A is in B.B is in C.",
        "B is in C.A is in B.",
    )
    text = model.tokenizer.decode(probe.tokens[0][~probe.mark("distractor")[0]])
    assert text.startswith('<s> He said "Stop." Then he went.')
    given = needle(model, 200, [0.5], [Needle(("X is Y.",), "What is X?", "Y", ("Y",))])
    assert said(model, given, "answer").strip() == "Y"


def test_sentences_joined_are_the_text() -> None:
    text = 'One. "Two!" (Three?)\n\nA heading\n\nFour... and 3.5 of it.  End'
    found = split_sentences(text)
    assert "".join(found) == " " + text
    assert [one.strip() for one in found] == [
        "One.", '"Two!"', "(Three?)", "A heading", "Four...", "and 3.5 of it.", "End",
    ]  # fmt: skip


def test_the_bundled_haystack_is_of_known_words() -> None:
    hay = read_haystack(None)
    known = set(bundled.all_words()) | set(re.findall(r"\w+", " ".join(bundled._STORIES)))
    assert len(hay.sentences) == len(set(hay.sentences)) == 3000
    for sentence in hay.sentences:
        assert set(re.findall(r"\w+", sentence)) <= known


def test_a_chat_template_is_laid_around_the_prompt() -> None:
    tokenizer = small_tokenizer(True, "all")
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")  # noqa: S106
    tokenizer.chat_template = CHAT
    model = Reader(tokenizer, long_reader().shape)
    chat = needle(model, 300, [0.5], "numbers", per_cell=1)
    text = tokenizer.decode(chat.tokens[0])
    assert text.startswith("<s>[INST]")
    assert text.count("<s>") == 1
    assert re.search(r"number of (\w+)\? \[/INST\] The magic number of \1 is +\d{5}$", text)
    assert said(model, chat, "answer") == said(model, chat, "needle_answer")
    plain = needle(model, 300, [0.5], "numbers", per_cell=1, chat=False)
    assert "[INST]" not in tokenizer.decode(plain.tokens[0])
    assert (chat.settings["chat"], plain.settings["chat"]) == (True, False)
    tokenizer.chat_template = "{% for m in messages %}{% endfor %}"
    with pytest.raises(InputError, match="does not contain the message"):
        needle(model, 300, [0.5], "numbers")


class Slow:
    """A tokenizer without character offsets: one token a letter."""

    is_fast = False
    bos_token_id: int | None = None
    all_special_ids: list[int] = []  # noqa: RUF012

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 128 for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}

    def batch_decode(self, sequences: list[list[int]], **options: object) -> list[str]:
        return ["".join(map(chr, one)) for one in sequences]

    def apply_chat_template(self, conversation: object, **options: object) -> object:
        raise AssertionError("a text without a template asks for none")


def test_without_offsets_pieces_are_joined() -> None:
    pieces = [Piece("ab"), Piece("cd", ("x",)), Piece("ef", ("x", "y"))]
    assert assemble(Slow(), pieces, [1]) == (
        [1, *map(ord, "abcdef")],
        {"x": [3, 4, 5, 6], "y": [5, 6]},
    )
    model = Reader(Slow(), long_reader().shape)
    probe = needle(model, 600, [0.5], "numbers", per_cell=1)
    assert probe.settings["spans"] == "concatenated"
    chars = "".join(map(chr, probe.tokens[0][probe.mark("needle_answer")[0]].tolist()))
    assert re.fullmatch(r" \d{5}", chars)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
def test_real_tokenizers_find_the_spans(name: str) -> None:
    model = real_reader(name)
    probe = needle(model, 700, [0.2, 0.9], "prose", chat=False)
    for row in range(len(probe)):
        key = said(model, probe, "needle_answer", row).strip()
        assert key
        assert key == said(model, probe, "answer", row).strip()


def test_the_written_form_makes_the_same_probe() -> None:
    model = long_reader()
    values = {"kind": "needle", "lengths": [200, 300], "depths": [0.5], "needles": "numbers"}
    built = build_probe(parse(ProbeConfig, values, "here"), model)
    assert built.tokens.equal(needle(model, [200, 300], [0.5], "numbers").tokens)
    with pytest.raises(InputError, match="no 'copies'"):
        build_probe(parse(ProbeConfig, values | {"copies": 2}, "here"), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": 30}, "does not hold the needle"),
        ({"depths": [1.5]}, "shares from 0 to 1"),
        ({"lengths": []}, "at least one length"),
        ({"depths": 0}, "at least one depth"),
        ({"needles": "fact"}, "did you mean 'facts'"),
        ({"needles": []}, "no needles given"),
        ({"needles": "none.jsonl"}, "cannot be read"),
        ({"haystack": "nowhere.txt"}, "cannot be read"),
        ({"distractors": -1}, "0 or more"),
        ({"distractors": 5000}, "has no 5000 distractors"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_what_makes_no_sense_gets_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        needle(long_reader(), **({"lengths": 300} | options))


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"needle": "A.", "question": "?", "answer": "B"}\n{"neddle": 1}\n[', "utf-8")
    with pytest.raises(InputError) as caught:
        needle(long_reader(), 300, needles=file)
    lines = str(caught.value).splitlines()
    assert "line 1: the answer 'B' is not said" in lines[0]
    assert "line 2: unknown field 'neddle'" in lines[1]
    assert "line 3" in lines[2]


def test_limits_are_checked_before_anything_is_read() -> None:
    with pytest.raises(InputError, match="reads at most 256"):
        needle(reader(n_ctx=256), lengths=[100, 300])
    with pytest.raises(InputError, match="needs a tokenizer"):
        needle(Reader(None), 100)


def test_facts_of_a_probe_follow_its_examples() -> None:
    probe = needle(long_reader(), [200, 300], [0.0, 1.0], per_cell=1)
    part = probe.examples(slice(1, 3))
    assert part.facts["length"].tolist() == [200, 300]
    assert part.facts["depth"].tolist() == [1, 0]
    assert probe.to("cpu").facts["number"].tolist() == [0] * 4


def test_an_answer_is_marked_where_it_is_a_word() -> None:
    model = long_reader()
    for sentence, answer, expected in (
        ("The red door is by the redder one.", "red", " red"),
        ("Start with art and then with cart.", "art", " art"),
        ("He says that 5 of the 55 are blue.", "5", " 5"),
        ("It was unbelievable.", "believ", "believ"),
    ):
        hidden = Needle((sentence,), "What is it?", answer, (answer,))
        parts = _hide(sentence, hidden.parts, "needle")
        assert "".join(part.text for part in parts) == f" {sentence}"
        before = parts[0].text.split()[-1]
        assert [p.text for p in parts if "needle_answer" in p.marks] == [expected]
        assert before in ("The", "with", "that", "un")
    probe = needle(model, lengths=120, depths=[0.5], needles=[hidden], distractors=0)
    assert "believ" in said(model, probe, "needle_answer")
