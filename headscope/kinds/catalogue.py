"""The kinds of attention heads that a model can be asked for, and those that it cannot."""

from collections.abc import Mapping

from headscope.kinds import measures, words
from headscope.kinds.kind import AskedModel, Confirm, Kind, Unasked
from headscope.metrics import logit_difference, loss
from headscope.probes.probe import Probe
from headscope.scorer import NEEDLE, REPEATED, TEXT
from headscope.scorers import CATALOGUE

SURVEY = "Zheng et al. 2024 (arXiv 2409.03752), survey of attention heads"
_FLAT = "attention spread evenly"
_NONE = "no effect at all"
_TEXTS = ("tokenizer",)
_TASKS = ("tokenizer", "causal", "unembedding")

_REPEATS = Confirm(
    lambda asked: asked.probe(REPEATED), loss.at("second_copy"), 1,
    "mean-ablation raises the loss of the second copy",
)  # fmt: skip
_READS = Confirm(lambda asked: asked.probe(TEXT), loss, 1, "mean-ablation raises the loss of texts")
_UNREPEATS = Confirm(
    lambda asked: asked.probe(REPEATED), loss.at("second_copy"), -1,
    "mean-ablation lowers the loss of the second copy",
)  # fmt: skip
_FINDS = Confirm(
    lambda asked: asked.probe(NEEDLE), loss, 1, "mean-ablation raises the loss of the answer"
)


def _answers(task: str, sign: int = -1) -> Confirm:
    word = "lowers" if sign < 0 else "raises"
    said = f"mean-ablation {word} the logit difference of {task}"

    def probe(asked: AskedModel) -> Probe:
        return asked.pairs(task)

    return Confirm(probe, logit_difference, sign, said)


def _kept(key: str, sign: int, said: str) -> Confirm:
    """On a probe that the measure has made."""

    def probe(asked: AskedModel) -> Probe:
        made: Probe = asked.keep(key, lambda: getattr(words, _MAKES[key])(asked.model, asked.seed))
        return made

    return Confirm(probe, logit_difference, sign, said)


_MAKES = {"choices": "choices", "yes or no": "yes_or_no", "contradicted": "contradicted"}


def _pattern(
    name: str, said: str, weakness: str, confirm: Confirm | None = None, control: str = _FLAT
) -> Kind:
    """A kind that a score of the catalogue names."""
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
        "weights, with pairs of single tokens",
        "one over the number of answers",
        measures.related(name),
        "Elhelo and Geva 2024 (arXiv 2412.11965), relations from parameters",
        "weights alone: whether the head ever attends to such a word is not asked",
        needs=("tokenizer", "unembedding", "linear_write", "ov_circuit"),
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
        weakness or "prompts of few templates: the mark stands at nearly the same place in each",
        _answers(task, -sign),
        _TASKS,
    )


