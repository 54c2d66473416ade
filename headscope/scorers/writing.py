"""What heads write: its size, the logits it moves directly, and whether it copies tokens.

Also a needle's contribution to the answer (attention and value together), and the sensitivity of
the loss to a head.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from headscope import metrics
from headscope.probes.probe import Probe
from headscope.scorer import (
    all_queries,
    contrasting_queries,
    gradient_scorer,
    output_scorer,
    predicting_queries,
)
from headscope.scorers.retrieval import answering, unless_hidden
from headscope.views import HeadGradients, HeadOutputs


@output_scorer(
    needs=("attention_write",),
    unit="norm",
    bounds=(0.0, None),
    source="Kobayashi et al. 2020 (arXiv 2004.10102), norm of a head's output",
    probe="text",
    control=None,
)
def head_output_norm(outputs: HeadOutputs, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Euclidean norm of the head's write to the residual stream.

    ``|z_i W_O|``, from 0, over every query but the first.

    Weakness: residual streams grow with depth, so lengths compare within a layer. The bias of the
    output projection is not part of a head and is left out.
    """
    return outputs.norm()


@output_scorer(
    needs=("attention_write", "unembedding"),
    unit="logits",
    source="Elhage et al. 2021, direct path; nostalgebraist 2020, logit lens, with frozen scale",
    queries=predicting_queries,
    per_final_scale=True,
)
def direct_logit_attribution(
    outputs: HeadOutputs, probe: Probe
) -> Float[Tensor, "batch head query"]:
    """Direct contribution of a head's write to the target's logit minus the average logit.

    ``z_i W_O . (d_target - mean over the vocabulary of d) / scale_i``, where ``d_t`` is the
    residual direction of token t's logit and ``scale_i`` the final norm's denominator in this
    run, held fixed; in logits, any sign, over the queries with a target (in the second copy,
    where there is one). The average is taken off because a write that raises all logits alike
    changes no prediction. Summed over all that is written, with the embedding, it gives the
    logit above the average logit.

    Where a norm follows attention (gemma2, gemma3, olmo2) its scale at query i is held fixed as
    well, and its gain is part of ``W_O``, which keeps the sum over heads exact; as
    ``hs.lens.attribute``.

    Weakness: the direct path only; what later layers make of the write is not seen. Before a
    soft cap of the logits, where there is one.
    """
    target = probe.targets[:, outputs.query_pos]
    unembedding = outputs.unembedding
    direction = unembedding.directions(target.clamp_min(0)) - unembedding.mean_direction
    return outputs.along(direction).masked_fill((target < 0)[:, None], torch.nan)


@output_scorer(
    needs=("attention_write", "unembedding"),
    unit="logits",
    source="Wang et al. 2022 (arXiv 2211.00593), direct effect on the logit difference",
    queries=contrasting_queries,
    probe="ioi",
    control=None,
    per_final_scale=True,
)
def direct_logit_difference(
    outputs: HeadOutputs, probe: Probe
) -> Float[Tensor, "batch head query"]:
    """Direct contribution of a head's write to the target's logit minus the foil's.

    ``z_i W_O . (d_target - d_foil) / scale_i``, in logits, any sign, over the queries that have
    both; see ``direct_logit_attribution``.

    Weakness: the direct path only, and only as good as the choice of the foil.
    """
    target = probe.targets[:, outputs.query_pos]
    foil = torch.full_like(target, -1) if probe.foils is None else probe.foils[:, outputs.query_pos]
    unembedding = outputs.unembedding
    direction = unembedding.directions(target.clamp_min(0)) - unembedding.directions(
        foil.clamp_min(0)
    )
    return outputs.along(direction).masked_fill(((target < 0) | (foil < 0))[:, None], torch.nan)


