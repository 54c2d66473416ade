"""The figures that headscope makes: plotly's, which also show where plotly.js does not run."""

import sys
import warnings
from base64 import b64encode
from typing import Any
from uuid import uuid4

import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import ExternalRenderer

from headscope.plots.export import drawn_bytes
from headscope.plots.static import live_html, sentence, static_html

_PLOTLY = "application/vnd.plotly.v1+json"


class Figure(go.Figure):  # type: ignore[misc]  # plotly ships no types
    """A plotly figure with a static picture beside the interactive one in notebooks.

    A notebook holds plotly's data, which a front end shows if it has plotly; beside it a PNG,
    drawn by matplotlib (extra ``paper``), or else the figure's numbers as HTML without scripts.
    So an untrusted notebook, a server without plotly and ``nbconvert`` show a picture or a table.
    Neither nbformat nor IPython is needed. In everything else it is a :class:`plotly.graph_objects.
    Figure`.
    """

    def __repr__(self) -> str:
        """Say what it shows, and how to see it."""
        size = f"{self.layout.width or 700} x {self.layout.height or 450} pixels"
        return (
            f"<Figure {sentence(self)}, {size}: a notebook shows it, "
            'hs.plots.save(figure, "picture.html") writes it>'
        )

    def _repr_mimebundle_(
        self, include: Any = None, exclude: Any = None, validate: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Data for plotly, and what is shown in its place where there is no plotly."""
        try:
            bundle = dict(super()._repr_mimebundle_(include, exclude, validate, **kwargs))
        except Exception:  # a renderer that the user chose lacks something: IPython, Chrome
            bundle = {}
        if not bundle:
            bundle = pio.renderers["plotly_mimetype"].to_mimebundle(self.to_dict())
        png = bundle.get("image/png") or _png(self)
        static = static_html(self, png)
        if live := bundle.get("text/html"):  # needs scripts, and front ends prefer it to a PNG
            bundle["text/html"] = live_html(static, live, f"headscope-{uuid4().hex}")
        elif png is None:
            bundle["text/html"] = static
        if png is not None:
            bundle["image/png"] = png
        return {**bundle, "text/plain": repr(self)}

    def _repr_html_(self) -> str:
        """What the bundle has as HTML, or the static picture."""
        bundle = self._repr_mimebundle_()
        return str(bundle.get("text/html") or static_html(self, bundle.get("image/png")))

    def _ipython_display_(self) -> None:
        """Show the figure as the last value of a cell, without nbformat."""
        if not pio.renderers.render_on_display:
            _display({"text/plain": repr(self)}, {})
        elif not _shown_outside(self):
            width, height = self.layout.width or 700, self.layout.height or 450
            about = {"width": width, "height": height, "alt": sentence(self)}  # twice the pixels
            _display(self._repr_mimebundle_(), {"image/png": about})

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Show the figure; arguments are those of :func:`plotly.io.show`."""
        if args or kwargs or not _in_ipython():
            super().show(*args, **kwargs)
        else:
            self._ipython_display_()


def _png(figure: go.Figure) -> str | None:
    """The figure drawn by matplotlib, in base64; None where that cannot be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a character without a font
            return b64encode(drawn_bytes(figure, "png")).decode("ascii")
    except Exception:  # whatever it is, the figure still shows as HTML
        return None


def _display(bundle: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Hand a bundle to the front end of the kernel; without a kernel write its text."""
    if _in_ipython():
        sys.modules["IPython"].display.display(bundle, raw=True, metadata=metadata)
    else:
        sys.stdout.write(f"{bundle['text/plain']}\n")


def _shown_outside(figure: go.Figure) -> bool:
    """Show a figure in the browser or wherever the user's own renderers do, if they can."""
    names = (pio.renderers.default or "").split("+")
    if not any(isinstance(pio.renderers[name], ExternalRenderer) for name in names if name):
        return False
    try:
        pio.show(figure)
    except Exception:  # no browser on this machine, no nbformat
        return False
    return True


def _in_ipython() -> bool:
    """Whether a kernel or a terminal of IPython runs this; it is loaded then."""
    module = sys.modules.get("IPython")
    return module is not None and module.get_ipython() is not None
