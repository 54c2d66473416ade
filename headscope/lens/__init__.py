"""Lenses: hidden states read in the vocabulary.

Every layer at every position: :func:`logit_lens`. One logit as an exact sum of parts:
:func:`attribute`; over a probe, per head: :func:`head_attribution`. Tokens that single heads
promote: :func:`head_lens`. Learned lenses, each compared with the plain one on held-out text:
:func:`tuned_lens`, :func:`linear_shortcuts`, :func:`attention_lens`; loaded by :func:`load`. What a
decoder generates from each layer of its encoder: :func:`decoder_lens`.
"""

from os import PathLike
from typing import Literal

from torch import Tensor

from headscope.base.arguments import checked
from headscope.errors import InputError, nearest
from headscope.lens.attention import AttentionLens as AttentionLens
from headscope.lens.attention import attention_lens as attention_lens
from headscope.lens.attribution import attribute as attribute
from headscope.lens.attribution import head_attribution as head_attribution
from headscope.lens.fitting import FitReport as FitReport
from headscope.lens.fitting import LensConfig
from headscope.lens.fitting import load_lens as _load_lens
from headscope.lens.linear import ResidualLens as ResidualLens
from headscope.lens.linear import linear_shortcuts as linear_shortcuts
from headscope.lens.linear import tuned_lens as tuned_lens
from headscope.lens.logit import decoder_lens as decoder_lens
from headscope.lens.logit import head_lens as head_lens
from headscope.lens.logit import logit_lens as logit_lens
from headscope.lens.logit import logit_lenses as logit_lenses
from headscope.lens.reading import SITES as SITES

_TENSORS = {
    "tuned": {"weight": 3, "bias": 2},
    "shortcut": {"weight": 3, "bias": 2},
    "attention": {"inner": 4, "outer": 4, "shift": 2},
}


@checked
def load(folder: "str | PathLike[str]") -> ResidualLens | AttentionLens:
    """Load a saved lens of any kind.

    Args:
        folder: folder written by ``lens.save``.

    Returns:
        The lens.

    Raises:
        InputError: if there is none, or its parts do not match.

    Example:
        >>> lens = hs.lens.linear_shortcuts(model, probe)
        >>> lens.save("shortcuts")
        >>> torch.equal(hs.lens.load("shortcuts").weight, lens.weight)
        True
    """
    tensors, facts = _load_lens(folder)
    if facts.kind not in _TENSORS:
        raise InputError(f"{folder}: {nearest(facts.kind, _TENSORS, kind='lens')}")
    wanted = _TENSORS[facts.kind]
    if {name: one.ndim for name, one in tensors.items()} != wanted:
        raise InputError(f"the lens in {folder} is incomplete: it should hold {', '.join(wanted)}.")
    try:
        report = FitReport.from_json(facts.report)
        if facts.kind == "attention":
            return _attention(tensors, facts, report)
        weight, bias = tensors["weight"], tensors["bias"]
        if weight.shape != (*bias.shape, bias.shape[1]) or len(bias) != len(report.rows):
            raise ValueError(f"weight has shape {tuple(weight.shape)}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the lens in {folder} is inconsistent: {error}.") from error
    kind: Literal["tuned", "shortcut"] = "tuned" if facts.kind == "tuned" else "shortcut"
    return ResidualLens(kind, weight, bias, report, facts.model, facts.digest, facts.settings)


def _attention(tensors: dict[str, Tensor], facts: LensConfig, report: FitReport) -> AttentionLens:
    settings = dict(facts.settings)
    layers = tuple(int(one) for one in settings.pop("layers"))
    inner, outer, shift = (tensors[name] for name in ("inner", "outer", "shift"))
    heads = (len(layers), inner.shape[1])
    fits = (
        inner.shape[:2] == heads == outer.shape[:2]
        and inner.shape[3] == outer.shape[2]
        and shift.shape == (len(layers), outer.shape[3])
    )
    if not fits:
        raise ValueError(f"inner {tuple(inner.shape)}, outer {tuple(outer.shape)}")
    return AttentionLens(layers, inner, outer, shift, report, facts.model, facts.digest, settings)
