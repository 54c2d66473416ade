"""Passages against memory: does a model say what it reads, or what it tends to say?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from headscope.base.statistics import mean_and_sem
from headscope.edits import Heads
from headscope.errors import HeadscopeError, InputError
from headscope.models.protocol import HeadModel
from headscope.probes import Probe
from headscope.retrieval.decore import Alpha, Contrast, decore
from headscope.retrieval.masks import Mask, Masking
from headscope.retrieval.passes import need_marks
from headscope.retrieval.prompts import batches, prompt_ids
from headscope.retrieval.writing import Generated, Text, generate

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """What each way of generating says: the passage's answer, the model's own, or neither.

    Attributes:
        arms: ways of generating.
        passage: whether the whole answer of the passage was said.
        own: whether the first token was the model's own answer.
        margin: at the first token, log-probability of the passage's answer less that of the
            model's own, nats.
        texts: what was said, by way and example.
        answers: what the passages say.
    """

    arms: tuple[str, ...]
    passage: Bool[np.ndarray, "arm example"]
    own: Bool[np.ndarray, "arm example"]
    margin: Float[np.ndarray, "arm example"]
    texts: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per way: passage, own, neither (shares), margin, their standard errors, n."""
        import pandas

        rows = []
        every = zip(self.arms, self.passage, self.own, self.margin, strict=True)
        for arm, passage, own, margin in every:
            shares = {"passage": passage, "own": own, "neither": ~(passage | own)}
            row: dict[str, Any] = {"arm": arm}
            for name, values in (shares | {"margin": margin}).items():
                moments = mean_and_sem(values.astype(float)[None])
                row |= {name: float(moments.mean[0]), f"{name}_sem": float(moments.sem[0])}
            rows.append(row | {"n": len(passage)})
        return pandas.DataFrame(rows)

    def __str__(self) -> str:
        """One line per way."""
        return "\n".join(
            f"{row['arm']:>16}: {row['passage']:.2f} as the passage says, {row['own']:.2f} as the "
            f"model tends to, {row['neither']:.2f} neither; margin {row['margin']:+.1f}"
            for row in self.to_pandas().to_dict("records")
        )


def faithfulness(
    model: HeadModel,
    probe: Probe,
    heads: Heads,
    *,
    alphas: Sequence[Alpha] = ("entropy", 0.5),
    method: Masking = "uniform",
    batch_size: int | None = None,
) -> Faithfulness:
    """Base model, the model without its retrieval heads, and DeCoRe, side by side.

    Every arm goes on from where the answer begins: of a chat model after the words that its reply
    begins with.

    Args:
        model: from :func:`headscope.load`.
        probe: of :func:`contradictions`, or any with answers appended and foils.
        heads: to be masked.
        alphas: of :func:`headscope.retrieval.decore`, one way of generating each.
        method: how heads are masked.
        batch_size: examples at a time.

    Raises:
        InputError: if the probe has no answers or foils, or a foil is a special token.
        HeadscopeError: if the base model says neither answer in any example, which leaves nothing
            to compare.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.retrieval.contradictions(model, examples=4)
        >>> faithfulness(model, probe, ["L2H1"], alphas=[0.5]).arms
        ('base', 'masked', 'DeCoRe 0.5')
    """
    if probe.foils is None:
        raise InputError("the probe has no foils: make it with hs.retrieval.contradictions.")
    need_marks(probe, "answer")
    without = (~(probe.foils >= 0).any(1)).nonzero().flatten().tolist()
    if without:
        raise InputError(f"example {without[0]} has no foil: make the probe with contradictions.")
    _check_foils(model, probe)
    begins = (probe.foils >= 0).int().argmax(1)  # predicts the answer's first token
    place = torch.arange(probe.length)
    answers = [
        probe.tokens[row, at & (place > begins[row])].tolist()
        for row, at in enumerate(probe.mark("answer"))
    ]
    asked = replace(probe, marks={**probe.marks, "end": place == begins[:, None]}, control=None)
    options: Any = {"new_tokens": max(map(len, answers)), "batch_size": batch_size}
    mask = Mask.of(model, heads, method)
    contrasts = {f"DeCoRe {alpha}": Contrast(alpha, plausible=0) for alpha in alphas}
    own = [int(row[row >= 0][0]) for row in probe.foils]
    said = {"base": generate(model, asked, **options)}
    _check_worth(model, said["base"], answers, own)
    said["masked"] = generate(model, asked, mask=mask, **options)
    for alpha in alphas:
        said[f"DeCoRe {alpha}"] = decore(model, asked, heads, alpha, method=method, **options)
    decode = None if model.tokenizer is None else model.tokenizer.decode
    return Faithfulness(
        arms=tuple(said),
        passage=np.array(
            [
                [
                    list(one[: len(answer)]) == answer
                    for one, answer in zip(made.tokens, answers, strict=True)
                ]
                for made in said.values()
            ]
        ),
        own=np.array(
            [
                [one[:1] == (foil,) for one, foil in zip(made.tokens, own, strict=True)]
                for made in said.values()
            ]
        ),
        margin=_margins(model, asked, mask, list(contrasts.values()), batch_size),
        texts=tuple(made.texts for made in said.values()),
        answers=tuple(str(one) if decode is None else decode(one) for one in answers),
    )


def _check_foils(model: HeadModel, probe: Probe) -> None:
    """Raise InputError if a foil is a special token."""
    special = set() if model.tokenizer is None else set(model.tokenizer.all_special_ids)
    found = set() if probe.foils is None else set(probe.foils[probe.foils >= 0].tolist())
    if special & found:
        raise InputError(
            f"the foils hold the special token {min(special & found)}, which answers nothing: "
            "make the probe with hs.retrieval.contradictions."
        )


def _check_worth(
    model: HeadModel, said: Generated, answers: list[list[int]], own: list[int]
) -> None:
    """Raise HeadscopeError if neither answer is said in any example."""
    for tokens, answer, foil in zip(said.tokens, answers, own, strict=True):
        if list(tokens[: len(answer)]) == answer or tokens[:1] == (foil,):
            return
    raise HeadscopeError(
        f"{model.name} says neither the passage's answer nor its own in any of the {len(own)} "
        f"examples (but e.g. {said.texts[0]!r}), so there is nothing to compare: give shorter "
        "passages (length=), fewer distractors, or needles that the model can read."
    )


def _margins(
    model: HeadModel, probe: Probe, mask: Mask, contrasts: Sequence[Contrast], size: int | None
) -> Float[np.ndarray, "arm example"]:
    """How much more likely the passage's answer is than the model's own, way by way."""
    assert probe.foils is not None  # noqa: S101  # checked by the caller
    at = (probe.foils >= 0).int().argmax(1)
    rows = torch.arange(len(probe))
    answer, own = probe.targets[rows, at], probe.foils[rows, at]
    found = np.full((2 + len(contrasts), len(probe)), np.nan)
    for batch in batches(prompt_ids(model, probe), size):
        base, masked = (
            Text(model, batch.real, one).prompt(batch.tokens).cpu() for one in (None, mask)
        )
        scores = [base, masked, *(one(base, masked).scores for one in contrasts)]
        chosen = torch.tensor(batch.rows)
        here = torch.arange(len(chosen))
        for arm, one in enumerate(scores):
            margin = one[here, answer[chosen]] - one[here, own[chosen]]
            found[arm, batch.rows] = margin.double().numpy()
    return found
