"""What every kind of result can do, so that files, pages and commands need not know the kinds."""

from os import PathLike
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from headscope.base.glance import Glance
from headscope.base.sections import Section

if TYPE_CHECKING:
    import pandas


@runtime_checkable
class Result(Protocol):
    """Something that was found out. :func:`headscope.plots.figures` draws it."""

    def glance(self) -> Glance:
        """What is worth knowing at a glance, for a terminal and a notebook."""

    def sections(self) -> list[Section]:
        """How a page shows it; figures are named and not drawn."""

    def to_pandas(self) -> "pandas.DataFrame":
        """The numbers as a data frame."""

    def save(self, path: "str | PathLike[str]") -> None:
        """Write it to one file, which ``load`` of the same class reads."""
