"""The tests' own run-time checks of types and shapes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest
import torch
import typing_extensions
from jaxtyping import Bool, Float, Float32, Int, Shaped, TypeCheckError
from jaxtyping._storage import get_shape_memo, pop_shape_memo, push_shape_memo
from torch import Tensor

from headscope.base import statistics
from tests.checked import _fits, _jaxtyping_finds, _plan, checked

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

    def wrong(count: int) -> Any:
        yield count

    wrong.__annotations__["return"] = int
    with pytest.raises(TypeCheckError, match="not <class 'int'>"):
        checked(wrong)


def test_generators_take_their_arguments_in_every_way() -> None:
    def values(by: int) -> Callable[..., Iterator[int]]:
        @checked
        def made(
            first: int, /, second: int = 5, *rest: int, last: int = by, **more: int
        ) -> Iterator[int]:
            yield from (first, second, *rest, last, by, *more.values())

        return made

    assert list(values(3)(1)) == [1, 5, 3, 3]
    assert list(values(4)(1, 2, 7, last=8, other=9)) == [1, 2, 7, 8, 4, 9]
    for wrong in ({"last": "8"}, {"other": "9"}, {"second": None}):
        with pytest.raises(TypeCheckError):
            values(3)(1, **wrong)


KINDS = [
    Float[Tensor, "n d"], Float[Tensor, "d n"], Float[Tensor, "n n"], Int[Tensor, "n d"],
    Bool[Tensor, "n 3"], Float32[Tensor, "2 _"], Shaped[Tensor, "..."], Float[Tensor, "*rest d"],
    Float[Tensor, "n *rest"], Float[Tensor, "n ... d"], Float[Tensor, "*#rest d"],
    Float[Tensor, "n #d"], Float[Tensor, "n+1 d"], Float[np.ndarray, "n d"], Float[Tensor, ""],
    Shaped[np.ndarray, "*rest"],
]  # fmt: skip
ARRAYS = [
    A, B, torch.ones(3, 3), torch.ones(2, 3, dtype=torch.long), A > 0, torch.ones(3),
    torch.ones(()), torch.ones(2, 3, 3), torch.ones(4, 2, 3), torch.ones(2, 1), np.ones((2, 3)),
    np.ones((2, 3), dtype=np.float32), np.ones(3, dtype=int), [1.0], torch.ones(2, 3).half(),
]  # fmt: skip


def test_arrays_fit_where_jaxtyping_says_so() -> None:
    """Each annotation after each other one, and what both leave known of the axes."""

    def found(fits: Callable[[Any, Any], bool], pairs: Any) -> tuple[Any, ...]:
        push_shape_memo({"x": 1})
        try:
            verdicts = [fits(*pair) for pair in pairs]
            sizes, shapes, *_ = get_shape_memo()
            return (*verdicts, dict(sizes), dict(shapes))
        except Exception as error:  # an axis that is a sum of what is not known yet
            return (type(error),)
        finally:
            pop_shape_memo()

    assert sum(_plan(kind) is not None for kind in KINDS) == len(KINDS) - 3
    for pairs in product(product(KINDS, ARRAYS), repeat=2):
        assert found(_fits, pairs) == found(_jaxtyping_finds, pairs), pairs
    assert _fits(KINDS[0], A)  # outside of every call


@pytest.mark.parametrize("base", [Protocol, typing_extensions.Protocol])
def test_members_of_protocols_are_looked_for_in_every_instance(base: Any) -> None:
    @typing_extensions.runtime_checkable
    class Named(base):
        name: str

        def told(self) -> str:
            raise NotImplementedError

    class Plain:
        def told(self) -> str:
            return ""

    class Sub(Plain):
        name = "a"

    with_name, without = Plain(), Plain()
    vars(with_name)["name"] = "b"
    for _ in range(2):
        assert isinstance(Sub(), Named)
        assert isinstance(with_name, Named)
        assert not isinstance(without, Named)
        assert not isinstance(SimpleNamespace(name="c"), Named)
    vars(with_name).clear()
    assert not isinstance(with_name, Named)


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
