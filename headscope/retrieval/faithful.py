"""Faithfulness to a passage: does a model say what it reads, or what it remembers?

The passages contradict the model's closed-book answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.result import Glance, Shown, number
from headscope.base.statistics import mean_and_sem
from headscope.edits import Heads
from headscope.errors import HeadscopeError, InputError
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes import Needle, Probe, needle
from headscope.probes.encoding import encode, need_tokenizer, ordinary_tokens
from headscope.probes.needle import Writer, facts, fixed_needles, writer_for
from headscope.probes.pairs import CAPITALS
from headscope.retrieval.follow import need_marks
from headscope.retrieval.generation import (
    Alpha,
    Contrast,
    Generated,
    Mask,
    Masking,
    Text,
    batches,
    decore,
    generate,
    prompt_ids,
)

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class PassageFaithfulness(Shown):
    """Answers by way of generation: the passage's, the model's own, or neither.

    Attributes:
        arms: ways of generating.
        passage: whether the whole answer of the passage was generated.
        own: whether the first token was the model's own answer.
        margin: at the first token, log-probability of the passage's answer minus that of the
            model's own, in nats.
        texts: generated texts, by arm and example.
        answers: answers in the passages.
    """

    arms: tuple[str, ...]
    passage: Bool[np.ndarray, "arm example"]
    own: Bool[np.ndarray, "arm example"]
    margin: Float[np.ndarray, "arm example"]
    texts: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per arm: passage, own, neither (shares), margin, their standard errors, n."""
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

    def glance(self) -> Glance:
        """One row per arm."""
        columns = ("arm", "passage", "own", "neither", "margin")
        return Glance(
            "answers of the passage, or the model's own",
            [f"{len(self.answers)} examples", "shares", "margin in nats"],
            columns,
            [
                (row["arm"], *(number(row[name]) for name in columns[1:]))
                for row in self.to_pandas().to_dict("records")
            ],
            hint="found.to_pandas(), found.texts",
            whole=True,
        )

    def __str__(self) -> str:
        """One line per arm."""
        return "\n".join(
            f"{row['arm']:>16}: {row['passage']:.2f} as the passage says, {row['own']:.2f} as the "
            f"model tends to, {row['neither']:.2f} neither; margin {row['margin']:+.1f}"
            for row in self.to_pandas().to_dict("records")
        )


@checked
@own_types()
def faithfulness(
    model: HeadModel,
    probe: Probe,
    heads: Heads,
    *,
    alphas: Sequence[Alpha] = ("entropy", 0.5),
    method: Masking = "uniform",
    batch_size: int | None = None,
) -> PassageFaithfulness:
    """Compare the base model, the model without its retrieval heads, and DeCoRe.

    Every arm continues from where the answer begins, in a chat after the opening words of the
    reply.

    Args:
        model: from :func:`headscope.load`.
        probe: from :func:`contradictions`, or any with answers appended and foils.
        heads: heads to mask.
        alphas: contrast weights for :func:`headscope.retrieval.decore`, one arm each.
        method: how heads are masked.
        batch_size: examples per pass.

    Raises:
        InputError: if the probe has no answers or foils, or a foil is a special token.
        HeadscopeError: if the base model gives neither answer in any example, so there is
            nothing to compare.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.retrieval.contradictions(model, examples=4)
        >>> faithfulness(model, probe, ["L2H1"], alphas=[0.5]).arms
        ('base', 'masked', 'DeCoRe 0.5')
    """
    options = RunOptions(batch_size)
    if probe.foils is None:
        raise InputError("the probe has no foils: make it with hs.retrieval.contradictions.")
    need_marks(probe, "answer")
    without = (~(probe.foils >= 0).any(1)).nonzero().flatten().tolist()
    if without:
        raise InputError(f"example {without[0]} has no foil: make the probe with contradictions.")
    _check_foils(model, probe)
    begins = (probe.foils >= 0).int().argmax(1)  # position that predicts the answer's first token
    place = torch.arange(probe.length)
    answers = [
        probe.tokens[row, at & (place > begins[row])].tolist()
        for row, at in enumerate(probe.mark("answer"))
    ]
    asked = replace(probe, marks={**probe.marks, "end": place == begins[:, None]}, control=None)
    given: Any = {"new_tokens": max(map(len, answers)), "batch_size": batch_size}
    mask = Mask.of(model, heads, method)
    contrasts = {f"DeCoRe {alpha}": Contrast(alpha, plausible=0) for alpha in alphas}
    own = [int(row[row >= 0][0]) for row in probe.foils]
    said = {"base": generate(model, asked, **given)}
    _check_worth(model, said["base"], answers, own)
    said["masked"] = generate(model, asked, mask=mask, **given)
    for alpha in alphas:
        said[f"DeCoRe {alpha}"] = decore(model, asked, heads, alpha, method=method, **given)
    decode = None if model.tokenizer is None else model.tokenizer.decode
    return PassageFaithfulness(
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
        margin=_margins(model, asked, mask, list(contrasts.values()), options),
        texts=tuple(made.texts for made in said.values()),
        answers=tuple(str(one) if decode is None else decode(one) for one in answers),
    )


