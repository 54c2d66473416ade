"""Lenses that map each layer's residual stream linearly to a later one.

Linear shortcuts predict the later stream itself; the tuned lens fits an affine map per layer so
that its prediction matches the model's.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.result import Glance, Shown
from headscope.errors import InputError, nearest
from headscope.lens.fitting import (
    Data,
    Descent,
    FitReport,
    LensConfig,
    divergence_of_lens,
    examples_per_pass,
    in_turn,
    judge_streams,
    save_lens,
    split_data,
    streams,
)
from headscope.lens.reading import logits_of, row_chunks, row_names
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.probe import Probe
from headscope.views import Unembedding

_TITLES = {"tuned": "tuned lens", "shortcut": "linear shortcuts"}


@dataclass(frozen=True, eq=False, repr=False)
class ResidualLens(Shown):
    """Affine map ``x @ weight + bias`` per place, followed by the model's own unembedding.

    Attributes:
        kind: kind of fit: ``tuned`` or ``shortcut``.
        weight, bias: per place, from the bottom up; places above are read unchanged.
        report: held-out loss and that of the plain logit lens.
        model: name of the model that it belongs to.
        digest: digest of its weights.
        settings: settings of the fit, as JSON values.

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
        """Name in figures."""
        return _TITLES[self.kind]

    def translate(self, rows: Float[Tensor, "row d_model"], place: int) -> Tensor:
        """Apply the map of one place to rows ``[row d_model]``."""
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
        """Write ``lens.safetensors`` and ``config.json`` into a folder, each atomically."""
        tensors = {"weight": self.weight, "bias": self.bias}
        facts = LensConfig(
            kind=self.kind,
            model=self.model,
            digest=self.digest,
            settings=dict(self.settings),
            report=self.report.to_json(),
        )
        save_lens(folder, tensors, facts)

    def glance(self) -> Glance:
        """Show the held-out loss of every place."""
        return replace(self.report.glance(), title=f"{self.title} of {self.model}")

    def __repr__(self) -> str:
        """Return what it is and whether it is worth anything."""
        return f"<{self.title} of {self.model}: {self.report}>"


# Eigenvalues below this share of the largest are directions absent from the data.
_LEAST = 1e-10


@checked
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
        seed: seed for the choice of examples.
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
    """Minimum-norm least-squares solution A of ``X A = Y``, from ``X.T X`` and ``X.T Y``."""
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
    """Share of the goal's variance explained by the maps, and by the identity."""
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


# Entries of one block of unembedding vectors: 16 MB in fp32.
_BLOCK_ENTRIES = 1 << 22