_KINDS = (
    _pattern(
        "previous_token", "attends to the token before", "a positional head looks alike", _REPEATS
    ),
    _pattern("next_token", "attends to the token after", "a positional head looks alike"),
    _pattern("current_token", "attends to the query's own token", "a resting place in some models"),
    Kind(
        "positional", "attends to the token two to five places back", "repeated_tokens", _FLAT,
        measures.positional, "Voita et al. 2019 (arXiv 1905.09418), positional heads",
        "places farther back are not tried", _READS,
    ),
    _pattern("local_window", "attends to the last few tokens", "short texts make it easy", _READS),
    _pattern(
        "duplicate_token", "attends to earlier equal tokens", "says nothing of what it writes",
        _REPEATS,
    ),
    _pattern(
        "induction", "attends to what followed an earlier equal token",
        "a fixed distance looks alike at one length", _REPEATS,
    ),
    _pattern("first_token", "rests on the first token: a sink", "most heads do, in large models"),
    _pattern("delimiter", "attends to punctuation and separators", "frequent ones give more"),
    _pattern("separator", "rests on [SEP]", "most heads of encoders do"),
    Kind(
        "active_dormant", "rests on the first token in one domain and works in another",
        "text, repeated_tokens", "the other domain", measures.dormant,
        "Guo et al. 2024 (arXiv 2410.13835), active-dormant heads",
        "two domains of ours; the lengths of their texts differ", needs=("tokenizer", "causal"),
    ),
    Kind(
        "copying", "raises the tokens that it attends to", "repeated_tokens",
        "the same rows, told other tokens", measures.copies,
        "Olsson et al. 2022 (arXiv 2209.11895), copying", "the direct path only", _REPEATS,
        ("attention_write", "unembedding", "causal"),
    ),
    Kind(
        "copy_suppression", "lowers the tokens that it attends to", "repeated_tokens",
        "the same rows, told other tokens", measures.suppresses,
        "McDougall et al. 2023 (arXiv 2310.04625), copy suppression",
        "the direct path only; queries and keys are not asked", _UNREPEATS,
        ("attention_write", "unembedding", "causal"),
    ),
    _pattern(
        "retrieval", "copies a needle while the answer is said", "needs a model that answers",
        _FINDS, "the text without its needle",
    ),
    _pattern(
        "query_focused_retrieval", "attends from a question to the needle that answers it",
        "attention alone", _FINDS, "the text without its needle",
    ),
    _task(
        "name_mover", "attends to the name that is due and raises it", "ioi", "io",
        "Wang et al. 2022 (arXiv 2211.00593)",
    ),
    _task(
        "negative_name_mover", "attends to the name that is due and lowers it", "ioi", "io",
        "Wang et al. 2022 (arXiv 2211.00593)", -1,
    ),
    Kind(
        "s_inhibition", "attends from the end to the repeated name", "ioi", _FLAT,
        measures.attends("ioi", "s2"), "Wang et al. 2022 (arXiv 2211.00593)",
        "attention alone; that it keeps movers away is what the ablation tells",
        _answers("ioi"), _TASKS,
    ),
    Kind(
        "backup_name_mover", "takes over when name movers are ablated", "ioi",
        "the run without ablation", measures.backs_up, "Wang et al. 2022 (arXiv 2211.00593)",
        "zero-ablation also shifts the final norm", needs=(*_TASKS, "attention_write"),
    ),
    Kind(
        "successor", "its weights map an ordinal to the next one", "weights, with ordinals",
        "one over the number of answers", measures.next_in_order,
        "Gould et al. 2023 (arXiv 2312.09230)",
        "weights alone; an MLP may do the same", needs=("tokenizer", "unembedding", "linear_write",
                                                        "ov_circuit"),
    ),
    _relation("capital", "its weights map countries to capitals: associative memory"),
    _relation("plural", "its weights map nouns to their plurals"),
    _relation("past_tense", "its weights map verbs to their past"),
    _relation("opposite", "its weights map words to their opposites"),
    _task(
        "greater_than", "attends to the year that must be exceeded", "greater_than", "year",
        "Hanna et al. 2023 (arXiv 2305.00586)",
    ),
    _task(
        "subject_verb", "attends to the subject and raises the verb that agrees", "agreement",
        "subject", "Finlayson et al. 2021 (arXiv 2106.06087)",
    ),
    _task(
        "argument_mover", "attends to the argument that is due and raises it: a letter mover",
        "docstring", "argument", "Heimersheim and Janiak 2023, docstring circuit",
    ),
    _task(
        "entity_tracking", "attends to the property of the entity asked about and raises it",
        "colour_objects", "colour", "Prakash et al. 2024 (arXiv 2402.14811), entity tracking",
    ),
    Kind(
        "subject_extraction", "attends from the end to the subject of a fact", "capital_of", _FLAT,
        measures.attends("capital_of", "country"),
        "Geva et al. 2023 (arXiv 2304.14767), extraction heads",
        "the subject stands at the same place in all prompts of a form",
        _answers("capital_of"), _TASKS,
    ),
    _task(
        "attribute_extraction", "attends to the subject and raises its attribute", "capital_of",
        "country", "Geva et al. 2023 (arXiv 2304.14767), extraction heads",
    ),
    Kind(
        "context", "prefers what the text says to what is remembered", "contradicted facts",
        f"{_FLAT}; {_NONE}", measures.of_context,
        "Jin et al. 2024 (arXiv 2402.18154), context heads", "an induction head does the same",
        _kept("contradicted", -1, "mean-ablation lowers the lead of the text's answer"), _TASKS,
    ),
    Kind(
        "memory", "prefers what is remembered to what the text says", "contradicted facts", _NONE,
        measures.of_memory, "Jin et al. 2024 (arXiv 2402.18154), memory heads",
        "a copy-suppression head looks alike",
        _kept("contradicted", 1, "mean-ablation raises the lead of the text's answer"), _TASKS,
    ),
    Kind(
        "correct_letter", "attends to the letter of the right option and raises it", "choices",
        "a quarter of the attention to letters", measures.correct_letter,
        "Lieberum et al. 2023 (arXiv 2307.09458), correct-letter heads",
        "needs a model that knows the answers",
        _kept("choices", -1, "mean-ablation lowers the lead of the right letter"), _TASKS,
    ),
    Kind(
        "constant_letter", "attends to all option letters alike", "choices", _FLAT,
        measures.constant_letters, "Lieberum et al. 2023 (arXiv 2307.09458), constant heads",
        "a delimiter head looks alike", needs=_TASKS,
    ),
    Kind(
        "single_letter", "attends to one option letter, whatever it stands for", "choices", _FLAT,
        measures.single_letter, "Lieberum et al. 2023 (arXiv 2307.09458), single-letter heads",
        "the first and last letter are also places", needs=_TASKS,
    ),
    Kind(
        "negative", "attends to 'no' more than to 'yes'", "yes or no", _NONE, measures.negative,
        "Yu et al. 2024 (arXiv 2408.00137), negative attention score",
        "attention alone", needs=_TASKS,
    ),
    Kind(
        "function_vector", "its mean output makes a model do a task without demonstrations",
        "in-context prompts", "means of prompts with shuffled labels", measures.in_context_task,
        "Todd et al. 2023 (arXiv 2310.15213)", "the measure is itself an intervention on few tasks",
        needs=_TASKS,
    ),
    Kind(
        "label_word", "attends to label words as the model will answer: an anchor",
        "in-context prompts", "chance, 0.5", measures.label_words,
        "Wang et al. 2023 (arXiv 2305.14160)", "attention alone, and of one task", needs=_TASKS,
    ),
    Kind(
        "rare_word", "attends in the order of rarity", "text", "counts in another order",
        measures.rare_words, "Stoehr et al. 2024 (arXiv 2403.19851), memorisation head",
        "counts of a small corpus", needs=("tokenizer", "causal"),
    ),
    Kind(
        "subword_merge", "attends to earlier pieces of the same word", "text", _FLAT,
        measures.word_pieces, SURVEY, "a previous-token head looks alike", _READS, _TEXTS,
    ),
    Kind(
        "apostrophe", "attends to apostrophes", "texts with apostrophes", _FLAT,
        measures.apostrophes, SURVEY, "a delimiter head looks alike", needs=_TEXTS,
    ),
    Kind(
        "truthfulness", "its output tells true from false statements", "statements of capitals",
        "chance, 0.5", measures.told_apart(words.statements),
        "Li et al. 2023 (arXiv 2306.03341), truthful heads",
        "a probe finds what is there, used or not", needs=_TEXTS,
    ),
    Kind(
        "sentiment", "its output tells good from bad opinions", "opinions", "chance, 0.5",
        measures.told_apart(words.opinions),
        "Tigges et al. 2023 (arXiv 2310.15154), sentiment summarisers",
        "a probe finds what is there, used or not", needs=_TEXTS,
    ),
)  # fmt: skip

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _KINDS}

