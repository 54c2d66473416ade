"""Studies of tokens: information flow, relevance, and the geometry of states."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr

from headscope.capture import collect
from headscope.errors import UnsupportedModelError
from headscope.flow import alti, rollout, route_scores
from headscope.geometry import layers, position_heads, position_layers
from headscope.lens import attention_lens
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, from_tokens
from headscope.pruning import confidence, gradient_importance, learn_alphas
from headscope.relevance import atman, memorized
from headscope.scoring.score import score
from headscope.studies.study import (
    MATTERS,
    Claim,
    Evidence,
    Study,
    StudySetting,
    control_mean,
    nanmean,
    over_heads,
    paired,
    prose,
    rank_correlation,
    repeated,
    role,
    skilled,
    unpaired,
)
from headscope.table import HeadTable
from headscope.table.lens import LayerTable
from headscope.table.relevance import Memorized, TokenRelevance


def _lens(model: HeadModel, setting: StudySetting) -> Evidence:
    skilled(model, setting)
    fitted_on = prose(model, StudySetting(seed=setting.seed), seed=setting.seed, length=32)
    layer = model.shape.attention_layers[len(model.shape.attention_layers) // 2]
    lens = attention_lens(
        model,
        fitted_on,
        [layer],
        rank=4,
        steps=setting.size(25, 15),
        learning_rate=5e-3,
        held_out=0.5,
        seed=setting.seed,
        progress=False,
    )
    if lens.report is None:
        raise UnsupportedModelError("its lens was not tested on other texts.")
    return paired(
        lens.report.learned[0],
        lens.report.plain[0],
        note=f"layer {layer}, held-out texts",
        less=True,
    )


ATTENTION_LENS = Study(
    "attention-lens",
    "Decoding a layer's heads into next-token predictions",
    "Sakarvadia et al. 2023, Attention Lens: A Tool for Mechanistically Interpreting the Attention "
    "Head Information Retrieval Mechanism, arXiv 2310.16270",
    (
        Claim(
            "learned",
            "A learned map decodes the prediction from a layer's heads better than the unembedding "
            "does.",
            "KL divergence between the model and the lens, on other texts",
            "the same for the plain direct path",
            _lens,
            MATTERS,
            "nats",
        ),
    ),
    "In the middle layer; the learned map of each head has rank 4.",
)


def _routes(model: HeadModel, setting: StudySetting, number: int) -> HeadTable:
    probe, _ = skilled(model, setting, number)
    few = probe.examples(slice(0, setting.size(12, 6)))
    return setting.share(("routes", number), lambda: route_scores(model, few, edge_threshold=0.02))


def _always(model: HeadModel, setting: StudySetting) -> Evidence:
    head = _routes(model, setting, 0)["on_route"].top(1)[0][0]
    scores = _routes(model, setting, 1)["on_route"]
    return paired(
        scores.per_example[head.layer, head.head],
        control_mean(scores, head),
        note=str(head),
        results={"on_route": scores},
    )


def _flow_is_need(model: HeadModel, setting: StudySetting) -> Evidence:
    probe, _ = skilled(model, setting, 0)
    flow = _routes(model, setting, 1)["flow"]
    importance = setting.share(
        ("importance",),
        lambda: gradient_importance(model, probe, normalise=False, progress=False),
    )
    return rank_correlation(
        importance.mean.ravel(),
        flow.mean.ravel(),
        by_text=flow.per_example,
        note="all heads",
        results={"flow": flow},
    )


ROUTES = Study(
    "flow-routes",
    "Information flow routes to a prediction",
    "Ferrando and Voita 2024, Information Flow Routes: Automatically Interpreting Language Models "
    "at Scale, arXiv 2403.00824",
    (
        Claim(
            "always",
            "Some heads are on the route to most predictions.",
            "share of texts in which the head is on the route, for the head chosen on other texts",
            "mean of all other heads",
            _always,
            0.3,
            "share of texts",
        ),
        Claim(
            "needed",
            "Heads that carry more of the flow matter more to the loss.",
            "rank correlation over heads between flow and gradient importance on other texts",
            "none",
            _flow_is_need,
            0.2,
            "rank correlation",
        ),
    ),
    "Routes to the last token of each text; an edge counts from 2% of the flow.",
)


def _explained(model: HeadModel, setting: StudySetting) -> dict[str, Float[np.ndarray, " text"]]:
    return setting.share(("explained",), lambda: _explain(model, setting))


def _explain(model: HeadModel, setting: StudySetting) -> dict[str, Float[np.ndarray, " text"]]:
    """Rank correlation of token relevance with the effect of masking each token, by text."""
    probe, _ = skilled(model, setting)
    count, length = setting.size(16, 8), 24
    short = from_tokens(probe.tokens[:count, :length])
    last = model.shape.attention_layers[-1]
    maps = {
        "rollout": rollout(model, short).matrix[:, -1],
        "alti": alti(model, short).matrix[:, -1],
        "attention": collect(model, short, [last])[last].pattern.mean(1)[:, -1].numpy(),
    }
    found: dict[str, list[float]] = {name: [] for name in maps}
    for row in range(len(short)):
        hidden = atman(model, short.tokens[row], mode="erase", progress=False)
        relevance = np.abs(hidden.relevance)[:length]
        for name, rows in maps.items():
            given = rows[row][: len(relevance)]
            found[name].append(float(spearmanr(relevance[1:-1], given[1:-1]).statistic))
    return {name: np.array(values) for name, values in found.items()}


def _against(first: str, second: str, model: HeadModel, setting: StudySetting) -> Evidence:
    found = _explained(model, setting)
    return paired(found[first], found[second], note="24 tokens per text; first and last left out")


def _weighted_sink(model: HeadModel, setting: StudySetting) -> Evidence:
    probe, _ = skilled(model, setting)
    names = ["first_token_value_weighted", "first_token"]
    table = score(model, probe, names, progress=False)
    weighted, plain = (
        np.nanmean(table[name].per_example.reshape(-1, len(probe)), axis=0) for name in names
    )
    return paired(
        weighted,
        plain,
        note="mean over all heads",
        results={names[0]: table[names[0]]},
        less=True,
    )


ATTENTION_FLOW = Study(
    "attention-flow",
    "Attributions that beat raw attention",
    "Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers, arXiv 2005.00928; "
    "Kobayashi et al. 2020, Attention is Not Only a Weight, arXiv 2004.10102; Ferrando et al. "
    "2022, Measuring the Mixing of Contextual Information in the Transformer, arXiv 2203.04212",
    (
        Claim(
            "rollout",
            "Rollout agrees with the effect of hiding tokens better than raw attention does.",
            "rank correlation over tokens between rollout and the effect of hiding each token",
            "the same for the last layer's attention, averaged over heads",
            partial(_against, "rollout", "attention"),
            0.0,
            "rank correlation",
        ),
        Claim(
            "alti",
            "ALTI, which uses the vectors themselves, agrees with it better than rollout does.",
            "rank correlation over tokens between ALTI and the effect of hiding each token",
            "the same for rollout",
            partial(_against, "alti", "rollout"),
            0.0,
            "rank correlation",
        ),
        Claim(
            "norms",
            "Attention to the first token is far smaller when weighted by the norm of the value.",
            "value-weighted attention to the first token, mean over heads",
            "plain attention to the first token",
            _weighted_sink,
            0.05,
            "attention",
        ),
    ),
    "The effect of hiding a token is the absolute change in the loss on the most likely next token "
    "when that token is hidden from all queries.",
)


def _suppressed(model: HeadModel, setting: StudySetting) -> Evidence:
    probe = repeated(model, setting, setting.seed + 1)
    role("induction", model, setting)
    half = probe.structure.shape[1] // 2
    start = probe.length - 2 * half
    values, others = [], []
    last: TokenRelevance | None = None
    for row in range(min(len(probe), 8)):
        at = start + half + half // 2  # in the middle of the second copy
        tokens = probe.tokens[row, : at + 1].tolist()
        last = atman(model, tokens, [int(probe.tokens[row, at + 1])], progress=False)
        relevance = last.relevance[: at + 1]
        source = at + 1 - half
        values.append(relevance[source])
        others.append(np.delete(relevance, [source, at]).mean())
    return paired(
        np.array(values),
        np.array(others),
        note="repeated random tokens",
        results={} if last is None else {"atman": last},
    )


ATMAN = Study(
    "atman",
    "Token relevance from suppressed attention",
    "Deb et al. 2023, AtMan: Understanding Transformer Predictions Through Memory Efficient "
    "Attention Manipulation, arXiv 2301.08110",
    (
        Claim(
            "source",
            "Suppressing attention to the copied token raises the loss more than suppressing other "
            "tokens.",
            "rise in loss with the copied token suppressed",
            "mean over all other tokens except the last",
            _suppressed,
            MATTERS,
            "nats",
        ),
    ),
    "Repeated random tokens, where the source of each copied token is known; for models with an "
    "induction head.",
)

_FAMOUS = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the "
    "political bands which have connected them with another, and to assume among the powers of the "
    "earth, the separate and equal station",
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, "
    "conceived in Liberty, and dedicated to the proposition that all men are created equal.",
    "We the People of the United States, in Order to form a more perfect Union, establish Justice, "
    "insure domestic Tranquility, provide for the common defence, promote the general Welfare, and "
    "secure the Blessings of Liberty to ourselves and our Posterity",
    "Our Father, who art in heaven, hallowed be thy name; thy kingdom come; thy will be done on "
    "earth as it is in heaven. Give us this day our daily bread; and forgive us our trespasses",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age "
    "of foolishness, it was the epoch of belief, it was the epoch of incredulity",
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer the "
    "slings and arrows of outrageous fortune, or to take arms against a sea of troubles",
    "All human beings are born free and equal in dignity and rights. They are endowed with reason "
    "and conscience and should act towards one another in a spirit of brotherhood.",
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep. And the Spirit of God moved upon the face "
    "of the waters.",
    "Congress shall make no law respecting an establishment of religion, or prohibiting the free "
    "exercise thereof; or abridging the freedom of speech, or of the press; or the right of the "
    "people peaceably to assemble",
)
_PREFIX, _REST = 16, 12


def _by_heart(model: HeadModel, texts: Sequence[str], setting: StudySetting) -> Memorized:
    return memorized(
        model, texts, prefix=_PREFIX, length=_REST, stride=_REST, seed=setting.seed, progress=False
    )


def _famous(model: HeadModel, setting: StudySetting) -> Memorized:
    skilled(model, setting)
    texts = _FAMOUS[: setting.size(len(_FAMOUS), 4)]
    return setting.share(("famous",), lambda: _by_heart(model, texts, setting))


def _known(model: HeadModel, setting: StudySetting) -> Evidence:
    famous = _famous(model, setting)
    probe, _ = skilled(model, setting)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UnsupportedModelError("it has no tokenizer, and memorisation is measured on texts.")
    fresh = [
        str(tokenizer.decode(row[real].tolist(), skip_special_tokens=True))
        for row, real in zip(probe.tokens, probe.real, strict=True)
    ]
    other = _by_heart(model, fresh, setting)
    first, second = (
        np.array([span.right for span in one.spans], float) / _REST for one in (famous, other)
    )
    return unpaired(first, second, note=f"{int(famous.known.sum())} of {len(first)} spans complete")


def _rare(model: HeadModel, setting: StudySetting) -> Evidence:
    famous = _famous(model, setting)
    known = int(famous.known.sum())
    if known < 4:
        raise UnsupportedModelError(f"it has memorised only {known} spans of famous texts, not 4.")
    scores = famous.heads["rare_attention"]
    values, shuffled = scores.per_example, scores.control_per_example
    if shuffled is None:
        raise UnsupportedModelError("its attention score has no control.")
    mean = np.nanmean(values[..., ::2], -1)
    head = np.unravel_index(int(np.nanargmin(mean)), mean.shape)
    return paired(
        values[head][1::2],
        shuffled[head][1::2],
        note=f"L{head[0]}H{head[1]}",
        results={"rare_attention": scores},
        less=True,
    )


MEMORISATION = Study(
    "memorisation",
    "Memorised text and heads that attend to rare tokens",
    "Stoehr et al. 2024, Localizing Paragraph Memorization in Language Models, arXiv 2403.19851",
    (
        Claim(
            "known",
            "The model continues famous texts verbatim for longer than new ones.",
            "share of the next twelve tokens that are correct before the first error",
            "the same for texts that it cannot have seen",
            _known,
            MATTERS,
            "share",
        ),
        Claim(
            "rare",
            "On memorised text, a head attends more to rarer tokens.",
            "rank correlation between attention and token frequency, for the head chosen on other "
            "spans",
            "the same with frequencies shuffled",
            _rare,
            MATTERS,
            "rank correlation",
        ),
    ),
    "Ten famous texts against passages written for headscope (stories for a bundled model).",
)


def _measured(model: HeadModel, setting: StudySetting, *, shuffled: bool = False) -> LayerTable:
    probe, _ = skilled(model, setting)
    if shuffled and probe.control is None:
        raise UnsupportedModelError("its texts have no shuffled control.")
    chosen = probe.control if shuffled and probe.control is not None else probe
    measures = ["matrix_entropy", "curvature", "intrinsic_dimension"]
    return setting.share(
        ("layers", shuffled), lambda: layers(model, chosen, measures=measures, progress=False)
    )


def _middle(table: LayerTable, name: str) -> Float[np.ndarray, " text"]:
    values = table[name].per_text
    found: Float[np.ndarray, " text"] = values[(len(values) - 1) // 2]
    return found


def _compressed(model: HeadModel, setting: StudySetting) -> Evidence:
    table = _measured(model, setting)
    return paired(
        _middle(table, "matrix_entropy"),
        table["matrix_entropy"].per_text[0],
        note="half the depth",
        results={"layers": table},
        less=True,
    )


def _straighter(model: HeadModel, setting: StudySetting) -> Evidence:
    table = _measured(model, setting)
    return paired(
        _middle(table, "curvature"),
        table["curvature"].per_text[0],
        note="half the depth",
        less=True,
    )


LAYER_BY_LAYER = Study(
    "layer-by-layer",
    "How middle layers reshape a text's hidden states",
    "Skean et al. 2025, Layer by Layer: Uncovering Hidden Representations in Language Models, "
    "arXiv 2502.02013; Hosseini and Fedorenko 2023, Large Language Models Implicitly Learn to "
    "Straighten Neural Sentence Trajectories, arXiv 2311.04930",
    (
        Claim(
            "compressed",
            "At half the depth, a text's hidden states spread over fewer directions than its "
            "embeddings.",
            "matrix entropy at half the depth",
            "the same for the embeddings",
            _compressed,
            MATTERS,
            "nats",
        ),
        Claim(
            "straighter",
            "At half the depth, the trajectory of a text's hidden states is straighter than that "
            "of its embeddings.",
            "curvature at half the depth",
            "the same for the embeddings",
            _straighter,
            0.05,
            "radians",
        ),
    ),
    "The first token of each text is left out.",
)


def _shuffled_dimension(model: HeadModel, setting: StudySetting) -> Evidence:
    plain = _measured(model, setting)
    mixed = _measured(model, setting, shuffled=True)
    return paired(
        _middle(mixed, "intrinsic_dimension"),
        _middle(plain, "intrinsic_dimension"),
        note="half the depth",
        results={"shuffled": mixed},
    )


TOKEN_GEOMETRY = Study(
    "token-geometry",
    "Intrinsic dimension of a text's hidden states",
    "Viswanathan et al. 2025, The Geometry of Tokens in Internal Representations of Large Language "
    "Models, arXiv 2501.10573",
    (
        Claim(
            "shuffled",
            "At half the depth, shuffled text has a higher intrinsic dimension than the text "
            "itself.",
            "intrinsic dimension of the hidden states of the shuffled text",
            "the same for the original text",
            _shuffled_dimension,
            MATTERS,
            "dimensions",
        ),
    ),
    "TwoNN on the tokens of single texts, which underestimates high dimensions in both cases.",
)


def _whole(model: HeadModel, setting: StudySetting) -> Probe:
    """Unpadded texts of equal length, half of them as reference."""
    probes = [skilled(model, setting, number)[0] for number in range(2)]
    length = min(48, *(int(one.real.sum(1).min()) for one in probes))
    rows = [one.tokens[:, :length] for one in probes]
    return from_tokens(torch.cat(rows))


def _positional(model: HeadModel, setting: StudySetting) -> Evidence:
    probe = _whole(model, setting)
    table = position_layers(model, probe, progress=False)
    values = _middle(table, "position_share")
    return paired(values, np.zeros_like(values), note="half the depth", results={"position": table})


def _positional_head(model: HeadModel, setting: StudySetting) -> Evidence:
    head = role("previous_token", model, setting)
    scores = position_heads(model, _whole(model, setting), progress=False)["qk_position"]
    return paired(
        scores.per_example[head.layer, head.head],
        control_mean(scores, head),
        note=str(head),
        results={"qk_position": scores},
    )


POSITION = Study(
    "position-and-context",
    "Splitting hidden states into position and content",
    "Song and Zhong 2023, Uncovering Hidden Geometry in Transformers via Disentangling Position "
    "and Context, arXiv 2310.04861",
    (
        Claim(
            "share",
            "Position explains part of the variance of hidden states on texts that it was not "
            "estimated on.",
            "share of variance explained by position at half the depth",
            "none",
            _positional,
            0.05,
            "share",
        ),
        Claim(
            "previous",
            "Position accounts for more of the previous-token head's attention scores than of "
            "other heads'.",
            "share of position in that head's attention scores",
            "mean of all other heads",
            _positional_head,
            MATTERS,
            "share",
        ),
    ),
    "The paper studies learned position embeddings; with rotary positions, a mean over texts still "
    "captures what depends on position.",
)


def _confident(model: HeadModel, setting: StudySetting) -> Evidence:
    probe, _ = skilled(model, setting, 0)
    other, _ = skilled(model, setting, 1)
    sure = confidence(model, other)
    importance = setting.share(
        ("importance",),
        lambda: gradient_importance(model, probe, normalise=False, progress=False),
    )
    return rank_correlation(
        importance.mean.ravel(),
        sure.mean.ravel(),
        by_text=sure.per_example,
        note="all heads",
        results={"confidence": sure},
    )


def _farther(model: HeadModel, setting: StudySetting) -> Evidence:
    probe, _ = skilled(model, setting)
    scores = score(model, probe, ["attention_distance"], progress=False)["attention_distance"]
    by_text = nanmean(scores.per_example, 1)
    return rank_correlation(
        np.arange(len(by_text), dtype=float),
        nanmean(by_text, 1),
        of="layers",
        by_text=by_text,
        note="all layers, mean over their heads; n counts layers",
        results={"attention_distance": scores},
    )


SPECIALISED = Study(
    "specialised-heads",
    "Confident heads and long-range layers",
    "Voita et al. 2019, Analyzing Multi-Head Self-Attention: Specialized Heads Do the Heavy "
    "Lifting, arXiv 1905.09418; Vig and Belinkov 2019, Analyzing the Structure of Attention in a "
    "Transformer Language Model, arXiv 1906.04284",
    (
        Claim(
            "confident",
            "Heads that put most of their attention on one token matter more to the loss.",
            "rank correlation over heads between confidence and gradient importance on other texts",
            "none",
            _confident,
            0.2,
            "rank correlation",
        ),
        Claim(
            "farther",
            "Deeper heads attend to more distant tokens.",
            "rank correlation over heads between layer and mean attention distance",
            "none",
            _farther,
            0.2,
            "rank correlation",
        ),
    ),
    "Confidence ignores the first token, which decoders use as an attention sink.",
)


def _sparser(model: HeadModel, setting: StudySetting) -> Evidence:
    probe, _ = skilled(model, setting)
    parts = [probe.examples(slice(at, at + 2)) for at in range(0, min(len(probe), 8) - 1, 2)]
    start = 1.25
    alphas = [
        learn_alphas(
            model, part, steps=setting.size(8, 4), rate=0.2, start=start, seed=setting.seed,
            progress=False,
        )
        for part in parts
    ]  # fmt: skip
    values = np.stack([one.mean for one in alphas], -1)
    return over_heads(
        values,
        np.full(len(parts), start),
        note="all heads; n counts pairs of texts that alphas were trained on",
        results={"alpha": alphas[0]},
    )


ENTMAX = Study(
    "sparse-attention",
    "How sparse heads become when they can choose",
    "Correia et al. 2019, Adaptively Sparse Transformers, arXiv 1909.00015",
    (
        Claim(
            "sparser",
            "Heads that can choose their sparsity become sparser.",
            "alpha of entmax after training, mean over heads",
            "alpha at the start, 1.25",
            _sparser,
            0.0,
            "alpha",
        ),
    ),
    "Alphas are trained for a few steps with the model frozen; the paper trains the model with "
    "them. Alpha is 1 for softmax and 2 for sparsemax.",
)
ALL = (
    ATTENTION_LENS, ROUTES, ATTENTION_FLOW, ATMAN, MEMORISATION, LAYER_BY_LAYER, TOKEN_GEOMETRY,
    POSITION, SPECIALISED, ENTMAX,
)  # fmt: skip
