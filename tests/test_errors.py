"""Errors are sentences that name the input, the cause and the fix."""

import pytest

from headscope.errors import (
    HeadscopeError,
    InputError,
    ModelLoadError,
    UnsupportedModelError,
    nearest,
)


@pytest.mark.parametrize("kind", [InputError, ModelLoadError, UnsupportedModelError])
def test_one_except_catches_all(kind: type[Exception]) -> None:
    assert issubclass(kind, HeadscopeError)


def test_wrong_input_is_also_a_value_error() -> None:
    with pytest.raises(ValueError, match="no head"):
        raise InputError("'7' is no head")


def test_nearest_guesses_a_typing_mistake() -> None:
    said = nearest("Inducton", ["induction", "entropy"], kind="scorer")
    assert said == "unknown scorer 'Inducton'; did you mean 'induction'? known: entropy, induction."


def test_nearest_does_not_guess_wildly() -> None:
    assert "did you mean" not in nearest("xyz", ["induction", "entropy"])


def test_nearest_with_nothing_to_choose_from() -> None:
    assert nearest("a", []) == "unknown name 'a'; known: none."
