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
from headscope.probes import Probe
from headscope.probes.encoding import ordinary_tokens
from headscope.pruning import gradient_importance, one_shot, pruning_curve
from headscope.studies.study import (
    Claim,
    Evidence,
    Study,
    StudySetting,
    need_skill,
    paired,
    prose,
    skilled,
)
from headscope.table import HeadTable, LensGrid

_EVERY = 4  # positions that a lens reads
_MATTERS = 0.1  # of a ratio between -1 and 1: less is chance


def _weights(model: HeadModel, setting: StudySetting, seed: int) -> HeadTable:
    tokens = setting.size(256, 64)
    return setting.share(
        ("weights", seed), lambda: score_weights(model, tokens=tokens, seed=seed, progress=False)
    )


def _of_heads(table: HeadTable, name: str) -> Float[np.ndarray, " head"]:
    if name not in table:
        raise UnsupportedModelError(f"{name} cannot be read from its weights.")
    return table[name].mean.ravel()


def _beyond_chance(circuit: str, model: HeadModel, setting: StudySetting) -> Evidence:
    table = _weights(model, setting, setting.seed)
    name = f"{circuit}_outliers"
    values = _of_heads(table, name)
    return paired(values, np.zeros_like(values), note="all heads", results={name: table[name]})


LOW_RANK = Study(
    "low-rank",
    "Few directions carry what heads read and write",
    "Bhojanapalli et al. 2020, Low-Rank Bottleneck in Multi-head Attention Models, "
    "arXiv 2002.07028; Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
    tuple(
        Claim(
            circuit,
            f"{circuit.upper()} circuits have directions that stand out from random weights.",
            f"singular values of {circuit.upper()} above those of random factors, mean over heads",
            "random factors of the same shapes and sizes, which have none",
            partial(_beyond_chance, circuit),
            0.5,
            "singular values",
        )
        for circuit in ("ov", "qk")
    ),
    "From weights alone. Random factors have the variance of the model's own entries.",
)


def _eigenvalues(name: str, model: HeadModel, setting: StudySetting) -> Evidence:
    table = _weights(model, setting, setting.seed)
    values = _of_heads(table, name)
    return paired(values, np.zeros_like(values), note="all heads", results={name: table[name]})


EMBEDDING_SPACE = Study(
    "embedding-space",
    "Heads read in the space of the vocabulary",
    "Dar et al. 2023, Analyzing Transformers in Embedding Space, arXiv 2209.02535; Elhage et al. "
    "2021, A Mathematical Framework for Transformer Circuits",
    (
        Claim(
            "copying",
            "OV circuits raise the tokens that are attended: heads copy more than chance.",
            "sum of the OV circuit's eigenvalues over the sum of their sizes, mean over heads",
            "random weights, whose eigenvalues cancel",
            partial(_eigenvalues, "copying_eigenvalues"),
            _MATTERS,
        ),
        Claim(
            "matching",
            "QK circuits look for the token that is asked with.",
            "sum of the QK circuit's eigenvalues over the sum of their sizes, mean over heads",
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


def _prunable(model: HeadModel, setting: StudySetting) -> Evidence:
    probe, _ = skilled(model, setting)
    order = _least_important(model, setting)
    heads = max(1, round(0.3 * len(order)))
    curve = pruning_curve(
        model, probe, metrics.loss, {"importance": order}, counts=[heads], progress=False
    )
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
    probe, losses = skilled(model, setting)
    order = _least_important(model, setting)
    heads = max(1, round(0.2 * len(order)))
    curve = pruning_curve(
        model, probe, metrics.loss, {"importance": order}, counts=[heads], random=1, progress=False
    )
    rise = curve.effects.per_example[curve.effects.labels[0].index("importance"), -1]
    known = math.log(len(ordinary_tokens(model))) - float(np.nanmean(losses))
    return paired(
        rise / known,
        np.full(rise.shape, 0.1),
        note=f"{heads} of {len(model.shape.heads)} heads removed",
        less=True,
    )


SIXTEEN_HEADS = Study(
    "sixteen-heads",
    "How many heads a model can do without",
    "Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv 1905.10650",
    (
        Claim(
            "importance",
            "Removing the least important heads costs less than removing random ones.",
            "rise of the loss without three tenths of the heads, least important first",
            "mean of five random orders",
            _prunable,
            0.0,
            "nats",
        ),
        Claim(
            "redundant",
            "A fifth of the heads can go and the model keeps nine tenths of what it knows.",
            "rise of the loss, as a share of what the model gains over chance",
            "one tenth",
            _redundant,
            0.0,
            "share",
        ),
    ),
    "Gradient importance on one set of texts, loss on another; heads are ablated by zero.",
)


def _divergence(
    model: HeadModel, probe: Probe, count: int, lens: ResidualLens | None = None
) -> tuple[Float[np.ndarray, "text row"], LensGrid]:
    """KL divergence of the model from what a lens reads, by text and row; the first text's grid.

    Every fourth position is read: what a vocabulary costs at all of them, and each row, is more
    than the passes themselves.
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
            "Three quarters up the stack the stream already says much of the prediction.",
            "KL divergence of the model from the logit lens at three quarters of the depth",
            "the same at the embedding",
            _gradual,
            0.1,
            "nats",
        ),
    ),
    "The model's own final norm and unembedding, on texts that it predicts.",
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
    "Layers that a matrix can jump over",
    "Din et al. 2024, Jump to Conclusions, arXiv 2303.09435",
    (
        Claim(
            "shortcut",
            "From half the depth, one matrix comes closer to the model's prediction than reading "
            "the stream as it is.",
            "KL divergence of the model from its reading through the matrix, on other texts",
            "the same without the matrix",
            _shortcut,
            0.1,
            "nats",
        ),
    ),
    "Least squares on texts that the model predicts.",
)


def _anisotropy(model: HeadModel, setting: StudySetting) -> Evidence:
    probe = prose(model, setting, seed=setting.seed + 1, length=64)
    need_skill(model, probe)
    table = layers(model, probe, measures=["mean_cosine"], progress=False)
    values = table["mean_cosine"].per_text
    return paired(
        values[1:-1].mean(0) if len(values) > 2 else values[-1],
        values[0],
        note="mean over the places between the embedding and the last",
        results={"layers": table},
    )


GEOMETRY = Study(
    "hidden-geometry",
    "The shape of hidden states",
    "Ethayarajh 2019, How Contextual are Contextualized Word Representations?, arXiv 1909.00512; "
    "Skean et al. 2025, Layer by Layer, arXiv 2502.02013",
    (
        Claim(
            "anisotropy",
            "Hidden states of different tokens point the same way more than their embeddings do.",
            "mean cosine between the states of a text's tokens",
            "the same of the embeddings",
            _anisotropy,
            0.05,
            "cosine",
        ),
    ),
    "The first token of each text is left out: as a sink it dwarfs all others.",
)
ALL = (LOW_RANK, EMBEDDING_SPACE, SIXTEEN_HEADS, LOGIT_LENS, SHORTCUTS, GEOMETRY)
