"""Comparisons that decide: NaN never agrees, and tolerances follow dtype, length and scores."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Roundings between two ways to one number, in units of epsilon: of the number itself, by the root
# of the number of terms of a sum, and by the size of an attention score (a score ``s`` is off by
# ``eps * s``, and its weight in a row by that share). Sums in half precision are accumulated in
# fp32 and rounded once.
_SINGLE, _HALF = (32.0, 2.0, 4.0), (8.0, 0.25, 0.5)


@dataclass(frozen=True)
class Gap:
    """How far two things that should be equal are apart, and how far they may be.

    Attributes:
        size: largest difference, relative to the largest expected number; NaN where either side
            has one.
        allowed: largest size that rounding explains.
    """

    size: float
    allowed: float

    @property
    def closed(self) -> bool:
        """Whether they agree; a size of NaN does not.

        Example:
            >>> Gap(float("nan"), 1.0).closed
            False
        """
        return self.size <= self.allowed


def gap(actual: Tensor, expected: Tensor, allowed: float) -> Gap:
    """Compare two tensors of one shape.

    Args:
        actual: any shape.
        expected: of the same shape; NaN on either side makes the gap NaN.
        allowed: largest difference, relative to the largest ``expected`` number.

    Example:
        >>> gap(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 1e-6).closed
        True
    """
    if actual.shape != expected.shape:
        return Gap(math.inf, allowed)
    if expected.numel() == 0:
        return Gap(math.nan, allowed)  # nothing was seen, so nothing was proved
    exact = torch.promote_types(expected.dtype, torch.float32)  # not every device has float64
    a, e = actual.detach().to(expected.device, exact), expected.detach().to(exact)
    least = float(torch.finfo(torch.float32).tiny)
    return Gap(float((a - e).abs().max() / e.abs().max().clamp_min(least)), allowed)


def rounding(dtype: torch.dtype, terms: int = 1, score: float = 0.0) -> float:
    """Largest relative difference that rounding explains between two ways to one sum.

    Args:
        dtype: in which it is computed.
        terms: how many terms it has; errors of terms add up like their root.
        score: size of the largest attention score behind it.

    Returns:
        At most a half: what differs by more is not rounding in any dtype.

    Example:
        >>> rounding(torch.float32, terms=64) < 1e-4 < rounding(torch.bfloat16) <= 0.5
        True
    """
    # A model in fp64 still rotates, normalises and takes its softmax in fp32.
    computed = torch.float32 if dtype == torch.float64 else dtype
    itself, by_term, by_score = _SINGLE if computed == torch.float32 else _HALF
    size = itself + by_term * math.sqrt(terms) + by_score * score
    return min(0.5, torch.finfo(computed).eps * size)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at when a model was loaded.

    Attributes:
        what: what should be equal, in a few words.
        gap: how far it is apart.
        costs: what a model loses that fails here, keys of ``model.limits``; none: it is refused.
        reason: what a failure means, and what to do, as the end of a sentence.
    """

    what: str
    gap: Gap
    costs: tuple[str, ...] = ()
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the two sides agree."""
        return self.gap.closed


@dataclass(frozen=True)
class Proof:
    """What was proved of a model when it was loaded; empty where that was switched off.

    Attributes:
        tokens: length of the text that it was proved on.
        checks: the worst of each kind over all layers.
        facts: other things that were seen, as sentences.
        limits: what failed and cost a capability: reason by capability.
    """

    tokens: int = 0
    checks: tuple[Check, ...] = ()
    facts: tuple[str, ...] = ()
    limits: dict[str, str] = field(default_factory=dict)
