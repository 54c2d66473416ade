"""Studies of weights, of the residual stream, and of which heads are needed."""

import math
from functools import partial

import numpy as np
from jaxtyping import Float

from headscope import metrics
from headscope.circuits import score as score_weights
from headscope.errors import UnsupportedModelError
from headscope.geometry import layers
from headscope.heads import HeadIndex
from headscope.lens import linear_shortcuts, logit_lens
from headscope.lens.linear import ResidualLens
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, in_context
from headscope.probes.encoding import ordinary_tokens
from headscope.pruning import PruningCurve, gradient_importance, one_shot, pruning_curve
from headscope.studies.study import (
    MATTERS,
    Claim,
    Evidence,
    Study,
    StudySetting,
    metric_of,
    need_skill,
    paired,
    prose,
    skilled,
)
from headscope.table import HeadTable, LensGrid

_EVERY = 4  # positions that a lens reads
_MATTERS = 0.1  # of a ratio between -1 and 1: smaller values are noise


def _weights(model: HeadModel, setting: StudySetting, seed: int) -> HeadTable:
    tokens = setting.size(256, 64)
    return setting.share(
        ("weights", seed), lambda: score_weights(model, tokens=tokens, seed=seed, progress=False)
    )


def _of_heads(table: HeadTable, name: str) -> Float[np.ndarray, " head"]:
    if name not in table:
        raise UnsupportedModelError(f"{name} cannot be computed from its weights.")
    return table[name].mean.ravel()


def _beyond_chance(circuit: str, model: HeadModel, setting: StudySetting) -> Evidence:
    table = _weights(model, setting, setting.seed)
    name = f"{circuit}_outliers"
    values = _of_heads(table, name)
    return paired(values, np.zeros_like(values), note="all heads", results={name: table[name]})


LOW_RANK = Study(
    "low-rank",
    "Low-rank structure in OV and QK circuits",
    "Bhojanapalli et al. 2020, Low-Rank Bottleneck in Multi-head Attention Models, "
    "arXiv 2002.07028; Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
    tuple(
        Claim(
            circuit,
            f"{circuit.upper()} circuits have singular values above those of random weights.",
            f"number of singular values of {circuit.upper()} above those of random factors, mean "
            "over heads",
            "zero, as for random factors of the same shape and variance",
            partial(_beyond_chance, circuit),
            0.5,
            "singular values",
        )
        for circuit in ("ov", "qk")
    ),
    "From weights alone. Random factors have the variance of the model's own weights.",
)


def _eigenvalues(name: str, model: HeadModel, setting: StudySetting) -> Evidence:
    table = _weights(model, setting, setting.seed)
    values = _of_heads(table, name)
    return paired(values, np.zeros_like(values), note="all heads", results={name: table[name]})


EMBEDDING_SPACE = Study(
    "embedding-space",
    "Reading heads in vocabulary space",
    "Dar et al. 2023, Analyzing Transformers in Embedding Space, arXiv 2209.02535; Elhage et al. "
    "2021, A Mathematical Framework for Transformer Circuits",
    (
        Claim(
            "copying",
            "OV circuits raise the logits of attended tokens: heads copy more than chance.",
            "sum of the OV circuit's eigenvalues over the sum of their magnitudes, mean over heads",
            "random weights, whose eigenvalues cancel",
            partial(_eigenvalues, "copying_eigenvalues"),
            _MATTERS,
        ),
        Claim(
            "matching",
            "QK circuits match the query's own token.",
            "sum of the QK circuit's eigenvalues over the sum of their magnitudes, mean over heads",
            "random weights, whose eigenvalues cancel",
            partial(_eigenvalues, "matching_eigenvalues"),
            _MATTERS,
        ),
    ),
    "From weights alone, over the whole vocabulary, with the raw embedding.",
)


def _least_important(model: HeadModel, setting: StudySetting) -> tuple[HeadIndex, ...]:
    """Heads by gradient importance on the first set of texts, least important first."""
    probe = prose(model, setting, seed=setting.seed, length=64)
    return setting.share(
        ("least important",), lambda: one_shot(gradient_importance(model, probe, progress=False))
    )


