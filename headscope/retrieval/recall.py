"""How much of the right answer a response says."""

import re
from collections import Counter
from collections.abc import Hashable, Iterable

# The separator between groups of three digits of one number.
_GROUPED = re.compile(r"(?<=\d)[,'\u202f\u2009](?=\d{3}(?!\d))")


def word_recall(reference: str, response: str) -> float:
    """ROUGE-1 recall (Lin 2004): the share of the reference's words that the response says.

    ``sum over words of min(count in reference, count in response) / words of the reference``, in
    [0, 1]; words are runs of letters and digits in lower case. The published retrieval code
    also cuts words to their stems; here a word has to be said as it is. Digits in groups of three
    (``48,213``) are one number. 0 for an empty reference.

    Example:
        >>> word_recall("eat a sandwich", "You should eat the sandwich.")
        0.6666666666666666
        >>> word_recall("48213", "It is **48,213**.")
        1.0
    """
    words = (
        re.findall(r"[^\W_]+", _GROUPED.sub("", text.lower())) for text in (reference, response)
    )
    return recall(*words)


def recall(reference: Iterable[Hashable], response: Iterable[Hashable]) -> float:
    """The same of any items."""
    wanted, said = Counter(reference), Counter(response)
    total = sum(wanted.values())
    return sum((wanted & said).values()) / total if total else 0.0
