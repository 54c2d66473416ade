"""What every page shares: template, styles, scripts, packed arrays, a policy against the rest."""

import json
from base64 import b64encode
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from plotly.offline import get_plotlyjs

from headscope.plots.text import visible
from headscope.table import AttentionExample

if TYPE_CHECKING:
    from jinja2 import Environment


# What may end a script element or a line of script inside a string.
_UNSAFE = {ord(one): f"\\u{ord(one):04x}" for one in "<>&\u2028\u2029"}
_TEMPLATES = ("frame.html", "page.html", "sections.html", "report.html", "view.html")


def filled(
    template: str,
    *,
    styles: Iterable[str],
    scripts: Iterable[str],
    data: object,
    plotly: bool = True,
    **words: object,
) -> str:
    """A page: template, styles, one copy of plotly.js, own scripts, and the data that they draw.

    Args:
        template: name of its file in this package.
        styles: names of style sheets, joined in this order.
        scripts: names of scripts, which run after plotly.js in this order.
        data: JSON values, in a script element of their own.
        plotly: whether the scripts need it.
        words: what else the template uses.
    """
    texts = [*([plotly_js()] if plotly else []), *map(resource, scripts)]
    return (
        _environment()
        .get_template(template)
        .render(
            style="".join(map(resource, styles)),
            scripts=texts,
            data=as_data(data),
            policy=policy(texts),
            **words,
        )
    )


def as_data(value: object) -> str:
    """JSON that stays inside its script element, whatever the strings in it say."""
    made = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return made.translate(_UNSAFE)


def policy(scripts: Iterable[str]) -> str:
    """Content security policy: our scripts by hash, our styles, pictures made in the page."""
    hashes = " ".join(
        f"'sha256-{b64encode(sha256(one.encode()).digest()).decode()}'" for one in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


@cache
def plotly_js() -> str:
    """plotly.js; browsers hash a script after turning line ends into newlines."""
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


def resource(name: str) -> str:
    """A file of this package, as text."""
    return (files("headscope.report") / name).read_text(encoding="utf-8")


def _environment() -> "Environment":
    from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound

    class Own(BaseLoader):
        def get_source(self, environment: Environment, template: str) -> tuple[str, None, None]:
            if template not in _TEMPLATES:
                raise TemplateNotFound(template)
            return resource(template), None, None

    made = Environment(
        loader=Own(),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["visible"] = visible
    return made


_LONGEST = 120  # characters shown of a token
Kind = Literal["f4", "f2", "u2", "u1"]


def packed(values: np.ndarray, kind: Kind, *, needed: bool = False) -> dict[str, str] | None:
    """An array as little-endian bytes; None where floats are all missing.

    Args:
        values: of any shape; rows one after the other.
        kind: ``f4`` for what is sorted and compared, ``f2`` (3 digits) for what is only shown;
            numbers that would lose more than that are kept as ``f4``.
        needed: also where all are missing.
    """
    if kind[0] == "f" and not needed and not np.isfinite(values).any():
        return None
    if kind == "f2" and not _fits_half(values):
        kind = "f4"
    flat = np.ascontiguousarray(values).astype(f"<{kind}")
    return {"kind": kind, "data": b64encode(flat.tobytes()).decode()}


def _fits_half(values: np.ndarray) -> bool:
    """Whether half precision keeps every number to 0.2%, or to a millionth of the largest."""
    known = np.abs(values[np.isfinite(values)])
    most = float(known.max(initial=0.0))
    if most > 6e4:
        return False
    lost = np.abs(known.astype(np.float16).astype(np.float64) - known)
    return bool((lost <= 2e-3 * known + 1e-6 * most).all())


def packed_tokens(tokens: Iterable[str]) -> list[str]:
    """Tokens made visible and cut."""
    return [visible(one[:_LONGEST]) + ("…" if len(one) > _LONGEST else "") for one in tokens]


def packed_example(example: AttentionExample) -> dict[str, Any]:
    """Tokens and patterns; under a causal mask only what lies on and below the diagonal."""
    rows, columns = np.tril_indices(len(example.tokens))
    triangle = not np.triu(example.pattern, 1).any()
    return {
        "tokens": packed_tokens(example.tokens),
        "triangle": triangle,
        "pattern": packed(example.pattern[:, rows, columns] if triangle else example.pattern, "u1"),
        "words": visible(example.words),
    }
