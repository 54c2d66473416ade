"""How much of the right answer a response says."""

import re
from collections import Counter
from collections.abc import Hashable, Iterable


def word_recall(reference: str, response: str) -> float:
    """ROUGE-1 recall (Lin 2004): the share of the reference's words that the response says.

    ``sum over words of min(count in reference, count in response) / words of the reference``, in
    [0, 1]; words are runs of letters and digits in lower case. The published retrieval code
    also cuts words to their stems; here a word has to be said as it is. 0 for an empty reference.

    Example:
        >>> word_recall("eat a sandwich", "You should eat the sandwich.")
        0.6666666666666666
    """
    words = (re.findall(r"[^\W_]+", text.lower()) for text in (reference, response))
    return recall(*words)


def recall(reference: Iterable[Hashable], response: Iterable[Hashable]) -> float:
    """The same of any items."""
    wanted, said = Counter(reference), Counter(response)
    total = sum(wanted.values())
    return sum((wanted & said).values()) / total if total else 0.0