def _check_foils(model: HeadModel, probe: Probe) -> None:
    """Raise InputError if a foil is a special token."""
    special = set() if model.tokenizer is None else set(model.tokenizer.all_special_ids)
    found = set() if probe.foils is None else set(probe.foils[probe.foils >= 0].tolist())
    if special & found:
        raise InputError(
            f"the foils hold the special token {min(special & found)}, which is not an answer: "
            "make the probe with hs.retrieval.contradictions."
        )


def _check_worth(
    model: HeadModel, said: Generated, answers: list[list[int]], own: list[int]
) -> None:
    """Raise HeadscopeError if neither answer was given in any example."""
    for tokens, answer, foil in zip(said.tokens, answers, own, strict=True):
        if list(tokens[: len(answer)]) == answer or tokens[:1] == (foil,):
            return
    raise HeadscopeError(
        f"{model.name} says neither the passage's answer nor its own in any of the {len(own)} "
        f"examples (but e.g. {said.texts[0]!r}), so there is nothing to compare: give shorter "
        "passages (length=), fewer distractors, or needles that the model can read."
    )


def _margins(
    model: HeadModel, probe: Probe, mask: Mask, contrasts: Sequence[Contrast], options: RunOptions
) -> Float[np.ndarray, "arm example"]:
    """Log-probability of the passage's answer minus that of the model's own, per arm."""
    assert probe.foils is not None  # noqa: S101  # checked by the caller
    at = (probe.foils >= 0).int().argmax(1)
    rows = torch.arange(len(probe))
    answer, own = probe.targets[rows, at], probe.foils[rows, at]
    found = np.full((2 + len(contrasts), len(probe)), np.nan)
    for batch in batches(prompt_ids(model, probe), options):
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


@checked
def contradictions(
    model: HeadModel,
    needles: str | Sequence[Needle] | None = None,
    *,
    examples: int = 32,
    length: int = 96,
    distractors: int = 2,
    seed: int = 0,
    **probe: Any,
) -> Probe:
    """Make passages that contradict the model's closed-book answers.

    Every question is first asked without a passage, in the chat template if the passages use it,
    and after the opening words of the reply: the most likely token is the beginning of the model's
    own answer and becomes the probe's ``foils``. Special tokens and tokens without a letter or
    digit are never foils. For the bundled ``facts`` it is the most likely of the words that are
    values, and the passage states the least likely one; of custom needles, those whose answer
    begins like the model's own are left out.

    Args:
        model: from :func:`headscope.load`.
        needles: ``facts`` (in the words of the bundled models; the default without a chat
            template), ``capitals`` (the capitals of other countries; the default with one), or
            needles, or a JSONL file of them.
        examples: maximum number of examples.
        length: maximum tokens of a passage with its question.
        distractors: number of sentences about other things of the same kind in every passage.
        seed: seed of facts and passages.
        probe: other arguments of :func:`headscope.probes.needle`.

    Returns:
        A probe with the kind ``needle`` with foils at the first token of the answer.

    Raises:
        InputError: if no question is left, or the values are not single tokens of the model's
            tokenizer.

    Example:
        >>> import headscope as hs
        >>> probe = contradictions(hs.load(), examples=4)
        >>> bool((probe.foils >= 0).sum() == 4)
        True
    """
    if examples < 1:
        raise InputError(f"examples={examples}: give 1 or more.")
    if distractors < 0:
        raise InputError(f"distractors={distractors}: give 0 or more.")
    writer = writer_for(model, probe.get("chat"), probe.get("bos"))
    made: list[Probe] = []
    if needles is None:
        needles = "capitals" if writer.chat else "facts"
    if needles == "facts":
        rng = Random(f"contradictions {seed}")  # noqa: S311 - words, not secrets
        sets = [tuple(islice(facts(rng), 1 + distractors)) for _ in range(examples)]
        own = closed_book(model, writer, [one[0] for one in sets])
        values = _values(model, distractors)
        against = [_against(one, row, values) for one, row in zip(sets, own, strict=True)]
        among = torch.full_like(own, -torch.inf)
        among[:, list(values.values())] = 0
        own = own + among
    else:
        given = _capitals(seed) if needles == "capitals" else fixed_needles(needles)
        if given is None:
            raise InputError(
                f"needles={needles!r} cannot be answered without a passage: 'facts' or 'capitals'."
            )
        own = closed_book(model, writer, given)
        first = [writer.ask(one).answer for one in given]
        kept = [i for i in range(len(given)) if int(own[i].argmax()) != first[i]][:examples]
        against = [(given[i], *given[:i], *given[i + 1 :])[: 1 + distractors] for i in kept]
        own = own[kept]
    if not against:
        raise InputError(
            "the model gives every answer without the passage, so that no passage contradicts "
            "it: use other needles."
        )
    for row, one in enumerate(against):
        drawn = needle(
            model,
            length,
            [0.5],
            list(one),
            per_cell=1,
            distractors=len(one) - 1,
            seed=seed + row,
            **probe,
        )
        made.append(replace(drawn, control=None))
    return _joined(model, made, own.argmax(1).tolist(), seed)


