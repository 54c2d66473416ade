"""The Attention Lens: a learned map from each head's output to the vocabulary."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.errors import InputError
from headscope.lens.heads import head_words
from headscope.lens.outputs import head_streams
from headscope.lens.prompt import Promptish, read_prompt
from headscope.lens.reading import logits_added
from headscope.lens.report import FitReport
from headscope.lens.saved import Saved, save_lens
from headscope.models.protocol import HeadModel
from headscope.table.lens import HeadWords


@dataclass(frozen=True, eq=False, repr=False)
class AttentionLens:
    """What each head's output says, by a learned map to the vocabulary.

    Head h of a layer says ``z_h (W_O_h D.T + inner_h outer_h) / s``: the plain direct path (D:
    residual directions of the logits) and a learned correction; s holds the scales of the final
    norm and of a norm after attention. A layer says the sum over its heads, ``shift``, and the
    biases of the model's readout. As a head's output lies in d_head dimensions, this is every
    linear map from it to the vocabulary where the rank is d_head.

    Attributes:
        layers: with a lens.
        inner, outer: factors of every head's correction.
        shift: of every layer.
        report: held-out loss beside that of the plain direct path, one row per layer.
        model: name of the model that it belongs to.
        digest: of its weights.
        settings: what it was fitted with. JSON values.

    Example:
        >>> lens = hs.lens.attention_lens(model, probe, layers=[0], rank=2, steps=1)
        >>> words = lens.read(model, [5, 9, 5, 9], k=3)
        >>> len(words.promoted("L0H0")), len(words.suppressed("L0H0"))
        (3, 3)
    """

    layers: tuple[int, ...]
    inner: Float[Tensor, "layer head d_head rank"]
    outer: Float[Tensor, "layer head rank d_vocab"]
    shift: Float[Tensor, "layer d_vocab"]
    report: FitReport | None
    model: str
    digest: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    title = "attention lens"

    @torch.no_grad()
    def read(
        self, model: HeadModel, prompt: Promptish, position: int = -1, *, k: int = 10
    ) -> HeadWords:
        """Tokens that every head promotes and suppresses at one position, by the learned maps.

        As :func:`headscope.lens.head_lens`, which is the same with a correction of 0.

        Raises:
            InputError: if the lens belongs to another model, or the prompt does not fit.
        """
        self.check(model)
        if k < 1:
            raise InputError(f"k must be at least 1; got {k}.")
        text = read_prompt(model, prompt)
        at = text.at(position)
        seen = head_streams(model, text.probe, self.layers)
        pieces = (
            self.by_head(model, place, seen.z[layer][at : at + 1])[0]
            for place, layer in enumerate(self.layers)
        )
        return head_words(model, text, at, self.layers, pieces, k)

    def by_head(
        self, model: HeadModel, place: int, z: Float[Tensor, "token head d_head"]
    ) -> Float[Tensor, "token head d_vocab"]:
        """Logits of single heads, of outputs over the scales."""
        plain = logits_added(model.readout, writes(model, self.layers[place], z).flatten(0, 1))
        inner, outer = (one[place].to(z.device) for one in (self.inner, self.outer))
        change = torch.einsum("the,her,hrv->thv", z, inner, outer)
        return plain.view(*z.shape[:2], -1) + change

    def check(self, model: HeadModel) -> None:
        """Raise InputError if the lens belongs to another model."""
        if model.digest() != self.digest:
            raise InputError(
                f"this {self.title} was fitted to {self.model}, and {model.name} has other weights."
            )

    def save(self, folder: "str | PathLike[str]") -> None:
        """Write ``lens.safetensors`` and ``config.json`` into a folder, each whole or absent."""
        tensors = {"inner": self.inner, "outer": self.outer, "shift": self.shift}
        facts = Saved(
            kind="attention",
            model=self.model,
            digest=self.digest,
            settings={**self.settings, "layers": list(self.layers)},
            report={} if self.report is None else self.report.to_json(),
        )
        save_lens(folder, tensors, facts)

    def judged(self, report: FitReport) -> "AttentionLens":
        """The same lens with its report."""
        return replace(self, report=report)

    def __repr__(self) -> str:
        """Return what it is and whether it is worth anything."""
        return f"<{self.title} of {self.model}: {self.report or 'not judged'}>"


def writes(
    model: HeadModel, layer: int, z: Float[Tensor, "token head d_head"]
) -> Float[Tensor, "token head d_model"]:
    """What outputs over the scales add to the stream."""
    write = model.parts.attention_write(layer)
    plain = torch.einsum("the,hem->thm", z, model.output_weights(layer).float())
    return write.vectors(plain, torch.ones_like(plain[..., 0]))


def layer_logits(
    model: HeadModel,
    layer: int,
    z: Float[Tensor, "token head d_head"],
    biases: Float[Tensor, " d_vocab"],
) -> Float[Tensor, "token d_vocab"]:
    """What all heads of a layer say on the plain direct path, before a soft cap."""
    return logits_added(model.readout, writes(model, layer, z).sum(1)) + biases


def correction(
    z: Float[Tensor, "token head d_head"],
    inner: Float[Tensor, "head d_head rank"],
    outer: Float[Tensor, "head rank d_vocab"],
    shift: Float[Tensor, " d_vocab"],
) -> Float[Tensor, "token d_vocab"]:
    """What the learned part adds to a layer's logits."""
    held = torch.einsum("the,her->thr", z, inner)
    return held.flatten(1) @ outer.flatten(0, 1) + shift
