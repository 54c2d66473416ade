"""Where heads of vision models look: neighbouring patches, the class token, registers."""

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.errors import InputError
from headscope.probes.probe import Probe
from headscope.scorer import IMAGES, Scorer, queries_with, row_scorer
from headscope.views import AttentionRows

_NEEDS = ("patches", "bidirectional")


def hop_mass(hops: int, *, name: str | None = None, threshold: float | None = None) -> Scorer:
    """Make the scorer of attention between patches ``hops`` apart; its name is ``hop_<n>``.

    ``sum of A[i, j] over the patches j with max(|row_i - row_j|, |column_i - column_j|) = hops``, a
    probability in [0, 1], over every patch i that has such a j. Hop 0 is the patch itself, hop 1
    its 8 neighbours (fewer at the edges), which is ``patch_neighbours``.

    Args:
        hops: Chebyshev distance on the grid of patches.
        name: of the scorer.
        threshold: mean from which a head has the role of this name.

    Weakness: more patches lie at a larger distance; its null, attention spread evenly, says how
    many.

    Raises:
        InputError: if the distance is negative.

    Example:
        >>> hs.scorers.hop_mass(2).name
        'hop_2'
    """
    if hops < 0:
        raise InputError(f"hops={hops}: give 0 (the patch itself) or more.")

    def function(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        apart = _apart(rows, probe).abs().amax(-1)
        patches = _between_patches(rows, probe)
        keys = (apart == hops) & patches
        return rows.mass(keys[None].expand(rows.pattern.shape[0], -1, -1))

    function.__doc__ = f"Attention to patches {hops} rows or columns away."
    return row_scorer(
        name=name or f"hop_{hops}",
        source="Xie et al. 2023 (arXiv 2303.13731), attention by k-hop neighbourhood",
        probe=IMAGES,
        threshold=threshold,
        needs=_NEEDS,
    )(function)


patch_neighbours = hop_mass(1, name="patch_neighbours", threshold=0.5)


@row_scorer(
    source="Darcet et al. 2023 (arXiv 2309.16588), attention to the class token",
    probe=IMAGES,
    queries=queries_with("class"),
    threshold=0.5,
    needs=_NEEDS,
)
def class_token(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention of patches to the class token.

    ``A[i, class]``, a probability in [0, 1], over every patch. The class token's own row is
    left out.

    Weakness: patches park attention there as text models do on the first token.
    """
    return rows.column_mass(probe.mark("class"))


@row_scorer(
    source="Darcet et al. 2023 (arXiv 2309.16588), attention to registers",
    probe=IMAGES,
    queries=queries_with("register"),
    threshold=0.5,
    needs=_NEEDS,
)
def registers(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention of patches to the register tokens, all of them together.

    ``sum of A[i, j] over the registers j``, a probability in [0, 1], over every patch.

    Weakness: as ``class_token``; a model without registers keeps such attention in some patches.
    """
    return rows.column_mass(probe.mark("register"))


def mean_reach(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Mean distance between the middles of patches, over what a patch gives to patches.

    Args:
        rows: of attention.
        probe: of images.
    """
    far = _apart(rows, probe).to(rows.pattern.dtype).norm(dim=-1)
    weight = rows.pattern * _between_patches(rows, probe)
    mean: Tensor = torch.linalg.vecdot(weight, far) / weight.sum(-1)
    return mean


def _apart(rows: AttentionRows, probe: Probe) -> Tensor:
    """Rows and columns of patches between queries and keys."""
    assert probe.grid is not None  # noqa: S101  # check_fits saw to it
    return probe.grid.offsets(rows.query_pos)[:, : rows.pattern.shape[-1]]


def _between_patches(rows: AttentionRows, probe: Probe) -> Tensor:
    """Which pairs of query and key are patches."""
    assert probe.grid is not None  # noqa: S101  # check_fits saw to it
    keys = torch.arange(rows.pattern.shape[-1], device=rows.pattern.device)
    return probe.grid.is_patch(rows.query_pos)[:, None] & probe.grid.is_patch(keys)
