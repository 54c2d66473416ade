"""The catalogue of kinds of attention heads, and the survey that tests a model for them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float

from headscope.ablation.heads import ablate_heads
from headscope.base.arguments import checked
from headscope.base.files import Saved, writable_folder
from headscope.base.options import RunOptions, track
from headscope.base.statistics import benjamini_hochberg
from headscope.errors import HeadscopeError, InputError, nearest, whole
from headscope.heads import HeadIndex
from headscope.kinds import measures
from headscope.kinds.measures import AskedModel, Confirm, Criterion, Kind, Unasked, one_sided
from headscope.metrics import Metric, answer_log_prob, logit_difference, loss
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.scorer import NEEDLE, REPEATED, TEXT
from headscope.scorers import CATALOGUE
from headscope.table import HeadScores, versions
from headscope.table.kinds import Finding, KindFacts, KindTable

SURVEY = "Zheng et al. 2024 (arXiv 2409.03752), survey of attention heads"
_FLAT = "uniform attention"
_NONE = "zero effect"
_TEXTS = ("tokenizer",)
_READABLE = "chance, 0.5; a probe of the mean token embedding; the median head of the layer"
_FOUND = (
    "a probe finds information whether or not the model uses it (Hewitt and Liang 2019, arXiv "
    "1909.03368); a single template; no head is named in a layer where most heads separate the "
    "classes"
)
_TASKS = ("tokenizer", "causal", "unembedding")

_REPEATS = Confirm(
    lambda asked: asked.probe(REPEATED), loss.at("second_copy"), 1,
    "mean-ablation raises the loss on the second copy",
)  # fmt: skip
_READS = Confirm(lambda asked: asked.probe(TEXT), loss, 1, "mean-ablation raises the loss on text")
_UNREPEATS = Confirm(
    lambda asked: asked.probe(REPEATED), loss.at("second_copy"), -1,
    "mean-ablation lowers the loss on the second copy",
)  # fmt: skip
_FINDS = Confirm(
    lambda asked: asked.probe(NEEDLE), loss, 1, "mean-ablation raises the loss on the answer"
)


def _answers(task: str, sign: int = -1) -> Confirm:
    word = "lowers" if sign < 0 else "raises"
    said = f"mean-ablation {word} the logit difference on {task}"

    def probe(asked: AskedModel) -> Probe:
        return asked.pairs(task)

    return Confirm(probe, logit_difference, sign, said)


def _kept(key: str, sign: int, said: str) -> Confirm:
    """Confirm by the logit difference on a probe built by the kind's measure."""

    def probe(asked: AskedModel) -> Probe:
        made: Probe = asked.keep(
            key, lambda: getattr(measures, _MAKES[key])(asked.model, asked.seed)
        )
        return made

    return Confirm(probe, logit_difference, sign, said)


_MAKES = {
    "choices": "choices", "denials": "denials", "contradicted": "contradicted",
    "successions": "successions", "related words": "related_words",
}  # fmt: skip


def _label(probe: Callable[[AskedModel], Probe], what: str) -> Confirm:
    return Confirm(
        probe, answer_log_prob, -1, f"mean-ablation lowers the log-probability of {what}"
    )


def _pattern(
    name: str, said: str, weakness: str, confirm: Confirm | None = None, control: str = _FLAT
) -> Kind:
    """Make a kind from a catalogue score."""
    scorer = CATALOGUE[name]
    assert scorer.probe is not None  # noqa: S101  # scores of rows have one
    return Kind(
        name, said, scorer.probe.name, control, measures.shared(name), scorer.source, weakness,
        confirm, scorer.needs,
    )  # fmt: skip


def _relation(name: str, said: str) -> Kind:
    return Kind(
        name,
        said,
        "weights, on pairs of single tokens",
        "one over the number of answers",
        measures.related(name),
        "Elhelo and Geva 2024 (arXiv 2412.11965), relations from parameters",
        "weights alone: does not check whether the head ever attends to such a word",
        _label(
            lambda asked: measures.relation_prompts(asked, name), "the answer after demonstrations"
        ),
        ("tokenizer", "unembedding", "linear_write", "ov_circuit"),
    )


