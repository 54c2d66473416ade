"""Names in a list, as typed."""

from headscope.scorers import resolve


def listed(names: str | None) -> list[str] | None:
    """Names separated by commas; None where none were given."""
    return None if names is None else [one.strip() for one in names.split(",") if one.strip()]


def scorer_names(names: str | None) -> list[str] | None:
    """The same, of scorers.

    Raises:
        InputError: if there is no such scorer.
    """
    found = listed(names)
    if found is not None:
        resolve(found)
    return found
