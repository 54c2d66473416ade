"""Arrays as base64 inside JSON: a fifth of the size of written numbers."""

from base64 import b64encode
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from headscope.plots.text import visible
from headscope.table import AttentionExample

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