def _task(
    name: str, said: str, task: str, mark: str, source: str, sign: int = 1, weakness: str = ""
) -> Kind:
    return Kind(
        name,
        said,
        task,
        f"{_FLAT}; {_NONE}",
        measures.task(task, mark, sign),
        source,
        weakness or "few prompt templates: the mark is at nearly the same position in each",
        _answers(task, -sign),
        _TASKS,
    )


_KINDS = (
    _pattern(
        "previous_token", "attends to the previous token", "any positional head does the same",
        _REPEATS
    ),
    _pattern("next_token", "attends to the next token", "any positional head does the same"),
    _pattern("current_token", "attends to the query's own token",
        "an attention sink in some models"),
    Kind(
        "positional", "attends to the token two to five places back", "repeated_tokens", _FLAT,
        measures.positional, "Voita et al. 2019 (arXiv 1905.09418), positional heads",
        "larger offsets are not tested", _READS,
    ),
    _pattern("local_window", "attends to the last few tokens", "short texts inflate it", _READS),
    _pattern(
        "duplicate_token", "attends to earlier copies of the current token",
        "does not check what the head writes",
        _REPEATS,
    ),
    _pattern(
        "induction", "attends to the token after an earlier copy of the current one",
        "a fixed-offset head looks the same at a single length", _REPEATS,
    ),
    _pattern("first_token", "attends to the first token (attention sink)",
        "most heads do in large models"),
    _pattern("delimiter", "attends to punctuation and separators",
        "depends on how frequent they are"),
    _pattern("separator", "attends to [SEP] as a sink", "most heads of encoders do"),
    Kind(
        "active_dormant", "attends to the first token in one domain and elsewhere in another",
        "text, repeated_tokens", "the other domain", measures.dormant,
        "Guo et al. 2024 (arXiv 2410.13835), active-dormant heads",
        "only two domains, with texts of different lengths", needs=("tokenizer", "causal"),
    ),
    Kind(
        "copying", "raises the logits of the tokens that it attends to", "repeated_tokens",
        "the same pattern, paired with other tokens", measures.copies,
        "Olsson et al. 2022 (arXiv 2209.11895), copying", "direct path only", _REPEATS,
        ("attention_write", "unembedding", "causal"),
    ),
    Kind(
        "copy_suppression", "lowers the logits of the tokens that it attends to", "repeated_tokens",
        "the same pattern, paired with other tokens", measures.suppresses,
        "McDougall et al. 2023 (arXiv 2310.04625), copy suppression",
        "direct path only; queries and keys are not tested", _UNREPEATS,
        ("attention_write", "unembedding", "causal"),
    ),
    _pattern(
        "retrieval", "copies the needle while the model answers",
        "needs a model that finds the answer",
        _FINDS, "the same text without the needle",
    ),
    _pattern(
        "query_focused_retrieval", "attends from a question to the needle that answers it",
        "attention alone", _FINDS, "the same text without the needle",
    ),
    _task(
        "name_mover", "attends to the correct name and raises its logit", "ioi", "io",
        "Wang et al. 2022 (arXiv 2211.00593)",
    ),
    _task(
        "negative_name_mover", "attends to the correct name and lowers its logit", "ioi", "io",
        "Wang et al. 2022 (arXiv 2211.00593)", -1,
    ),
    Kind(
        "s_inhibition", "attends from the end to the repeated name", "ioi", _FLAT,
        measures.attends("ioi", "s2"), "Wang et al. 2022 (arXiv 2211.00593)",
        "attention alone; only the ablation shows that it steers name movers away",
        _answers("ioi"), _TASKS,
    ),
    Kind(
        "backup_name_mover", "takes over when name movers are ablated", "ioi",
        "the run without ablation", measures.backs_up, "Wang et al. 2022 (arXiv 2211.00593)",
        "zero-ablation also changes the final norm's scale", needs=(*_TASKS, "attention_write"),
    ),
    Kind(
        "successor", "its weights map an ordinal to the next ordinal", "weights, on ordinals",
        "one over the number of answers", measures.next_in_order,
        "Gould et al. 2023 (arXiv 2312.09230)",
        "weights alone; an MLP may do the same job",
        _kept("successions", -1, "mean-ablation lowers the logit difference of the next ordinal"),
        ("tokenizer", "unembedding", "linear_write", "ov_circuit"),
    ),
    _relation("capital", "its weights map countries to capitals (associative memory)"),
    _relation("plural", "its weights map nouns to their plurals"),
    _relation("past_tense", "its weights map verbs to their past tense"),
    _relation("opposite", "its weights map words to their opposites"),
    _task(
        "greater_than", "attends to the year that the answer must exceed", "greater_than", "year",
        "Hanna et al. 2023 (arXiv 2305.00586)",
    ),
    _task(
        "subject_verb", "attends to the subject and raises the agreeing verb form", "agreement",
        "subject", "Finlayson et al. 2021 (arXiv 2106.06087)",
    ),
    _task(
        "argument_mover", "attends to the correct argument and raises its logit (letter mover)",
        "docstring", "argument", "Heimersheim and Janiak 2023, docstring circuit",
    ),
    _task(
        "entity_tracking", "attends to the queried entity's property and raises its logit",
        "colour_objects", "colour", "Prakash et al. 2024 (arXiv 2402.14811), entity tracking",
    ),
    Kind(
        "subject_extraction", "attends from the last token to the subject of a fact", "capital_of",
        _FLAT,
        measures.attends("capital_of", "country"),
        "Geva et al. 2023 (arXiv 2304.14767), extraction heads",
        "the subject is at the same position in all prompts of a template",
        _answers("capital_of"), _TASKS,
    ),
    _task(
        "attribute_extraction", "attends to the subject and raises the logit of its attribute",
        "capital_of",
        "country", "Geva et al. 2023 (arXiv 2304.14767), extraction heads",
    ),
    Kind(
        "context", "favours what the text says over what the model remembers", "contradicted facts",
        f"{_FLAT}; {_NONE}", measures.of_context,
        "Jin et al. 2024 (arXiv 2402.18154), context heads", "an induction head does the same",
        _kept("contradicted", -1, "mean-ablation lowers the logit difference of the text's answer"),
        _TASKS,
    ),
    Kind(
        "memory", "favours what the model remembers over what the text says", "contradicted facts",
        _NONE,
        measures.of_memory, "Jin et al. 2024 (arXiv 2402.18154), memory heads",
        "a copy-suppression head does the same",
        _kept("contradicted", 1, "mean-ablation raises the logit difference of the text's answer"),
        _TASKS,
    ),
    Kind(
        "correct_letter", "attends to the letter of the correct option and raises its logit",
        "choices",
        "a quarter of the attention to the letters", measures.correct_letter,
        "Lieberum et al. 2023 (arXiv 2307.09458), correct-letter heads",
        "needs a model that knows the answers",
        _kept("choices", -1, "mean-ablation lowers the logit difference of the correct letter"),
        _TASKS,
    ),
    Kind(
        "constant_letter", "attends equally to all option letters", "choices", _FLAT,
        measures.constant_letters, "Lieberum et al. 2023 (arXiv 2307.09458), constant heads",
        "a delimiter head does the same", needs=_TASKS,
    ),
    Kind(
        "single_letter", "attends to one option letter whatever the option says", "choices", _FLAT,
        measures.single_letter, "Lieberum et al. 2023 (arXiv 2307.09458), single-letter heads",
        "the first and last letters are also positions", needs=_TASKS,
    ),
    Kind(
        "negative", "attends to 'no' more than to 'yes'", "yes or no", _NONE, measures.negative,
        "Yu et al. 2024 (arXiv 2408.00137), negative attention score",
        "attention alone",
        _kept("denials", -1, "mean-ablation lowers the logit difference of 'no'"), _TASKS,
    ),
    Kind(
        "function_vector", "its mean output makes the model do a task without demonstrations",
        "in-context prompts", "mean outputs on prompts with shuffled labels",
        measures.in_context_task,
        "Todd et al. 2023 (arXiv 2310.15213)",
        "the measure is itself an intervention, on few tasks",
        _label(lambda asked: next(iter(measures.task_prompts(asked).values())),
               "the answer after demonstrations"),
        _TASKS,
    ),
    Kind(
        "label_word", "attends to the label word that the model will answer (anchor)",
        "in-context prompts", "chance, 0.5; the median head of the layer", measures.label_words,
        "Wang et al. 2023 (arXiv 2305.14160)",
        "attention alone, on one task: a preference for recent labels looks the same",
        _label(measures.label_prompts, "the correct label"), _TASKS,
    ),
    Kind(
        "semantic_induction", "attends to the token after a related word and raises its logit",
        "related words", "a third of the attention to the tokens after those words",
        measures.semantic_induction,
        "Ren et al. 2024 (arXiv 2402.13055), semantic induction heads",
        "words are related by hand-written categories, not parsed triples; similar embeddings are "
        "enough",
        _kept("related words", -1, "mean-ablation lowers the logit difference of that token"),
        _TASKS,
    ),
    Kind(
        "rare_word", "attends more to rarer tokens", "text", "shuffled token counts",
        measures.rare_words, "Stoehr et al. 2024 (arXiv 2403.19851), memorisation head",
        "token counts come from a small corpus", needs=("tokenizer", "causal"),
    ),
    Kind(
        "subword_merge", "attends to earlier pieces of the same word", "text", _FLAT,
        measures.word_pieces, SURVEY, "a previous-token head does the same", _READS, _TEXTS,
    ),
    Kind(
        "apostrophe", "attends to apostrophes", "texts with apostrophes", _FLAT,
        measures.apostrophes, SURVEY, "a delimiter head does the same", needs=_TEXTS,
    ),
    Kind(
        "truthfulness", "its output separates true from false statements",
        "statements about capitals",
        _READABLE, measures.told_apart(measures.statements),
        "Li et al. 2023 (arXiv 2306.03341), truthful heads",
        _FOUND, needs=_TEXTS,
    ),
    Kind(
        "sentiment", "its output separates positive from negative opinions", "opinions", _READABLE,
        measures.told_apart(measures.opinions),
        "Tigges et al. 2023 (arXiv 2310.15154), sentiment summarisers",
        _FOUND, needs=_TEXTS,
    ),
)  # fmt: skip

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _KINDS}

