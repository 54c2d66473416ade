"""Studies of long contexts: which heads attend far back, to what, and with what effect."""

from collections.abc import Sequence

import numpy as np

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
    MATTERS,
    Claim,
    Evidence,
    Study,
    StudySetting,
    answers,
    control_mean,
    control_of,
    fetching,
    metric_of,
    needles,
    paired,
    prose,
    random_heads,
    rank_correlation,
    retrieval_heads,
    role,
)
from headscope.table import HeadScores, HeadTable

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
        note=f"{head}; {found.runs.accuracy:.0%} of the answers right",
        results={"retrieval, decoding": scores},
    )


def _few(model: HeadModel, setting: StudySetting) -> Evidence:
    retrieval_heads(model, setting)
    probe = needles(model, setting, setting.seed + 1)
    scores = score(model, probe, ["retrieval_first_token"], progress=False)
    values = scores["retrieval_first_token"].mean.ravel()
    flags = np.where(np.isnan(values), np.nan, values > MATTERS)
    return paired(flags, np.full(flags.shape, _FEW), note="all heads", less=True)


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
    return paired(
        right[chosen],
        right[controls].mean(0),
        note=f"{', '.join(map(str, heads))} masked",
        results={"masking": curve},
        less=True,
    )


MASKING = Study(
    "retrieval-masking",
    "What a model says without its retrieval heads",
    "Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality, "
    "arXiv 2404.15574, sections 2 to 4",
    (
        Claim(
            "published",
            "While the model writes, a head attends most to the token that it says next.",
            "retrieval score as published, of the head chosen teacher-forced on other needles",
            "the same head with another question, or another needle in its place",
            _published,
            MATTERS,
            "share of answer tokens",
        ),
        Claim(
            "few",
            "Few heads retrieve: less than a tenth of them.",
            "share of the heads with a retrieval score above 0.1",
            "one tenth",
            _few,
            0.0,
            "share of heads",
        ),
        Claim(
            "masking",
            "Masked retrieval heads cost more right answers than as many masked random heads.",
            "change of the share of answer tokens that are right",
            "mean of random sets of other heads",
            _masking,
            MATTERS,
            "share of answer tokens",
        ),
    ),
    "Heads attend to everything alike where they are masked, as in the paper; here at all "
    "positions, since a short answer leaves no steps between.",
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
    return paired(chain, single, note="a chain of two against a single needle", less=True)


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
    "Chains of facts in long texts",
    "Roberts et al. 2024, Needle Threading, arXiv 2411.05000",
    (
        Claim(
            "harder",
            "A chain of two facts is followed less often than a single one is found.",
            "probability of the answer at the end of a chain of two",
            "probability of the answer of single needles in texts as long",
            _harder,
            0.05,
            "probability",
        ),
        Claim(
            "same-head",
            "The head that fetches single facts attends to the facts of a chain, too.",
            "attention of that head on the needles of a chain",
            "the same head with another question, or other needles in their place",
            _threaded,
            MATTERS,
            "attention",
        ),
    ),
    "The paper asks large models for chains of up to 25 steps in texts of up to 630,000 tokens; "
    "here a chain has two.",
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
    values = exact.mean.ravel()
    return paired(
        values,
        np.full(values.shape, 0.5),
        note="all heads",
        results={"long_need": exact},
        less=True,
    )


def _foretold(model: HeadModel, setting: StudySetting) -> Evidence:
    table = _needs(model, setting)
    guess = table["long_need_predicted"]
    return rank_correlation(
        table["long_need"].mean.ravel(),
        guess.mean.ravel(),
        note="all heads",
        results={"long_need_predicted": guess},
    )


LOCAL_KEYS = Study(
    "local-keys",
    "Heads that need no far keys, told from few numbers",
    "Donhauser et al. 2025, Unveiling Simplicities of Attention: Adaptive Long-Context Head "
    "Identification, arXiv 2502.09647",
    (
        Claim(
            "local",
            "Most queries of most heads are served by the first and the last tokens.",
            "share of queries that need more, mean over heads",
            "one half",
            _mostly_local,
            0.0,
            "share of queries",
        ),
        Claim(
            "foretold",
            "Mean and variance of the far scores tell which heads need far keys.",
            "rank correlation over heads of the need that is foretold with the exact one",
            "none",
            _foretold,
            0.5,
            "rank correlation",
        ),
    ),
    "A query needs far keys where the first 4 and the last 32 tokens have "
    "less than six tenths of its attention. Asked of models that find the needle.",
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
    values = gaps.mean.ravel()
    flags = np.where(np.isnan(values), np.nan, values > MATTERS)
    return paired(
        flags,
        np.full(flags.shape, 0.5),
        note="all heads",
        results={"streaming_gap": gaps},
        less=True,
    )


def _retrieval_is_far(model: HeadModel, setting: StudySetting) -> Evidence:
    gaps = _streaming(model, setting)
    head = retrieval_heads(model, setting)[0]
    return paired(gaps.per_example[head.layer, head.head], control_mean(gaps, head), note=str(head))


DUO = Study(
    "streaming-heads",
    "Heads that can do with a short cache",
    "Xiao et al. 2024, DuoAttention, arXiv 2410.10819",
    (
        Claim(
            "most",
            "More than half of the heads write the same with the first and the last tokens only.",
            "share of heads that lose a tenth or more of their write",
            "one half",
            _mostly_streaming,
            0.0,
            "share of heads",
        ),
        Claim(
            "retrieval",
            "The head that retrieves loses more of its write than others do.",
            "share of its write that the retrieval head loses",
            "mean of all other heads",
            _retrieval_is_far,
            MATTERS,
            "share of the write",
        ),
    ),
    "The paper learns which heads need their whole cache; here each head's own write with and "
    "without far tokens says so. First 4 and last 32 tokens.",
)


def _query_focused(model: HeadModel, setting: StudySetting) -> Evidence:
    return fetching(model, setting, "query_focused_retrieval")[1]


QUERY_FOCUSED = Study(
    "query-focused-heads",
    "Heads that find what a question asks for while they read it",
    "Zhang et al. 2025, Query-Focused Retrieval Heads Improve Long-Context Reasoning and "
    "Re-ranking, arXiv 2506.09944",
    (
        Claim(
            "looks",
            "A head attends from the question to the sentence that answers it.",
            "attention of the best head from the question to the needle, chosen on other needles",
            "the same head with another question, or another needle in its place",
            _query_focused,
            0.02,
            "attention",
        ),
    ),
    "Attention of all tokens of the question on all of the needle, so that even a head that does "
    "little else has a small share.",
)


def _slowness(model: HeadModel, setting: StudySetting) -> HeadScores:
    probe = needles(model, setting, setting.seed + 1)
    return setting.share(
        ("slowness",),
        lambda: score(model, probe, ["rotary_slowness"], progress=False)["rotary_slowness"],
    )


def _slow_planes(model: HeadModel, setting: StudySetting) -> Evidence:
    scores = _slowness(model, setting)
    values = scores.mean.ravel()
    return paired(
        values, np.zeros_like(values), note="all heads", results={"rotary_slowness": scores}
    )


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
    "Fast planes for places, slow planes for content",
    "Hong et al. 2024, On the token distance modeling ability of higher RoPE attention dimension, "
    "arXiv 2410.08703; Barbero et al. 2024, Round and Round We Go!, arXiv 2410.06205",
    (
        Claim(
            "slow",
            "Attention to far tokens rests on the slowly turning planes.",
            "correlation of a plane's slowness with what it adds to far scores, mean over heads",
            "none",
            _slow_planes,
            MATTERS,
            "correlation",
        ),
        Claim(
            "previous",
            "The head that looks at the token before rests on faster planes than others.",
            "the same correlation of the previous-token head",
            "mean of all other heads",
            _positional_is_fast,
            MATTERS,
            "correlation",
        ),
    ),
    "Contributions of planes to the scores with the farther half of the text, in absolute value.",
)


def _documents(model: HeadModel, setting: StudySetting, *, twice: bool) -> list[str]:
    """Repeated passages, or passages followed by the same amount of other text."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UnsupportedModelError("it has no tokenizer, and documents are texts.")
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
    return paired(found[0], found[1:].mean(0), note=f"{', '.join(map(str, heads))}")


def _ranks(model: HeadModel, setting: StudySetting) -> Evidence:
    heads = retrieval_heads(model, setting)
    twice, once = (_documents(model, setting, twice=one) for one in (True, False))
    return paired(
        _rise(model, twice, [heads])[0],
        _rise(model, once, [heads])[0],
        note="passages said twice against two passages",
    )


INFLUENCE = Study(
    "attention-influence",
    "Documents that need retrieval heads",
    "Hua et al. 2025, AttentionInfluence, arXiv 2505.07293",
    (
        Claim(
            "heads",
            "Without retrieval heads documents that repeat themselves are predicted worse than "
            "without as many others.",
            "rise of a document's loss, relative to the loss",
            "mean of random sets of other heads",
            _influential,
            0.05,
            "share of the loss",
        ),
        Claim(
            "ranks",
            "The rise tells documents that must be looked back into from others.",
            "rise of the loss of passages said twice, relative to the loss",
            "rise of two different passages as long",
            _ranks,
            0.05,
            "share of the loss",
        ),
    ),
    "The paper ranks a pretraining corpus; here documents are known to need looking back or not.",
)


def _contrasted(model: HeadModel, setting: StudySetting) -> Evidence:
    heads = retrieval_heads(model, setting)
    other = random_heads(model, heads, 1, setting.seed)[0]
    probe = setting.share(
        ("contradictions",),
        lambda: contradictions(
            model, examples=setting.size(24, 8), length=96, seed=setting.seed + 1
        ),
    )
    margins = [
        faithfulness(model, probe, one, alphas=["entropy"]).margin[-1] for one in (heads, other)
    ]
    return paired(margins[0], margins[1], note=f"{', '.join(map(str, heads))} contrasted")


def _masked_margin(model: HeadModel, setting: StudySetting) -> Evidence:
    heads = retrieval_heads(model, setting)
    examples = setting.size(24, 8)
    probe = setting.share(
        ("contradictions",),
        lambda: contradictions(model, examples=examples, length=96, seed=setting.seed + 1),
    )
    sets = [heads, *random_heads(model, heads, 1, setting.seed)]
    found = [faithfulness(model, probe, one, alphas=[]).margin for one in sets]
    return paired(
        found[0][1] - found[0][0],
        found[1][1] - found[1][0],
        note=f"{', '.join(map(str, heads))} masked",
        less=True,
    )


DECORE = Study(
    "decore",
    "Contrasting retrieval heads, to keep to the text",
    "Gema et al. 2024, DeCoRe: Decoding by Contrasting Retrieval Heads, arXiv 2410.18860",
    (
        Claim(
            "masked",
            "Without its retrieval heads the model keeps less to a passage that contradicts it "
            "than without as many others.",
            "change of the log-odds of the passage's answer against the model's own",
            "the same with random other heads masked",
            _masked_margin,
            0.5,
            "nats",
        ),
        Claim(
            "contrast",
            "Contrasting the model with itself without retrieval heads keeps it to the passage "
            "more than contrasting as many others.",
            "log-odds of the passage's answer against the model's own, DeCoRe",
            "DeCoRe with random other heads",
            _contrasted,
            0.5,
            "nats",
        ),
    ),
    "Alpha is the entropy of the model's next token, as in the paper, at most 1. Contrasting any "
    "heads raises odds that are large already, so other heads are the control.",
)
ALL = (
    MASKING, THREADS, LOCAL_KEYS, DUO, QUERY_FOCUSED, ROTARY, INFLUENCE, DECORE,
)  # fmt: skip
