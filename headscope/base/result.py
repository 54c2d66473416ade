"""What every kind of result can do, so that files, pages and commands need not know the kinds."""

from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from headscope.base.glance import Glance
from headscope.base.sections import Section

if TYPE_CHECKING:
    import pandas


@runtime_checkable
class Result(Protocol):
    """Numbers that were found out. :func:`headscope.plots.figures` draws them."""

    def glance(self) -> Glance:
        """What is worth knowing at a glance, for a terminal and a notebook."""

    def summary(self) -> str:
        """The same in a few lines of text."""

    def sections(self) -> list[Section]:
        """How a page shows it; figures are named and not drawn."""

    def columns(self) -> dict[str, Any]:
        """The numbers, column by column."""

    def to_pandas(self) -> "pandas.DataFrame":
        """The numbers as a data frame."""

    def save(self, path: "str | PathLike[str]") -> None:
        """Write it to one file, which ``load`` of the same class reads."""


class Tabular:
    """Base of results of numbers, whose rows :meth:`to_pandas` gives."""

    if TYPE_CHECKING:  # a method of every class that derives from it

        def to_pandas(self) -> "pandas.DataFrame":
            """The numbers as a data frame."""
            ...

    def columns(self) -> dict[str, Any]:
        """The numbers, column by column, under the names that :meth:`to_pandas` gives them."""
        frame = self.to_pandas()
        return {str(name): frame[name].to_numpy() for name in frame}