UNASKED: tuple[Unasked, ...] = (
    Unasked(
        "iteration",
        "needs a model trained on an iterative algorithm: pass its steps to "
        "hs.kinds.of_relation(..., least=0.5, steady=0.8).",
        "Cabannes et al. 2024 (arXiv 2406.02128)",
    ),
    Unasked(
        "clustering",
        "needs a model trained on sparse modular addition or a similar task: pass texts of the "
        "task to hs.kinds.clustering.",
        "Cabannes et al. 2024 (arXiv 2410.24050)",
    ),
    Unasked(
        "adjacency",
        "needs a model trained on mazes: pass the neighbours of each cell to hs.kinds.of_relation.",
        "Ivanitskiy et al. 2023 (arXiv 2312.02566)",
    ),
    Unasked(
        "dependency",
        "needs parsed sentences: pass the dependency edges to hs.kinds.of_relation.",
        "Clark et al. 2019 (arXiv 1906.04341)",
    ),
    Unasked(
        "padding_register",
        "needs the image model that a text encoder conditions, to see how its images change with "
        "padding.",
        "Toker et al. 2025 (arXiv 2501.06751)",
    ),
    Unasked(
        "safety",
        "needs harmful prompts and a judge of refusals.",
        "Zhou et al. 2024 (arXiv 2410.13708)",
    ),
    Unasked(
        "faithfulness",
        "needs generated chains of thought and a judge of their faithfulness.",
        "Tanneru et al. 2024 (arXiv 2406.10625)",
    ),
    Unasked(
        "language_coherence",
        "needs generated text and a judge of its language.",
        SURVEY,
    ),
)


