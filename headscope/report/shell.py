"""What every page shares: template, styles, scripts and the policy that lets nothing else in."""

import json
from base64 import b64encode
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

from plotly.offline import get_plotlyjs

from headscope.plots.text import visible

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