def _counts(model: HeadModel, setting: StudySetting) -> list[int]:
    """How many heads are removed: up to three tenths of them."""
    shares = (0.1, 0.2, 0.3)[setting.size(0, 1) :]
    return sorted({max(1, round(share * len(model.shape.heads))) for share in shares})


def _pruned(model: HeadModel, setting: StudySetting) -> PruningCurve:
    """Loss without the least important heads, and without as many random ones."""
    probe, _ = skilled(model, setting)
    orders = {"importance": _least_important(model, setting)}
    counts = _counts(model, setting)
    return setting.share(
        ("pruned",),
        lambda: pruning_curve(model, probe, metrics.loss, orders, counts=counts, progress=False),
    )


def _prunable(model: HeadModel, setting: StudySetting) -> Evidence:
    curve, heads = _pruned(model, setting), _counts(model, setting)[-1]
    arms, losses = curve.effects.labels[0], curve.effects.per_example[:, -1]
    random = [arms.index(one) for one in curve.controls]
    return paired(
        losses[arms.index("importance")],
        losses[random].mean(0),
        note=f"{heads} of {len(model.shape.heads)} heads removed",
        results={"pruning": curve},
        less=True,
    )


def _redundant(model: HeadModel, setting: StudySetting) -> Evidence:
    _, losses = skilled(model, setting)
    curve, every = _pruned(model, setting), len(model.shape.heads)
    heads = max(1, round(0.2 * every))
    at = curve.effects.labels[1].index(str(heads))
    rise = curve.effects.per_example[curve.effects.labels[0].index("importance"), at]
    known = math.log(len(ordinary_tokens(model))) - float(np.nanmean(losses))
    return paired(
        rise / known,
        np.full(rise.shape, 0.1),
        note=f"{heads} of {every} heads removed",
        less=True,
    )


SIXTEEN_HEADS = Study(
    "sixteen-heads",
    "How many heads can be pruned",
    "Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv 1905.10650",
    (
        Claim(
            "importance",
            "Removing the least important heads costs less than removing random ones.",
            "rise in loss after removing 30% of the heads, least important first",
            "mean over five random orders",
            _prunable,
            0.0,
            "nats",
        ),
        Claim(
            "redundant",
            "Removing a fifth of the heads costs less than a tenth of the model's gain over "
            "chance.",
            "rise in loss, as a share of the model's gain over chance",
            "one tenth",
            _redundant,
            0.0,
            "share",
        ),
    ),
    "Gradient importance on one set of texts, loss on another; heads are zero-ablated.",
)


def _divergence(
    model: HeadModel, probe: Probe, count: int, lens: ResidualLens | None = None
) -> tuple[Float[np.ndarray, "text row"], LensGrid]:
    """KL divergence between the model and a lens, by text and row, and the first text's grid.

    Only every fourth position is read: projecting every position and row onto the vocabulary would
    cost more than the passes themselves.
    """
    grids = []
    for row in range(min(len(probe), count)):
        tokens = probe.tokens[row, : int(probe.real[row].sum())].tolist()
        places = range(0, len(tokens), _EVERY)
        grids.append(logit_lens(model, tokens, positions=places, k=1, lens=lens))
    return np.array([grid.kl.mean(1) for grid in grids]), grids[0]