_Part = TypeVar("_Part", bound=Saved)


@dataclass(frozen=True, eq=False)
class KindAnswer(Saved):
    """Values of a kind's criteria for every head, or why it could not be tested.

    Attributes:
        reason: why the kind could not be tested; empty if it was.
        value: value of the first criterion, ``[layer, head]``; NaN where there is no head.
        holds: whether all criteria reach their thresholds.
        p: largest p-value of the criteria.
        rule: thresholds in words.
    """

    reason: str
    value: Float[np.ndarray, "layer head"]
    holds: Bool[np.ndarray, "layer head"]
    p: Float[np.ndarray, "layer head"]
    rule: str = ""


@dataclass(frozen=True, eq=False)
class KindEffects(Saved):
    """Effects of ablating a kind's heads on the kind's metric.

    Attributes:
        mean: change in the metric, per head.
        p: one-sided p-value for a change in the predicted direction.
        reason: why nothing was ablated; empty if heads were.
    """

    mean: Float[np.ndarray, " head"]
    p: Float[np.ndarray, " head"]
    reason: str = ""


@checked
@own_types()
def survey(
    model: HeadModel,
    kinds: Iterable[str | Kind] | str | Kind | None = None,
    *,
    confirm: bool = True,
    alpha: float = 0.05,
    most: int = 16,
    seed: int = 0,
    batch_size: int | None = None,
    folder: "str | Path | None" = None,
    progress: bool | None = None,
) -> KindTable:
    """Find which heads are of which kind, with p-values, and confirm them by ablation.

    A head is named if all criteria of a kind hold and the kind's p-value, corrected over all heads
    and kinds tested together (Benjamini and Hochberg 1995), is below alpha. Named heads are then
    mean-ablated one at a time on the kind's own probe: ``confirmed`` says whether the metric moves
    in the predicted direction, corrected over all ablated heads. A head can have a kind without
    being needed, since other heads may do the same.

    Kinds that share a probe share one pass over it. With a folder, each kind is saved as soon as it
    has been tested, and the same survey resumes there after an interruption.

    Args:
        model: from :func:`headscope.load`.
        kinds: names from :data:`headscope.kinds.KINDS`, or your own kinds. Default: all.
        confirm: also ablate the heads that were found.
        alpha: false discovery rate, between 0 and 1.
        most: heads of each kind to ablate, strongest first.
        seed: seed for all probes.
        batch_size: examples per pass.
        folder: where finished kinds are saved; built-in kinds only, since the name of a custom kind
            does not identify what it measures.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        Findings with ``.findings``, ``.named(kind)``, ``.of(head)`` and ``.left_out`` (kind ->
        reason).

    Raises:
        InputError: if a kind is unknown or has no p-value, alpha is not between 0 and 1, ``most``
            is below 1, or the folder cannot be written.

    Source: Zheng et al. 2024 (arXiv 2409.03752), survey of attention heads.

    Example:
        >>> found = hs.kinds.survey(model, ["induction", "previous_token"], confirm=False)
        >>> len(found.asked)
        2
    """
    if not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise InputError(f"alpha={alpha!r}: give a number between 0 and 1.")
    whole(most, "most", 1)
    RunOptions(batch_size, seed=seed, progress=progress)
    wanted = _wanted(kinds)
    asked = AskedModel(model, seed, batch_size)
    parts = _Parts.of(model, seed, folder)
    answers: dict[str, KindAnswer] = {}
    facts: list[KindFacts] = []
    with track(len(wanted), f"kinds of heads of {model.name}", show=progress) as advance:
        for kind in wanted:
            answer = parts.kept(KindAnswer, kind, [], partial(_ask, asked, kind))
            if not answer.reason:
                answers[kind.name] = answer
            facts.append(_facts_of(kind, answer))
            advance()
    adjusted = _adjusted(answers)
    findings = [
        Finding(kind.name, head, float(answers[kind.name].value[head]),
                float(adjusted[kind.name][head]))
        for kind in wanted
        if kind.name in answers
        for head in _named(answers[kind.name], adjusted[kind.name], alpha)
    ]  # fmt: skip
    if confirm:
        by_name = {kind.name: kind for kind in wanted}
        findings = _confirmed(asked, by_name, findings, alpha, most, parts, progress)
    if kinds is None:
        facts += [
            KindFacts(one.name, "", "", "", "", one.source, "", reason=one.reason)
            for one in UNASKED
        ]
    return KindTable(
        kinds=tuple(facts),
        findings=tuple(findings),
        values={name: answer.value for name, answer in answers.items()},
        p_adjusted=adjusted,
        alpha=float(alpha),
        heads=len(model.shape.heads),
        provenance=origin(model, seed=seed),
    )