@torch.no_grad()
def logit_metric(
    unembedding: Unembedding, last: Float[Tensor, "token d_model"]
) -> Float[Tensor, "d_model d_model"]:
    """Metric on hidden states that approximates the divergence of their predictions.

    ``F = sum over v of p(v) (w_v - w)(w_v - w).T`` with ``w_v`` the unembedding of token v, ``w``
    their mean under p, and p the model's mean prediction on some tokens: ``d.T F d / 2`` is, to
    second order, the divergence of predictions whose hidden states differ by d, with p in place of
    each token's own prediction (the Fisher information of the softmax, averaged).

    Args:
        unembedding: the model's unembedding.
        last: last residual stream of some tokens.
    """
    p = torch.zeros(len(unembedding.W_U), device=last.device)
    for chosen in row_chunks(len(last), unembedding):
        p += logits_of(unembedding, last[chosen]).softmax(1).sum(0) / len(last)
    width = unembedding.W_U.shape[1]
    metric = torch.zeros(width, width, device=last.device)
    mean = torch.zeros(width, device=last.device)
    for ids in torch.arange(len(p), device=last.device).split(max(1, _BLOCK_ENTRIES // width)):
        rows = unembedding.W_U[ids].float()
        metric += (rows * p[ids, None]).T @ rows
        mean += p[ids] @ rows
    return (metric - torch.outer(mean, mean)) * unembedding.logit_scale**2


def distance(
    unembedding: Unembedding,
    metric: Float[Tensor, "d_model d_model"],
    seen: Float[Tensor, "token d_model"],
    last: Float[Tensor, "token d_model"],
) -> Float[Tensor, " token"]:
    """Half the squared distance of two hidden states after the final norm, in nats.

    Args:
        unembedding: the model's unembedding.
        metric: from :func:`logit_metric`.
        seen: residual stream mapped by the lens.
        last: last residual stream.
    """
    gap = unembedding.normed(seen) - unembedding.normed(last)
    half: Tensor = ((gap @ metric) * gap).sum(1) / 2
    return half


def affordable_tokens(places: int, d_model: int, d_vocab: int) -> int:
    """Number of tokens whose divergence can be read at every place in about 1.5e11 FLOPs per step.

    Example:
        >>> from headscope.lens.linear import affordable_tokens
        >>> affordable_tokens(places=30, d_model=576, d_vocab=49152)
        44
    """
    return max(8, int(1.5e11 / (4.0 * places * d_model * d_vocab)))


def step_seconds(read: int, places: int, d_model: int, d_vocab: int) -> float:
    """Seconds that reading takes per step on this processor, from one timed product.

    Args:
        read: number of tokens whose divergence is read at every place.
        places: number of places of the lens.
        d_model: width of the model.
        d_vocab: size of its vocabulary.
    """
    square = torch.ones(512, 512)
    square @ square
    start = time.perf_counter()
    square @ square
    rate = 2 * 512**3 / max(time.perf_counter() - start, 1e-9)
    return 4.0 * read * (places + 1) * d_model * d_vocab / rate


# Largest norm of the gradient of one place's map.
_CLIP = 1.0
# d_model up to which a rate of 1e-3 is slow: a step moves x A by the rate times as many terms.
_WIDTH = 768


@checked
@own_types()
@torch.enable_grad()
def tuned_lens(
    model: HeadModel,
    probe: Probe | None = None,
    *,
    steps: int = 250,
    learning_rate: int | float | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    tokens: int | None = None,
    checkpoint: "str | PathLike[str] | None" = None,
    progress: bool | None = None,
) -> ResidualLens:
    """Fit ``x + x A + b`` per place below the last, decoded by the model's own norm and W_U.

    A and b start at 0, so the fit starts at the plain logit lens; the loss is ``KL(model || lens)``
    per token, in nats. Adam with a linearly falling rate and gradients clipped at 1; the paper uses
    SGD with Nesterov momentum on 2^18 tokens per step, here a step has about 1024 tokens. The same
    seed gives the same lens.

    Args:
        model: from :func:`headscope.load`.
        probe: text to fit to; default: the bundled passages, which are few: pass more.
        steps: optimiser steps.
        learning_rate: initial rate; default: 1e-3, and more if d_model is below 768, in inverse
            proportion, up to 1e-2.
        held_out: share of the examples that is held out for the report.
        seed: seed of the split, and of the draw of tokens.
        tokens: number of a step's tokens that are decoded over the whole vocabulary at each place,
            drawn anew for each: their mean loss is an unbiased estimate of the step's, at a
            fraction of its cost. If that is fewer than a step has, the first half of the steps
            brings the hidden state after the final norm close to the model's own, for all tokens
            and without the vocabulary, in the metric of its logits
            (:func:`headscope.lens.linear.logit_metric`). Default: all, or with large vocabularies
            as many as 1.5e11 FLOPs allow (44 for 30 layers, d_model 576 and 49k words). The
            held-out loss uses every held-out token.
        checkpoint: file that stores the fit every 20 seconds, from which the same call resumes
            after an interruption, with identical results; default: none.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        A lens for :func:`logit_lens`; ``.report`` has the held-out loss and that of the plain lens.

    Raises:
        InputError: if the data does not fit the model, a number is out of range, or the checkpoint
            belongs to another fit.

    Source: Belrose et al. 2023, arXiv 2303.08112, section 2.

    Example:
        >>> lens = hs.lens.tuned_lens(model, probe, steps=2)
        >>> again = hs.lens.tuned_lens(model, probe, steps=2)
        >>> torch.equal(lens.weight, again.weight)  # same seed, same lens
        True
        >>> hs.lens.logit_lens(model, [5, 9, 5, 9], lens=lens).name
        'tuned lens, residual'
    """
    options = RunOptions(seed=seed, progress=progress)
    if learning_rate is None:
        learning_rate = min(1e-2, max(1e-3, 1e-3 * _WIDTH / model.shape.d_model))
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens={tokens}: give 1 or more.")
    if steps < 1 or learning_rate <= 0:
        raise InputError(f"steps and learning_rate must be positive; got {steps}, {learning_rate}.")
    data = split_data(model, probe, held_out, seed)
    width, count = model.shape.d_model, model.shape.n_layers
    change = [
        torch.zeros(width, width, dtype=torch.float32, device=model.device) for _ in range(count)
    ]
    shift = [torch.zeros(width, dtype=torch.float32, device=model.device) for _ in range(count)]
    parameters = [one.requires_grad_() for one in (*change, *shift)]
    settings = {"steps": steps, "learning_rate": learning_rate, "seed": seed, **data.facts}
    size = model.shape.d_vocab
    whole = min(len(data.fit), examples_per_pass(data.fit)) * data.fit.length
    read = min(whole, affordable_tokens(count, width, size) if tokens is None else tokens)
    few = read < whole
    if few:
        settings |= {"tokens": read, "distilled_steps": steps // 2}
    metric = logit_metric(model.unembedding, _some_last(model, data)) if few else None

    def descend(batch: Probe, step: int) -> None:
        rows, last, _ = streams(model, batch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for place in range(count):
            x, maps = rows[place], (change[place], shift[place])
            with torch.enable_grad():
                if metric is not None and step < steps // 2:
                    seen = x + x @ maps[0] + maps[1]
                    distance(model.unembedding, metric, seen, last).mean().backward()
                elif few:
                    drawn = torch.randperm(len(x), generator=generator)[:read].to(x.device)
                    _descend(model, x[drawn], last[drawn], *maps)
                else:
                    _descend(model, x, last, *maps)
            torch.nn.utils.clip_grad_norm_([change[place], shift[place]], _CLIP)

    facts = {"lens": "tuned", "model": model.digest(), **settings}
    descent = Descent(steps, learning_rate, checkpoint, facts, options)
    seconds = (steps - steps // 2 if few else steps) * step_seconds(read, count, width, size)
    told = f" (about {seconds / 60:.0f} min for reading the vocabulary)" if seconds > 90 else ""
    descent.run(f"tuned lens of {model.name}{told}", data, parameters, descend)
    weight = torch.stack([one.detach() for one in change]) + torch.eye(
        width, dtype=torch.float32, device=model.device
    )
    bias = torch.stack([one.detach() for one in shift])

    def translate(x: Tensor, place: int) -> Tensor:
        return x @ weight[place] + bias[place]

    report = judge_streams(model, data, row_names(count)[:-1], translate)
    return ResidualLens(
        "tuned", weight.cpu(), bias.cpu(), report, model.name, model.digest(), settings
    )


@torch.no_grad()
def _some_last(model: HeadModel, data: Data) -> Tensor:
    """Last residual stream of up to 64 tokens from the first examples of the fit."""
    last = streams(model, data.fit.examples(slice(0, examples_per_pass(data.fit))))[1]
    return last[:: -(-len(last) // 64)]


def _descend(model: HeadModel, x: Tensor, last: Tensor, change: Tensor, shift: Tensor) -> None:
    """Accumulate the gradient of one place's mean loss, a few tokens at a time."""
    unembedding = model.unembedding
    for chosen in row_chunks(len(x), unembedding):
        with torch.no_grad():
            final = logits_of(unembedding, last[chosen]).log_softmax(1)
        seen = x[chosen]
        logits = logits_of(unembedding, seen + seen @ change + shift)
        loss = divergence_of_lens(final, logits).sum() / len(x)
        loss.backward()
