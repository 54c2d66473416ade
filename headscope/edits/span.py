"""Where in a text a pass is: which positions it runs, and which of them are decoding."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """Positions of one pass, as a fact of the pass: never guessed from the shape of a tensor.

    Attributes:
        first: position of the first query, counted among all keys, padding included.
        count: how many positions the pass runs.
        prompt: positions before this one are read as a prompt (``prefill``), those from it on are
            generated (``decode``).
        grows: whether the text may go on after the pass.
    """

    first: int
    count: int
    prompt: int
    grows: bool = False

    @classmethod
    def whole(cls, length: int) -> "Span":
        """A text that is read at once: all of it is prompt.

        Example:
            >>> hs.edits.Span.whole(5).prompt
            5
        """
        return cls(0, length, length)

    @property
    def end(self) -> int:
        """Position after the last."""
        return self.first + self.count

    @property
    def is_whole(self) -> bool:
        """Whether the pass reads the whole text at once."""
        return self == Span.whole(self.count)

    def last(self, count: int) -> "Span":
        """The same pass over its last ``count`` positions, which may reach back into its cache.

        Example:
            >>> hs.edits.Span(first=7, count=1, prompt=7).last(8).first
            0
        """
        return replace(self, first=self.end - count, count=count)

    def part(self, first: int, count: int) -> "Span":
        """Some of the pass's own positions, counted from its first.

        Example:
            >>> hs.edits.Span.whole(10).part(4, 2)
            Span(first=4, count=2, prompt=10, grows=False)
        """
        return replace(self, first=self.first + first, count=count)
