"""Singular values and eigenvalues of every head, with what chance alone would give."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Complex, Float

from headscope.base.glance import Glance, Shown, number, sizes
from headscope.base.saved import Saved
from headscope.base.statistics import top_order
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.table.provenance import Provenance
from headscope.table.summary import frozen


@dataclass(frozen=True, eq=False, repr=False)
class HeadSpectra(Saved, Shown):
    """Singular values of every head beside those of random factors of its shape and variance.

    Attributes:
        name: of the circuit, e.g. ``OV``.
        values: singular values, largest first; NaN in layers without attention.
        scale: largest singular value that random factors of the head's own shape and variance
            give, on average over draws.
        low: smallest value of each place over those draws, in units of ``scale``.
        high: the largest.
        chance: how the band was made, in a few words.
        provenance: where it came from.
    """

    name: str
    values: Float[np.ndarray, "layer head rank"]
    scale: Float[np.ndarray, "layer head"]
    low: Float[np.ndarray, " rank"]
    high: Float[np.ndarray, " rank"]
    chance: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check the shapes; freeze the arrays."""
        layers, heads, rank = self.values.shape
        if self.scale.shape != (layers, heads) or {len(self.low), len(self.high)} != {rank}:
            raise InputError(
                f"{self.name!r}: spectra of shape {self.values.shape} need a scale per head and "
                f"a band of {rank} values."
            )
        for name in ("values", "scale", "low", "high"):
            object.__setattr__(self, name, frozen(getattr(self, name), np.float64))

    def glance(self) -> Glance:
        """Heads with the largest singular value, relative to chance."""
        return Glance(
            f"{self.name} singular values",
            [sizes(("layer", "head", "value"), self.values.shape), self.provenance.model],
            ("head", "largest over chance"),
            _largest(self.relative[..., 0]),
            hint="hs.plots.spectra(spectra, ['L5H1'])",
        )

    @property
    def relative(self) -> Float[np.ndarray, "layer head rank"]:
        """Values in units of each head's scale; NaN for a head of zeros."""
        scale = np.where(self.scale > 0, self.scale, np.nan)
        ratio: np.ndarray = self.values / scale[..., None]
        return ratio


@dataclass(frozen=True, eq=False, repr=False)
class HeadEigenvalues(Saved, Shown):
    """Eigenvalues of every head's token-to-token matrix, those that are not 0 by its rank.

    Attributes:
        name: of the circuit, e.g. ``OV``.
        values: eigenvalues, in no order; NaN in layers without attention.
        description: of the matrix.
        provenance: where it came from.
    """

    name: str
    values: Complex[np.ndarray, "layer head rank"]
    description: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Freeze the array."""
        object.__setattr__(self, "values", frozen(self.values, np.complex128))

    def glance(self) -> Glance:
        """Heads with the largest ratio."""
        return Glance(
            f"{self.name} eigenvalues",
            [
                sizes(("layer", "head", "value"), self.values.shape),
                self.description,
                self.provenance.model,
            ],
            ("head", "sum Re / sum abs"),
            _largest(self.ratio),
            hint="hs.plots.eigenvalues(values, ['L5H1'])",
        )

    @property
    def ratio(self) -> Float[np.ndarray, "layer head"]:
        """``sum(Re(lambda)) / sum(|lambda|)``, in [-1, 1]; NaN for a zero matrix."""
        size = np.abs(self.values).sum(-1)
        ratio: np.ndarray = self.values.real.sum(-1) / np.where(size > 0, size, np.nan)
        return ratio

    @property
    def relative(self) -> Complex[np.ndarray, "layer head rank"]:
        """Eigenvalues over the largest modulus of their head; NaN for a zero matrix."""
        most = np.abs(self.values).max(-1, keepdims=True)
        ratio: np.ndarray = self.values / np.where(most > 0, most, np.nan)
        return ratio


def _largest(values: Float[np.ndarray, "layer head"]) -> list[tuple[str, str]]:
    places = zip(*np.unravel_index(top_order(values, 6), values.shape), strict=True)
    return [
        (str(HeadIndex(int(layer), int(head))), number(float(values[layer, head])))
        for layer, head in places
    ]
