import json
from pathlib import Path

import pytest

from headscope.errors import InputError
from headscope.probes import from_jsonl
from tests.probes.support import Reader, reader, real_reader

TEXT = "When Mary and John went to the store, John gave a drink to"


def write(folder: Path, *lines: object) -> Path:
    file = folder / "mine.jsonl"
    shown = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text("\n".join(shown), "utf-8")
    return file


@pytest.fixture(params=[True, False])
def model(request: pytest.FixtureRequest) -> Reader:
    return reader(bos=request.param)


def test_marks_come_from_character_positions(model: Reader, tmp_path: Path) -> None:
    second = TEXT.rindex("John")
    marks = {"s2": [second, second + 4], "went to": [TEXT.index("went"), TEXT.index(" the")]}
    probe = from_jsonl(model, write(tmp_path, {"text": TEXT, "marks": marks}, {"text": "Mary sat"}))
    decode = model.tokenizer.decode
    assert decode(probe.tokens[0][probe.marks["s2"][0]]) == " John"
    assert decode(probe.tokens[0][probe.marks["went to"][0]]) == " went to"
    assert not probe.marks["s2"][1].any()
    at = probe.marks["end"].int().argmax(1)
    assert at.tolist() == probe.last.tolist()
    assert probe.targets[0, :-1].equal(probe.tokens[0, 1:])  # no answers: the next tokens
    assert probe.foils is None
    assert decode(probe.tokens[0][probe.marks["delimiter"][0]]) == ","


def test_part_of_a_token_marks_the_token(model: Reader, tmp_path: Path) -> None:
    start = TEXT.index("Mary") + 1
    probe = from_jsonl(model, write(tmp_path, {"text": TEXT, "marks": {"a": [start, start + 1]}}))
    assert model.tokenizer.decode(probe.tokens[0][probe.marks["a"][0]]) == " Mary"


def test_answers_and_foils(model: Reader, tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"text": TEXT, "answer": " Mary", "foil": " John"},
        "",
        {"text": "Then Mary and", "answer": " John"},
    )
    probe = from_jsonl(model, file)
    assert len(probe) == 2
    assert probe.foils is not None
    ends = probe.marks["end"]
    assert [model.tokenizer.decode(i) for i in probe.targets[ends].tolist()] == [" Mary", " John"]
    assert probe.foils[ends].tolist()[1] == -1
    assert (probe.targets[~ends] == -1).all()


def test_every_bad_line_is_named(model: Reader, tmp_path: Path) -> None:
    bad = {
        "not valid JSON": "{",
        "a string 'text'": {"txt": "a"},
        "unknown field 'anwser'": {"text": "a b", "anwser": " c"},
        "its text is empty": {"text": ""},
        "glued to the text": {"text": TEXT, "answer": "Mary"},
        "tokens: it must be one": {"text": TEXT, "answer": " Xqzv"},
        "a foil needs an answer": {"text": TEXT, "foil": " Mary"},
        "the same token": {"text": TEXT, "answer": " Mary", "foil": " Mary"},
        "its answer is not a word": {"text": TEXT, "answer": 7},
        "mark 'm' is [3, 99]": {"text": "a b c", "marks": {"m": [3, 99]}},
    }
    file = write(tmp_path, {"text": "a fine line"}, *bad.values(), "[]", "3")
    with pytest.raises(InputError) as caught:
        from_jsonl(model, file)
    told = str(caught.value).splitlines()
    assert len(told) == 11
    for number, (what, line) in enumerate(zip(bad, told, strict=False), 2):
        assert f"line {number}: " in line
        assert what in line
    assert "2 more bad lines" in told[-1]


@pytest.mark.parametrize(
    "marks", [[1, 2], {"m": [2, 1]}, {"m": [0]}, {"m": [True, 3]}, {"m": [1, 2]}]
)
def test_bad_marks(model: Reader, tmp_path: Path, marks: object) -> None:
    with pytest.raises(InputError, match="mark"):
        from_jsonl(model, write(tmp_path, {"text": "a  b", "marks": marks}))


def test_bad_files(model: Reader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        from_jsonl(model, write(tmp_path, ""))
    with pytest.raises(InputError, match="cannot be read"):
        from_jsonl(model, tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="reads at most 4: shorten it"):
        from_jsonl(reader(n_ctx=4), write(tmp_path, {"text": TEXT}))
    with pytest.raises(InputError, match="has none"):
        from_jsonl(Reader(None), write(tmp_path, {"text": TEXT}))


def test_with_a_real_tokenizer(tmp_path: Path) -> None:
    model = real_reader("gpt2")
    odd = "Zürich — naïve 😀 Mary"
    start = odd.index("Mary")
    line = {"text": odd, "answer": " went", "marks": {"name": [start, start + 4], "face": [15, 16]}}
    probe = from_jsonl(model, write(tmp_path, line))
    assert model.tokenizer.decode(probe.tokens[0][probe.marks["name"][0]]) == " Mary"
    assert "😀" in model.tokenizer.decode(probe.tokens[0][probe.marks["face"][0]])
