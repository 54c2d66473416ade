"""Studies of attention patterns: induction, earlier tokens, sinks, delimiters, needles."""

import math
from functools import partial

import numpy as np

from headscope import metrics
from headscope.circuits import composition
from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.kinds import AskedModel, survey
from headscope.kinds.measures import choices
from headscope.models import bundled
from headscope.models.protocol import HeadModel
from headscope.probes import random_tokens, text
from headscope.probes.encoding import ordinary_tokens
from headscope.retrieval import token_losses
from headscope.scoring.score import score
from headscope.studies.study import (
    MATTERS,
    RIGHT,
    Claim,
    Evidence,
    Study,
    StudySetting,
    against_random_sets,
    answers,
    best_head,
    fetching,
    metric_of,
    need_skill,
    needles,
    paired,
    pattern,
    prose,
    repeated,
    retrieval_heads,
    role,
)
from headscope.table import HeadScores

_KNOWN_GAIN = 0.5  # nats: a smaller gain from a repetition is no copying
_OTHERS = "the same head on the same tokens in an order that breaks the pattern"


def _pattern(scorer: str, model: HeadModel, setting: StudySetting) -> Evidence:
    return pattern(scorer, model, setting)[1]


def _needed(model: HeadModel, setting: StudySetting) -> Evidence:
    role("induction", model, setting)
    chosen = score(model, repeated(model, setting, setting.seed), ["induction"], progress=False)
    heads = [head for head, value in chosen["induction"].top(3) if value > MATTERS]
    probe = repeated(model, setting, setting.seed + 1)
    second = metrics.loss.at("second_copy")
    gain = math.log(len(ordinary_tokens(model))) - float(
        np.nanmean(metric_of(model, probe, second))
    )
    if gain < _KNOWN_GAIN:
        raise UnsupportedModelError(
            f"it predicts repeated tokens only {gain:.2f} nats better than chance."
        )
    return against_random_sets(model, probe, second, heads, scale=gain, sign=1.0, seed=setting.seed)


