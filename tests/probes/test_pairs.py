from collections import Counter
from inspect import unwrap

import pytest

from headscope.errors import InputError
from headscope.probes import pairs
from headscope.probes.pairs import ioi
from headscope.probes.probe import Probe
from tests.probes.support import Reader, reader, real_reader

PLACES = ("end", "io", "s1", "s1_next", "s2")


@pytest.fixture(params=["small", "small without BOS", "gpt2", "gpt-neox-20b"])
def model(request: pytest.FixtureRequest) -> Reader:
    if request.param.startswith("small"):
        return reader(bos="without" not in request.param)
    return real_reader(request.param)


def said(model: Reader, probe: Probe, example: int, place: str) -> str:
    at = probe.marks[place][example]
    assert at.sum() == 1
    return model.tokenizer.decode(probe.tokens[example][at]).strip()


def answers(model: Reader, probe: Probe, example: int) -> tuple[str, str]:
    assert probe.foils is not None
    end = probe.marks["end"][example]
    ids = probe.targets[example][end], probe.foils[example][end]
    return tuple(model.tokenizer.decode(i).strip() for i in ids)


def test_marks_and_answers_are_the_right_words(model: Reader) -> None:
    probe = pairs(model, "ioi", batch=16)
    assert set(probe.marks) == set(PLACES)
    assert probe.real.all()  # one length
    for i in range(16):
        sentence = model.tokenizer.decode(probe.tokens[i], skip_special_tokens=True)
        io, s = said(model, probe, i, "io"), said(model, probe, i, "s1")
        assert io != s
        assert said(model, probe, i, "s2") == s
        assert sentence.count(s) == 2
        assert sentence.count(f" {io} ") == 1
        assert sentence.endswith(" to")
        assert answers(model, probe, i) == (io, s)
    assert (probe.targets >= 0).sum(1).tolist() == [1] * 16


def test_s1_next_is_the_token_after_s1(model: Reader) -> None:
    probe = pairs(model)
    assert probe.marks["s1"][:, :-1].equal(probe.marks["s1_next"][:, 1:])


def test_half_abba_half_baba(model: Reader) -> None:
    probe = pairs(model, batch=20)
    first = Counter(
        bool(probe.marks["io"][i].int().argmax() < probe.marks["s1"][i].int().argmax())
        for i in range(20)
    )
    assert first == {True: 10, False: 10}


@pytest.mark.parametrize("corrupt", ["flip", "third"])
def test_the_corrupt_prompt_differs_in_s2_alone(model: Reader, corrupt: str) -> None:
    probe = pairs(model, batch=12, corrupt=corrupt)
    other = probe.corrupt
    assert other is not None
    assert (probe.tokens != other.tokens).equal(probe.marks["s2"])
    assert all(other.marks[name].equal(probe.marks[name]) for name in PLACES)
    for i in range(12):
        io, s = answers(model, probe, i)
        if corrupt == "flip":
            assert said(model, other, i, "s2") == io
            assert answers(model, other, i) == (s, io)
        else:
            assert said(model, other, i, "s2") not in (io, s)
            assert answers(model, other, i) == (io, s)


def test_the_seed_decides(model: Reader) -> None:
    one, same, other = (pairs(model, seed=seed).tokens for seed in (1, 1, 2))
    assert one.equal(same)
    assert not (one.shape == other.shape and one.equal(other))


def test_what_cannot_be_made_says_why() -> None:
    with pytest.raises(InputError, match="0 of our names, 0 places and 0 objects"):
        pairs(reader(words="none"))
    with pytest.raises(InputError, match="did you mean 'ioi'"):
        pairs(reader(), "iio")
    with pytest.raises(InputError, match="corrupt='both'"):
        unwrap(ioi)(reader(), corrupt="both")  # unwrapped: not type-checked, as for a user
    with pytest.raises(InputError, match="has none"):
        pairs(Reader(None))
    with pytest.raises(InputError, match="reads at most 8"):
        pairs(reader(n_ctx=8))
    with pytest.raises(InputError, match="batch=0"):
        pairs(reader(), batch=0)
