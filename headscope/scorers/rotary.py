"""Which rotary frequencies make a head's scores with far tokens."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.errors import InputError
from headscope.probes.probe import Probe
from headscope.scorer import match_scorer
from headscope.scorers.retrieval import answering
from headscope.views.qk import Matches, Rotation


@match_scorer(
    unit="correlation",
    bounds=(-1.0, 1.0),
    source="Hong et al. 2024 (arXiv 2410.08703), positional heads, by contribution of dimensions",
    queries=answering,
    needs=("rotary", "causal"),
)
def rotary_slowness(seen: Matches, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Correlation, over rotary planes, of slowness and of what a plane adds to far scores.

    Plane p adds ``c_p(i, j) = q_a k_a + q_b k_b`` over its two coordinates, after rotation. Its
    share is the mean of ``|c_p|`` over the keys in the farther half of what the query sees,
    over the sum of all planes' means. The score is Pearson's correlation of that share with the
    planes' rank from the fastest to the slowest, in [-1, 1], over the positions that predict the
    answer. Towards 1 a head's far attention rests on slow planes (content), towards -1 on fast
    ones (exact distance). NaN in layers without rotary positions (some of cohere2's or smollm3's).
    ``headscope.retrieval.rotary_contributions`` gives the shares.

    Weakness: large contributions that cancel count, and dimensions that are not rotated do not.
    """
    share = plane_shares(seen, far_keys(seen))
    if share.shape[-1] < 2:  # a correlation needs two
        return share.new_full(share.shape[:-1], torch.nan)
    order = turning(seen).frequency.abs().argsort(descending=True)
    share = share[..., order.to(share.device)]
    rank = torch.arange(share.shape[-1], device=share.device, dtype=share.dtype)
    rank, share = rank - rank.mean(), share - share.mean(-1, keepdim=True)
    size = (rank.square().sum() * share.square().sum(-1)).sqrt()
    found = (share * rank).sum(-1) / size.where(size > 0, torch.nan)
    return found.clamp(-1, 1)


def turning(seen: Matches) -> Rotation:
    """Rotary positions of the layer, which the engine hands over to scorers that need them."""
    if seen.rotation is None:
        raise InputError("the scorer must say needs=('rotary',) to be told of the rotation.")
    return seen.rotation


def far_keys(seen: Matches) -> Bool[Tensor, "batch query key"]:
    """Keys in the farther half of what each query sees."""
    keys = torch.arange(seen.visible.shape[-1], device=seen.visible.device)
    first = seen.visible.int().argmax(-1)
    middle = first + (seen.query_pos - first) / 2
    return seen.visible & (keys < middle[..., None])


def plane_shares(
    seen: Matches, keys: Bool[Tensor, "batch query key"]
) -> Float[Tensor, "batch head query plane"]:
    """Share of each rotary plane in the size of the scores with some keys; NaN without keys."""
    weights = keys[:, None].to(seen.key.dtype)
    sizes = []
    if not turning(seen).first:  # a layer without rotary positions
        return seen.query.new_zeros(*seen.query.shape[:3], 0)
    for plane in zip(turning(seen).first, turning(seen).second, strict=True):
        at = torch.tensor(plane, device=seen.key.device)
        sizes.append(torch.linalg.vecdot(seen.products(at).abs(), weights))
    stacked = torch.stack(sizes, -1)
    total = stacked.sum(-1, keepdim=True)
    return stacked / total.where(total > 0, torch.nan)