@output_scorer(
    needs=("attention_write", "unembedding", "text"),
    unit="share",
    bounds=(0.0, 1.0),
    source="Olsson et al. 2022 (arXiv 2209.11895), behavioural copying score",
    control=None,
)
def copying(outputs: HeadOutputs, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Share of a head's logit increases that falls on the tokens it attends to.

    ``sum_j A[i, j] up_i(token j) / sum of up_i over the different tokens of the example``, where
    ``up_i(t)`` is the logit that the write ``z_i W_O`` gives token t directly, minus its mean over
    the vocabulary, and 0 if that is negative. From 0 (raises other tokens, or none) to 1 (attends
    to one token and raises only it), over every query but the first; the source stretches the same
    ratio to [-1, 1]. A head that raises all tokens alike gets 1 over their number. It has no null:
    copying does not depend on repetition.

    Weakness: attention parked on the first token dilutes it, and tokens outside the example are
    not looked at. Only the logits of the example's own tokens are computed.
    """
    tokens, real = probe.tokens, probe.real
    directions = (
        outputs.unembedding.directions(tokens.where(real, 0)) - outputs.unembedding.mean_direction
    )
    by_head = torch.einsum("hem,bpm->bhep", outputs.W_O.float(), directions)
    up = torch.matmul(outputs.z.transpose(1, 2), by_head).relu_()
    pattern = outputs.rows.pattern
    attended = (pattern * up[..., : pattern.shape[-1]]).sum(-1)
    raised = torch.linalg.vecdot(up, _first_of_each(probe)[:, None, None].to(up.dtype))
    return torch.where(raised > 0, attended / raised.where(raised > 0, 1), 0).clamp_max(1)


def _first_of_each(probe: Probe) -> Float[Tensor, "batch pos"]:
    """1 where a token (not a structure label) first occurs in its example."""
    order = probe.tokens.masked_fill(~probe.real, -1).sort(dim=1, stable=True)
    new = torch.ones_like(order.values, dtype=torch.bool)
    new[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    new &= order.values >= 0
    first = torch.zeros_like(new).scatter_(1, order.indices, new)
    return first.float()


_NEEDS = ("attention_write", "unembedding", "values", "causal")


@output_scorer(
    unit="logits",
    source="LOCOS (arXiv 2607.01002), write-aware retrieval: the needle's part",
    queries=answering,
    probe="needle",
    control="needle",
    per_final_scale=True,
    needs=_NEEDS,
)
def needle_write(outputs: HeadOutputs, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Contribution to the answer's logit of what the head reads from the needle.

    ``sum over needle keys j of A[i, j] v_j W_O . (d_target - mean over the vocabulary of d) /
    scale_i``, in logits, any sign, over the positions that predict the answer; ``d_t`` is the
    residual direction of token t's logit and ``scale_i`` the final norm's denominator, held
    fixed. It is the needle's share of ``direct_logit_attribution``. NaN where the layer's window
    hides the needle.

    Weakness: the direct path only; what later layers make of the write is not seen.
    """
    needle = outputs.of_keys(probe.host.mark("needle"))
    return _along_target(replace(outputs, z=needle), outputs, probe)


@output_scorer(
    unit="logits",
    source="LOCOS (arXiv 2607.01002), write-aware retrieval: needle minus the rest",
    queries=answering,
    probe="needle",
    control="needle",
    per_final_scale=True,
    needs=_NEEDS,
)
def needle_write_contrast(outputs: HeadOutputs, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Contribution to the answer's logit of the needle's tokens minus that of all others.

    ``needle_write`` minus the same sum over all other keys, in logits, any sign, over the positions
    that predict the answer. NaN where the layer's window hides the needle.

    Weakness: a head that also fetches the answer from elsewhere scores low, and so does a head
    whose other values lower it by their bias alone.
    """
    needle = outputs.of_keys(probe.host.mark("needle"))
    return _along_target(replace(outputs, z=2 * needle - outputs.z), outputs, probe)


def _along_target(
    part: HeadOutputs, whole: HeadOutputs, probe: Probe
) -> Float[Tensor, "batch head query"]:
    target = probe.targets[:, part.query_pos]
    direction = part.unembedding.directions(target.clamp_min(0)) - part.unembedding.mean_direction
    values = part.along(direction).masked_fill((target < 0)[:, None], torch.nan)
    return unless_hidden(values, whole.rows, probe.mark("needle"))


@gradient_scorer(
    metric=metrics.loss,
    bounds=(0.0, None),
    queries=all_queries,
    needs=("causal",),
    source="Michel et al. 2019 (arXiv 1905.10650), section 4.1, as their code takes it by token",
)
def loss_sensitivity(gradients: HeadGradients, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Size of the first-order change of the loss when a head is scaled, token by token.

    ``|z_i . dL/dz_i|`` with z the head's output before the output projection and L the mean loss
    of the example, in nats from 0 up, mean over all queries; no norm over the layer is taken.
    ``hs.pruning.gradient_importance(over="token", normalise=False)`` is the same.

    Weakness: first order only, and it says nothing of the sign.
    """
    return (gradients.z * gradients.gradient).sum(-1).abs().transpose(1, 2)
