"""Whether a head raises the logits of the tokens that it attends to."""

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.outputs import HeadOutputs
from headscope.probes.probe import Probe
from headscope.scorer import output_scorer


@output_scorer(
    needs=("attention_write", "readout"),
    unit="share",
    bounds=(0.0, 1.0),
    source="Olsson et al. 2022 (arXiv 2209.11895), behavioural copying score",
    control=None,
)
def copying(outputs: HeadOutputs, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Of all that a head's write raises, the share that falls on the tokens it attends to.

    ``sum_j A[i, j] up_i(token j) / sum of up_i over the different tokens of the example``, where
    ``up_i(t)`` is the logit that the write ``z_i W_O`` gives token t directly, less its mean
    over the vocabulary, and 0 if that is negative. From 0 (raises other tokens, or none) to 1
    (attends to one token and raises only it), over every query but the first; the source
    stretches the same ratio to [-1, 1]. A head that raises all tokens alike gets 1 over their
    number. It has no null: copying does not depend on repetition.

    Weakness: attention parked on the first token dilutes it, and tokens outside the example are
    not looked at. Only the logits of the example's own tokens are computed.
    """
    tokens, real = probe.tokens, probe.real
    directions = outputs.readout.directions(tokens.where(real, 0)) - outputs.readout.mean_direction
    by_head = torch.einsum("hem,bpm->bhep", outputs.W_O.float(), directions)
    up = torch.matmul(outputs.z.transpose(1, 2), by_head).relu_()
    pattern = outputs.rows.pattern
    attended = (pattern * up[..., : pattern.shape[-1]]).sum(-1)
    raised = torch.linalg.vecdot(up, _first_of_each(probe)[:, None, None].to(up.dtype))
    return torch.where(raised > 0, attended / raised.where(raised > 0, 1), 0).clamp_max(1)


def _first_of_each(probe: Probe) -> Float[Tensor, "batch pos"]:
    """1 where a token (not a structure label) occurs for the first time in its example."""
    order = probe.tokens.masked_fill(~probe.real, -1).sort(dim=1, stable=True)
    new = torch.ones_like(order.values, dtype=torch.bool)
    new[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    new &= order.values >= 0
    first = torch.zeros_like(new).scatter_(1, order.indices, new)
    return first.float()
