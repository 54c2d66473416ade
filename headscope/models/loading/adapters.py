"""Adapters from other packages, for models that headscope has no way into."""

from importlib.metadata import entry_points
from typing import Any

from headscope.errors import InputError
from headscope.models.protocol import HeadModel

GROUP = "headscope.adapters"


def adapted(source: Any, tokenizer: Any = None) -> HeadModel | None:
    """The head model that an installed adapter makes of an object; None where none takes it.

    An adapter is a function ``(source, tokenizer) -> HeadModel | None`` that a package names under
    ``[project.entry-points."headscope.adapters"]``; it returns None for what it does not know.
    Adapters are asked in the order of their names. Hold one to what the rest of headscope relies
    on with :func:`headscope.testing.check_model`.

    Args:
        source: what :func:`headscope.load` was given; never a name or a path.
        tokenizer: that was given beside it.

    Raises:
        InputError: if an adapter cannot be imported, or returns something else.

    Example:
        >>> adapted(object()) is None
        True
    """
    for point in sorted(entry_points(group=GROUP), key=lambda one: one.name):
        try:
            adapter = point.load()
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"the adapter {point.name!r} ({point.value}) cannot be imported: {error}. Mend or "
                "uninstall the package that brings it."
            ) from None
        made = adapter(source, tokenizer)
        if made is None:
            continue
        if not isinstance(made, HeadModel):
            raise InputError(
                f"the adapter {point.name!r} ({point.value}) returned {type(made).__name__}, which "
                "is not a HeadModel: see headscope.testing.check_model."
            )
        return made
    return None
