"""What a head writes: how much, and which logits it moves directly."""

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.outputs import HeadOutputs
from headscope.probes.probe import Probe
from headscope.scorer import output_scorer
from headscope.scorers.queries import contrasting_queries, predicting_queries


@output_scorer(
    needs=("attention_write",),
    unit="norm",
    bounds=(0.0, None),
    source="Kobayashi et al. 2020 (arXiv 2004.10102), norm of a head's output",
    probe="text",
    control=None,
)
def head_output_norm(outputs: HeadOutputs, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Euclidean length of what the head adds to the residual stream.

    ``|z_i W_O|``, from 0, over every query but the first.

    Weakness: residual streams grow with depth, so lengths compare within a layer. The bias of
    the output projection belongs to no head and is left out.
    """
    return outputs.norm()


@output_scorer(
    needs=("attention_write", "readout"),
    unit="logits",
    source="Elhage et al. 2021, direct path; nostalgebraist 2020, logit lens, with frozen scale",
    queries=predicting_queries,
    per_final_scale=True,
)
def direct_logit_attribution(
    outputs: HeadOutputs, probe: Probe
) -> Float[Tensor, "batch head query"]:
    """How much a head's write alone raises the target's logit above the average logit.

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
    readout = outputs.readout
    direction = readout.directions(target.clamp_min(0)) - readout.mean_direction
    return outputs.along(direction).masked_fill((target < 0)[:, None], torch.nan)


@output_scorer(
    needs=("attention_write", "readout"),
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
    """How much a head's write alone raises the target's logit above the foil's.

    ``z_i W_O . (d_target - d_foil) / scale_i``, in logits, any sign, over the queries that have
    both; see ``direct_logit_attribution``.

    Weakness: the direct path only, and only as good as the choice of the foil.
    """
    target = probe.targets[:, outputs.query_pos]
    foil = torch.full_like(target, -1) if probe.foils is None else probe.foils[:, outputs.query_pos]
    readout = outputs.readout
    direction = readout.directions(target.clamp_min(0)) - readout.directions(foil.clamp_min(0))
    return outputs.along(direction).masked_fill(((target < 0) | (foil < 0))[:, None], torch.nan)
