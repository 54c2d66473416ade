"""Token ids of your own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.errors import InputError
from headscope.probes.encoding import next_tokens
from headscope.probes.probe import Probe


def from_tokens(
    tokens: Int[Tensor, "batch pos"] | Sequence[Sequence[int]],
    real: Bool[Tensor, "batch pos"] | None = None,
    marks: Mapping[str, Bool[Tensor, "batch pos"]] | None = None,
    targets: Int[Tensor, "batch pos"] | None = None,
    clusters: Sequence[int] | Int[Tensor, " batch"] | None = None,
) -> Probe:
    """Use your own ids as a probe; equal tokens count as repetitions.

    Args:
        tokens: token ids, as the model reads them (BOS included, if you want one).
        real: False at padding, on either side; None means no padding.
        marks: named sets of positions.
        targets: token to predict at each position, -1 for none; None means the next token.
        clusters: a label per example; those with one label (a needle, a document, a template)
            count as one observation in errors, intervals and tests.

    Raises:
        InputError: if the shapes do not fit each other.

    Example:
        >>> probe = from_tokens([[5, 7, 9, 5, 7, 9]])
        >>> probe.targets.tolist()
        [[7, 9, 5, 7, 9, -1]]
    """
    try:
        ids = torch.as_tensor(tokens).long()
    except (TypeError, ValueError) as error:
        raise InputError(
            "the token rows are not all whole numbers or differ in length: "
            "pad them to one length and say with real= which are tokens."
        ) from error
    shown = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
    probe = Probe(tokens=ids, real=shown, structure=ids, targets=ids, marks=marks or {})
    return replace(
        probe,
        structure=ids.where(shown, -1),
        targets=next_tokens(ids, shown) if targets is None else targets,
        clusters=None if clusters is None else torch.as_tensor(clusters).long(),
    )
