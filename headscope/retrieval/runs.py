"""What happened in each run of a needle probe: what was said, how right it was, who copied it."""

import re
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

# How runs were made: decoded greedily, or read with the answer appended.
Form = Literal["decoded", "forced"]


@dataclass(frozen=True, eq=False)
class Run:
    """One example, decoded greedily, or read with its answer (teacher-forced).

    Attributes:
        tokens: what was generated, up to where it stopped; teacher-forced, the answer.
        response: the same as text; ids with spaces between, without a tokenizer.
        recall: share of the answer's words (see :func:`word_recall`) that it says.
        answer: what was asked for, as text.
        needle: ids of the needle's answer tokens.
        copied: at each step, whether the head's most attended token lies among the needle's
            answer tokens and is that step's token.
        reachable: at each step, whether the layer's window shows any of those.
    """

    tokens: tuple[int, ...]
    response: str
    recall: float
    needle: tuple[int, ...]
    copied: Bool[np.ndarray, "step layer head"]
    reachable: Bool[np.ndarray, "step layer"]
    answer: str = ""

    @cached_property
    def by_step(self) -> Float[np.ndarray, "layer head"]:
        """Copied steps over the needle's length; above 1 where the needle is said again."""
        return self._unless_hidden(self.copied.sum(0) / max(len(self.needle), 1))

    @cached_property
    def by_set(self) -> Float[np.ndarray, "layer head"]:
        """Different copied tokens over different tokens of the needle; at most 1."""
        different = sorted(set(self.needle))
        steps = {
            token: [i for i, said in enumerate(self.tokens) if said == token] for token in different
        }
        found = [self.copied[at].any(0) for at in steps.values()]
        return self._unless_hidden(np.sum(found, axis=0) / max(len(different), 1))

    @cached_property
    def active(self) -> Float[np.ndarray, "layer head"]:
        """1 where the head copied at least one token."""
        return self._unless_hidden(self.copied.any(0).astype(float))

    def _unless_hidden(
        self, values: Float[np.ndarray, "layer head"]
    ) -> Float[np.ndarray, "layer head"]:
        """NaN in layers that could not see the needle at any step."""
        seen = np.any(self.reachable, axis=0, keepdims=True).T
        return np.where(seen, values, np.nan)


@dataclass(frozen=True, eq=False)
class Runs:
    """All runs of a probe, in its order.

    Attributes:
        runs: one per example.
        length, depth: of each example, as asked for; NaN where the probe does not say.
        threshold: recall above which a run counts.
        form: how they were made.
        chat: whether a chat template was laid around the prompts; None: not known.

    Example:
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> runs = hs.retrieval.follow(model, probe)
        >>> lengths, depths, right, count = runs.grid()
        >>> right.shape, count.tolist()
        ((1, 1), [[1]])
    """

    runs: tuple[Run, ...]
    length: Float[np.ndarray, " example"]
    depth: Float[np.ndarray, " example"]
    threshold: float
    form: Form = "decoded"
    chat: bool | None = None

    @cached_property
    def recall(self) -> Float[np.ndarray, " example"]:
        """Recall of each run."""
        return np.array([run.recall for run in self.runs])

    @cached_property
    def counted(self) -> Bool[np.ndarray, " example"]:
        """Runs that answered well enough to be counted."""
        return self.recall > self.threshold

    @cached_property
    def scored(self) -> Bool[np.ndarray, " example"]:
        """Runs that scores are means over: those that count; teacher-forced, all."""
        return self.counted if self.form == "decoded" else np.ones_like(self.counted)

    @property
    def accuracy(self) -> float:
        """Share of the runs that count."""
        return float(self.counted.mean())

    def samples(self, count: int = 3) -> list[str]:
        """What was said where what was asked for, of the first runs; long replies cut."""
        return [
            f"{_short(run.response)} (asked for: {run.answer.strip()})" for run in self.runs[:count]
        ]

    def grid(
        self,
    ) -> tuple[
        Float[np.ndarray, " length"],
        Float[np.ndarray, " depth"],
        Float[np.ndarray, "length depth"],
        Int[np.ndarray, "length depth"],
    ]:
        """Lengths, depths, the share of right runs in each cell (NaN: none), and how many."""
        lengths, row = np.unique(self.length, return_inverse=True)
        depths, column = np.unique(self.depth, return_inverse=True)
        right, count = np.zeros((2, len(lengths), len(depths)))
        np.add.at(right, (row, column), self.counted)
        np.add.at(count, (row, column), 1)
        with np.errstate(invalid="ignore"):
            return lengths, depths, right / count, count.astype(int)


def _short(text: str, most: int = 80) -> str:
    shown = " ".join(text.split())
    return repr(shown if len(shown) <= most else shown[: most - 3] + "...")


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