def _wanted(kinds: Iterable[str | Kind] | str | Kind | None) -> list[Kind]:
    if kinds is None:
        return list(KINDS.values())
    listed = [kinds] if isinstance(kinds, str | Kind) else list(kinds)
    left_out = {one.name: one.reason for one in UNASKED}
    found = []
    for one in listed:
        if isinstance(one, str) and one in left_out:
            raise InputError(f"the kind {one!r} cannot be tested on a model alone: {left_out[one]}")
        if isinstance(one, str) and one not in KINDS:
            raise InputError(nearest(one, KINDS, kind="kind of head"))
        found.append(KINDS[one] if isinstance(one, str) else one)
    if not found:
        raise InputError("no kinds given: name at least one, or omit kinds to test all.")
    return found


@dataclass(frozen=True)
class _Parts:
    """Files of finished kinds, each written atomically."""

    folder: Path | None
    facts: tuple[str, ...]

    @classmethod
    def of(cls, model: HeadModel, seed: int, folder: "str | Path | None") -> "_Parts":
        """Create the folder before anything runs.

        Raises:
            InputError: if the folder is not writable.
        """
        if folder is None:
            return cls(None, ())
        place = writable_folder(Path(folder))
        said = (model.digest(), str(model.dtype), str(seed), versions().get("headscope", ""))
        return cls(place, said)

    def kept(
        self, kept: type[_Part], kind: Kind, heads: Sequence[HeadIndex], make: Callable[[], _Part]
    ) -> _Part:
        """Load an earlier result, or compute and store it."""
        if self.folder is None or KINDS.get(kind.name) is not kind:
            return make()
        words = (*self.facts, kept.__name__, kind.name, *map(str, heads))
        digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
        what = "effects" if heads else "heads"
        file = self.folder / f"{kind.name}-{what}-{digest}.safetensors"
        if file.exists():
            with suppress(InputError):  # recompute a damaged file
                return kept.load(file)
        made = make()
        made.save(file)
        return made


