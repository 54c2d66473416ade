"""All that weights say of all heads, in one go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from headscope.base.glance import Glance, Shown, sizes
from headscope.base.saved import Saved
from headscope.circuits.composition import composition, random_composition
from headscope.circuits.maps import relation_scores
from headscope.circuits.paths import Path, chains
from headscope.circuits.scores import score
from headscope.circuits.spectra import eigenvalues, spectra
from headscope.errors import InputError, UnsupportedModelError
from headscope.models.protocol import HeadModel
from headscope.progress import track
from headscope.table import HeadEigenvalues, HeadSpectra, HeadTable, PairScores

Found = TypeVar("Found")
_MODES = ("Q", "K", "V")
_CIRCUITS = ("OV", "QK")


@dataclass(frozen=True, eq=False, repr=False)
class Survey(Saved, Shown):
    """What the weights of a model say.

    Attributes:
        table: every weight score and relation score.
        pairs: Q-, K- and V-composition, as far as the family allows.
        spectra: singular values of OV and QK.
        eigenvalues: of OV and QK, over the vocabulary with the first MLP's part added.
        paths: strongest chains of heads, by kind.
        missing: what the family does not allow, with the reason.
    """

    table: HeadTable
    pairs: tuple[PairScores, ...]
    spectra: tuple[HeadSpectra, ...]
    eigenvalues: tuple[HeadEigenvalues, ...]
    paths: Mapping[str, list[Path]]
    missing: Mapping[str, str]

    def glance(self) -> Glance:
        """The heads that stand out in each part."""
        rows = []
        for name in ("copying_eigenvalues", "copying_top5", "matching_eigenvalues", "ov_norm"):
            if name in self.table:
                best = ", ".join(f"{head} {value:.2f}" for head, value in self.table.top(name, 3))
                rows.append((name, best))
        for pairs in self.pairs:
            found = (f"{one} → {other} {value:.2f}" for one, other, value in pairs.top(3))
            rows.append((pairs.name, ", ".join(found)))
        rows += [(f"paths: {kind}", str(found[0])) for kind, found in self.paths.items() if found]
        rows += [(f"no {name}", why) for name, why in self.missing.items()]
        facts = [sizes(("layer", "head"), self.table.shape), f"{len(self.table)} weight scores"]
        model = next(iter(self.table.values())).provenance.model
        return Glance(
            "survey of weights",
            [*facts, model],
            ("part", "strongest"),
            rows,
            hint="survey.table.to_pandas_wide(), hs.plots.composition_graph(survey.pairs)",
        )


def survey(
    model: HeadModel,
    *,
    tokens: int = 256,
    paths: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> Survey:
    """Read the weights of every head: scores, compositions, spectra, eigenvalues, paths.

    Args:
        model: any model; what its family does not allow is left out and told in ``missing``.
        tokens: see :func:`headscope.circuits.score`.
        paths: chains of each kind.
        seed: of what is drawn.
        progress: show a progress bar. None: only in a terminal or notebook.

    Raises:
        UnsupportedModelError: if the weights say nothing alone.

    Example:
        >>> found = hs.circuits.survey(model, tokens=32, paths=2)
        >>> dict(found.missing)  # this family allows everything
        {}
    """
    missing: dict[str, str] = {}
    with track(9, "reading weights", show=progress) as advance:

        def tried(name: str, work: Callable[[], Found]) -> list[Found]:
            try:
                return [work()]
            except UnsupportedModelError as error:
                missing[name] = str(error)
            except InputError as error:  # no relation has enough single-token pairs
                if name != "relations":
                    raise
                missing[name] = str(error)
            finally:
                advance()
            return []

        table = score(model, tokens=tokens, seed=seed)
        advance()
        for more in tried("relations", lambda: relation_scores(model)):
            table = table.join(more)
        pairs, singular, complex_values = [], [], []
        for mode in _MODES:
            pairs += tried(f"{mode}_composition", partial(composition, model, mode))
        for circuit in _CIRCUITS:
            singular += tried(f"{circuit}_spectra", partial(spectra, model, circuit, seed=seed))
            complex_values += tried(
                f"{circuit}_eigenvalues", partial(eigenvalues, model, circuit, "mlp")
            )
    return Survey(
        table,
        tuple(pairs),
        tuple(singular),
        tuple(complex_values),
        _paths(model, pairs, paths),
        missing,
    )


def _paths(model: HeadModel, pairs: list[PairScores], count: int) -> dict[str, list[Path]]:
    """Chains of two heads through keys, of two, and of three; none where there are no pairs."""
    if not pairs:
        return {}
    chance = random_composition(model)
    keys = [one for one in pairs if one.name.startswith("K")]
    return {
        "two heads, keys only": chains(keys, chance, count, 2),
        "two heads": chains(pairs, chance, count, 2),
        "three heads": chains(pairs, chance, count, 3),
    }