def _capitals(seed: int) -> tuple[Needle, ...]:
    """Countries paired with other countries' capitals."""
    rng = Random(f"capitals {seed}")  # noqa: S311 - words, not secrets
    countries = rng.sample(sorted(CAPITALS), len(CAPITALS))
    false = [CAPITALS[one] for one in (*countries[1:], countries[0])]
    return tuple(
        Needle(
            (f"The capital of {country} is {city}.",),
            f"What is the capital of {country}?",
            city,
            (city,),
        )
        for country, city in zip(countries, false, strict=True)
    )


def closed_book(
    model: HeadModel, writer: Writer, questions: Sequence[Needle]
) -> Float[torch.Tensor, "question d_vocab"]:
    """Log-probabilities of the answer's first token after each question without a passage.

    -inf for special tokens and tokens without letters or digits.
    """
    tokenizer = need_tokenizer(model, "a question")
    ordinary = ordinary_tokens(model)
    texts = tokenizer.batch_decode(ordinary[:, None].tolist())
    words = ordinary[[any(map(str.isalnum, text)) for text in texts]]
    rows = []
    for one in questions:
        ids = torch.tensor([writer.ask(one).ids])
        with torch.no_grad():
            logits = model.forward(ids, logits_at=torch.tensor([ids.shape[1] - 1]))
        said = logits[0, -1].float().log_softmax(0).cpu()
        rows.append(torch.full_like(said, -torch.inf).index_copy(0, words, said[words]))
    return torch.stack(rows)


def _values(model: HeadModel, distractors: int) -> dict[str, int]:
    """Possible values of bundled facts, with their first tokens, which are unique."""
    tokenizer = need_tokenizer(model, "a value")
    words = sorted({one.answer for one in islice(facts(Random(0)), 20)})  # noqa: S311
    first = {word: encode(tokenizer, f" {word}").word(1, 1 + len(word)) for word in words}
    ids = {
        word: encode(tokenizer, f" {word}").ids[place]
        for word, place in first.items()
        if place is not None
    }
    if len(ids) < 2 + distractors:
        raise InputError(
            f"the tokenizer of {model.name} has {len(ids)} of the values of 'facts' as single "
            f"tokens and {2 + distractors} are needed: give needles, or fewer distractors."
        )
    return ids


def _against(
    set_of: tuple[Needle, ...], own: Float[torch.Tensor, " d_vocab"], values: dict[str, int]
) -> tuple[Needle, ...]:
    """The same facts, with the first value replaced by the model's least likely one."""
    taken = {one.answer for one in set_of[1:]}
    value = min((word for word in values if word not in taken), key=lambda w: float(own[values[w]]))
    asked = set_of[0]
    text = asked.texts[0].replace(f"{asked.question} {asked.answer}", f"{asked.question} {value}")
    return (replace(asked, texts=(text,), answer=value, parts=(value,)), *set_of[1:])


def _joined(model: HeadModel, made: Sequence[Probe], foils: Sequence[int], seed: int) -> Probe:
    """Join probes of one example each, padded on the right, with their foils.

    A foil is placed where the answer's first non-white-space token is predicted.
    """
    longest = max(one.length for one in made)

    def stacked(values: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(one, (0, longest - one.shape[1]), value=fill)
                for one in values
            ]
        )

    first = made[0]
    targets = stacked([one.targets for one in made], -1)
    tokenizer = need_tokenizer(model, "an answer")
    known = targets.unique()
    texts = tokenizer.batch_decode([[max(one, 0)] for one in known.tolist()])
    white = known[[not text.strip() for text in texts]]
    start = ((targets >= 0) & ~torch.isin(targets, white)).int().argmax(1)
    opposed = torch.full_like(targets, -1)
    opposed[torch.arange(len(made)), start] = torch.tensor(foils)
    return replace(
        first,
        tokens=stacked([one.tokens for one in made], 0),
        real=stacked([one.real for one in made], 0).bool(),
        structure=stacked([one.structure for one in made], -1),
        targets=targets,
        foils=opposed,
        marks={name: stacked([one.marks[name] for one in made], 0).bool() for name in first.marks},
        facts={name: torch.cat([one.facts[name] for one in made]) for name in first.facts},
        name="contradictions",
        seed=seed,
    )
