"""Whether a model can do a paired task: its answers told beside every number that rests on them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from headscope.probes.probe import Probe

_TOKENS_PER_PASS = 8192


@runtime_checkable
class CanAnswer(Protocol):
    """What can be run on tokens; every ``HeadModel`` can."""

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Logits ``[batch pos d_vocab]``."""


def with_accuracy(model: object, probe: Probe) -> Probe:
    """The probe and its corrupt pair with what the model makes of them.

    ``facts["right"]`` is 1 where the model gives the target a higher logit than the foil (without
    foils: where the target is the likeliest token), else 0; ``settings["accuracy"]`` is its
    mean, and ``settings["accuracy_corrupt"]`` that of the corrupt prompts where they have answers
    of their own. What cannot be run (a tokenizer alone) is left as it is.
    """
    if not isinstance(model, CanAnswer):
        return probe
    own = _right(model, probe)
    told: dict[str, float] = {"accuracy": float(own.float().mean())}
    facts = {**probe.facts, "right": own.float()}
    other = probe.corrupt
    if other is not None and not torch.equal(other.targets, probe.targets):
        theirs = _right(model, other)
        told["accuracy_corrupt"] = float(theirs.float().mean())
        other = replace(
            other,
            facts={**other.facts, "right": theirs.float()},
            settings={**other.settings, **told},
        )
    return replace(probe, facts=facts, settings={**probe.settings, **told}, corrupt=other)


def _right(model: CanAnswer, probe: Probe) -> Bool[Tensor, " example"]:
    """Whether each example's answer wins."""
    at = (probe.targets >= 0).int().argmax(1)
    found: list[Bool[Tensor, " some"]] = []
    for rows in torch.arange(len(probe)).split(max(1, _TOKENS_PER_PASS // probe.length)):
        places: Sequence[int] = sorted(set(at[rows].tolist()))
        with torch.no_grad():
            logits = model.forward(
                probe.tokens[rows], real=probe.real[rows], logits_at=torch.tensor(places)
            )
        column = torch.tensor([places.index(place) for place in at[rows].tolist()])
        one = logits.cpu().float()[torch.arange(len(rows)), column]
        target = one.gather(1, probe.targets[rows, at[rows]][:, None])[:, 0]
        if probe.foils is None:
            found.append(target >= one.amax(1))
        else:
            found.append(target > one.gather(1, probe.foils[rows, at[rows]][:, None])[:, 0])
    return torch.cat(found)