def _gradual(model: HeadModel, setting: StudySetting) -> Evidence:
    probe = prose(model, setting, seed=setting.seed + 1, length=48)
    need_skill(model, probe)
    found, grid = _divergence(model, probe, setting.size(12, 6))
    row = max(1, 3 * (len(grid.rows) - 1) // 4)
    return paired(
        found[:, row],
        found[:, 0],
        note=f"after {grid.rows[row]}",
        results={"logit lens": grid},
        less=True,
    )


LOGIT_LENS = Study(
    "logit-lens",
    "Predictions that form layer by layer",
    "nostalgebraist 2020, interpreting GPT: the logit lens; Belrose et al. 2023, Eliciting Latent "
    "Predictions with the Tuned Lens, arXiv 2303.08112",
    (
        Claim(
            "gradual",
            "At three quarters of the depth, the residual stream already predicts much of the "
            "output.",
            "KL divergence between the model and the logit lens at three quarters of the depth",
            "the same at the embedding",
            _gradual,
            0.1,
            "nats",
        ),
    ),
    "With the model's own final norm and unembedding, on texts that it predicts better than "
    "chance.",
)

# English, French and German words of one meaning and three spellings.
_MEANINGS = (
    ("flower", "fleur", "Blume"), ("water", "eau", "Wasser"), ("house", "maison", "Haus"),
    ("book", "livre", "Buch"), ("dog", "chien", "Hund"), ("tree", "arbre", "Baum"),
    ("bread", "pain", "Brot"), ("milk", "lait", "Milch"), ("night", "nuit", "Nacht"),
    ("day", "jour", "Tag"), ("man", "homme", "Mann"), ("woman", "femme", "Frau"),
    ("child", "enfant", "Kind"), ("king", "roi", "König"), ("city", "ville", "Stadt"),
    ("mountain", "montagne", "Berg"), ("river", "fleuve", "Fluss"), ("sun", "soleil", "Sonne"),
    ("snow", "neige", "Schnee"), ("fire", "feu", "Feuer"), ("heart", "coeur", "Herz"),
    ("head", "tête", "Kopf"), ("eye", "oeil", "Auge"), ("door", "porte", "Tür"),
    ("window", "fenêtre", "Fenster"), ("kitchen", "cuisine", "Küche"), ("bird", "oiseau", "Vogel"),
    ("fish", "poisson", "Fisch"), ("horse", "cheval", "Pferd"), ("cat", "chat", "Katze"),
    ("bridge", "pont", "Brücke"), ("school", "école", "Schule"), ("month", "mois", "Monat"),
    ("year", "année", "Jahr"), ("time", "temps", "Zeit"), ("world", "monde", "Welt"),
    ("word", "mot", "Wort"), ("friend", "ami", "Freund"), ("death", "mort", "Tod"),
    ("life", "vie", "Leben"),
)  # fmt: skip
_LEAST_WORDS, _KNOWN = 12, 0.2  # words; probability of their translations


def _translated(model: HeadModel, setting: StudySetting) -> tuple[Probe, list[tuple[int, int]]]:
    """French words to translate into German, with the English and German token of each."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UnsupportedModelError("it has no tokenizer, and this study needs words.")

    def token(word: str) -> int:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else -1

    words = {
        f" {german}": (french, token(english), token(german))
        for english, french, german in _MEANINGS
        if min(token(english), token(german)) >= 0
    }
    if len(words) < _LEAST_WORDS:
        raise UnsupportedModelError(
            f"{len(words)} of {len(_MEANINGS)} words are single tokens of its tokenizer in English "
            f"and in German: this study needs {_LEAST_WORDS}."
        )
    shown = [(one[0], label) for label, one in words.items()]
    probe = in_context(
        model, shown, template="Français: {text} - Deutsch:{label}\n", shots=4,
        batch=min(len(shown), setting.size(32, 16)), seed=setting.seed,
    )  # fmt: skip
    said = float(np.nanmean(metric_of(model, probe, metrics.answer_probability)))
    if said < _KNOWN:
        raise UnsupportedModelError(
            f"it gives the German words a probability of only {said:.2f}, with four translations "
            "as demonstrations."
        )
    german = [label for _, label in shown]
    return probe, [words[german[int(one)]][1:] for one in probe.facts["class"]]


def _through_english(model: HeadModel, setting: StudySetting) -> Evidence:
    probe, words = _translated(model, setting)
    found, grids = [], []
    for row, (english, german) in enumerate(words):
        tokens = probe.tokens[row][probe.real[row]].tolist()
        other = words[(row + 1) % len(words)][0]
        last = [len(tokens) - 1] * 3
        grids.append(
            logit_lens(model, tokens, positions=last, target=[english, german, other], k=1)
        )
        found.append(grids[-1].target_log_prob)
    likely = np.stack(found, 1)[1:-1]  # between the embedding and the end
    if len(likely) == 0:
        raise UnsupportedModelError("it has a single layer, with nothing in between.")
    values, control = likely[..., 0], likely[..., 1:].max(-1)
    place = int((values - control)[:, ::2].mean(1).argmax())
    return paired(
        values[place, 1::2],
        control[place, 1::2],
        note=f"after {grids[0].rows[1 + place]}",
        results={"logit lens": grids[1]},
    )


LATENT_LANGUAGE = Study(
    "latent-language",
    "English as a latent language between French and German",
    "Wendler et al. 2024, Do Llamas Work in English? On the Latent Language of Multilingual "
    "Transformers, arXiv 2402.10588",
    (
        Claim(
            "english",
            "In some middle layer, the English word is more likely than the German word to be "
            "output.",
            "log-probability of the English word in the logit lens, after the layer chosen on "
            "other words",
            "that of the German word, or of another word's English translation if that is more "
            "likely",
            _through_english,
            MATTERS,
            "nats",
        ),
    ),
    "French words to translate into German after four demonstrations, if the English and the "
    "German word are single tokens; the paper also counts tokens that begin a word. For models "
    "that can translate.",
)


def _shortcut(model: HeadModel, setting: StudySetting) -> Evidence:
    probe = prose(model, setting, seed=setting.seed + 1, length=48)
    need_skill(model, probe)
    fitted_on = prose(model, StudySetting(seed=setting.seed), seed=setting.seed)
    lens = linear_shortcuts(model, fitted_on, seed=setting.seed, progress=False)
    found, grid = _divergence(model, probe, setting.size(12, 6), lens)
    plain, _ = _divergence(model, probe, setting.size(12, 6))
    row = (len(grid.rows) - 1) // 2
    return paired(
        found[:, row],
        plain[:, row],
        note=f"from {grid.rows[row]}",
        results={"linear shortcut": grid},
        less=True,
    )


SHORTCUTS = Study(
    "linear-shortcuts",
    "Linear shortcuts across layers",
    "Din et al. 2024, Jump to Conclusions, arXiv 2303.09435",
    (
        Claim(
            "shortcut",
            "From half the depth, a linear map comes closer to the model's prediction than the "
            "residual stream itself.",
            "KL divergence between the model and the prediction through the linear map, on other "
            "texts",
            "the same without the map",
            _shortcut,
            0.1,
            "nats",
        ),
    ),
    "Fitted by least squares on other texts; tested on texts that the model predicts better than "
    "chance.",
)


def _anisotropy(model: HeadModel, setting: StudySetting) -> Evidence:
    probe = prose(model, setting, seed=setting.seed + 1, length=64)
    need_skill(model, probe)
    table = layers(model, probe, measures=["mean_cosine"], progress=False)
    values = table["mean_cosine"].per_text
    return paired(
        values[1:-1].mean(0) if len(values) > 2 else values[-1],
        values[0],
        note="mean over layers between the embedding and the last",
        results={"layers": table},
    )


GEOMETRY = Study(
    "hidden-geometry",
    "Anisotropy of hidden states",
    "Ethayarajh 2019, How Contextual are Contextualized Word Representations?, arXiv 1909.00512; "
    "Skean et al. 2025, Layer by Layer, arXiv 2502.02013",
    (
        Claim(
            "anisotropy",
            "Hidden states of different tokens are more similar in direction than their "
            "embeddings.",
            "mean cosine between the hidden states of a text's tokens",
            "the same for the embeddings",
            _anisotropy,
            0.05,
            "cosine",
        ),
    ),
    "The first token of each text is left out: as an attention sink, its norm dwarfs all others.",
)
ALL = (
    LOW_RANK, EMBEDDING_SPACE, SIXTEEN_HEADS, LOGIT_LENS, LATENT_LANGUAGE, SHORTCUTS, GEOMETRY,
)  # fmt: skip
