"""Results from weights alone: scores of pairs of heads, spectra, and the card of one head."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Complex, Float

from headscope.base.files import Saved, read_only, whole_file
from headscope.base.result import Glance, Shown, Tabular, number, reasons, sizes
from headscope.base.specs import Provenance, ScoreSpec, Specified, specified
from headscope.base.statistics import top_order
from headscope.errors import InputError
from headscope.heads import HeadIndex

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class PairScores(Specified, Saved, Shown, Tabular):
    """One score for every ordered pair of heads.

    Attributes:
        spec: declaration of the score.
        values: value of the pair (first layer, first head, second layer, second head).
        upward: whether only pairs with the first head in a lower layer exist; other cells are 0.
        provenance: where it came from.
    """

    spec: ScoreSpec
    values: Float[np.ndarray, "layer head layer head"]
    upward: bool = True
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check the shape; freeze the array."""
        shape = self.values.shape
        if len(shape) != 4 or shape[:2] != shape[2:]:
            raise InputError(f"{self.name!r} is [layer head layer head]; got shape {shape}.")
        object.__setattr__(self, "values", read_only(self.values, np.float64))

    @classmethod
    def _of_parts(cls, parts: dict[str, Any]) -> "PairScores":
        return cls(**specified(parts))

    @property
    def present(self) -> Bool[np.ndarray, "layer head layer head"]:
        """Mask of pairs that exist and have a value."""
        known: np.ndarray = ~np.isnan(self.values)
        if not self.upward:
            return known
        layers = np.arange(self.values.shape[0])
        below: np.ndarray = (layers[:, None] < layers)[:, None, :, None]
        known &= below
        return known

    def top(self, k: int = 10) -> list[tuple[HeadIndex, HeadIndex, float]]:
        """The k largest existing pairs, largest first; on ties the lowest heads."""
        masked = np.where(self.present, self.values, np.nan)
        found = np.unravel_index(top_order(masked, k), masked.shape)
        return [
            (HeadIndex(i, j), HeadIndex(m, n), float(self.values[i, j, m, n]))
            for i, j, m, n in zip(*(axis.tolist() for axis in found), strict=True)
        ]

    def glance(self) -> Glance:
        """Show the largest pairs."""
        layers, heads = self.values.shape[:2]
        return Glance(
            self.name,
            [
                f"{int(self.present.sum()):,} pairs of heads",
                sizes(("layer", "head"), (layers, heads)),
                self.unit,
                self.provenance.model,
            ],
            ("first", "second", "value"),
            [(str(one), str(other), number(value)) for one, other, value in self.top(10)],
            hint="hs.plots.composition_matrix(pairs), hs.plots.composition_graph(pairs)",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per existing pair: first, second (``L0H1``), their numbers, and the value."""
        import pandas

        axes = np.nonzero(self.present)
        names = ("first_layer", "first_head", "second_layer", "second_head")
        columns: dict[str, object] = dict(zip(names, axes, strict=True))
        for side, at in (("first", axes[:2]), ("second", axes[2:])):
            columns[side] = [f"L{layer}H{head}" for layer, head in zip(*at, strict=True)]
        return pandas.DataFrame({**columns, "score": self.name, "value": self.values[axes]})


@dataclass(frozen=True, eq=False, repr=False)
class HeadSpectra(Saved, Shown):
    """Singular values of every head, with those of random factors of the same shape and variance.

    Attributes:
        name: name of the circuit, e.g. ``OV``.
        values: singular values, largest first; NaN in layers without attention.
        scale: largest singular value of random factors of the head's own shape and variance,
            averaged over draws.
        low: smallest value at each rank over those draws, in units of ``scale``.
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
            object.__setattr__(self, name, read_only(getattr(self, name), np.float64))

    def glance(self) -> Glance:
        """Show the heads with the largest singular value, relative to chance."""
        return Glance(
            f"{self.name} singular values",
            [sizes(("layer", "head", "value"), self.values.shape), self.provenance.model],
            ("head", "largest over chance"),
            _largest(self.relative[..., 0]),
            hint="hs.plots.spectra(spectra, ['L5H1'])",
        )

    @property
    def relative(self) -> Float[np.ndarray, "layer head rank"]:
        """Singular values in units of each head's scale; NaN for an all-zero head."""
        scale = np.where(self.scale > 0, self.scale, np.nan)
        ratio: np.ndarray = self.values / scale[..., None]
        return ratio


@dataclass(frozen=True, eq=False, repr=False)
class HeadEigenvalues(Saved, Shown):
    """Nonzero eigenvalues of every head's token-to-token matrix.

    Attributes:
        name: name of the circuit, e.g. ``OV``.
        values: eigenvalues, unordered; NaN in layers without attention.
        description: what the matrix is.
        provenance: where it came from.
    """

    name: str
    values: Complex[np.ndarray, "layer head rank"]
    description: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Freeze the array."""
        object.__setattr__(self, "values", read_only(self.values, np.complex128))

    def glance(self) -> Glance:
        """Show the heads with the largest ratio."""
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
        """Copying score ``sum(Re(lambda)) / sum(|lambda|)``, in [-1, 1]; NaN for a zero matrix."""
        size = np.abs(self.values).sum(-1)
        ratio: np.ndarray = self.values.real.sum(-1) / np.where(size > 0, size, np.nan)
        return ratio

    @property
    def relative(self) -> Complex[np.ndarray, "layer head rank"]:
        """Eigenvalues divided by their head's largest modulus; NaN for a zero matrix."""
        most = np.abs(self.values).max(-1, keepdims=True)
        ratio: np.ndarray = self.values / np.where(most > 0, most, np.nan)
        return ratio


def _largest(values: Float[np.ndarray, "layer head"]) -> list[tuple[str, str]]:
    places = zip(*np.unravel_index(top_order(values, 6), values.shape), strict=True)
    return [
        (str(HeadIndex(int(layer), int(head))), number(float(values[layer, head])))
        for layer, head in places
    ]


_KEY = "headscope"
_ARRAYS = ("values", "scale", "low", "high")
_MAX_BYTES = 200_000_000


def save_spectra(spectra: Sequence[HeadSpectra], path: "str | PathLike[str]") -> None:
    """Write spectra of one model to a file, atomically."""
    from safetensors.numpy import save

    arrays = {
        f"{i}.{name}": getattr(one, name).astype("float32")
        for i, one in enumerate(spectra)
        for name in _ARRAYS
    }
    facts = [
        {"name": one.name, "chance": one.chance, "provenance": one.provenance.to_json()}
        for one in spectra
    ]
    made = save(arrays, metadata={_KEY: json.dumps(facts)})
    with whole_file(Path(path)) as file:
        file.write(made)


def load_spectra(path: "str | PathLike[str]") -> list[HeadSpectra]:
    """Read spectra written by :func:`save_spectra`.

    Raises:
        InputError: if the file holds no spectra.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise InputError(f"{str(file)!r} is larger than any file of spectra.")
        with safe_open(file, framework="numpy") as opened:
            facts = json.loads((opened.metadata() or {})[_KEY])
            return [
                HeadSpectra(
                    name=str(one["name"]),
                    chance=str(one["chance"]),
                    provenance=Provenance.from_json(one["provenance"]),
                    **{
                        name: opened.get_tensor(f"{i}.{name}").astype("float64") for name in _ARRAYS
                    },
                )
                for i, one in enumerate(facts)
            ]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(file)!r} holds no spectra: {error!r}.") from None


# What a card without ranks says of them.
NO_RANKS = (
    "No ranks by weights: that takes scores of all heads; "
    "hs.explain(head, model, ranks=True) or headscope head --ranks has them."
)
_TOLD = ("copying_eigenvalues", "copying_top5", "matching_eigenvalues", "ov_effective_rank")


@dataclass(frozen=True, repr=False)
class HeadCard(Saved, Shown):
    """What the weights of one head tell, as JSON values.

    Attributes:
        head: ``L5H1``.
        kv_head: key/value head that it reads.
        model: name.
        scores: value of every weight score.
        ranks: rank of the head among all heads by each score, 1 the largest; empty if no other head
            was scored.
        ov: largest directions of the OV circuit with the tokens read and written.
        qk: the same for the QK circuit: tokens of the query and of the key.
        fed_by: per kind of composition, the earlier heads that feed it most.
        feeds: per kind, the later heads that it feeds most.
        missing: what this model family does not allow, with the reason.
    """

    head: str
    kv_head: int
    model: str
    scores: Mapping[str, float]
    ranks: Mapping[str, int]
    ov: list[dict[str, Any]]
    qk: list[dict[str, Any]]
    fed_by: Mapping[str, list[tuple[str, float]]]
    feeds: Mapping[str, list[tuple[str, float]]]
    missing: Mapping[str, str]

    def glance(self) -> Glance:
        """Show copying scores, what the head reads and writes, and its partners."""
        rows = [(name, number(self.scores[name])) for name in _TOLD if name in self.scores]
        for circuit, between, views in (
            ("OV", "reads → writes", self.ov),
            ("QK", "asks → finds", self.qk),
        ):
            for view in views[:2]:
                sides = (" ".join(view[side][0][:4]) for side in ("reads", "writes"))
                rows.append((f"{circuit} {between}", " → ".join(sides)))
        for title, partners in (("fed by", self.fed_by), ("feeds", self.feeds)):
            for mode, found in partners.items():
                if found:
                    heads = ", ".join(f"{one} {value:.2f}" for one, value in found[:3])
                    rows.append((f"{title} ({mode})", heads))
        rows += [(f"no {names}", why) for names, why in reasons(self.missing, self.model)]
        return Glance(
            f"head {self.head}",
            [f"key/value head {self.kv_head}", f"{len(self.scores)} weight scores", self.model],
            ("what", ""),
            rows,
            hint=f"card.to_json(), hs.explain({self.head!r}, model)",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the card as a JSON object."""
        return asdict(self)