UNASKED: tuple[Unasked, ...] = (
    Unasked(
        "iteration",
        "asks for a model trained on an iterative algorithm; score your own steps with "
        "hs.scorers.relation.",
        "Cabannes et al. 2024 (arXiv 2406.02128)",
    ),
    Unasked(
        "clustering",
        "asks for a model trained on sparse modular addition; mass and evenness of "
        "hs.scorers.relation measure it there.",
        "Cabannes et al. 2024 (arXiv 2410.24050)",
    ),
    Unasked(
        "adjacency",
        "asks for a model of mazes; give its neighbours to hs.scorers.relation.",
        "Ivanitskiy et al. 2023 (arXiv 2312.02566)",
    ),
    Unasked(
        "semantic_induction",
        "asks for texts with relation triples found by a parser; give yours to "
        "hs.scorers.relation.",
        "Ren et al. 2024 (arXiv 2402.13055)",
    ),
    Unasked(
        "dependency",
        "asks for parsed sentences; give the edges of yours to hs.scorers.relation.",
        "Clark et al. 2019 (arXiv 1906.04341)",
    ),
    Unasked(
        "padding_register",
        "asks for the image model behind a text encoder, whose pictures change with its padding.",
        "Toker et al. 2025 (arXiv 2501.06751)",
    ),
    Unasked(
        "safety",
        "asks for harmful prompts and a judge of refusals.",
        "Zhou et al. 2024 (arXiv 2410.13708)",
    ),
    Unasked(
        "faithfulness",
        "asks for generated chains of thought and a judge of them.",
        "Tanneru et al. 2024 (arXiv 2406.10625)",
    ),
    Unasked(
        "language_coherence",
        "asks for generated text and a judge of its language.",
        SURVEY,
    ),
)
