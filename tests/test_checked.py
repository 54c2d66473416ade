"""The tests' own run-time checks of types and shapes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from headscope.base import statistics
from tests.checked import checked

if TYPE_CHECKING:
    from decimal import Decimal as Unknown

A, B = torch.ones(2, 3), torch.ones(4, 3)


@checked
def summed(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], *, name: str = "") -> Tensor:
    return a + b


def test_one_name_of_an_axis_is_one_size() -> None:
    assert summed(A, A).shape == A.shape
    with pytest.raises(TypeCheckError, match="n d"):
        summed(A, B)
    with pytest.raises(TypeCheckError, match="name"):
        summed(A, A, name=1)


def test_results_are_held_to_the_sizes_of_arguments() -> None:
    @checked
    def grown(a: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return torch.cat([a, a])

    with pytest.raises(TypeCheckError, match="n d"):
        grown(A)


def test_types_without_shapes() -> None:
    @checked
    def twice(count: int, names: list[str]) -> int:
        result: Any = count * 2 if names else "none"
        return result

    assert twice(1, ["a"]) == 2
    for count, names in (("1", ["a"]), (1, [1]), (1, [])):
        with pytest.raises(TypeCheckError):
            twice(count, names)


def test_inner_functions_share_a_wrapper_and_keep_their_own_values() -> None:
    def adder(by: int, default: int) -> Callable[[int], int]:
        @checked
        def add(to: int, more: int = default) -> int:
            return to + by + more

        return add

    three, five = adder(3, 10), adder(5, 20)
    assert (three(1), five(1), three(1, 0), five(1, 0)) == (14, 26, 4, 6)
    for add in (three, five):
        with pytest.raises(TypeCheckError):
            add("1")


def test_every_call_has_its_own_sizes() -> None:
    @checked
    def again(a: Float[Tensor, "n d"], rest: list[Tensor]) -> Float[Tensor, "n d"]:
        if rest:
            again(rest[0], rest[1:])
        return a

    assert again(A, [B, A]) is A


def test_dataclasses_methods_and_generators() -> None:
    @checked
    @dataclass(frozen=True)
    class Pair:
        a: Float[Tensor, "n d"]
        b: Float[Tensor, "n d"]

        @classmethod
        @checked
        def of(cls, both: tuple[Tensor, Tensor]) -> "Pair":
            return cls(*both)

    assert Pair.of((A, A)).b is A
    with pytest.raises(TypeCheckError, match="n d"):
        Pair(A, B)
    with pytest.raises(TypeCheckError, match="both"):
        Pair.of([A, A])

    @checked
    def parts(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Iterator[Tensor]:
        yield from (a, b)

    assert len(list(parts(A, A))) == 2
    with pytest.raises(TypeCheckError, match="n d"):
        parts(A, B)  # before anything asks for the first value


def test_names_that_nobody_knows_are_not_checked() -> None:
    @checked
    def anything(value: "Unknown", count: int) -> "Unknown":
        return value

    assert anything(A, 1) is A
    with pytest.raises(TypeCheckError):
        anything(A, "1")


def test_headscope_is_checked() -> None:
    three, two = np.ones(3), np.ones(2)
    with pytest.raises(TypeCheckError, match="heads"):
        statistics.interval_of_sem(three, two, np.full(3, 9))
    with pytest.raises(TypeCheckError, match="level"):
        statistics.interval_of_sem(three, three, np.full(3, 9), level="95%")
    with pytest.raises(TypeCheckError, match="paired"):
        statistics.Design(paired="yes")
