"""Studies of long contexts: which heads attend far back, to what, and with what effect."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from headscope import metrics
from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, needle
from headscope.retrieval import (
    contradictions,
    decoded,
    faithfulness,
    influence,
    masking_curve,
    need,
)
from headscope.scorers import streaming_gap
from headscope.scoring.score import score
from headscope.studies.study import (
    LEVEL,
    MATTERS,
    Claim,
    Evidence,
    Study,
    StudySetting,
    answers,
    beyond_sets,
    control_mean,
    control_of,
    fetching,
    metric_of,
    nanmean,
    needles,
    over_heads,
    paired,
    prose,
    random_heads,
    rank_correlation,
    retrieval_heads,
    role,
    unpaired,
)
from headscope.table import HeadScores, HeadTable

_SETS = 3  # of random other heads, where each takes decoding or as many passes
_FEW = 0.1  # share of the heads: Wu et al. 2024 find fewer than 5 % on models with many more


def _published(model: HeadModel, setting: StudySetting) -> Evidence:
    answers(model, setting, setting.seed + 1)
    heads = retrieval_heads(model, setting)
    probe = needles(model, setting, setting.seed + 1)
    found = decoded(model, probe.examples(slice(0, setting.size(24, 6))), progress=False)
    scores = found.by_set
    head = heads[0]
    return paired(
        scores.per_example[head.layer, head.head],
        control_of(scores, head),
        note=f"{head}; {found.runs.accuracy:.0%} of the answers correct",
        results={"retrieval, decoding": scores},
    )


def _few(model: HeadModel, setting: StudySetting) -> Evidence:
    retrieval_heads(model, setting)
    probe = needles(model, setting, setting.seed + 1)
    scores = score(model, probe, ["retrieval_first_token"], progress=False)
    by_text = scores["retrieval_first_token"].per_example
    value, texts = _share_above(by_text), by_text.shape[-1]
    rng = np.random.default_rng(setting.seed)
    drawn = [_share_above(by_text[..., rng.integers(0, texts, texts)]) for _ in range(500)]
    high, low = np.quantile(drawn, [0.5 + LEVEL / 2, 0.5 - LEVEL / 2])
    note = "all heads; interval of texts drawn again"
    return Evidence(value, _FEW, _FEW - float(high), _FEW - float(low), texts, note)


def _share_above(by_text: Float[np.ndarray, "layer head text"]) -> float:
    """Share of heads whose mean over texts is above a tenth."""
    mean = nanmean(by_text, -1)
    return float((mean[~np.isnan(mean)] > MATTERS).mean())


def _masking(model: HeadModel, setting: StudySetting) -> Evidence:
    answers(model, setting, setting.seed + 1)
    heads = retrieval_heads(model, setting)
    random_heads(model, heads, 1, 0)
    probe = needles(model, setting, setting.seed + 1)
    curve = masking_curve(
        model,
        probe,
        heads,
        counts=[0, len(heads)],
        scope="all",
        right="share",
        random=3,
        seed=setting.seed,
        progress=False,
    )
    arms, right = curve.effects.labels[0], curve.effects.per_example[:, -1]
    controls = [arms.index(one) for one in curve.controls]
    chosen = next(index for index in range(len(arms)) if index not in controls)
    return beyond_sets(
        right[chosen],
        right[controls],
        note=f"{', '.join(map(str, heads))} masked",
        results={"masking": curve},
        less=True,
    )


MASKING = Study(
    "retrieval-masking",
    "Published retrieval scores, and masking the heads",
    "Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality, "
    "arXiv 2404.15574, sections 2 to 4",
    (
        Claim(
            "published",
            "While decoding, a head's most attended token is the token that the model generates.",
            "retrieval score as published, of the head chosen teacher-forced on other needles",
            "the same head with another question, or another needle in its place",
            _published,
            MATTERS,
            "share of answer tokens",
        ),
        Claim(
            "few",
            "Fewer than a tenth of the heads retrieve.",
            "share of heads with a retrieval score above 0.1",
            "one tenth",
            _few,
            0.0,
            "share of heads",
        ),
        Claim(
            "masking",
            "Masking retrieval heads costs more correct answers than masking as many random heads.",
            "change in the share of correct answer tokens",
            "mean over random sets of other heads",
            _masking,
            MATTERS,
            "share of answer tokens",
        ),
    ),
    "Masked heads attend uniformly, as in the paper, but here at all positions, since a short "
    "answer leaves no decoding steps in between.",
)


def _hops(model: HeadModel, setting: StudySetting, seed: int) -> Probe:
    length = min(128, model.shape.n_ctx or 128)
    depths, per_cell = setting.size(5, 3), setting.size(4, 8)
    return setting.share(
        ("hops", seed),
        lambda: needle(model, length, depths, "hops", per_cell=per_cell, distractors=1, seed=seed),
    )


def _harder(model: HeadModel, setting: StudySetting) -> Evidence:
    single = answers(model, setting, setting.seed + 1)
    chain = metric_of(model, _hops(model, setting, setting.seed + 1), metrics.answer_probability)
    return unpaired(chain, single, note="a chain of two facts against a single needle", less=True)


def _threaded(model: HeadModel, setting: StudySetting) -> Evidence:
    answers(model, setting, setting.seed + 1)
    head = retrieval_heads(model, setting)[0]
    probe = _hops(model, setting, setting.seed + 1)
    scores = score(model, probe, ["needle_mass"], progress=False)["needle_mass"]
    return paired(
        scores.per_example[head.layer, head.head],
        control_of(scores, head),
        note=str(head),
        results={"needle_mass": scores},
    )


THREADS = Study(
    "needle-threading",
    "Following chains of facts in long texts",
    "Roberts et al. 2024, Needle Threading, arXiv 2411.05000",
    (
        Claim(
            "harder",
            "The model follows a chain of two facts less often than it finds a single fact.",
            "probability of the answer at the end of a chain of two",
            "probability of the answer to a single needle in texts of the same length",
            _harder,
            0.05,
            "probability",
        ),
        Claim(
            "same-head",
            "The head that retrieves single facts also attends to the facts of a chain.",
            "attention of that head to the needles of a chain",
            "the same head with another question, or other needles in their place",
            _threaded,
            MATTERS,
            "attention",
        ),
    ),
    "The paper tests large models on chains of up to 25 steps in texts of up to 630,000 tokens; "
    "here a chain has two steps.",
)


def _needs(model: HeadModel, setting: StudySetting) -> HeadTable:
    answers(model, setting, setting.seed + 1)
    probe = needles(model, setting, setting.seed + 1)
    recent = min(32, probe.length // 3)
    return setting.share(
        ("need",), lambda: need(model, probe, sink=4, recent=recent, progress=False)
    )


def _mostly_local(model: HeadModel, setting: StudySetting) -> Evidence:
    exact = _needs(model, setting)["long_need"]
    values = exact.per_example
    return over_heads(
        values, np.full(values.shape[-1], 0.5), results={"long_need": exact}, less=True
    )


def _foretold(model: HeadModel, setting: StudySetting) -> Evidence:
    table = _needs(model, setting)
    guess = table["long_need_predicted"]
    return rank_correlation(
        table["long_need"].mean.ravel(),
        guess.mean.ravel(),
        by_text=guess.per_example,
        note="all heads",
        results={"long_need_predicted": guess},
    )


LOCAL_KEYS = Study(
    "local-keys",
    "Predicting which heads need distant keys",
    "Donhauser et al. 2025, Unveiling Simplicities of Attention: Adaptive Long-Context Head "
    "Identification, arXiv 2502.09647",
    (
        Claim(
            "local",
            "For most queries of most heads, the first and the most recent tokens are enough.",
            "share of queries that need distant keys, mean over heads",
            "one half",
            _mostly_local,
            0.0,
            "share of queries",
        ),
        Claim(
            "foretold",
            "The mean and variance of the scores of distant keys predict which heads need them.",
            "rank correlation over heads between the predicted and the exact need",
            "none",
            _foretold,
            0.5,
            "rank correlation",
        ),
    ),
    "A query needs distant keys if the first 4 and the last 32 tokens receive less than 60% of its "
    "attention. For models that find the needle.",
)


def _streaming(model: HeadModel, setting: StudySetting) -> HeadScores:
    answers(model, setting, setting.seed + 1)
    probe = needles(model, setting, setting.seed + 1)
    recent = min(32, probe.length // 3)
    scorer = streaming_gap(4, recent, name="streaming_gap")
    return setting.share(
        ("gap",), lambda: score(model, probe, [scorer], progress=False)["streaming_gap"]
    )


def _mostly_streaming(model: HeadModel, setting: StudySetting) -> Evidence:
    gaps = _streaming(model, setting)
    values = gaps.per_example
    flags = np.where(np.isnan(values), np.nan, values > MATTERS)
    return over_heads(
        flags, np.full(flags.shape[-1], 0.5), results={"streaming_gap": gaps}, less=True
    )


def _retrieval_is_far(model: HeadModel, setting: StudySetting) -> Evidence:
    gaps = _streaming(model, setting)
    head = retrieval_heads(model, setting)[0]
    return paired(gaps.per_example[head.layer, head.head], control_mean(gaps, head), note=str(head))


DUO = Study(
    "streaming-heads",
    "Heads that need only a short cache",
    "Xiao et al. 2024, DuoAttention, arXiv 2410.10819",
    (
        Claim(
            "most",
            "More than half of the heads produce nearly the same output from only the first and "
            "the most recent tokens.",
            "share of heads whose output changes by more than a tenth",
            "one half",
            _mostly_streaming,
            0.0,
            "share of heads",
        ),
        Claim(
            "retrieval",
            "The retrieval head loses more of its output than other heads do.",
            "share of the retrieval head's output that is lost",
            "mean of all other heads",
            _retrieval_is_far,
            MATTERS,
            "share of the write",
        ),
    ),
    "The paper learns which heads need their full cache; here each head's output is computed with "
    "and without distant tokens. The cache holds the first 4 and the last 32 tokens.",
)


def _query_focused(model: HeadModel, setting: StudySetting) -> Evidence:
    return fetching(model, setting, "query_focused_retrieval")[1]


QUERY_FOCUSED = Study(
    "query-focused-heads",
    "Heads that locate the answer while reading the question",
    "Zhang et al. 2025, Query-Focused Retrieval Heads Improve Long-Context Reasoning and "
    "Re-ranking, arXiv 2506.09944",
    (
        Claim(
            "looks",
            "A head attends from the question to the sentence that answers it.",
            "attention from the question to the needle, for the head chosen on other needles",
            "the same head with another question, or another needle in its place",
            _query_focused,
            0.02,
            "attention",
        ),
    ),
    "Attention from all tokens of the question to the whole needle, so even a head that does "
    "little else has a small score.",
)


def _slowness(model: HeadModel, setting: StudySetting) -> HeadScores:
    probe = needles(model, setting, setting.seed + 1)
    return setting.share(
        ("slowness",),
        lambda: score(model, probe, ["rotary_slowness"], progress=False)["rotary_slowness"],
    )


def _slow_planes(model: HeadModel, setting: StudySetting) -> Evidence:
    scores = _slowness(model, setting)
    values = scores.per_example
    return over_heads(values, np.zeros(values.shape[-1]), results={"rotary_slowness": scores})


def _positional_is_fast(model: HeadModel, setting: StudySetting) -> Evidence:
    scores = _slowness(model, setting)
    head = role("previous_token", model, setting)
    return paired(
        scores.per_example[head.layer, head.head],
        control_mean(scores, head),
        note=str(head),
        less=True,
    )


ROTARY = Study(
    "rotary-dimensions",
    "Fast rotary planes for position, slow planes for content",
    "Hong et al. 2024, On the token distance modeling ability of higher RoPE attention dimension, "
    "arXiv 2410.08703; Barbero et al. 2024, Round and Round We Go!, arXiv 2410.06205",
    (
        Claim(
            "slow",
            "Attention to distant tokens relies on the slowly rotating planes.",
            "correlation between a plane's slowness and its contribution to distant scores, mean "
            "over heads",
            "none",
            _slow_planes,
            MATTERS,
            "correlation",
        ),
        Claim(
            "previous",
            "The previous-token head relies on faster planes than other heads.",
            "the same correlation for the previous-token head",
            "mean of all other heads",
            _positional_is_fast,
            MATTERS,
            "correlation",
        ),
    ),
    "Absolute contributions of planes to the scores of the more distant half of the text.",
)


def _documents(model: HeadModel, setting: StudySetting, *, twice: bool) -> list[str]:
    """Repeated passages, or passages followed by the same amount of other text."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UnsupportedModelError("it has no tokenizer, and this study reads documents.")
    room = (model.shape.n_ctx or 200) - 4
    probe = prose(model, setting, seed=setting.seed + 1, length=min(48, room // 2))
    said = [
        str(tokenizer.decode(row[real].tolist(), skip_special_tokens=True))
        for row, real in zip(probe.tokens, probe.real, strict=True)
    ]
    after = said if twice else [*said[1:], said[0]]
    return [f"{first} {second}" for first, second in zip(said, after, strict=True)]


def _rise(
    model: HeadModel, documents: Sequence[str], sets: Sequence[Sequence[HeadIndex]]
) -> np.ndarray:
    found = [influence(model, documents, heads, progress=False).score for heads in sets]
    return np.stack(found)


def _influential(model: HeadModel, setting: StudySetting) -> Evidence:
    heads = retrieval_heads(model, setting)
    sets = [heads, *random_heads(model, heads, 3, setting.seed)]
    found = _rise(model, _documents(model, setting, twice=True), sets)
    return beyond_sets(found[0], found[1:], note=f"{', '.join(map(str, heads))}")


def _ranks(model: HeadModel, setting: StudySetting) -> Evidence:
    heads = retrieval_heads(model, setting)
    twice, once = (_documents(model, setting, twice=one) for one in (True, False))
    return paired(
        _rise(model, twice, [heads])[0],
        _rise(model, once, [heads])[0],
        note="repeated passages against two different passages",
    )


INFLUENCE = Study(
    "attention-influence",
    "Scoring documents by their need for retrieval heads",
    "Hua et al. 2025, AttentionInfluence, arXiv 2505.07293",
    (
        Claim(
            "heads",
            "Masking retrieval heads hurts the prediction of repetitive documents more than "
            "masking as many other heads.",
            "relative rise in a document's loss",
            "mean over random sets of other heads",
            _influential,
            0.05,
            "share of the loss",
        ),
        Claim(
            "ranks",
            "The rise separates documents that require looking back from others.",
            "relative rise in loss on repeated passages",
            "the same for two different passages of the same length",
            _ranks,
            0.05,
            "share of the loss",
        ),
    ),
    "The paper ranks a pretraining corpus; here it is known which documents require looking back.",
)


def _contrasted(model: HeadModel, setting: StudySetting) -> Evidence:
    heads = retrieval_heads(model, setting)
    sets = [heads, *random_heads(model, heads, _SETS, setting.seed)]
    probe = setting.share(
        ("contradictions",),
        lambda: contradictions(
            model, examples=setting.size(24, 8), length=96, seed=setting.seed + 1
        ),
    )
    margins = [faithfulness(model, probe, one, alphas=["entropy"]).margin[-1] for one in sets]
    return beyond_sets(
        margins[0], np.stack(margins[1:]), note=f"{', '.join(map(str, heads))} contrasted"
    )


def _masked_margin(model: HeadModel, setting: StudySetting) -> Evidence:
    heads = retrieval_heads(model, setting)
    examples = setting.size(24, 8)
    probe = setting.share(
        ("contradictions",),
        lambda: contradictions(model, examples=examples, length=96, seed=setting.seed + 1),
    )
    sets = [heads, *random_heads(model, heads, _SETS, setting.seed)]
    found = [faithfulness(model, probe, one, alphas=[]).margin for one in sets]
    changes = np.stack([one[1] - one[0] for one in found])
    return beyond_sets(
        changes[0], changes[1:], note=f"{', '.join(map(str, heads))} masked", less=True
    )


DECORE = Study(
    "decore",
    "Contrastive decoding with masked retrieval heads",
    "Gema et al. 2024, DeCoRe: Decoding by Contrasting Retrieval Heads, arXiv 2410.18860",
    (
        Claim(
            "masked",
            "Masking retrieval heads makes the model less faithful to a passage that contradicts "
            "its knowledge than masking as many other heads.",
            "change in the log-odds of the passage's answer against the model's own",
            "the same with as many random other heads masked",
            _masked_margin,
            0.5,
            "nats",
        ),
        Claim(
            "contrast",
            "Contrasting with masked retrieval heads makes the model more faithful to the passage "
            "than contrasting with as many other heads masked.",
            "log-odds of the passage's answer against the model's own, with DeCoRe",
            "DeCoRe with random other heads",
            _contrasted,
            0.5,
            "nats",
        ),
    ),
    "Alpha is the entropy of the model's next-token distribution, as in the paper, capped at 1. "
    "Contrasting with any heads masked raises odds that are already large, so other heads serve as "
    "the control.",
)
ALL = (
    MASKING, THREADS, LOCAL_KEYS, DUO, QUERY_FOCUSED, ROTARY, INFLUENCE, DECORE,
)  # fmt: skip
