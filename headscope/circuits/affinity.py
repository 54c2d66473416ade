"""How far the subspace that one head writes is the one that a later head reads."""

import torch

from headscope.circuits.composition import operands
from headscope.circuits.orthogonal import column_space
from headscope.circuits.reading import over_all_pairs, upward
from headscope.models.protocol import HeadModel
from headscope.origin import of_weights
from headscope.table import PairScores


def subspace_affinity(model: HeadModel, mode: str, fold_norm: bool = True) -> PairScores:
    """Overlap of every head's write subspace with every later head's read subspace.

    ``|P.T @ Q|_F^2 / min(rank)`` with P and Q orthonormal bases of what the rows of ``W_O`` and the
    columns of the later head's ``W_Q``, ``W_K`` or ``W_V`` span: the mean squared cosine of their
    principal angles. Range [0, 1]; by chance d_head / d_model where both have full rank. Unlike
    composition it counts all directions of a subspace alike. Heads that share keys and values
    have equal entries.

    Source: the projection kernel of Grassmann learning (Hamm and Lee 2008).

    Example:
        >>> pairs = hs.circuits.subspace_affinity(model, "K")
        >>> pairs.values.ndim
        4
    """
    writer, reader = operands(model, mode, fold_norm)
    written, writes = column_space(writer.right.mT)
    read, reads = column_space(reader.left)
    size = written.shape[-1]
    layers, heads = written.shape[:2]
    rows = written.permute(0, 1, 3, 2).flatten(1, 2)
    values = written.new_zeros(layers, heads, layers, heads)
    for later in range(1, layers):
        columns = read[later].transpose(0, 1).flatten(1)
        product = (rows[:later] @ columns).square_()
        shared = product.view(later, heads, size, -1, read.shape[-1]).sum((2, 4))
        shared = shared / torch.minimum(writes[:later, :, None], reads[later]).clamp_min(1)
        values[:later, :, later] = shared.repeat_interleave(heads // shared.shape[-1], dim=-1)
    values = torch.where(upward(writer.layers), values.cpu(), 0.0)
    return PairScores(
        f"{mode}_affinity",
        over_all_pairs(model, values, writer.layers),
        unit="share of subspace",
        bounds=(0.0, 1.0),
        description="the later head reads the subspace that the earlier head writes",
        source="projection kernel, Hamm and Lee 2008",
        provenance=of_weights(model, circuit="affinity", mode=mode, fold_norm=fold_norm),
    )
