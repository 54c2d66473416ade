"""Reading learned lenses back."""

from os import PathLike
from typing import Literal

from torch import Tensor

from headscope.errors import InputError, nearest
from headscope.lens.attention import AttentionLens
from headscope.lens.fitting import FitReport, LensConfig, load_lens
from headscope.lens.linear import ResidualLens

_TENSORS = {
    "tuned": {"weight": 3, "bias": 2},
    "shortcut": {"weight": 3, "bias": 2},
    "attention": {"inner": 4, "outer": 4, "shift": 2},
}


def load(folder: "str | PathLike[str]") -> ResidualLens | AttentionLens:
    """Read a lens that its ``save`` wrote; it says what it is.

    Raises:
        InputError: if there is none, or its parts do not fit together.

    Example:
        >>> lens = hs.lens.linear_shortcuts(model, probe)
        >>> lens.save("shortcuts")
        >>> torch.equal(hs.lens.load("shortcuts").weight, lens.weight)
        True
    """
    tensors, facts = load_lens(folder)
    if facts.kind not in _TENSORS:
        raise InputError(f"{folder}: {nearest(facts.kind, _TENSORS, kind='lens')}")
    wanted = _TENSORS[facts.kind]
    if {name: one.ndim for name, one in tensors.items()} != wanted:
        raise InputError(f"the lens in {folder} should hold {', '.join(wanted)} and does not.")
    try:
        report = FitReport.from_json(facts.report)
        if facts.kind == "attention":
            return _attention(tensors, facts, report)
        weight, bias = tensors["weight"], tensors["bias"]
        if weight.shape != (*bias.shape, bias.shape[1]) or len(bias) != len(report.rows):
            raise ValueError(f"weight has shape {tuple(weight.shape)}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the lens in {folder} does not fit together: {error}.") from error
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
