"""What the needle's values write onto the answer: attention and value together."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.outputs import HeadOutputs
from headscope.probes.probe import Probe
from headscope.scorer import output_scorer
from headscope.scorers.retrieval import answering, unless_hidden

_NEEDS = ("attention_write", "readout", "values", "causal")


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
    """How much what the head fetches from the needle raises the answer's logit.

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
    """How much more the needle's tokens raise the answer's logit than all other tokens do.

    ``needle_write`` less the same sum over all other keys, in logits, any sign, over the
    positions that predict the answer. NaN where the layer's window hides the needle.

    Weakness: a head that fetches the answer also from elsewhere scores low; so does one whose
    other values lower it by their bias alone.
    """
    needle = outputs.of_keys(probe.host.mark("needle"))
    return _along_target(replace(outputs, z=2 * needle - outputs.z), outputs, probe)


def _along_target(
    part: HeadOutputs, whole: HeadOutputs, probe: Probe
) -> Float[Tensor, "batch head query"]:
    target = probe.targets[:, part.query_pos]
    direction = part.readout.directions(target.clamp_min(0)) - part.readout.mean_direction
    values = part.along(direction).masked_fill((target < 0)[:, None], torch.nan)
    return unless_hidden(values, whole.rows, probe.mark("needle"))
