"""Studies of attention patterns: induction, earlier tokens, sinks, delimiters, needles."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import stdtrit

from headscope import metrics
from headscope.capture import collect
from headscope.circuits import composition
from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.kinds import AskedModel, survey
from headscope.kinds.measures import choices
from headscope.models import bundled
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, from_tokens, random_tokens, text
from headscope.probes.encoding import bos_prefix, check_length, need_onwards, ordinary_tokens
from headscope.retrieval import token_losses
from headscope.scorers import relation
from headscope.scoring.score import score
from headscope.studies.study import (
    LEVEL,
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
    over_heads,
    paired,
    pattern,
    prose,
    repeated,
    retrieval_heads,
    role,
)
from headscope.table import HeadScores

_KNOWN_GAIN = 0.5  # nats: with a smaller gain from repetition the model does not copy
_OTHERS = "the same head on the same tokens, in an order that breaks the pattern"


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
        note=f"{places} tokens per text",
        results={"losses": losses},
        less=True,
    )


INDUCTION = Study(
    "induction-heads",
    "Heads that continue repeated sequences",
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
            "Ablating the induction heads hurts the prediction of repeated tokens more than "
            "ablating as many other heads.",
            "share of the gain from repetition lost under ablation",
            "mean over random sets of other heads",
            _needed,
            MATTERS,
            "share",
        ),
        Claim(
            "in-context",
            "Tokens late in a text are predicted better than early ones.",
            "loss on the last quarter of a text",
            "loss on its second eighth",
            _in_context,
            0.02,
            "nats",
        ),
    ),
    "Scores on repeated random tokens, mean ablation over the probe, and the loss along stories in "
    "a small language of few words, which a model can pick up in context. The gain from repetition "
    "is the log of the vocabulary size minus the loss.",
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
    value, mean = float(into[before.layer, before.head]), float(others.mean())
    # Where another head would lie, if the others are a sample of a normal distribution.
    reach = float(stdtrit(others.size - 1, 0.5 + LEVEL / 2)) * math.sqrt(1 + 1 / others.size)
    spread = reach * float(others.std(ddof=1))
    return Evidence(
        value,
        mean,
        value - mean - spread,
        value - mean + spread,
        int(others.size),
        f"{before} into {later}; interval in which 99 % of other heads would lie",
        {"composition": scores},
    )


COMPOSITION = Study(
    "composition",
    "Heads that compose with later heads",
    "Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Merullo et al. 2024, "
    "Talking Heads, arXiv 2406.09519",
    (
        Claim(
            "previous-token",
            "A head attends to the previous token.",
            "previous-token score of the best head, chosen on other tokens",
            "mean of all other heads",
            partial(_pattern, "previous_token"),
            MATTERS,
            "attention",
        ),
        Claim(
            "k-composition",
            "The induction head takes its keys from the previous-token head more than from other "
            "heads.",
            "K-composition score of the pair",
            "all other heads below the induction head",
            _k_composition,
            0.0,
        ),
    ),
    "Composition is computed from the weights, with the norm's gain folded in and without rotary "
    "positions.",
)


def _sink(model: HeadModel, setting: StudySetting) -> Evidence:
    length = min(setting.size(64, 32), (model.shape.n_ctx or 64) - 2)
    probe = random_tokens(model, length=length, batch=setting.size(24, 12), seed=setting.seed + 1)
    scores = score(model, probe, ["first_token"], progress=False)["first_token"]
    places = np.arange(1, probe.tokens.shape[1])
    return over_heads(
        scores.per_example,
        np.full(len(probe), float((1.0 / (places + 1)).mean())),
        note="mean over all heads, random tokens",
        results={"first_token": scores},
    )


def _separated(model: HeadModel, setting: StudySetting) -> Evidence:
    probe = prose(model, setting, seed=setting.seed + 1)
    scores = score(model, probe, ["separator"], progress=False)["separator"]
    shares = probe.mark("separator").sum(1) / probe.real.sum(1)
    return over_heads(
        scores.per_example,
        shares.double().numpy(),
        note="mean over all heads",
        results={"separator": scores},
    )


def _best_on_prose(scorer: str, model: HeadModel, setting: StudySetting) -> Evidence:
    probes = [prose(model, setting, seed=setting.seed + k) for k in range(2)]
    return best_head(model, scorer, *probes)[1]


SINKS = Study(
    "attention-sinks",
    "Attention sinks on the first token",
    "Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
    (
        Claim(
            "sink",
            "Heads give the first token far more attention than a uniform pattern would.",
            "attention on the first token, mean over all heads",
            "uniform attention over all visible tokens",
            _sink,
            MATTERS,
            "attention",
        ),
    ),
    "Random tokens, so that no content explains attention to the first token.",
)

SURFACE = Study(
    "bert-attention",
    "Surface patterns in attention",
    "Clark et al. 2019, What Does BERT Look At?, arXiv 1906.04341",
    (
        Claim(
            "separator",
            "Heads put much more of their attention on separators than their share of the text.",
            "attention to separators, mean over all heads",
            "even attention over all tokens of the text",
            _separated,
            MATTERS,
            "attention",
        ),
        Claim(
            "delimiter",
            "A head attends to punctuation.",
            "attention to delimiters of the best head, chosen on other texts",
            "the same head on the shuffled text, or all other heads",
            partial(_best_on_prose, "delimiter"),
            MATTERS,
            "attention",
        ),
        Claim(
            "previous",
            "A head attends to the previous token.",
            "previous-token score of the best head, chosen on other tokens",
            "mean of all other heads",
            partial(_pattern, "previous_token"),
            MATTERS,
            "attention",
        ),
    ),
    "Only encoders have separators; the other claims are tested on every model.",
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
    "Heads that retrieve answers from a long context",
    "Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality, "
    "arXiv 2404.15574",
    (
        Claim(
            "copies",
            "A head's most attended token is the answer token in the needle that comes next.",
            "retrieval score of the best head at the answer's first token, chosen on other needles",
            "the same head with another question, or another needle in its place",
            _retrieval,
            MATTERS,
            "share of answer tokens",
        ),
        Claim(
            "needed",
            "Ablating the retrieval heads costs more of the answer's probability than ablating as "
            "many other heads.",
            "share of the answer's probability lost under ablation",
            "mean over random sets of other heads",
            _retrieval_needed,
            MATTERS,
            "share",
        ),
    ),
    "Teacher-forced, where the paper decodes. Heads are mean-ablated at every position; the paper "
    "masks them during decoding.",
)


def _letters(model: HeadModel, setting: StudySetting, number: int) -> tuple[HeadScores, HeadScores]:
    """Attention from the end of questions to the right letter, and to all four."""
    asked = AskedModel(model, setting.seed + number)
    probe = choices(model, setting.seed + number)
    if number:
        right = float((metric_of(model, probe, metrics.logit_difference) > 0).mean())
        if right < RIGHT:
            raise UnsupportedModelError(
                f"it prefers the right letter to a wrong one in only {right:.0%} of the questions "
                "(chance: 50%)."
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
    "Heads that attend to the correct answer's letter",
    "Lieberum et al. 2023, Does Circuit Analysis Interpretability Scale? Evidence from Multiple "
    "Choice Capabilities in Chinchilla, arXiv 2307.09458",
    (
        Claim(
            "letter",
            "A head attends from the end of the question to the right answer's letter more than to "
            "the other letters.",
            "attention from the end of the question to the right letter, of the head chosen on "
            "other questions",
            "mean of its attention to the three wrong letters",
            _right_letter,
            MATTERS,
            "attention",
        ),
    ),
    "Questions with four lettered options in random order, for models that prefer the right "
    "letter; the paper's model has 70 billion parameters.",
)

# Kinds that ablation can confirm, on probes that every decoder can read.
_CONFIRMED = ("previous_token", "duplicate_token", "induction", "copying", "retrieval")
_ABLATED = 8  # heads of each kind


def _kinds_are_needed(model: HeadModel, setting: StudySetting) -> Evidence:
    role("induction", model, setting)
    kinds = _CONFIRMED[: setting.size(len(_CONFIRMED), 3)]
    found = survey(model, kinds, most=_ABLATED, seed=setting.seed, progress=False)
    tried = [one for one in found.findings if one.confirmed is not None]
    if not tried:
        raise UnsupportedModelError("none of its heads has a kind that ablation can confirm.")
    return paired(
        np.array([float(bool(one.confirmed)) for one in tried]),
        np.full(len(tried), found.alpha),
        note=f"heads of the kinds {', '.join(sorted({one.kind for one in tried}))}",
        results={"kinds": found},
    )


CATALOGUE = Study(
    "catalogue",
    "Heads of known kinds, tested by ablation",
    "Zheng et al. 2024, Attention Heads of Large Language Models: A Survey, arXiv 2409.03752",
    (
        Claim(
            "needed",
            "The heads that show a known behaviour are needed for it.",
            "share of those heads whose ablation moves their kind's metric in the expected "
            "direction, with p below 0.05 after correction",
            "the share confirmed by chance",
            _kinds_are_needed,
            0.2,
            "share of heads",
        ),
    ),
    "Five kinds from the survey; at most eight heads of each are ablated, one at a time. A head "
    "can have a kind without being needed if other heads do the same. For models with an induction "
    "head; headscope kinds covers all kinds.",
)
_CELLS = 8  # of a maze


def _maze(rng: np.random.Generator) -> tuple[list[tuple[int, int]], int]:
    """Connections of a random tree of cells, in random order and direction, and one cell."""
    order = rng.permutation(_CELLS)
    joined = [(int(order[at]), int(order[rng.integers(at)])) for at in range(1, _CELLS)]
    turned = [(b, a) if rng.random() < 0.5 else (a, b) for a, b in joined]
    listed = [turned[at] for at in rng.permutation(len(turned))]
    return listed, int(rng.integers(_CELLS))


def _mazes(model: HeadModel, setting: StudySetting, seed: int) -> Probe:
    return setting.share(("mazes", seed), lambda: _make_mazes(model, setting, seed))


def _make_mazes(model: HeadModel, setting: StudySetting, seed: int) -> Probe:
    """Lists of connections of cells, and a cell at which a path has arrived, in random tokens."""
    known = ordinary_tokens(model).numpy()
    if len(known) < _CELLS + 2:
        raise UnsupportedModelError(
            f"a maze needs {_CELLS + 2} different tokens, and it has {len(known)}."
        )
    prefix = bos_prefix(model, None)
    rng = np.random.default_rng([16, seed])
    tokens, every, before = [], [], []
    for row in range(setting.size(128, 96)):
        listed, current = _maze(rng)
        names = rng.choice(known, _CELLS + 2, replace=False).tolist()
        cells = [one for pair in listed for one in (*pair, _CELLS)] + [_CELLS + 1, current]
        tokens.append([*prefix, *(names[cell] for cell in cells)])
        after = {b for a, b in listed if a == current}
        earlier = {a for a, b in listed if b == current}
        places = list(enumerate(cells[:-2], len(prefix)))
        query = len(tokens[-1]) - 1
        every += [(row, query, at) for at, cell in places if cell in after | earlier]
        before += [(row, query, at) for at, cell in places if cell in earlier]
    check_length(model, len(tokens[0]), what="a maze", fix="give a model with a longer context")
    pairs = {"neighbours": torch.tensor(every), "listed_before": torch.tensor(before)}
    return replace(from_tokens(tokens), pairs=pairs)


def _adjacent(name: str, model: HeadModel, setting: StudySetting) -> Evidence:
    need_onwards(model, "a path through a maze")
    probes = [_mazes(model, setting, setting.seed + k) for k in range(2)]
    return best_head(model, relation(name).mass, *probes)[1]


MAZES = Study(
    "maze-adjacency",
    "Heads that look up neighbouring cells in a maze",
    "Ivanitskiy et al. 2023, Structured World Representations in Maze-Solving Transformers, "
    "arXiv 2312.02566",
    (
        Claim(
            "neighbours",
            "From the current cell of a path, a head attends to its neighbours in the list of "
            "connections.",
            "attention to mentions of neighbours, for the head chosen on other mazes",
            "the same rows at the positions of another maze's neighbours",
            partial(_adjacent, "neighbours"),
            MATTERS,
            "attention",
        ),
        Claim(
            "listed-before",
            "A head also finds neighbours that are listed before the cell, which an induction "
            "head cannot find.",
            "attention to mentions of such neighbours, for the head chosen on other mazes",
            "the same rows at the positions of another maze's such neighbours",
            partial(_adjacent, "listed_before"),
            MATTERS,
            "attention",
        ),
    ),
    "The paper trains models on mazes; here any decoder gets the list: trees of eight cells, named "
    "by random tokens, with each connection written once and in a random direction, so that an "
    "induction head finds the neighbours listed after the cell and no others. The second claim is "
    "not in the paper: it separates heads that use the maze from heads that repeat a pair.",
)

_BITS, _ADDED = 12, 5  # of a string, and how many at its beginning are added


def _strings(
    model: HeadModel, setting: StudySetting, number: int
) -> tuple[Probe, Int[np.ndarray, " string"]]:
    """Strings of two tokens, with the number of ones among those that are added."""
    need_onwards(model, "a sum of bits")
    ids = ordinary_tokens(model)[:2]
    if len(ids) < 2:
        raise UnsupportedModelError("bits take two tokens.")
    rng = np.random.default_rng([17, setting.seed + number])
    bits = torch.from_numpy(rng.integers(0, 2, (24 * setting.size(32, 16), _BITS)))
    start = torch.tensor([bos_prefix(model, None)]).long().expand(len(bits), -1)
    tokens = torch.cat([start, ids[bits]], 1)
    check_length(model, tokens.shape[1], what="a string of bits", fix="give another model")
    count = bits[:, :_ADDED].sum(1)
    if number:
        logits = model.forward(tokens)[:, -1].cpu()
        said = logits[:, ids].argmax(1)
        right = float((said == count % 2).double().mean())
        if right < RIGHT:
            raise UnsupportedModelError(
                f"it gets {right:.0%} of the sums of {_ADDED} bits right (chance: 50%): it was not "
                "trained to add the first bits of a string."
            )
    return from_tokens(tokens), count.numpy()


def _even(model: HeadModel, setting: StudySetting) -> Evidence:
    def shares(number: int) -> Float[np.ndarray, "place string layer head"]:
        """Overlap of the last row with even attention to the places that are added, and others."""
        rows = _last_rows(model, _strings(model, setting, number)[0])
        first = rows.shape[-1] - _BITS
        parts = [rows[..., at : at + _ADDED] for at in (first, first + _ADDED)]
        return np.stack([np.minimum(one, 1 / _ADDED).sum(-1) for one in parts])

    tried, chosen = shares(1), shares(0)
    lead = chosen[0].mean(0)
    layer, number = np.unravel_index(int(np.nanargmax(lead)), lead.shape)
    found = tried[:, :, layer, number]
    scores = score(model, _strings(model, setting, 1)[0], _added, progress=False)
    return paired(
        found[0],
        found[1],
        note=str(HeadIndex(int(layer), int(number))),
        results={name: scores[name] for name in scores},
    )


def _pairs_with_bits(probe: Probe) -> list[list[tuple[int, int]]]:
    first, last = probe.length - _BITS, probe.length - 1
    return [[(last, first + at) for at in range(_ADDED)]] * len(probe)


_added = relation("added", _pairs_with_bits)


def _last_rows(model: HeadModel, probe: Probe) -> Float[np.ndarray, "string layer head key"]:
    """Attention of every head at the last position; NaN in layers without attention."""
    shape = model.shape
    rows = np.full((len(probe), shape.n_layers, shape.n_heads, probe.length), np.nan)
    for layer, one in collect(model, probe).items():
        rows[:, layer] = one.pattern[:, :, -1].numpy()
    return rows


def _clustered(model: HeadModel, setting: StudySetting) -> Evidence:
    probe, count = _strings(model, setting, 1)
    head = HeadIndex.parse(_even(model, setting).note)
    outputs = collect(model, probe, [head.layer])[head.layer].z[:, -1, head.head].double().numpy()
    rng = np.random.default_rng(setting.seed)
    found = [
        (
            _between(outputs[part], count[part]),
            _between(outputs[part], rng.permutation(count[part])),
        )
        for part in np.array_split(np.arange(len(count)), setting.size(32, 16))
    ]
    values, control = np.array(found).T
    return paired(values, control, note=f"{head}; n counts draws of strings")


def _between(
    outputs: Float[np.ndarray, "string d_head"], groups: Int[np.ndarray, " string"]
) -> float:
    """Share of the variance of outputs that lies between groups."""
    centred = outputs - outputs.mean(0)
    means = [centred[groups == one].mean(0) for one in groups]
    return float((np.array(means) ** 2).sum() / (centred**2).sum())


CLUSTERING = Study(
    "clustering-head",
    "Heads whose outputs cluster inputs by what matters for the task",
    "Cabannes et al. 2024, Clustering Head: A Visual Case Study of the Training Dynamics in "
    "Transformers, arXiv 2410.24050",
    (
        Claim(
            "even",
            "A head attends to the bits that are added, equally to each, and to no others.",
            "overlap of its attention with uniform attention to the five bits, for the head "
            "chosen on other strings",
            "overlap with uniform attention to the next five bits",
            _even,
            0.3,
            "overlap",
        ),
        Claim(
            "clusters",
            "The head's output is the same for strings with the same number of ones among these "
            "bits.",
            "share of the variance of its outputs that is between strings with different numbers "
            "of ones",
            "the same with the numbers shuffled among strings",
            _clustered,
            0.5,
            "share of the variance",
        ),
    ),
    "Sparse modular addition: whether the first 5 of 12 bits have an odd sum. For models that "
    "were trained (or compiled) to predict it as the next token; bits are the model's first two "
    "tokens.",
)
ALL = (
    INDUCTION, COMPOSITION, SINKS, SURFACE, RETRIEVAL, CHOICES, CATALOGUE, MAZES, CLUSTERING,
)  # fmt: skip
