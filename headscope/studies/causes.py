"""Studies of causal effects: circuits and their estimates, self-repair, task vectors."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float

from headscope import metrics
from headscope.ablation import ablate_heads, back_patch, head_values
from headscope.circuits import record, relations, score_parts
from headscope.circuits.decomposition import PromptRecording
from headscope.circuits.maps import TokenRelation
from headscope.edges import attribute, contextual, discrete, faithfulness, stability
from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.kinds import relation_scores
from headscope.kinds.measures import BAD, GOOD, ORDERS, RELATIONS
from headscope.lens import head_attribution
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, in_context, text
from headscope.relevance import anchors
from headscope.steering import (
    compare,
    contrast,
    head_means,
    indirect_effect,
    inject,
    learn_strengths,
    outputs_at,
)
from headscope.studies.study import (
    MATTERS,
    Claim,
    Evidence,
    Study,
    StudySetting,
    above_draws,
    against_random_sets,
    control_mean,
    control_of,
    known_pairs,
    metric_of,
    paired,
    rank_correlation,
    skilled,
    unpaired,
)
from headscope.table import HeadScores
from headscope.table.edges import EdgeGraph
from headscope.table.relevance import Anchors

_DIFFERENCE = metrics.logit_difference


def _exact(model: HeadModel, setting: StudySetting) -> HeadScores:
    probe = known_pairs(model, setting, 1)
    return setting.share(
        ("ablated",), lambda: ablate_heads(model, probe, _DIFFERENCE, "mean", progress=False)
    )


def _made_up(model: HeadModel, setting: StudySetting) -> Evidence:
    first, second = (known_pairs(model, setting, number) for number in (0, 1))
    direct = head_attribution(model, first, "foil")
    last = max(model.shape.attention_layers)
    heads = [(head, value) for head, value in direct.top(len(model.shape.heads)) if value > 0]
    below = [head for head, _ in heads if head.layer < last]
    if not below:
        raise UnsupportedModelError("no head below its last layer raises the answer's logit.")
    head = below[0]
    gives = head_attribution(model, second, "foil").per_example[head.layer, head.head]
    if not paired(gives, np.zeros_like(gives), clusters=second.cluster_labels).low > 0:
        raise UnsupportedModelError(
            f"no head raises the answer's logit directly (best: {head}, "
            f"{float(np.nanmean(gives)):.2f} logits on other prompts)."
            "logits on other prompts)."
        )
    zeroed = ablate_heads(model, second, _DIFFERENCE, "zero", heads=[head], progress=False)
    lost = -zeroed.per_example[head.layer, head.head]
    return paired(
        lost,
        gives,
        note=str(head),
        results={"direct": direct},
        less=True,
        clusters=second.cluster_labels,
    )


SELF_REPAIR = Study(
    "self-repair",
    "Later layers that compensate for an ablated head",
    "McGrath et al. 2023, The Hydra Effect: Emergent Self-repair in Language Model Computations, "
    "arXiv 2307.15771",
    (
        Claim(
            "made-up",
            "Ablating a head costs the answer less than the head's direct effect: later components "
            "compensate.",
            "drop in logit difference after ablating the head with the largest direct effect, "
            "chosen on other prompts",
            "the head's direct contribution to that logit difference",
            _made_up,
            0.0,
            "logits",
        ),
    ),
    "On a task that the model can do. The head below the last layer with the largest direct "
    "contribution to the logit difference is zero-ablated. The final norm's scale is frozen for "
    "the direct contribution but not for the drop.",
)


def _contextual(model: HeadModel, setting: StudySetting, number: int) -> HeadScores:
    probe = known_pairs(model, setting, number)
    return setting.share(
        ("contextual", number),
        lambda: contextual(model, probe, _DIFFERENCE, ablation="mean", progress=False).scores,
    )


def _decomposed(model: HeadModel, setting: StudySetting) -> Evidence:
    scores = _contextual(model, setting, 1)
    return rank_correlation(
        _exact(model, setting).mean.ravel(),
        scores.mean.ravel(),
        by_text=scores.per_example,
        note="all heads",
        results={"contextual decomposition": scores},
    )


def _decomposed_needed(model: HeadModel, setting: StudySetting) -> Evidence:
    heads = [head for head, _ in _contextual(model, setting, 1).bottom(3)]
    probe = known_pairs(model, setting, 2)
    lead = float(np.nanmean(metric_of(model, probe, _DIFFERENCE)))
    return against_random_sets(
        model, probe, _DIFFERENCE, heads, scale=lead, sign=-1.0, seed=setting.seed
    )


DECOMPOSITION = Study(
    "contextual-decomposition",
    "Tracing head outputs to the answer by contextual decomposition",
    "Hsu et al. 2024, Efficient Automated Circuit Discovery in Transformers using Contextual "
    "Decomposition, arXiv 2407.00886",
    (
        Claim(
            "ablation",
            "Contextual decomposition ranks heads as ablation does.",
            "rank correlation over heads between the two effects on the logit difference",
            "none",
            _decomposed,
            0.3,
            "rank correlation",
        ),
        Claim(
            "needed",
            "Ablating its top three heads hurts the answer more than ablating three random heads.",
            "share of the logit difference lost, on other prompts",
            "mean of random sets of other heads",
            _decomposed_needed,
            MATTERS,
            "share",
        ),
    ),
    "On a task that the model can do; heads are mean-ablated. The decomposition freezes attention "
    "patterns, so it misses what a head does through the queries and keys of other heads.",
)


def _graph(model: HeadModel, setting: StudySetting) -> EdgeGraph:
    probe = known_pairs(model, setting, 0)
    return setting.share(
        ("graph",),
        lambda: attribute(model, probe, _DIFFERENCE, "eap_ig", steps=3, progress=False),
    )


def _circuit(model: HeadModel, setting: StudySetting) -> Evidence:
    graph = _graph(model, setting)
    curve = faithfulness(
        model,
        known_pairs(model, setting, 1),
        _DIFFERENCE,
        graph,
        [0.05, 0.1],
        controls=setting.size(5, 3),
        seed=setting.seed,
        progress=False,
    )
    random = np.asarray(curve.random)[:, -1]
    return above_draws(
        float(curve.faithfulness[-1]),
        random,
        note=f"{int(curve.counts[-1])} edges; n counts draws of random edges",
        results={"faithfulness": curve},
    )


def _stable(model: HeadModel, setting: StudySetting) -> Evidence:
    graph = _graph(model, setting)
    count = max(5, len(graph.edges) // 50)
    found = stability(graph, count, seed=setting.seed)
    return Evidence(
        found.jaccard,
        found.chance,
        found.low - found.chance,
        found.high - found.chance,
        found.prompts,
        f"the {count} strongest edges; interval of 95 % of the draws",
    )


CIRCUITS = Study(
    "circuit-discovery",
    "Sparse circuits that reproduce the model's behaviour",
    "Hanna et al. 2024, Have Faith in Faithfulness, arXiv 2403.17806; Mueller et al. 2025, MIB: A "
    "Mechanistic Interpretability Benchmark, arXiv 2504.13151",
    (
        Claim(
            "faithful",
            "A tenth of the edges, chosen by integrated gradients, keeps far more of the logit "
            "difference than as many random edges.",
            "share of the logit difference that the circuit keeps, on other prompts",
            "circuits with as many random edges",
            _circuit,
            0.3,
            "share",
        ),
        Claim(
            "stable",
            "Resampled prompts give the same strongest edges.",
            "overlap (intersection over union) with the edges of resampled prompts",
            "overlap of two random sets of as many edges",
            _stable,
            0.5,
            "overlap",
        ),
    ),
    "On a task that the model can do, with edges patched from the paired prompt. Stability is "
    "measured on the 2% of edges with the largest scores.",
)


def _codes(model: HeadModel, setting: StudySetting) -> Evidence:
    probe = known_pairs(model, setting, 1)
    if probe.corrupt is None:
        raise UnsupportedModelError("the prompts of its task have no paired prompts.")
    found = discrete(
        model,
        probe,
        probe.corrupt,
        features=setting.size(128, 64),
        steps=setting.size(200, 60),
        seed=setting.seed,
        progress=False,
    )
    over = found.scores.mean if found.scores.null is None else found.scores.mean - found.scores.null
    return rank_correlation(
        over.ravel(),
        np.abs(_exact(model, setting).mean).ravel(),
        note="all heads",
        results={"codes": found.scores},
    )


CODES = Study(
    "discrete-codes",
    "Finding circuit heads with sparse codes",
    "O'Neill and Bui 2024, Sparse Autoencoders Enable Scalable and Reliable Circuit Identification "
    "in Language Models, arXiv 2405.12522",
    (
        Claim(
            "ranks",
            "Heads with more task-specific codes matter more under ablation.",
            "rank correlation over heads between the number of task-specific codes, minus its mean "
            "with shuffled labels, and the absolute effect of ablation",
            "none",
            _codes,
            0.2,
            "rank correlation",
        ),
    ),
    "Positive prompts come from a task that the model can do; negative ones are their paired "
    "prompts.",
)


def _put_back(model: HeadModel, setting: StudySetting) -> Evidence:
    probe = known_pairs(model, setting, 1)
    count = model.shape.n_layers
    step = max(1, count // setting.size(8, 5))
    found = back_patch(
        model, probe, metrics.answer_log_prob, layers=range(0, count, step), progress=False
    )
    source, destination = found.pair
    return paired(
        found.held_out,
        np.maximum(0.0, found.null_held_out),
        note=f"from L{source} into L{destination}",
        results={"back-patching": found.effects},
    )


BACK_PATCHING = Study(
    "hopping-too-late",
    "Answers that are resolved too late in the stack",
    "Biran et al. 2024, Hopping Too Late: Exploring the Limitations of Large Language Models on "
    "Multi-Hop Queries, arXiv 2406.12775",
    (
        Claim(
            "helps",
            "Patching a later hidden state back into an earlier layer makes the answer more "
            "likely.",
            "change in the answer's log-probability for the best pair of layers, chosen on other "
            "prompts",
            "zero, or the same with another prompt's state if that is better",
            _put_back,
            0.05,
            "nats",
        ),
    ),
    "The paper uses two-hop questions; here the model gets a one-hop task that it can do, since "
    "small models do not follow chains. Measured at the last token of the prompt.",
)


def _fired(model: HeadModel, setting: StudySetting) -> list[tuple[list[int], HeadIndex, int, int]]:
    """Strong attention entries in half of the prompts: prompt, head, query and key."""
    probe, _ = skilled(model, setting)
    rng = np.random.default_rng(setting.seed)
    found = []
    for row in range(setting.size(4, 2)):
        tokens = probe.tokens[row, probe.real[row]].tolist()[:32]
        for layer, attends in record(model, tokens).attends.items():
            places = (attends >= _FIRES).nonzero().tolist()
            found += [
                (tokens, HeadIndex(layer, head), query, key)
                for head, query, key in places
                if 0 < key < query
            ]
    if len(found) < _LEAST_PAIRS:
        raise UnsupportedModelError(
            f"its heads put at least half of their attention on only {len(found)} tokens that are "
            "neither the first nor the query's own."
        )
    chosen = rng.choice(len(found), min(len(found), setting.size(60, 24)), replace=False)
    return [found[index] for index in sorted(chosen)]


_FIRES, _LEAST_PAIRS, _SHARE = 0.5, 8, 0.7


def _sparse(model: HeadModel, setting: StudySetting) -> Evidence:
    kept, own, heads = [], [], []
    recorded: dict[tuple[int, ...], PromptRecording] = {}
    for tokens, head, query, key in _fired(model, setting):
        if tuple(tokens) not in recorded:
            recorded[tuple(tokens)] = record(model, tokens)
        made = recorded[tuple(tokens)]
        parts = score_parts(model, made, head, query, key, _SHARE)
        if parts.score <= 0:
            continue
        kept.append(len(parts.kept) / model.shape.d_head)
        heads.append(head.layer * model.shape.n_heads + head.head)
        values = [
            head_values(model, torch.tensor([tokens]), site=site, layers=[head.layer])[head.layer][
                0
            ]
            for site in ("query", "key")
        ]
        kv = head.head // (values[0].shape[0] // values[1].shape[0])
        products = values[0][head.head, query].double() * values[1][kv, key].double()
        own.append(_kept(products.numpy()) / model.shape.d_head)
    return paired(
        np.array(kept),
        np.array(own),
        note="pairs with half of the attention; n counts heads",
        less=True,
        clusters=heads,
    )


def _kept(products: Float[np.ndarray, " dimension"]) -> int:
    """Number of largest products that make up 70% of their sum."""
    total = np.cumsum(np.sort(products)[::-1])
    return int(np.argmax(total >= _SHARE * total[-1])) + 1


SPARSE_DECOMPOSITION = Study(
    "sparse-decomposition",
    "Few singular directions behind strong attention",
    "Franco and Crovella 2024, Sparse Attention Decomposition Applied to Circuit Tracing, "
    "arXiv 2410.00340",
    (
        Claim(
            "sparse",
            "Where a head attends strongly, few singular directions of its QK circuit carry the "
            "attention score.",
            "share of the directions that make up 70% of the score",
            "the same share in the head's own coordinates",
            _sparse,
            0.05,
            "share of directions",
        ),
    ),
    "Attention of at least 0.5 to a token that is neither the first nor the query's own, with a "
    "positive score. Any basis in which products cancel needs few of them, so the weights' own "
    "basis is the control.",
)


def _halves(model: HeadModel) -> list[tuple[str, list[TokenRelation]]]:
    found = []
    for name, one in relations(model).items():
        if name in ("copy", "case") or len(one) < 2 * _LEAST_PAIRS:
            continue
        found.append(
            (
                name,
                [
                    TokenRelation(name, one.source[half::2], one.target[half::2], one.words)
                    for half in range(2)
                ],
            )
        )
    if not found:
        raise UnsupportedModelError("its vocabulary has no relation with sixteen pairs of words.")
    return found


def _mapped(model: HeadModel, setting: StudySetting) -> Evidence:
    best: tuple[float, str, HeadIndex, Float[np.ndarray, "layer head pair"]] | None = None
    rest: list[Float[np.ndarray, " pair"]] = []
    for name, (first, second) in _halves(model):
        chosen = _of_words(model, first)
        tried = _of_words(model, second)
        head, value = chosen.top(1)[0]
        if best is None or value > best[0]:
            best = (value, name, head, tried.per_example)
            rest = [control_mean(tried, head)]
    if best is None:
        raise UnsupportedModelError("none of its heads maps words to their partners.")
    _, name, head, values = best
    return paired(values[head.layer, head.head], rest[0], note=f"{name}, {head}")


def _of_words(model: HeadModel, pairs: TokenRelation) -> HeadScores:
    listed = list(zip(pairs.source.tolist(), pairs.target.tolist(), strict=True))
    return relation_scores(model, [listed])


MAPS = Study(
    "maps",
    "Word relations encoded in head weights",
    "Elhelo and Geva 2024, Inferring Functionality of Attention Heads from their Parameters "
    "(MAPS), arXiv 2412.11965",
    (
        Claim(
            "relation",
            "A head's weights map words to their partners in a relation.",
            "share of pairs whose partner gets the head's largest logit, with relation and head "
            "chosen on other pairs",
            "mean of all other heads",
            _mapped,
            MATTERS,
            "share of pairs",
        ),
    ),
    "Plurals, opposites, capitals, comparatives, past tenses and ordered sequences, where their "
    "words are single tokens; the partner's logit must be the largest among the partners of its "
    "relation.",
)


def _ordered(model: HeadModel) -> list[list[tuple[int, int]]]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UnsupportedModelError("it has no tokenizer, and ordered sequences are made of words.")
    sets = []
    for words in ORDERS.values():
        ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
        ids = [one[0] if len(one) == 1 else -1 for one in ids]
        sets.append([(a, b) for a, b in pairwise(ids) if a >= 0 <= b])
    return [one for one in sets if len(one) >= _LEAST_SET]


_LEAST_SET = 5


def _successor(model: HeadModel, setting: StudySetting) -> Evidence:
    sets = _ordered(model)
    if len(sets) < 2:
        raise UnsupportedModelError(
            "its tokenizer has single tokens for fewer than two ordered sequences (days, months, "
            "numbers)."
        )
    chosen, tried = (relation_scores(model, sets[half::2], "successor") for half in range(2))
    head = chosen.top(1)[0][0]
    return paired(
        tried.per_example[head.layer, head.head],
        control_mean(tried, head),
        note=f"{head}; tested on other sequences than it was chosen on",
        results={"successor": tried},
    )


SUCCESSORS = Study(
    "successor-heads",
    "Heads that increment ordered tokens",
    "Gould et al. 2023, Successor Heads: Recurring, Interpretable Attention Heads In The Wild, "
    "arXiv 2312.09230",
    (
        Claim(
            "successor",
            "A head's weights map an element of an ordered sequence to the next: Monday to "
            "Tuesday.",
            "share of elements whose successor gets the head's largest logit, with the head chosen "
            "on other sequences",
            "mean of all other heads",
            _successor,
            MATTERS,
            "share of pairs",
        ),
    ),
    "Days, months, numbers, ordinals and letters, where they are single tokens; the head is chosen "
    "on half of the sequences and tested on the others.",
)


def _single(model: HeadModel, words: Sequence[str]) -> bool:
    tokenizer = model.tokenizer
    return tokenizer is not None and all(
        len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1 for word in words
    )


def _task(model: HeadModel, setting: StudySetting, number: int) -> Probe:
    """In-context prompts of a task that the model does better with demonstrations."""
    return setting.share(("task", number), lambda: _make_task(model, setting, number))


def _make_task(model: HeadModel, setting: StudySetting, number: int) -> Probe:
    said = []
    for name, pairs in RELATIONS.items():
        known = [(a, f" {b}") for a, b in pairs.items() if _single(model, (a, b))]
        if len(known) < 2 * _LEAST_SET:
            said.append(f"{name}: {len(known)} pairs of single tokens")
            continue
        probe = in_context(model, known, template="{text} :{label}\n", shots=4, seed=number)
        right = float(np.nanmean(metric_of(model, probe, metrics.answer_probability)))
        if probe.corrupt is None or right < _PROBABLE:
            said.append(f"{name}: the answer has a probability of {right:.2f}")
            continue
        return probe.examples(slice(number % 2, None, 2))
    raise UnsupportedModelError(f"it can do none of the tasks ({'; '.join(said)}).")


_PROBABLE = 0.2


def _effects(model: HeadModel, setting: StudySetting) -> HeadScores:
    probe = _task(model, setting, 0)
    return setting.share(
        ("indirect",),
        lambda: indirect_effect(model, {"task": probe}, seed=setting.seed, progress=False),
    )


def _carries(model: HeadModel, setting: StudySetting) -> Evidence:
    effects = _effects(model, setting)
    head = effects.top(1)[0][0]
    tried = {"task": _task(model, setting, 1)}
    scores = indirect_effect(model, tried, heads=[head], seed=setting.seed, progress=False)
    return paired(
        scores.per_example[head.layer, head.head],
        control_of(scores, head),
        note=str(head),
        results={"indirect effect": effects},
    )


def _injected(model: HeadModel, setting: StudySetting) -> Evidence:
    heads = [head for head, _ in _effects(model, setting).top(10)]
    vectors = head_means(model, _task(model, setting, 0))
    tried = _task(model, setting, 1).corrupt
    if tried is None:
        raise UnsupportedModelError("its prompts have no counterparts with shuffled labels.")
    found = compare(model, tried, vectors, heads, seed=setting.seed)
    by_arm = dict(zip(found.arms, found.task, strict=True))
    return paired(
        by_arm["heads"],
        np.maximum(by_arm["none"], by_arm["random heads"]),
        note=f"{len(heads)} heads",
        results={"steering": found},
    )


FUNCTION_VECTORS = Study(
    "function-vectors",
    "Heads whose outputs encode the task",
    "Todd et al. 2023, Function Vectors in Large Language Models, arXiv 2310.15213",
    (
        Claim(
            "carries",
            "Injecting a head's mean output on a task's prompts makes the model do the task on "
            "prompts without demonstrations of it.",
            "change in the answer's probability for the best head, chosen on other prompts",
            "the same with the head's mean on prompts with shuffled labels",
            _carries,
            0.005,
            "probability",
        ),
        Claim(
            "injected",
            "Injecting the means of ten heads makes the answers to prompts with shuffled labels "
            "more likely.",
            "log-probability of the answer with the means of ten heads injected",
            "no injection, or random directions of the same norms if that is better",
            _injected,
            MATTERS,
            "nats",
        ),
    ),
    "Capitals, plurals, past tenses or opposites: the first task whose answers get a probability "
    "of at least 0.2 with four demonstrations.",
)


def _learned(model: HeadModel, setting: StudySetting) -> Evidence:
    probe, tried = _task(model, setting, 0), _task(model, setting, 1).corrupt
    if tried is None or probe.corrupt is None:
        raise UnsupportedModelError("its prompts have no counterparts with shuffled labels.")
    vectors = head_means(model, probe)
    found = learn_strengths(
        model, vectors, probe.corrupt, steps=setting.size(20, 10), every=5, progress=False
    )
    where = tried.mark("end")
    losses = []
    for strength in (found.values, np.full_like(found.values, np.nanmean(found.values))):
        with inject(model, vectors, strength=np.nan_to_num(strength), positions=where):
            losses.append(_plain_loss(model, tried))
    return paired(
        losses[0],
        np.minimum(losses[1], _plain_loss(model, tried)),
        note=f"mean strength {float(np.nanmean(found.values)):.2f}",
        less=True,
    )


def _plain_loss(model: HeadModel, probe: Probe) -> Float[np.ndarray, " example"]:
    values = metrics.loss(model.forward(probe.tokens, real=probe.real), probe)
    found: Float[np.ndarray, " example"] = values.detach().double().cpu().numpy()
    return found


SOFT_INJECTION = Study(
    "soft-injection",
    "Learned per-head strengths for task injection",
    "Soft Injection of Task Embeddings, 2025, arXiv 2507.20906",
    (
        Claim(
            "learned",
            "Strengths learned per head make the answers more likely than one shared strength.",
            "loss on the answer, on other prompts, with the learned strengths",
            "the same with the mean strength for all heads, or without injection if that is better",
            _learned,
            MATTERS,
            "nats",
        ),
    ),
    "Task, prompts and mean outputs are those of the function-vectors study.",
)

_NOUNS = ("boy", "girl", "man", "woman", "teacher", "farmer", "king", "queen", "doctor", "sister")
_PLEASANT = (
    "happy", "kind", "clever", "rich", "brave", "gentle", "lucky", "proud", "calm", "glad",
    "loved", "safe",
)  # fmt: skip
_UNPLEASANT = (
    "sad", "angry", "poor", "tired", "lonely", "cruel", "sick", "afraid", "hurt", "bitter",
    "ugly", "guilty",
)  # fmt: skip


def _single_nouns(model: HeadModel) -> list[str]:
    return [one for one in _NOUNS if _single(model, (one,))]


def _feelings(model: HeadModel, seed: int) -> list[Probe]:
    """Sentences with pleasant and unpleasant endings, from disjoint halves of the word lists."""
    if model.tokenizer is None:
        raise UnsupportedModelError("it has no tokenizer, and this study needs words.")
    sets = [[one for one in words if _single(model, (one,))] for words in (_PLEASANT, _UNPLEASANT)]
    nouns = _single_nouns(model)
    least = min(len(sets[0]), len(sets[1]))
    if least < 4 or len(nouns) < 2:
        raise UnsupportedModelError(
            f"only {least} pleasant and unpleasant words are single tokens of its tokenizer: this "
            "study needs 4."
        )
    made = []
    for words in sets:
        part = words[seed % 2 : 2 * (least // 2) : 2]
        texts = [f"One day the {noun} was {word}" for word in part for noun in nouns[:4]]
        made.append(text(model, texts))
    return made


def _ends(probe: Probe) -> torch.Tensor:
    place = torch.arange(probe.length)
    return place == probe.last[:, None]


def _told_apart(model: HeadModel, setting: StudySetting) -> Evidence:
    skilled(model, setting)
    (good, bad), (fine, foul) = (_feelings(model, half) for half in range(2))
    vectors = contrast(model, _at_end(good), _at_end(bad))
    if vectors.auc is None:
        raise UnsupportedModelError("no vector was evaluated on examples.")
    head = vectors.auc.top(1)[0][0]
    direction = vectors.values[head.layer, head.head].double().numpy()
    projected = [
        outputs_at(model, one, _ends(one))[:, head.layer, head.head].double().numpy() @ direction
        for one in (fine, foul)
    ]
    spread = float(np.concatenate([one - one.mean() for one in projected]).std()) or 1.0
    nouns = min(4, len(_single_nouns(model)))
    by_word = [one.reshape(-1, nouns).mean(1) / spread for one in projected]
    return unpaired(*by_word, note=f"{head}; held-out words, n counts words")


def _at_end(probe: Probe) -> Probe:
    return replace(probe, marks={**probe.marks, "end": _ends(probe)}, control=None)


REPRESENTATION = Study(
    "representation-engineering",
    "Sentiment directions in head outputs",
    "Zou et al. 2023, Representation Engineering, arXiv 2310.01405; Jorgensen et al. 2023, "
    "Improving Activation Steering with Mean-Centring, arXiv 2312.03813",
    (
        Claim(
            "told-apart",
            "A head's direction from unpleasant to pleasant words separates held-out words.",
            "output of the best head along its direction at pleasant words, in standard deviations",
            "the same at unpleasant words",
            _told_apart,
            1.0,
            "standard deviations",
        ),
    ),
    "Difference of means at the last word of short sentences; head and direction are chosen on "
    "half of the words and tested on the other half.",
)


def _labelled(model: HeadModel, setting: StudySetting) -> Anchors:
    found = setting.share(("anchors",), lambda: _make_anchors(model, setting))
    right = found.accuracy
    if not right >= _BETTER:
        raise UnsupportedModelError(
            f"it names the right one of two classes for only {right:.0%} of the texts."
        )
    return found


_BETTER = 0.75


def _make_anchors(model: HeadModel, setting: StudySetting) -> Anchors:
    if not _single(model, ("good", "bad")):
        raise UnsupportedModelError("'good' and 'bad' are not single tokens of its tokenizer.")
    shown = [
        (f"The {thing} was {word}.", label)
        for words, label in ((GOOD, " good"), (BAD, " bad"))
        for word, thing in zip(words, ("food", "film", "room", "book") * 4, strict=False)
    ]
    probe = in_context(
        model,
        shown,
        template="{text} It was{label}\n",
        shots=4,
        batch=setting.size(24, 12),
        seed=setting.seed,
    )
    return anchors(model, probe, progress=False)


def _flow(name: str, shallow: bool, model: HeadModel, setting: StudySetting) -> Evidence:
    found = _labelled(model, setting)
    half = max(1, len(found.flows[name]) // 2)
    part = slice(0, half) if shallow else slice(half, None)
    return paired(
        found.flows[name][part].mean(0),
        found.flows["other"][part].mean(0),
        note="shallow half" if shallow else "deep half",
        results={"anchors": found} if shallow else {},
    )


ANCHORS = Study(
    "label-words",
    "Label words as anchors for in-context learning",
    "Wang et al. 2023, Label Words are Anchors: An Information Flow Perspective for Understanding "
    "In-Context Learning, arXiv 2305.14160",
    (
        Claim(
            "gather",
            "In shallow layers, information flows from demonstrations into their label words.",
            "saliency of attention from label words to the text before them",
            "saliency of all other attention",
            partial(_flow, "text_to_label", True),
            0.0,
            "saliency",
        ),
        Claim(
            "read",
            "In deep layers, the prediction reads from the label words.",
            "saliency of attention from the last token to label words",
            "saliency of all other attention",
            partial(_flow, "label_to_final", False),
            0.0,
            "saliency",
        ),
    ),
    "Sentences with pleasant and unpleasant words, four demonstrations each; for models that name "
    "the class of at least three quarters of them.",
)
ALL = (
    SELF_REPAIR, DECOMPOSITION, CIRCUITS, CODES, BACK_PATCHING, SPARSE_DECOMPOSITION, MAPS,
    SUCCESSORS, FUNCTION_VECTORS, SOFT_INJECTION, REPRESENTATION, ANCHORS,
)  # fmt: skip
