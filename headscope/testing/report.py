"""Report of checks: passed, not applicable, or failed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from headscope.errors import HeadscopeError, UnsupportedModelError

Outcome = Literal["passed", "limited", "failed"]
Subject = TypeVar("Subject")


class CheckError(HeadscopeError):
    """Raised when a model, scorer or intervention fails a check."""


@dataclass(frozen=True)
class Check:
    """One check with its outcome.

    Attributes:
        name: name of the check.
        verdict: ``passed``, ``limited`` (not supported, with a reason) or ``failed``.
        reason: one sentence on why it is limited or failed; empty if it passed.
    """

    name: str
    verdict: Outcome
    reason: str = ""


@dataclass(frozen=True)
class CheckReport:
    """Every check of one subject, in the order in which they ran.

    Attributes:
        subject: name of what was checked.
        checks: one entry per check.
    """

    subject: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of the checks that held."""
        return tuple(check.name for check in self.checks if check.verdict == "passed")

    @property
    def limited(self) -> Mapping[str, str]:
        """Checks that do not apply, with reasons."""
        return {check.name: check.reason for check in self.checks if check.verdict == "limited"}

    @property
    def failed(self) -> Mapping[str, str]:
        """Failed checks with reasons; empty unless ``raises=False`` was passed."""
        return {check.name: check.reason for check in self.checks if check.verdict == "failed"}

    def __bool__(self) -> bool:
        """True if no check failed."""
        return not self.failed

    def __str__(self) -> str:
        """Format a summary line, and a line for each check that did not pass."""
        told = [check for check in self.checks if check.verdict != "passed"]
        head = f"{self.subject}: {len(self.passed)} of {len(self.checks)} checks passed"
        return "\n".join([head, *(f"  {c.name}: {c.verdict}: {c.reason}" for c in told)])


def run_checks(
    subject: str,
    given: Subject,
    checks: Iterable[tuple[str, Callable[[Subject], None]]],
    *,
    raises: bool,
) -> CheckReport:
    """Run checks in order.

    Args:
        subject: name of what is checked.
        given: argument of every check.
        checks: names and functions; a function that returns has passed, one that raises
            :class:`~headscope.errors.UnsupportedModelError` does not apply, one that raises
            anything else has failed.
        raises: raise at the first failure instead of continuing.

    Raises:
        CheckError: at the first failure, with the subject, the check and the difference.
    """
    found = []
    for name, check in checks:
        try:
            check(given)
        except UnsupportedModelError as refusal:
            found.append(Check(name, "limited", str(refusal)))
        except Exception as error:  # the subject may fail in any way
            found.append(Check(name, "failed", _told(error)))
            if raises:
                raise CheckError(f"{subject} fails the check {name!r}: {_told(error)}") from error
        else:
            found.append(Check(name, "passed"))
    return CheckReport(subject, tuple(found))


def _told(error: Exception) -> str:
    """Format an error in one sentence."""
    if isinstance(error, CheckError):
        return str(error)
    text = " ".join(str(error).split())[:300]
    return f"it raises {type(error).__name__}: {text}" if text else f"it raises {error!r}"


def relative_gap(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number (at least 1).

    Infinite if shapes differ or a number is non-finite on one side only, so NaN never passes a
    comparison with a tolerance.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not torch.equal(a.isfinite(), b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a[b.isfinite()], b[b.isfinite()]
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0)) if a.numel() else 0.0


def agree(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise unless two tensors agree up to a tolerance.

    Raises:
        CheckError: if they differ, with the difference.
    """
    if actual.shape != expected.shape:
        raise CheckError(
            f"{what} have shape {tuple(actual.shape)} instead of {tuple(expected.shape)}."
        )
    difference = relative_gap(actual, expected)
    if not difference <= tolerance:
        raise CheckError(f"{what} differ by {difference:.2g} (tolerance: {tolerance:.2g}).")


def ensure(holds: bool, otherwise: str) -> None:
    """Raise unless a condition holds.

    Raises:
        CheckError: with the given message, if it does not.
    """
    if not holds:
        raise CheckError(otherwise)