def _ask(asked: AskedModel, kind: Kind) -> KindAnswer:
    """Evaluate a kind's criteria, or say why it cannot be tested."""
    reason = kind.lacking(asked.model)
    if not reason:
        try:
            return _answer(kind, kind.measure(asked), asked.model)
        except CannotTestError:
            raise
        except HeadscopeError as error:
            reason = str(error)
    nothing = np.full((asked.model.shape.n_layers, asked.model.shape.n_heads), np.nan)
    return KindAnswer(reason, nothing, np.isfinite(nothing), nothing)


class CannotTestError(InputError):
    """Raised when no criterion of a kind has a p-value."""


def _answer(kind: Kind, criteria: Sequence[Criterion], model: HeadModel) -> KindAnswer:
    """Combine the criteria.

    Raises:
        CannotTestError: if none has a p-value.
    """
    if all(one.p is None for one in criteria):
        raise CannotTestError(
            f"the kind {kind.name!r} has no criterion with a p-value: give it one, because without "
            "it every head counts as certain and the correction becomes too lenient for all other "
            "kinds."
        )
    first = criteria[0]
    there = np.zeros(first.value.shape, dtype=bool)
    there[tuple(np.transpose(model.shape.heads))] = True
    holds = there.copy()
    p = np.zeros(first.value.shape)
    for one in criteria:
        holds &= np.nan_to_num(one.value, nan=-np.inf) >= one.least
        if one.p is not None:
            p = np.maximum(p, np.nan_to_num(one.p, nan=1.0))
    said = ", ".join(f"{one.what} >= {one.least:g}" for one in criteria)
    value = np.where(there, first.value, np.nan)
    return KindAnswer("", value, holds, np.where(there, p, np.nan), said)


