"""Lenses that map the stream of each layer to a later one by a matrix; linear shortcuts fit it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.options import RunOptions
from headscope.errors import InputError, nearest
from headscope.lens.fitting import in_turn, judge_streams, split_data, streams
from headscope.lens.learned import FitReport, Saved, save_lens
from headscope.lens.reading import row_names
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.probe import Probe

_TITLES = {"tuned": "tuned lens", "shortcut": "linear shortcuts"}


@dataclass(frozen=True, eq=False, repr=False)
class ResidualLens:
    """``x @ weight + bias`` for the stream at each place, then the model's own readout.

    Attributes:
        kind: how it was fitted: ``tuned`` or ``shortcut``.
        weight, bias: of each place, from the bottom up; places above are read as they are.
        report: held-out loss beside that of the plain logit lens.
        model: name of the model that it belongs to.
        digest: of its weights.
        settings: what it was fitted with. JSON values.

    Example:
        >>> lens = hs.lens.tuned_lens(model, probe, steps=1)
        >>> lens.title, lens.translate(torch.zeros(3, model.shape.d_model), 0).shape[0]
        ('tuned lens', 3)
    """

    kind: Literal["tuned", "shortcut"]
    weight: Float[Tensor, "row d_model d_model"]
    bias: Float[Tensor, "row d_model"]
    report: FitReport
    model: str
    digest: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What pictures call it."""
        return _TITLES[self.kind]

    def translate(self, rows: Float[Tensor, "row d_model"], place: int) -> Tensor:
        """Rows ``[row d_model]`` of one place, as the lens sees them further up."""
        if place >= len(self.weight):
            return rows
        return rows.float() @ self.weight[place].to(rows.device) + self.bias[place].to(rows.device)

    def check(self, model: HeadModel) -> None:
        """Raise InputError if the lens belongs to another model."""
        if model.digest() != self.digest:
            raise InputError(
                f"this {self.title} was fitted to {self.model}, and {model.name} has other weights."
            )

    def save(self, folder: "str | PathLike[str]") -> None:
        """Write ``lens.safetensors`` and ``config.json`` into a folder, each whole or absent."""
        tensors = {"weight": self.weight, "bias": self.bias}
        facts = Saved(
            kind=self.kind,
            model=self.model,
            digest=self.digest,
            settings=dict(self.settings),
            report=self.report.to_json(),
        )
        save_lens(folder, tensors, facts)

    def __repr__(self) -> str:
        """Return what it is and whether it is worth anything."""
        return f"<{self.title} of {self.model}: {self.report}>"


# Eigenvalues below this share of the largest are directions that the data does not have.
_LEAST = 1e-10


@own_types()
@torch.no_grad()
def linear_shortcuts(
    model: HeadModel,
    probe: Probe | None = None,
    to: str | None = None,
    *,
    held_out: float = 0.2,
    seed: int = 0,
    progress: bool | None = None,
) -> ResidualLens:
    """Fit ``x_l @ A`` to the stream at a later place, for every place below it, in closed form.

    Least squares without intercept, of least norm where the data leaves a choice, from Gram
    matrices in double precision: one pass over the text, nothing of it kept. Unlike in the paper
    every token counts, not one drawn from each sentence.

    Args:
        model: from :func:`headscope.load`.
        probe: text to fit to; default: the bundled passages, which are few. Fewer tokens than
            d_model fit themselves perfectly and say nothing.
        to: place to reach, e.g. ``L5``; default: the last, whose reading is the model's own.
        held_out: share of the examples that it is judged by.
        seed: of the draw of examples.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        A lens for :func:`logit_lens`; ``.settings["r2"]`` has the share of variance explained on
        held-out text per place, pooled (squares are summed over tokens and dimensions before they
        are divided; no mean of one r2 per dimension), ``.settings["r2_plain"]`` that of the
        identity.

    Raises:
        InputError: if the data does not fit the model, or there is no such place.

    Source: Din et al. 2023, "Jump to Conclusions", arXiv 2303.09435, sections 3 and 4.

    Example:
        >>> lens = hs.lens.linear_shortcuts(model, probe, to="L1")
        >>> lens.report.rows, len(lens.settings["r2"])
        (('embedding', 'L0'), 2)
        >>> bool((lens.bias == 0).all())  # without intercept
        True
    """
    options = RunOptions(seed=seed, progress=progress)
    names = row_names(model.shape.n_layers)
    goal = names[-1] if to is None else to
    if goal not in names[1:]:
        raise InputError(nearest(goal, names[1:], kind="place"))
    count = names.index(goal)
    data = split_data(model, probe, held_out, seed)
    width = model.shape.d_model
    gram = torch.zeros(count, width, width, dtype=torch.float64)
    cross = torch.zeros_like(gram)
    with options.track(len(data.fit), f"shortcuts of {model.name}") as advance:
        for batch in in_turn(data.fit):
            x, y = _sides(model, batch, count)
            gram += x.mT @ x
            cross += x.mT @ y
            advance(len(batch))
    weight = torch.stack(
        [least_squares(one, other) for one, other in zip(gram, cross, strict=True)]
    )
    fitted = weight.float().to(model.device)
    r2, r2_plain = _explained(model, data.held_out, weight, count)
    report = judge_streams(model, data, names[:count], lambda x, place: x @ fitted[place])
    settings = {"to": goal, "seed": seed, "r2": r2, "r2_plain": r2_plain, **data.facts}
    return ResidualLens(
        "shortcut",
        fitted.cpu(),
        torch.zeros(count, width),
        report,
        model.name,
        model.digest(),
        settings,
    )


def least_squares(
    gram: Float[Tensor, "d_model d_model"], cross: Float[Tensor, "d_model d_out"]
) -> Float[Tensor, "d_model d_out"]:
    """A of least norm with least ``|X A - Y|``, of ``X.T X`` and ``X.T Y``."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _LEAST * values[-1]
    inverse = torch.where(kept, 1 / values.where(kept, values.new_ones(())), 0.0)
    solution: Tensor = vectors @ (inverse[:, None] * (vectors.mT @ cross))
    return solution


def _sides(
    model: HeadModel, batch: Probe, count: int
) -> tuple[Float[Tensor, "row token d_model"], Float[Tensor, "token d_model"]]:
    """Streams of the places below the goal, and of the goal."""
    rows, last, _ = streams(model, batch)
    goal = last if count == len(rows) else rows[count]
    return rows[:count].cpu().double(), goal.cpu().double()


def _explained(
    model: HeadModel, held_out: Probe, weight: Float[Tensor, "row d_model d_model"], count: int
) -> tuple[list[float], list[float]]:
    """Share of the goal's variance that the maps explain, and that the identity does."""
    missed = np.zeros((2, count))
    total, squares, tokens = torch.zeros(()), torch.zeros(()), 0
    for batch in in_turn(held_out):
        x, y = _sides(model, batch, count)
        missed[0] += (x @ weight - y).square().sum((1, 2)).numpy()
        missed[1] += (x - y).square().sum((1, 2)).numpy()
        total, squares, tokens = total + y.sum(0), squares + y.square().sum(0), tokens + len(y)
    variance = float((squares - total.square() / tokens).sum())
    shares = 1 - missed / variance
    return shares[0].tolist(), shares[1].tolist()
