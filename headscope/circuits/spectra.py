"""Singular values and eigenvalues of all heads as numbers, for tables and pictures."""

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from headscope.circuits.factors import HeadFactors
from headscope.circuits.measures import token_cores
from headscope.circuits.ov_qk import ov, qk
from headscope.circuits.scores import entry_sizes
from headscope.circuits.singular_values import product_spectra
from headscope.circuits.vocabulary import Dictionary, Embedding, Gram
from headscope.errors import InputError, nearest
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import of_weights
from headscope.table import HeadEigenvalues, HeadSpectra

_DRAWS = 64
_BETWEEN = {"OV": "token to logit", "QK": "query token to key token"}
_SEEN = {"raw": "raw embedding", "mlp": "first MLP added", "mlp_only": "first MLP alone"}


@own_types()
def spectra(
    model: HeadModel, circuit: str = "OV", fold_norm: bool = True, *, seed: int = 0
) -> HeadSpectra:
    """Singular values of every head, and the band in which random factors would put them.

    The band is that of products of two Gaussian factors, each with the shape and the variance of
    the head's own: smallest and largest of 64 draws, place by place. It is not Marchenko and
    Pastur's law, which holds for one factor and not for a product. QK at distance 0 under rotary
    positions.

    Args:
        model: any model that has this circuit.
        circuit: ``OV`` or ``QK``.
        fold_norm: fold the norm before attention.
        seed: of the draws.

    Raises:
        UnsupportedModelError: where weights alone do not give the circuit.

    Example:
        >>> found = hs.circuits.spectra(model, "QK")
        >>> found.values.shape == (model.shape.n_layers, model.shape.n_heads, model.shape.d_head)
        True
    """
    factors = _factors(model, circuit, fold_norm)
    width, rank = factors.left.shape[-2:]
    drawn = product_spectra(width, rank, width, _DRAWS, seed)
    largest = drawn[:, 0].mean()
    relative = (drawn / largest).numpy()
    return HeadSpectra(
        circuit,
        _by_layer(model, factors, factors.singular_values()),
        _by_layer(model, factors, entry_sizes(factors).cpu().double() * float(largest)),
        low=relative.min(0),
        high=relative.max(0),
        chance=f"products of Gaussian factors of the same shape and variance, {_DRAWS} draws",
        provenance=of_weights(model, circuit=circuit, fold_norm=fold_norm, draws=_DRAWS, seed=seed),
    )


@own_types()
def eigenvalues(
    model: HeadModel, circuit: str = "OV", embedding: Embedding = "raw"
) -> HeadEigenvalues:
    """Eigenvalues behind the copying (OV) and matching (QK) scores of every head.

    Those of ``E @ W_V @ W_O @ W_U.T`` (token to logit) or ``E @ W_Q @ W_K.T @ E.T`` (query token to
    key token, mean over the vocabulary removed) that are not 0 by rank; see
    :func:`copying_eigenvalues`, whose value is their ratio.

    Args:
        model: any model that has this circuit.
        circuit: ``OV`` or ``QK``.
        embedding: what tokens look like: ``raw``, ``mlp`` or ``mlp_only``.

    Example:
        >>> found = hs.circuits.eigenvalues(model)
        >>> found.values.shape[:2] == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    factors = _factors(model, circuit, True)
    words = Dictionary(model, embedding)
    kind: Gram = "output_input" if circuit == "OV" else "input"
    values = torch.linalg.eigvals(token_cores(factors, words, kind).cpu().double())
    return HeadEigenvalues(
        circuit,
        _by_layer(model, factors, values),
        description=f"{_BETWEEN[circuit]}, {_SEEN[embedding]}",
        provenance=of_weights(model, circuit=circuit, embedding=embedding, fold_norm=True),
    )


def _factors(model: HeadModel, circuit: str, fold_norm: bool) -> HeadFactors:
    if circuit == "OV":
        return ov(model, fold_norm)
    if circuit == "QK":
        return qk(model, fold_norm, 0 if fold_norm else None)
    raise InputError(nearest(str(circuit), ["OV", "QK"], kind="circuit"))


def _by_layer(
    model: HeadModel, factors: HeadFactors, values: Tensor
) -> Shaped[np.ndarray, "layer head *rest"]:
    """Values of the layers that have attention, over the model's own layer numbers."""
    found = values.detach().cpu().numpy()
    result = np.full((model.shape.n_layers, *found.shape[1:]), np.nan, found.dtype)
    result[list(factors.layers)] = found
    return result