def _facts_of(kind: Kind, answer: KindAnswer) -> KindFacts:
    return KindFacts(
        kind.name, kind.said, kind.probe, kind.control, answer.rule, kind.source, kind.weakness,
        "" if kind.confirm is None else kind.confirm.said, answer.reason,
    )  # fmt: skip


def _adjusted(answers: Mapping[str, KindAnswer]) -> dict[str, Float[np.ndarray, "layer head"]]:
    """Correct p-values over all heads and kinds together."""
    if not answers:
        return {}
    together = benjamini_hochberg(np.stack([answer.p for answer in answers.values()]))
    return dict(zip(answers, together, strict=True))


def _named(
    answer: KindAnswer, adjusted: Float[np.ndarray, "layer head"], alpha: float
) -> list[HeadIndex]:
    chosen = answer.holds & (np.nan_to_num(adjusted, nan=1.0) < alpha)
    heads = [HeadIndex(int(layer), int(head)) for layer, head in np.argwhere(chosen)]
    return sorted(heads, key=lambda head: (-answer.value[head], head))


def _confirmed(
    asked: AskedModel,
    kinds: Mapping[str, Kind],
    findings: Sequence[Finding],
    alpha: float,
    most: int,
    parts: _Parts,
    progress: bool | None,
) -> list[Finding]:
    """Add the effects of ablation to the findings."""
    effects: dict[tuple[str, HeadIndex], tuple[float, float]] = {}
    ablated = _Ablated(asked, {})
    plans = {
        name: [one.head for one in findings if one.kind == name][:most]
        for name in dict.fromkeys(one.kind for one in findings)
        if kinds[name].confirm is not None
    }
    with track(sum(map(len, plans.values())), "ablating heads", show=progress) as advance:
        for name, heads in plans.items():
            kind = kinds[name]
            found = parts.kept(KindEffects, kind, heads, partial(ablated.of, kind, heads))
            if not found.reason:
                pairs = zip(found.mean.tolist(), found.p.tolist(), strict=True)
                effects |= zip([(name, head) for head in heads], pairs, strict=True)
            advance(len(heads))
    adjusted = benjamini_hochberg(np.array([p for _, p in effects.values()]))
    corrected = dict(zip(effects, adjusted.tolist(), strict=True))
    return [
        one
        if (one.kind, one.head) not in effects
        else replace(
            one,
            effect=effects[one.kind, one.head][0],
            effect_p=corrected[one.kind, one.head],
            confirmed=bool(corrected[one.kind, one.head] < alpha),
        )
        for one in findings
    ]


@dataclass(frozen=True)
class _Ablated:
    """Effects of ablating heads, shared by kinds with the same probe and metric."""

    asked: AskedModel
    known: dict[tuple[Probe, Metric], dict[HeadIndex, HeadScores]]

    def of(self, kind: Kind, heads: Sequence[HeadIndex]) -> KindEffects:
        """Mean-ablate heads one by one on the probe of their kind."""
        plan, nothing = kind.confirm, np.empty(0)
        assert plan is not None  # noqa: S101  # those without were left out
        try:
            probe = plan.probe(self.asked)
            known = self.known.setdefault((probe, plan.metric), {})
            missing = [head for head in heads if head not in known]
            if missing:
                scores = ablate_heads(
                    self.asked.model, probe, plan.metric, heads=missing,
                    batch_size=self.asked.batch_size, progress=False,
                )  # fmt: skip
                known |= dict.fromkeys(missing, scores)
        except HeadscopeError as error:
            return KindEffects(nothing, nothing, str(error))
        return KindEffects(
            np.array([known[head].mean[head] for head in heads]),
            np.array([one_sided(known[head], plan.sign)[head] for head in heads]),
        )
