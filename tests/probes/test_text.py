from pathlib import Path

import pytest

from headscope.errors import InputError
from headscope.probes import text
from headscope.probes.encoding import is_delimiter
from tests.probes.support import Reader, reader, real_reader


def test_the_bundled_passages() -> None:
    model = reader(n_ctx=1024)
    probe = text(model)
    assert len(probe) == 12
    for tokens, real in zip(probe.tokens, probe.real, strict=True):
        decoded = model.tokenizer.decode(tokens[real], skip_special_tokens=True)
        assert decoded[0].isupper() or decoded[0] == '"'
        assert decoded[-1] in '."'
    assert (probe.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    short = text(reader(n_ctx=32))  # cut to what the model reads
    assert short.tokens.equal(probe.tokens[:, :32])


def test_strings_are_padded_on_the_right() -> None:
    model = reader(bos=False)
    probe = text(model, ["Mary and John went.", "Mary went"])
    sizes = probe.real.sum(1).tolist()
    assert sizes[0] == probe.length > sizes[1]
    assert probe.targets[1, sizes[1] - 1 :].eq(-1).all()
    assert probe.structure[1, sizes[1] :].eq(-1).all()
    assert len(text(model, "Mary and John went.")) == 1


def test_delimiters_are_punctuation_and_breaks_but_not_the_first_token() -> None:
    model = reader()
    probe = text(model, [". Mary, John!\nThe end"], bos=False)
    marked = [model.tokenizer.decode([i]) for i in probe.tokens[probe.marks["delimiter"]].tolist()]
    assert [one.strip(" ") for one in marked] == [",", "!", "\n"]
    assert not text(model, ["Mary, John"]).marks["delimiter"][:, 0].any()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (",", True),
        (" ...", True),
        ('."', True),
        ("\n", True),
        (" ", False),
        ("a.", False),
        ("", False),
        ("—", True),
    ],
)
def test_what_a_delimiter_is(shown: str, expected: bool) -> None:
    assert is_delimiter(shown) is expected


def test_the_control_shuffles_each_example_in_place() -> None:
    probe = text(reader())
    control = probe.control
    assert control is not None
    assert control.structure.equal(probe.structure)
    assert control.real.equal(probe.real)
    assert not control.tokens.equal(probe.tokens)
    assert control.tokens[:, 0].equal(probe.tokens[:, 0])
    for old, new, real in zip(probe.tokens, control.tokens, probe.real, strict=True):
        assert sorted(old[real].tolist()) == sorted(new[real].tolist())


def test_a_file_gives_its_paragraphs(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Mary went home.\n\n\nJohn did not.\r\n\r\nNobody knew.\n", "utf-8")
    by_path, by_name = text(reader(), file), text(reader(), str(file))
    assert len(by_path) == 3
    assert by_path.tokens.equal(by_name.tokens)
    assert by_path.settings["source"] == "mine.txt"


def test_length_cuts_into_pieces_and_batch_draws_some() -> None:
    model = reader()
    whole = text(model, length=16)
    assert whole.length == 16
    assert whole.real.all()
    assert (whole.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    some = text(model, length=16, batch=5, seed=1)
    assert len(some) == 5
    assert some.tokens.equal(text(model, length=16, batch=5, seed=1).tokens)
    assert not some.tokens.equal(text(model, length=16, batch=5, seed=2).tokens)
    rows = {tuple(row) for row in whole.tokens.tolist()}
    assert {tuple(row) for row in some.tokens.tolist()} <= rows


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    model = reader(n_ctx=32)
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n\n ")
    binary.write_bytes(b"\xff\xfe\x00")
    cases = {
        "empty.txt: no text": lambda: text(model, empty),
        "cannot be read": lambda: text(model, tmp_path / "absent.txt"),
        "not.here.txt cannot be read": lambda: text(model, "not.here.txt"),
        "as UTF-8": lambda: text(model, binary),
        "text 2 of the texts given is .* reads at most 32: cut it": lambda: text(
            model, ["Mary went", "and " * 60]
        ),
        "text 1 of the texts given has fewer than two": lambda: text(model, ["", "Mary went"]),
        "no text": lambda: text(model, []),
        "gives 12 examples, fewer than batch=50": lambda: text(model, batch=50),
        "length=1: give 2 or more": lambda: text(model, length=1),
        "has none": lambda: text(Reader(None)),
    }
    for message, call in cases.items():
        with pytest.raises(InputError, match=message):
            call()


def test_with_a_real_tokenizer() -> None:
    probe = text(real_reader("gpt2"))
    assert len(probe) == 12
    assert probe.marks["delimiter"].any(1).all()
