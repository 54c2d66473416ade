"""A share of all model types, held against docs/families.md; a file of tests for each share."""

import re
import warnings
from functools import cache

import transformers

from tools.families import PAGE, Family, examine
from tools.tiny_models import kinds

SHARES = 4
_SECTIONS = {
    "Supported": "supported",
    "Supported, with limits": "limited",
    "Refused": "refused",
    "Not built": "not built",
}
_ROW = re.compile(r"^\| `([^`]+)` \|")
_VERSION = re.compile(r"class of transformers\s+(\d+\.\d+)")


@cache
def listed() -> dict[str, str]:
    """Verdict on each causal language model's type, as the page gives it."""
    verdict, found = "", {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            verdict = _SECTIONS.get(line[3:], "")
        elif verdict and (match := _ROW.match(line)):
            found[match[1]] = verdict
    return found


def is_current() -> bool:
    """Whether the page is of the installed transformers."""
    match = _VERSION.search(PAGE.read_text(encoding="utf-8"))
    return match is not None and transformers.__version__.startswith(f"{match[1]}.")


def share(number: int) -> list[str]:
    """Every fourth model type."""
    return list(kinds()[number::SHARES])


def judged(kind: str) -> Family:
    """What headscope makes of a model type; other libraries warn of their own defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return examine(kind)


def holds(kind: str) -> None:
    """Right, limited or refused, and as the page says."""
    family = judged(kind)
    assert family.verdict != "wrong", family.reasons
    if is_current():
        said = f"{family.verdict}, {family.reasons}: run python -m tools.families"
        assert listed()[kind] == family.verdict, said
