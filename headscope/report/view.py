"""The attention viewer: tokens in a line, thumbnails of heads; for notebooks and as a file."""

from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path

from headscope.base.files import whole_page
from headscope.report.page import filled, packed_example
from headscope.table import AttentionExample

_HEIGHT = 560
# What is left of the frame where a front end takes it out.
_BLOCKED = (
    "The attention viewer runs scripts, which this notebook may not: trust the notebook and run "
    'the cell again, or write the viewer to a file with .save("view.html").'
)


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Attention of some heads on one text; shows itself in notebooks.

    Attributes:
        example: what is shown.
        height: of the frame in a notebook, in pixels.
    """

    example: AttentionExample
    height: int = _HEIGHT

    def page(self) -> str:
        """The viewer as one HTML page that fetches nothing."""
        example = self.example
        heads = [str(head) for head in example.heads]
        return filled(
            "view.html",
            styles=["page.css", "report.css"],
            scripts=["attention.js", "view.js"],
            data={"heads": heads, **packed_example(example)},
            plotly=False,
            title=f"Attention of {example.provenance.model or 'the model'}",
            words=example.words,
            several=len(heads) > 1,
        )

    def save(self, path: "str | PathLike[str]") -> None:
        """Write the page atomically.

        Raises:
            InputError: if the name does not end in ``.html``.
        """
        whole_page(Path(path), self.page())

    def _repr_html_(self) -> str:
        """The page in a frame of its own: nothing of it touches the notebook, or the reverse."""
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{escape(self.page())}" '
            f'title="Attention of {len(self.example.heads)} heads" '
            f'style="width:100%;height:{self.height}px;border:0">{escape(_BLOCKED)}</iframe>'
        )

    def __repr__(self) -> str:
        """Heads and length."""
        heads = ", ".join(map(str, self.example.heads[:6]))
        more = ", ..." if len(self.example.heads) > 6 else ""
        return f"AttentionView({heads}{more} on {len(self.example.tokens)} tokens)"