def _in_context(model: HeadModel, setting: StudySetting) -> Evidence:
    length = min(model.shape.n_ctx or 192, setting.size(192, 128))
    stories = bundled.stories(setting.size(24, 12), seed=setting.seed + 1)
    probe = text(model, stories, length=length, batch=setting.size(24, 12))
    need_skill(model, probe)
    losses = token_losses(model, probe, progress=False)
    places = losses.losses.shape[-1]
    early = losses.losses[0][:, places // 8 : places // 4]
    late = losses.losses[0][:, 3 * places // 4 :]
    return paired(
        np.nanmean(late, 1),
        np.nanmean(early, 1),
        note=f"{places} tokens a text",
        results={"losses": losses},
        less=True,
    )


INDUCTION = Study(
    "induction-heads",
    "Heads that continue what was said before",
    "Olsson et al. 2022, In-context Learning and Induction Heads, arXiv 2209.11895",
    (
        Claim(
            "pattern",
            "A head attends to the token after the previous occurrence of the current one.",
            "induction score of the best head, chosen on other tokens",
            _OTHERS,
            partial(_pattern, "induction"),
            MATTERS,
            "attention",
        ),
        Claim(
            "needed",
            "Without its induction heads the model predicts repeated tokens worse than without as "
            "many others.",
            "share of the gain from repetition that is lost",
            "mean of random sets of other heads",
            _needed,
            MATTERS,
            "share",
        ),
        Claim(
            "in-context",
            "Late tokens of a text are predicted better than early ones.",
            "loss over the last quarter of a text",
            "loss over its second eighth",
            _in_context,
            0.02,
            "nats",
        ),
    ),
    "Scores on random tokens said twice, ablation by the mean over the probe, and loss along "
    "stories in a small language of few words, which a model can pick up. The gain from "
    "repetition is log of the vocabulary less the loss.",
)


def _k_composition(model: HeadModel, setting: StudySetting) -> Evidence:
    before, later = role("previous_token", model, setting), role("induction", model, setting)
    if not before.layer < later.layer:
        raise UnsupportedModelError(
            f"its previous-token head {before} is not below its induction head {later}."
        )
    scores = composition(model, "K")
    into = scores.values[:, :, later.layer, later.head]
    below = into[: later.layer]
    others = np.delete(below.ravel(), before.layer * below.shape[1] + before.head)
    others = others[np.isfinite(others)]
    if others.size < 3:
        raise UnsupportedModelError(f"only {others.size} other heads are below {later}.")
    value, mean, spread = float(into[before.layer, before.head]), others.mean(), others.std(ddof=1)
    return Evidence(
        value,
        float(mean),
        float(value - mean - 2 * spread),
        float(value - mean + 2 * spread),
        int(others.size),
        f"{before} into {later}; interval of two standard deviations of the other heads",
        {"composition": scores},
    )


COMPOSITION = Study(
    "composition",
    "Heads that talk to later heads",
    "Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Merullo et al. 2024, "
    "Talking Heads, arXiv 2406.09519",
    (
        Claim(
            "previous-token",
            "A head attends to the token before.",
            "previous-token score of the best head, chosen on other tokens",
            "mean of all other heads",
            partial(_pattern, "previous_token"),
            MATTERS,
            "attention",
        ),
        Claim(
            "k-composition",
            "The induction head reads its keys from the previous-token head more than from others.",
            "K-composition score of the pair",
            "all other heads below the induction head",
            _k_composition,
            0.0,
        ),
    ),
    "Composition is read from weights, with the norm's gain folded and without rotary positions.",
)


def _sink(model: HeadModel, setting: StudySetting) -> Evidence:
    length = min(setting.size(64, 32), (model.shape.n_ctx or 64) - 2)
    probe = random_tokens(model, length=length, batch=setting.size(24, 12), seed=setting.seed + 1)
    scores = score(model, probe, ["first_token"], progress=False)["first_token"]
    flat = scores.per_example.reshape(-1, scores.per_example.shape[-1])
    values = np.nanmean(flat[~np.isnan(flat).all(1)], axis=0)
    places = np.arange(1, probe.tokens.shape[1])
    return paired(
        values,
        np.full(values.shape, float((1.0 / (places + 1)).mean())),
        note="mean over all heads, random tokens",
        results={"first_token": scores},
    )


def _best_on_prose(scorer: str, model: HeadModel, setting: StudySetting) -> Evidence:
    probes = [prose(model, setting, seed=setting.seed + k) for k in range(2)]
    return best_head(model, scorer, *probes)[1]


SINKS = Study(
    "attention-sinks",
    "Attention that is parked on the first token",
    "Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
    (
        Claim(
            "sink",
            "Heads give the first token far more attention than its share.",
            "attention on the first token, mean over all heads",
            "even attention over all tokens that are seen",
            _sink,
            MATTERS,
            "attention",
        ),
    ),
    "Random tokens, so that the first token cannot be what the text asks for.",
)

SURFACE = Study(
    "bert-attention",
    "What attention looks at on the surface",
    "Clark et al. 2019, What Does BERT Look At?, arXiv 1906.04341",
    (
        Claim(
            "separator",
            "A head gives most of its attention to separators.",
            "attention of the best head on separators, chosen on other texts",
            "mean of all other heads",
            partial(_best_on_prose, "separator"),
            MATTERS,
            "attention",
        ),
        Claim(
            "delimiter",
            "A head attends to punctuation.",
            "attention of the best head on delimiters, chosen on other texts",
            "the same head on the shuffled text, or all other heads",
            partial(_best_on_prose, "delimiter"),
            MATTERS,
            "attention",
        ),
        Claim(
            "previous",
            "A head attends to the token before.",
            "previous-token score of the best head, chosen on other tokens",
            "mean of all other heads",
            partial(_pattern, "previous_token"),
            MATTERS,
            "attention",
        ),
    ),
    "Separators exist in encoders only; the other claims are asked of every model.",
)


def _retrieval(model: HeadModel, setting: StudySetting) -> Evidence:
    return fetching(model, setting)[1]


def _retrieval_needed(model: HeadModel, setting: StudySetting) -> Evidence:
    heads = retrieval_heads(model, setting)
    right = answers(model, setting, setting.seed + 1)
    return against_random_sets(
        model,
        needles(model, setting, setting.seed + 1),
        metrics.answer_probability,
        heads,
        scale=float(np.nanmean(right)),
        sign=-1.0,
        seed=setting.seed,
    )


RETRIEVAL = Study(
    "retrieval-heads",
    "Heads that fetch an answer from far back",
    "Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality, "
    "arXiv 2404.15574",
    (
        Claim(
            "copies",
            "A head attends most to the token of a hidden answer that is said next.",
            "retrieval score of the best head at the answer's first token, chosen on other needles",
            "the same head with another question, or another needle in its place",
            _retrieval,
            MATTERS,
            "share of answer tokens",
        ),
        Claim(
            "needed",
            "Without its retrieval heads the model loses more of hidden answers than without as "
            "many others.",
            "share of the answer's probability that is lost",
            "mean of random sets of other heads",
            _retrieval_needed,
            MATTERS,
            "share",
        ),
    ),
    "Teacher-forced; the paper decodes. Heads are replaced by their mean at every position; the "
    "paper masks them while it decodes.",
)


def _letters(model: HeadModel, setting: StudySetting, number: int) -> tuple[HeadScores, HeadScores]:
    """Attention from the end of questions to the right letter, and to all four."""
    asked = AskedModel(model, setting.seed + number)
    probe = choices(model, setting.seed + number)
    if number:
        right = float((metric_of(model, probe, metrics.logit_difference) > 0).mean())
        if right < RIGHT:
            raise UnsupportedModelError(
                f"it prefers the right letter to a wrong one in {right:.0%} of the questions only "
                "(half by guessing)."
            )
    return asked.attention(probe, "right"), asked.attention(probe, "letters")


def _right_letter(model: HeadModel, setting: StudySetting) -> Evidence:
    tried, letters = _letters(model, setting, 1)
    first, all_first = _letters(model, setting, 0)
    lead = np.nanmean(first.per_example - (all_first.per_example - first.per_example) / 3, -1)
    layer, number = np.unravel_index(int(np.nanargmax(lead)), lead.shape)
    head = HeadIndex(int(layer), int(number))
    right = tried.per_example[head.layer, head.head]
    wrong = (letters.per_example[head.layer, head.head] - right) / 3
    return paired(right, wrong, note=str(head), results={"right letter": tried})


CHOICES = Study(
    "multiple-choice",
    "Heads that look at the letter of the right answer",
    "Lieberum et al. 2023, Does Circuit Analysis Interpretability Scale? Evidence from Multiple "
    "Choice Capabilities in Chinchilla, arXiv 2307.09458",
    (
        Claim(
            "letter",
            "A head attends from the end to the letter of the right answer more than to others.",
            "attention from the end to the right letter, of the head chosen on other questions",
            "mean of its attention to the three wrong letters",
            _right_letter,
            MATTERS,
            "attention",
        ),
    ),
    "Questions with four lettered options in a drawn order, asked of models that prefer the right "
    "letter; the paper's model has 70 billion parameters.",
)

# Kinds whose heads ablation can confirm, on probes that every decoder reads.
_CONFIRMED = ("previous_token", "duplicate_token", "induction", "copying", "retrieval")


def _kinds_are_needed(model: HeadModel, setting: StudySetting) -> Evidence:
    role("induction", model, setting)
    kinds = _CONFIRMED[: setting.size(len(_CONFIRMED), 3)]
    found = survey(model, kinds, seed=setting.seed, progress=False)
    tried = [one for one in found.findings if one.confirmed is not None]
    if not tried:
        raise UnsupportedModelError("no head is of a kind that ablation can confirm.")
    return paired(
        np.array([float(bool(one.confirmed)) for one in tried]),
        np.full(len(tried), found.alpha),
        note=f"heads of the kinds {', '.join(sorted({one.kind for one in tried}))}",
        results={"kinds": found},
    )


CATALOGUE = Study(
    "catalogue",
    "Heads of known kinds do what their kind says",
    "Zheng et al. 2024, Attention Heads of Large Language Models: A Survey, arXiv 2409.03752",
    (
        Claim(
            "needed",
            "Heads named by what they do are needed for it.",
            "share of named heads whose ablation moves their kind's metric as it should, p below "
            "0.05 after correction",
            "the share that chance would confirm",
            _kinds_are_needed,
            0.2,
            "share of heads",
        ),
    ),
    "Five kinds of the survey; at most sixteen heads of each are ablated, one by one. A head may "
    "be of a kind and not be needed where others do the same. Asked of models with an induction "
    "head; headscope kinds asks for all kinds.",
)
ALL = (INDUCTION, COMPOSITION, SINKS, SURFACE, RETRIEVAL, CHOICES, CATALOGUE)
