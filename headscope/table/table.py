"""All scores of one model, side by side."""

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.base.glance import Glance, Shown
from headscope.base.saved import Stored
from headscope.base.sections import Rows, Section, Words
from headscope.base.statistics import rank_correlation, top_k_overlap
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.table.notable import RoleFinding, best_lines, find_roles, roles_by_head, table_glance
from headscope.table.parquet import read_scores, write_scores
from headscope.table.scores import HeadScores

if TYPE_CHECKING:
    import pandas
    import polars
    from rich.console import Console, ConsoleOptions, RenderResult


class UnknownScoreError(InputError, KeyError):
    """There is no score of this name."""

    __str__ = Exception.__str__  # KeyError would print the quoted repr


class HeadTable(Shown, Mapping[str, HeadScores], Stored):
    """Layers x heads x scores of one model: a read-only mapping from name to score.

    Scores of several attention stacks stand under ``stack:name``; :meth:`stack` gives the table of
    one of them.
    """

    def __init__(self, scores: Iterable[HeadScores]) -> None:
        """Put scores side by side.

        Raises:
            InputError: if there are none, two share a name, or they are not of one model.
        """
        given = list(scores)
        several = len({one.stack for one in given}) > 1
        self._scores: dict[str, HeadScores] = {}
        for one in given:
            name = f"{one.stack}:{one.name}" if several else one.name
            if name in self._scores:
                raise InputError(f"two scores are called {name!r}; rename one of them.")
            self._scores[name] = one
        if not self._scores:
            raise InputError("a table needs at least one score.")
        for stack in {one.stack for one in given}:
            _check_one_model([one for one in given if one.stack == stack])

    def __getitem__(self, name: str) -> HeadScores:
        """Return one score; an unknown name raises InputError with the nearest one."""
        if name not in self._scores:
            raise UnknownScoreError(nearest(name, self._scores, kind="score"))
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in order."""
        return iter(self._scores)

    def __len__(self) -> int:
        """Return the number of scores."""
        return len(self._scores)

    @property
    def stacks(self) -> "Mapping[str, HeadTable]":
        """Table of every attention stack by its name; empty in a model with a single one."""
        names = dict.fromkeys(one.stack for one in self.values())
        if len(names) == 1:
            return MappingProxyType({next(iter(names)): self})
        return MappingProxyType({name: self.stack(name) for name in names})

    def stack(self, name: str) -> "HeadTable":
        """The scores of one attention stack.

        Args:
            name: of the stack; empty in a model with a single one.

        Raises:
            InputError: if the table has no such stack.

        Example:
            >>> table.stack("") is table, list(table.stacks)
            (True, [''])
        """
        found = [one for one in self.values() if one.stack == name]
        if not found:
            known = ", ".join(dict.fromkeys(repr(one.stack) for one in self.values()))
            raise InputError(f"the table has no stack {name!r}: it has {known}.")
        return self if len(found) == len(self) else HeadTable(found)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers and of heads in a layer.

        Raises:
            InputError: if the table has several attention stacks.
        """
        if len(names := dict.fromkeys(one.stack for one in self.values())) > 1:
            raise InputError(
                f"the table has the stacks {', '.join(names)}: choose one, table.stack(...)."
            )
        layers, heads = next(iter(self.values())).mean.shape
        return layers, heads

    def top(self, score: str, k: int = 10) -> list[tuple[HeadIndex, float]]:
        """The k heads with the largest mean of one score."""
        return self[score].top(k)

    def filter(
        self,
        score: str,
        minimum: float | None = None,
        maximum: float | None = None,
        heads: "Iterable[str | tuple[int, int]] | None" = None,
    ) -> list[HeadIndex]:
        """Heads whose mean lies in a range, largest first.

        This returns heads and not a smaller table: p-values are adjusted over all heads of the
        model, and a table of chosen heads would adjust them over the chosen alone.

        Args:
            score: name of the score.
            minimum: smallest mean that is kept, itself included.
            maximum: largest mean that is kept, itself included.
            heads: look only among these.
        """
        among = None if heads is None else {HeadIndex.parse(head) for head in heads}
        return [
            head
            for head, mean in self[score].top(self[score].mean.size)
            if (minimum is None or mean >= minimum)
            and (maximum is None or mean <= maximum)
            and (among is None or head in among)
        ]

    def join(self, other: "HeadTable") -> "HeadTable":
        """Both tables' scores; a name that both have, or another model, is an error."""
        return HeadTable([*self.values(), *other.values()])

    def rank_correlation(self) -> "pandas.DataFrame":
        """Spearman correlation over heads between every two scores."""
        import pandas

        rows = [[rank_correlation(a.mean, b.mean) for b in self.values()] for a in self.values()]
        return pandas.DataFrame(rows, index=list(self), columns=list(self))

    def overlap(self, other: "HeadTable", score: str, k: int = 10) -> float:
        """Jaccard index of the k best heads of one score, here and in another table."""
        if self.shape != other.shape:
            raise InputError(f"the tables have heads {self.shape} and {other.shape}.")
        return top_k_overlap(self[score].mean, other[score].mean, k)

    def roles(self, alpha: float = 0.05) -> dict[HeadIndex, list[tuple[str, float]]]:
        """Roles of each head that has any: (score, mean), strongest first.

        A head has the role of a score if the score has a threshold, the head's mean reaches it,
        and the head is above the control at false discovery rate ``alpha`` over all heads.
        """
        return roles_by_head(find_roles(self.values(), alpha))

    def role_summary(self, alpha: float = 0.05) -> list[RoleFinding]:
        """For each role the heads that have it, none included; print them to read them."""
        return find_roles(self.values(), alpha)

    def columns(self) -> dict[str, Any]:
        """Columns of :meth:`to_pandas`: one entry per head and score that was computed."""
        parts = [one.columns() for one in self.values()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head and score, with all numbers."""
        import pandas

        return pandas.DataFrame(self.columns())

    def to_pandas_wide(self) -> "pandas.DataFrame":
        """One row per head, one column of means per score, indexed by ``L5H1``."""
        import pandas

        first = next(iter(self.values()))
        shown = np.any([one.present for one in self.values()], axis=0)
        layer, head = np.nonzero(shown)
        columns: dict[str, Any] = {
            "layer": layer,
            "head": head,
            "kv_head": head // (first.mean.shape[1] // first.kv_heads),
        }
        columns |= {one.name: one.mean[shown] for one in self.values()}
        return pandas.DataFrame(columns, index=pandas.Index(first.labels[shown], name="label"))

    def to_polars(self) -> "polars.DataFrame":
        """The rows of :meth:`to_pandas` as a polars frame (extra ``polars``).

        Raises:
            InputError: if polars is not installed.
        """
        try:
            import polars
        except ImportError:
            raise InputError("polars is not installed: pip install 'headscope[polars]'.") from None
        return polars.DataFrame(self.columns())

    def save(self, path: "str | PathLike[str]", *, examples: bool = False) -> None:
        """Write one parquet file atomically.

        Args:
            path: of the file.
            examples: also keep the values per example, for intervals later.
        """
        write_scores(list(self.values()), path, examples=examples)

    @staticmethod
    def load(path: "str | PathLike[str]") -> "HeadTable":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: if the file is missing or damaged, or holds something else.
        """
        return read_scores(path, HeadTable)

    def _parts(self) -> dict[str, object]:
        """What a saved result that holds a table keeps of it."""
        return {"scores": tuple(self.values())}

    def glance(self) -> Glance:
        """The three most notable heads of each score, and the roles."""
        return table_glance(list(self.values()))

    def summary(self) -> str:
        """Its size, then a line per score with the three most notable heads."""
        lines = [f"  {line.text}{line.strong}" for line in best_lines(list(self.values()))]
        return "\n".join([repr(self), *lines])

    def sections(self) -> list[Section]:
        """Notes and the three most notable heads of each score."""
        rows = [(one.text.rstrip(": "), one.strong) for one in best_lines(list(self.values()))]
        notes = [Words(note) for note in self.glance().notes]
        return [Section("Heads", [*notes, Rows(("score", "most notable heads"), rows)])]

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Best heads, other scores and roles, in the console's width."""
        yield from table_glance(list(self.values()), options.max_width).terminal()

    def __repr__(self) -> str:
        """Size and names."""
        if len(self.stacks) > 1:
            return f"HeadTable(stacks {', '.join(self.stacks)}: {', '.join(self)})"
        layers, heads = self.shape
        return f"HeadTable({layers} layers x {heads} heads: {', '.join(self)})"


def _check_one_model(scores: list[HeadScores]) -> None:
    """Raise if scores cannot be of one model."""
    first = scores[0]
    for one in scores[1:]:
        for what, here, there in (
            ("heads", first.mean.shape, one.mean.shape),
            ("key/value heads", first.kv_heads, one.kv_heads),
            ("weights", first.provenance.weight_digest, one.provenance.weight_digest),
        ):
            if here != there and here and there:
                raise InputError(
                    f"{first.name!r} and {one.name!r} are not of one model: "
                    f"their {what} are {here} and {there}."
                )
